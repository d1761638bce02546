"""Builds the extension libraries; everything that needs no code is in pyproject.toml.

Two libraries on LibTorch's stable ABI, without the Python API: `_C` (CPU) and `_C_cuda` (where nvcc is found). One
wheel, tagged py3-none-PLATFORM, serves every Python and torch that the package supports.

Environment:
    BOOTGRAD_CUDA=0|1: leave `_C_cuda` out, or insist on it. Unset: build it when nvcc is found.
    BOOTGRAD_REQUIRE_EXT=1: a missing `_C` is an error instead of a slower package.
    TORCH_CUDA_ARCH_LIST: architectures of `_C_cuda`, as for torch's own extensions.
    MAX_JOBS: sources compiled at a time. Unset: as many as there are cores.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, LinkError

ROOT = Path(__file__).parent
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
INSTALL_TORCH = (
    "bootgrad's extensions are compiled against the torch that will run them: "
    "install torch first, then `pip install --no-build-isolation .`"
)
# What the kernels ask of a compiler: C++17, vector types and their shuffles, which GCC has since version 12.
PROBE = """
typedef float v4 __attribute__((vector_size(16)));
template <class... T> auto sum(T... x) { return (x + ...); }
v4 probe(v4 a, v4 b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5) * sum(1.0f, 2.0f); }
"""


class BuildLibraries(build_ext):
    """Builds `_C`, and `_C_cuda` after it; without a usable compiler installs the package without them."""

    def build_extensions(self):
        """Build what this machine can, or say what is left out."""
        try:
            import torch.utils.cpp_extension as cpp
        except ImportError:
            sys.exit(INSTALL_TORCH)
        self.torch_paths = {"include": cpp.include_paths(), "library": cpp.library_paths()}
        check_environment()
        reason = self.unusable()
        if reason:
            reason = f"no usable C++ compiler, GCC 12 or newer or clang ({reason})"
            for name in ("BOOTGRAD_REQUIRE_EXT", "BOOTGRAD_CUDA"):
                if os.environ.get(name) == "1":
                    raise CompileError(f"{name}=1, but there is {reason}")
            print(f"bootgrad: {reason}; installing without _C", file=sys.stderr)
            self.extensions = []
            return
        super().build_extensions()
        if wants_cuda():
            self.build_cuda()

    def unusable(self) -> str:
        """Why the compilers cannot build a trivial library; empty if they can."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                objects = []
                for name, text in (("probe_c.c", "int probe_c(void) { return 0; }"), ("probe.cpp", PROBE)):
                    source = Path(folder, name)
                    source.write_text(text)
                    flags = ["-std=c++17"] if name.endswith(".cpp") else []
                    objects += self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-fPIC", *flags])
                self.compiler.link_shared_object(objects, str(Path(folder, "probe.so")), target_lang="c++")
            except (CompileError, LinkError, ExecError, OSError) as error:
                return str(error)
        return ""

    def build_extension(self, ext):
        """Compile the sources side by side and link them, without Python's own flags for modules."""

        def compile_one(source):
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=ext.define_macros,
                include_dirs=[*ext.include_dirs, *self.torch_paths["include"]],
                extra_postargs=ext.extra_compile_args,
            )

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = [name for names in pool.map(compile_one, ext.sources) for name in names]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=ext.libraries,
            library_dirs=self.torch_paths["library"],
            extra_postargs=ext.extra_link_args,
            target_lang="c++",
        )

    def build_cuda(self):
        """Build `_C_cuda` with torch's own command, which knows nvcc; torch itself may be a build without CUDA."""
        import torch.utils.cpp_extension as cpp

        cpp.CUDA_HOME = cpp.CUDA_HOME or cuda_home()
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        extension = cpp.CppExtension(
            "bootgrad._C_cuda",
            [str(path.relative_to(ROOT)) for path in cuda_sources()],
            include_dirs=[str(ROOT.resolve() / "csrc/include"), str(Path(cpp.CUDA_HOME, "include"))],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("USE_CUDA", None)],
            library_dirs=[str(Path(cpp.CUDA_HOME, folder)) for folder in ("lib64", "lib")],
            libraries=["cudart_static", "rt", "dl", "pthread"],
            extra_compile_args={"cxx": ["-std=c++17", "-O2"], "nvcc": ["-std=c++17", "-O3"]},
            extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
            py_limited_api=True,
        )

        class Command(cpp.BuildExtension):
            get_ext_filename = BuildLibraries.get_ext_filename
            get_libraries = BuildLibraries.get_libraries

        command = Command(self.distribution)
        options = self.distribution.command_options.get("build_ext", {})
        self.distribution.command_options["build_ext"] = {}
        self.distribution.ext_modules, modules = [extension], self.distribution.ext_modules
        command.ensure_finalized()
        self.distribution.command_options["build_ext"], self.distribution.ext_modules = options, modules
        for name in ("build_lib", "build_temp", "inplace", "force", "debug"):
            setattr(command, name, getattr(self, name))
        command.run()
        self.extensions.append(extension)  # so that an install in place copies it, too

    def get_ext_filename(self, fullname):
        """Name without Python's tag: the library is loaded by torch, not imported."""
        return str(Path(*fullname.split("."))) + ".so"

    def get_libraries(self, ext):
        """Only the libraries asked for: never libpython."""
        return ext.libraries


