"""The CUDA kernel of linear_rank1_sq_norms without a GPU: run on the CPU by emulation, and compiled by nvcc."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bootgrad.ops.library import build_info

from ..tolerances import TOLERANCES
from .toolchain import (
    ARCHITECTURES,
    HERE,
    ROOT,
    TORCH_INCLUDE,
    build_emulated,
    compile_launcher,
    gencode,
    needs_cxx20,
    needs_nvcc,
    resource_usage,
    run,
)

STEM = "linear_rank1_sq_norms"
SOURCE = ROOT / f"csrc/cuda/{STEM}.cu"
DTYPES = {"double": torch.float64, "float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
CASES = 18  # a dtype
KERNELS = 2 * len(DTYPES)  # a warp or a block per sample


def check(program: Path, dtypes) -> None:
    """Results lie within rounding of the naive loops', and other layouts of the same numbers change no bit."""
    lines = [line.split() for line in run([program, *dtypes]).splitlines()]
    assert len(lines) == CASES * len(dtypes)
    bits = {}
    for dtype, group, I, O, layout, error, checksum in lines:  # noqa: E741
        assert float(error) <= TOLERANCES["compiled", DTYPES[dtype]].sums, (dtype, group, I, O, layout, error)
        bits.setdefault((dtype, group, I, O), set()).add(checksum)
    assert sum(len(checksums) for checksums in bits.values()) == len(bits)


@needs_cxx20()
def test_emulated_equals_naive_loops(tmp_path):
    check(build_emulated(STEM, "plain", tmp_path), list(DTYPES))


@needs_cxx20("address")
def test_emulated_stays_inside_its_buffers(tmp_path):
    check(build_emulated(STEM, "address", tmp_path), ["bfloat16"])


@pytest.mark.slow
@needs_cxx20("address")
def test_emulated_stays_inside_its_buffers_in_all_dtypes(tmp_path):
    check(build_emulated(STEM, "address", tmp_path), list(DTYPES))


@pytest.mark.slow
@needs_cxx20("thread")
def test_emulated_has_no_races(tmp_path):
    check(build_emulated(STEM, "thread", tmp_path), ["double", "bfloat16"])


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills_and_loads_16_bytes(architecture, tmp_path):
    object_file = tmp_path / f"{STEM}.o"
    report = compile_launcher(SOURCE, object_file, *gencode(architecture), "--keep", "--keep-dir", tmp_path)
    usage = {name: u for (name, _), u in resource_usage(report).items() if f"{STEM}_kernel" in name}
    assert len(usage) == KERNELS
    assert all(u["spilled"] == 0 for u in usage.values())
    assert all(u["registers"] <= 64 for u in usage.values())  # so that 1024 threads or more fit a multiprocessor
    ptx = next(tmp_path.glob("*.ptx")).read_text()
    bodies = re.findall(rf"\.entry \w*{STEM}_kernel\w*\(.*?^}}", ptx, re.DOTALL | re.MULTILINE)
    assert len(bodies) == KERNELS
    wide = [len(re.findall(r"ld\.global[\w.]*\.(?:v4\.[buf]32|v2\.[buf]64)", body)) for body in bodies]
    assert min(wide) >= 8, wide  # four loads in flight for x and for gy


@pytest.mark.slow
@needs_nvcc
def test_library_registers_the_op_for_cuda_and_checks_its_arguments(tmp_path):
    """Linked against torch's CPU build and loaded there, with stand-ins for the symbols that only libtorch_cuda has."""
    library, stand_ins = tmp_path / "lib_cuda.so", tmp_path / "libstand_ins.so"
    compile_launcher(SOURCE, tmp_path / f"{STEM}.o", *gencode(90))
    torch_libraries = [f"-L{TORCH_INCLUDE.parent / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"]
    run(["nvcc", "-shared", tmp_path / f"{STEM}.o", "-o", library, *torch_libraries])
    run(["g++", "-shared", "-fPIC", HERE / "stand_ins.cpp", "-o", stand_ins])
    environment = os.environ | {"BOOTGRAD_BACKEND": "eager", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", REGISTRATION, stand_ins, library]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Overriding" not in done.stderr
    before, after, *errors = done.stdout.splitlines()
    assert (before, after) == ("False", "True")
    assert [re.sub(r".*\.(?:h|cu):\d+, ", "", error) for error in errors] == [
        "x and gy must be (B, I) and (B, O); got 3 and 2 dimensions",
        "x and gy must have one batch size; got 2 and 3",
        "x and gy must have one dtype",
        "x and gy must be on one device",
    ]


REGISTRATION = """
import ctypes, sys, torch
import bootgrad
def has_kernel():
    return torch._C._dispatch_has_kernel_for_dispatch_key("bootgrad_cuda::linear_rank1_sq_norms", "CUDA")
print(has_kernel())
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[2])
print(has_kernel())
op, cuda = torch.ops.bootgrad_cuda.linear_rank1_sq_norms.default, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
z = torch.zeros
for x, gy in (z(2, 1, 3), z(2, 4)), (z(2, 3), z(3, 4)), (z(2, 3), z(2, 4).double()), (z(2, 3), z(2, 4)):
    try:
        op.redispatch(cuda, x, gy)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""


@pytest.mark.skipif(
    not any(info.name == "_C_cuda" and info.loaded for info in build_info()),
    reason="the library _C_cuda is not loaded: it was not built, or there is no CUDA device",
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_on_a_gpu_equals_the_formula(dtype):
    op = torch.ops.bootgrad_cuda.linear_rank1_sq_norms
    for B, I, O in itertools.product((0, 1, 63, 127), (0, 1, 63, 4096), (1, 127, 9000)):  # noqa: E741
        x, gy = (torch.randn(B, n, device="cuda").to(dtype) for n in (I, O))
        s = op(x, gy)
        exact = x.double().square().sum(1) * gy.double().square().sum(1)
        torch.testing.assert_close(s.double(), exact, rtol=TOLERANCES["compiled", dtype].sums, atol=0)
        apart = op(x.t().contiguous().t(), torch.cat([gy, gy[:, :1]], 1)[:, :O])
        assert torch.equal(apart, s)
