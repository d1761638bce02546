"""Building and installing: what lands in the wheel; what happens without a compiler, without torch, or on an error."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("bootgrad", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
TOOLS = ("Makefile", ".ci", ".clang-format")
INSTALL_TORCH = "install torch first, then `pip install --no-build-isolation .`"
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None or shutil.which("readelf") is None, reason="needs g++ and readelf"),
]


def copy_sources(folder, names=SOURCES):
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif source.exists():
            shutil.copy(source, folder / name)
    return folder


def run(*command, cwd, **environment):
    environment = {**os.environ, "BOOTGRAD_CUDA": "0", **environment}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build_wheel(sources, **environment):
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", "dist")
    built = run("-m", "pip", "wheel", *options, ".", cwd=sources, **environment)
    return built, next(iter((sources / "dist").glob("*.whl")), None)


def unpack(wheel, folder):
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def readelf(option, library):
    return subprocess.run(["readelf", "--wide", option, library], capture_output=True, text=True, check=True).stdout


def needed(library):
    return set(re.findall(r"NEEDED.*\[(.+)\]", readelf("--dynamic", library)))


def undefined_symbols(library):
    return set(re.findall(r" UND (\S+)", readelf("--dyn-syms", library)))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    sources = copy_sources(tmp_path_factory.mktemp("build"))
    built, wheel = build_wheel(sources)
    assert built.returncode == 0, built.stdout
    return wheel


def test_one_wheel_serves_every_python(wheel, tmp_path):
    assert re.fullmatch(r"bootgrad-[\w.]+-py3-none-\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"bootgrad/_C.so", "bootgrad/py.typed", "bootgrad/kernels/__init__.py"} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"bootgrad"}
    library = unpack(wheel, tmp_path) / "bootgrad/_C.so"
    assert {"libtorch_cpu.so"} <= needed(library)
    assert not {name for name in needed(library) if name.startswith("libpython")}
    assert not {name for name in undefined_symbols(library) if name.startswith(("Py", "_Py"))}
    # The stable ABI is C functions: nothing of at:: or c10:: in C++, which a later torch may lack.
    assert not {name for name in undefined_symbols(library) if re.match(r"_ZN?K?(2at|3c10)", name)}


def test_the_installed_library_computes(wheel, tmp_path):
    unpack(wheel, tmp_path)
    code = (
        "import torch, bootgrad\n"
        "from bootgrad.ops import library\n"
        "x, gy = torch.full((3, 2, 4), 2.0), torch.full((3, 2, 5), 3.0)\n"
        "info = library.build_info()[0]\n"
        "print(info.loaded, torch.ops.bootgrad.linear_sq_norms(x, gy, 'direct').tolist())\n"
    )
    done = run("-W", "error", "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stdout == "True [2880.0, 2880.0, 2880.0]\n"  # 20 entries of (2 · 2 · 3)² each


@pytest.mark.parametrize("environment", [NO_COMPILER, {"CC": "/bin/false"}])
def test_without_a_compiler_the_package_installs_and_warns_once(tmp_path, environment):
    built, wheel = build_wheel(copy_sources(tmp_path), **environment)
    assert built.returncode == 0, built.stdout
    installed = unpack(wheel, tmp_path / "installed")
    assert not list(installed.rglob("*.so"))
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n    import bootgrad\n"
        "print(*[w.category.__name__ for w in seen])\n"
    )
    environment = {"PYTHONPATH": str(installed)}
    assert run("-W", "always", "-c", code, cwd=tmp_path, **environment).stdout == "BootgradWarning\n"
    silent = run("-W", "error", "-c", "import bootgrad", cwd=tmp_path, BOOTGRAD_BACKEND="eager", **environment)
    assert (silent.returncode, silent.stdout) == (0, "")


def test_a_required_extension_needs_a_compiler(tmp_path):
    built, wheel = build_wheel(copy_sources(tmp_path), BOOTGRAD_REQUIRE_EXT="1", **NO_COMPILER)
    assert built.returncode != 0 and wheel is None
    assert "BOOTGRAD_REQUIRE_EXT=1, but there is no usable C++ compiler, GCC 12 or newer or clang" in built.stdout


REFUSED = {
    "BOOTGRAD_CUDA=1, but there is no usable C++ compiler, GCC 12 or newer or clang": {
        "BOOTGRAD_CUDA": "1",
        **NO_COMPILER,
    },
    "BOOTGRAD_CUDA must be 0 or 1, or unset; got 'yes'": {"BOOTGRAD_CUDA": "yes"},
    "MAX_JOBS must be a whole number of at least 1; got '0'": {"MAX_JOBS": "0"},
    "MAX_JOBS must be a whole number of at least 1; got 'all'": {"MAX_JOBS": "all"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_variables_that_cannot_be_obeyed_stop_the_build_in_one_sentence(tmp_path, message):
    built = run("setup.py", "build_ext", "--build-lib", "out", cwd=copy_sources(tmp_path), **REFUSED[message])
    assert built.returncode != 0 and not (tmp_path / "out").exists()
    assert message in built.stdout.splitlines()[-1] and "Traceback" not in built.stdout


def test_an_error_in_our_own_sources_fails_the_build(tmp_path):
    sources = copy_sources(tmp_path)
    for path in (sources / "csrc/cpu").glob("kernels_*.cpp"):
        path.unlink()
    (sources / "csrc/cpu/dispatch.cpp").write_text("int broken = undeclared;\n")
    built, wheel = build_wheel(sources)
    assert built.returncode != 0 and wheel is None
    assert "undeclared" in built.stdout


def test_without_torch_the_build_stops_and_says_why_but_metadata_is_made(tmp_path):
    sources = copy_sources(tmp_path / "sources", SOURCES + TOOLS)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('hidden')\n")
    built, wheel = build_wheel(sources, PYTHONPATH=str(hidden))
    assert built.returncode != 0 and wheel is None
    assert INSTALL_TORCH in built.stdout
    made = run("setup.py", "--quiet", "sdist", cwd=sources, PYTHONPATH=str(hidden))
    assert made.returncode == 0, made.stdout
    members = subprocess.run(
        ["tar", "--list", "--file", *(sources / "dist").glob("*.tar.gz")], capture_output=True, text=True, check=True
    ).stdout
    for name in (
        "csrc/cpu/conv_ops.cpp",
        "csrc/include/bootgrad/gemm.hpp",
        "kernels/__init__.py",
        "bootgrad/ops/schema.py",
        "Makefile",
        ".ci/run",
        ".clang-format",
    ):
        assert f"/{name}\n" in members


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_cuda_library_keeps_torch_among_its_needs():
    library = ROOT / "bootgrad/_C_cuda.so"  # which an install in place has built
    assert "libtorch.so" in needed(library)
    assert not {name for name in undefined_symbols(library) if name.startswith(("Py", "_Py"))}
