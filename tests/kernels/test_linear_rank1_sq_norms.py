"""The Triton kernel of linear_rank1_sq_norms without a GPU: interpreted against float64, and cross-compiled."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from ..tolerances import TOLERANCES
from .compiling import ARCHITECTURES, SHARED_LIMIT, cross_compile
from .interpreter import interpret
from .loading import load_kernel

STEM = "linear_rank1_sq_norms"
module = load_kernel(STEM)

POINTER = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def pair(B, I, O, dtype, seed=0):  # noqa: E741
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, n, generator=g, dtype=torch.float64).to(dtype) for n in (I, O))


def strided(t, layout):
    """The same numbers in other places: rows apart, transposed, every third number."""
    B, N = t.shape
    if layout == "rows apart":
        return t.new_full((B, N + 3), torch.nan)[:, :N].copy_(t)
    if layout == "transposed":
        return t.new_full((N, B), torch.nan).t().copy_(t)
    return t.new_full((B, 3 * N), torch.nan)[:, ::3].copy_(t)


def expected(x, gy):
    return x.double().square().sum(1) * gy.double().square().sum(1)


def check(results, cases):
    for (x, gy), s in zip(cases, results, strict=True):
        assert s.shape == (x.size(0),)
        assert s.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(s.double(), expected(x, gy), rtol=TOLERANCES["compiled", x.dtype].sums, atol=0)


def test_interpreted_equals_the_formula_and_strides_change_no_bit(tmp_path):
    small = itertools.product((0, 1, 63, 127), ((0, 5), (1, 1), (63, 31)))
    sizes = [(B, *size) for B, size in small] + [(5, 127, 256), (3, 2048, 1), (1, 127, 2049), (2, 9000, 64)]
    cases = [pair(*size, dtype) for size in sizes for dtype in (torch.float64, torch.float32)]
    cases += [pair(5, 127, 63, dtype) for dtype in (torch.float16, torch.bfloat16)]

    x, gy = pair(5, 70, 127, torch.float32)
    same = [(strided(x, layout), strided(gy, layout)) for layout in ("rows apart", "transposed", "every third")]
    alone = (x[3:4], gy[3:4])
    cases += [(x[:1].expand(5, -1), gy), (x, gy), *same, alone]

    results = interpret(STEM, cases, tmp_path)
    check(results, cases)
    plain, *others, one = results[-len(same) - 2 :]
    assert all(torch.equal(other, plain) for other in others)
    assert torch.equal(one, plain[3:4])  # a sample's result does not depend on the batch around it


@pytest.mark.parametrize("config", [config for _, config in module.CONFIGS], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills_and_loads_16_bytes(architecture, config, tmp_path):
    for dtype in POINTER:
        compiled = cross_compile(
            getattr(module, f"{STEM}_kernel"),
            arguments(dtype, config),
            architecture,
            config.num_warps,
            tmp_path,
            divisible=("x_ptr", "gy_ptr", "out_ptr", "I", "O", "stride_xb", "stride_gb"),
        )
        assert not compiled.spills
        assert compiled.shared <= SHARED_LIMIT[architecture]
        assert compiled.global_loads() == {"ld.global.v2.b64" if dtype == torch.float64 else "ld.global.v4.b32"}


def test_compiles_for_rows_of_one_number_and_for_64_bit_sizes(tmp_path):
    config = module.choose_config(1, 1)
    for changed in ({"I": 1, "stride_xb": 1}, {"I": "i64", "stride_xb": "i64", "stride_xi": "i64"}):
        given = arguments(torch.float32, config) | changed
        compiled = cross_compile(getattr(module, f"{STEM}_kernel"), given, 80, config.num_warps, tmp_path)
        assert not compiled.spills


def arguments(dtype, config):
    accumulator = POINTER[torch.float64 if dtype == torch.float64 else torch.float32]
    return {
        "x_ptr": POINTER[dtype],
        "gy_ptr": POINTER[dtype],
        "out_ptr": accumulator,
        "B": "i32",
        "I": "i32",
        "O": "i32",
        "stride_xb": "i32",
        "stride_xi": 1,
        "stride_gb": "i32",
        "stride_go": 1,
        "BLOCK_B": config.BLOCK_B,
        "BLOCK_N": config.BLOCK_N,
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", POINTER, ids=str)
def test_on_a_gpu_equals_the_formula(dtype):
    sizes = itertools.product((0, 1, 63, 127), ((0, 5), (1, 1), (63, 31), (784, 4096), (9000, 64)))
    cases = [tuple(t.cuda() for t in pair(B, *size, dtype)) for B, size in sizes]
    cases += [(strided(x, "rows apart"), strided(gy, "transposed")) for x, gy in cases[-3:]]
    results = [module.linear_rank1_sq_norms(*case) for case in cases]
    check(results, cases)
    assert all(torch.equal(module.linear_rank1_sq_norms(*c), s) for c, s in zip(cases, results, strict=True))
