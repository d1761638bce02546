"""The CPU kernels as they are, without torch, under sanitizers and at every vector length."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(("vector_bytes", "sanitizers"), [(64, "address,undefined"), (32, "thread")])
def test_kernels_agree_with_loops_and_sanitizers_stay_silent(tmp_path, vector_bytes, sanitizers):
    program = tmp_path / "check_kernels"
    build = subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-pthread",
         f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-DBOOTGRAD_VECTOR_BYTES={vector_bytes}",
         f"-I{ROOT / 'csrc/include'}", str(Path(__file__).with_name("check_kernels.cpp")), "-o", str(program)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr
    run = subprocess.run([program], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "0 failures\n", "")


CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")


@pytest.mark.slow
@pytest.mark.skipif(CROSS is None or EMULATOR is None, reason="no compiler or emulator for aarch64")
def test_kernels_agree_with_loops_on_aarch64(tmp_path):
    program = tmp_path / "check_kernels"
    build = subprocess.run(
        [CROSS, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-pthread", "-static",
         "-DBOOTGRAD_VECTOR_BYTES=16", f"-I{ROOT / 'csrc/include'}", str(Path(__file__).with_name("check_kernels.cpp")),
         "-o", str(program)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr
    run = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "0 failures\n", "")


@pytest.mark.slow
@pytest.mark.skipif(CROSS is None, reason="no compiler for aarch64")
def test_the_library_compiles_for_aarch64():
    from torch.utils.cpp_extension import include_paths

    folders = [f"-I{folder}" for folder in (ROOT / "csrc/include", *include_paths())]
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    options = ["-std=c++17", "-fsyntax-only", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-psabi", "-DNDEBUG"]
    options.append("-DTORCH_TARGET_VERSION=0x020b000000000000")
    build = subprocess.run([CROSS, *options, *folders, *map(str, sources)], capture_output=True, text=True)
    assert len(sources) > 10 and build.returncode == 0, build.stderr
