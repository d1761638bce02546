"""The compilers of the CUDA tests: g++ with the emulation of CUDA on the CPU, and nvcc where it is installed."""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ..resources import note

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
INCLUDE = ROOT / "csrc/include"
ARCHITECTURES = (80, 90)
TORCH_INCLUDE = Path(torch.__file__).parent / "include"

SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


@functools.cache
def cxx20(sanitizer: str = "plain") -> str | None:
    """A C++ compiler with std::barrier, _Float16 and the sanitizer, or None."""
    program = "#include <barrier>\nint main() { std::barrier<> b(1); _Float16 h = 1; return int(h) - 1; }"
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++")):
        command = [name, "-std=c++20", *SANITIZERS[sanitizer], "-x", "c++", "-", "-o", os.devnull, "-pthread"]
        if (
            shutil.which(name)
            and subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0
        ):
            return name
    return None


def needs_cxx20(sanitizer: str = "plain"):
    """Skip a test where no compiler can build the emulation."""
    return pytest.mark.skipif(
        cxx20(sanitizer) is None,
        reason=f"no C++20 compiler with <barrier>, _Float16 and sanitizer={sanitizer} ($CXX, g++, clang++)",
    )


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


def build_emulated(stem: str, sanitizer: str, folder: Path, headers: Path = INCLUDE) -> Path:
    """Compile tests/cuda/<stem>.cpp against the emulation and the kernels in ``headers``; returns the program."""
    program = folder / stem
    # The time goes into switching threads and into compiling, so nothing is optimized.
    # Wide loads read numbers through another type, as CUDA allows and standard C++ does not.
    flags = ["-std=c++20", "-O0", "-g", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = [f"-I{ROOT / 'tests/csrc/emulation'}", f"-I{headers}"]
    source = [HERE / f"{stem}.cpp", "-o", program, "-pthread"]
    run([cxx20(sanitizer), *flags, *SANITIZERS[sanitizer], *include, *source])
    return program


def run(command) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# What torch's own build command forbids, so that kernels do not lean on implicit conversions.
STRICT = ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
DEFINITIONS = ("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")


def compile_launcher(source: Path, object_file: Path, *flags: str | Path) -> str:
    """Compile a launcher against torch's headers; returns what ptxas reports."""
    return run(
        [
            *("nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC", *flags),
            *(f"-D__CUDA_NO_{name}__" for name in STRICT),
            *(*DEFINITIONS, f"-I{INCLUDE}", "-isystem", TORCH_INCLUDE, "-c", source, "-o", object_file),
        ]
    )


def gencode(*architectures: int) -> list[str]:
    """The flags of nvcc for machine code of some architectures."""
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]


def cuobjdump() -> str | None:
    """The tool that shows machine code: of the toolkit, or of the package triton."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return shutil.which("cuobjdump") or (str(bundled) if bundled.exists() else None)


def resource_usage(report: str) -> dict[tuple[str, int], dict[str, int]]:
    """(kernel, architecture) → registers and bytes spilled, from what ``ptxas -v`` says; noted as well."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
        re.DOTALL,
    )
    out = {}
    for name, architecture, stack, stores, loads, registers, shared in pattern.findall(report):
        out[name, int(architecture)] = {"registers": int(registers), "spilled": int(stores) + int(loads)}
        note(*demangled(name), int(architecture), int(registers), int(shared or 0), int(stack))
    return out


def demangled(name: str) -> tuple[str, str]:
    """A kernel's name and its template arguments, as in the source."""
    if shutil.which("c++filt") is None:
        return name, ""
    kernel, _, rest = run(["c++filt", name]).strip().removeprefix("void ").replace("bootgrad::", "").partition("<")
    return kernel.partition("(")[0], rest.rpartition(">(")[0]