class Wheel(bdist_wheel):
    """Tags the wheel for every Python 3 on this platform."""

    def get_tag(self):
        """Return py3-none-PLATFORM."""
        return "py3", "none", super().get_tag()[2]


def check_environment() -> None:
    """Stop at a variable whose value would be misunderstood; an empty one counts as unset."""
    jobs, cuda = os.environ.get("MAX_JOBS") or "1", os.environ.get("BOOTGRAD_CUDA") or "0"
    if not jobs.isdecimal() or int(jobs) < 1:
        sys.exit(f"MAX_JOBS must be a whole number of at least 1; got {jobs!r}")
    if cuda not in ("0", "1"):
        sys.exit(f"BOOTGRAD_CUDA must be 0 or 1, or unset; got {cuda!r}")


def cuda_sources() -> list[Path]:
    """Sources of `_C_cuda`."""
    return sorted(path for pattern in ("*.cu", "*.cpp") for path in (ROOT / "csrc/cuda").glob(pattern))


def cuda_home() -> str:
    """The toolkit's folder, as the compiler itself says: what is on the PATH may be a wrapper elsewhere."""
    report = subprocess.run([nvcc(), "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    return str(Path(re.search(r"^#\$ TOP=(.+)$", report, re.MULTILINE)[1]).resolve())


def nvcc() -> str | None:
    """Path of CUDA's compiler."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home, "bin")))


def wants_cuda() -> bool:
    """Whether to build `_C_cuda`; under BOOTGRAD_CUDA=1 its absence is an error."""
    wanted = os.environ.get("BOOTGRAD_CUDA")
    if wanted == "0":
        return False
    compiler = nvcc()
    if compiler:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cu")
            source.write_text("__global__ void probe(float* x) { *x = 1; }")
            command = [compiler, "-c", str(source), "-o", str(source.with_suffix(".o"))]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return True
    reason = f"{compiler} cannot compile a trivial kernel" if compiler else "nvcc is not found"
    if wanted == "1":
        raise CompileError(f"BOOTGRAD_CUDA=1, but {reason}")
    print(f"bootgrad: {reason}; installing without the CUDA library", file=sys.stderr)
    return False


setup(
    # The Triton kernels live in kernels/, but install below the package: the top-level name belongs to another project.
    packages=[
        *find_packages(include=["bootgrad", "bootgrad.*"]),
        *(f"bootgrad.{name}" for name in find_packages(include=["kernels", "kernels.*"])),
    ],
    package_dir={"bootgrad.kernels": "kernels"},
    ext_modules=[
        Extension(
            "bootgrad._C",
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp")),
            include_dirs=["csrc/include"],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("NDEBUG", None)],
            libraries=["torch", "torch_cpu", "c10"],
            extra_compile_args="-std=c++17 -O3 -g0 -ffp-contract=fast -fvisibility=hidden -Wall -Wno-psabi".split(),
        )
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
