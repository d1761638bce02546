"""The Triton kernels of an embedding's rows without a GPU: interpreted against float64, and cross-compiled."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from .compiling import ARCHITECTURES, SHARED_LIMIT, cross_compile
from .interpreter import run_interpreted
from .loading import load_kernel

module = load_kernel("embedding_sq_norms")

POINTER = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}


def arguments(lengths, D, V, dtype):
    """Tokens, a few of which are none, bounds and gy of samples with so many tokens."""
    g = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    gy = torch.randn(int(bounds[-1]), D, generator=g, dtype=torch.float64).to(dtype)
    return torch.randint(-1, V, (len(gy),), generator=g), bounds, gy


def expected(tokens, bounds, gy):
    """By torch's own derivative of a table with as many rows as there are tokens in use."""
    squares = []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own = tokens[begin:end]
        used, index = own.unique(return_inverse=True)
        table = torch.zeros(len(used), gy.size(1), dtype=torch.float64, requires_grad=True)
        rows = torch.autograd.grad(F.embedding(index, table), table, gy[begin:end].double())[0]
        squares.append(rows[used >= 0].square().sum())
    return torch.stack(squares) if squares else gy.new_zeros(0).double()


def interpret(cases, folder):
    torch.save(list(cases), folder / "cases.pt")
    run_interpreted("-m", __name__, str(folder))
    return torch.load(folder / "results.pt")


def _main(folder):
    torch.use_deterministic_algorithms(True)  # with this torch.empty is filled with NaN
    assert torch.empty(1).isnan().all()
    cases = torch.load(folder / "cases.pt")
    torch.save([module.embedding_sq_norms(*case) for case in cases], folder / "results.pt")


def compare(cases, results):
    for case, s in zip(cases, results, strict=True):
        dtype = case[2].dtype
        assert s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(s.double(), expected(*case), rtol=TOLERANCE[dtype], atol=0)


def test_interpreted_equals_the_gradient_of_the_table(tmp_path):
    sizes = (
        ((37, 37), 70, 5), ((1,), 3, 4), ((64, 3), 129, 1), ((50,), 20, 1000), ((100, 0, 7), 33, 12), ((33,), 5, 2)
    )  # fmt: skip
    cases = [arguments(*size, dtype) for size in sizes for dtype in (torch.float32, torch.float64, torch.float16)]
    cases += [arguments(*size, torch.float32) for size in (((), 3, 2), ((0, 0), 3, 2), ((5, 5), 0, 2))]
    tokens, bounds, gy = plain = arguments((70, 70, 65), 33, 9, torch.float32)
    spread = torch.full((len(gy), 66), torch.nan)[:, ::2].copy_(gy)
    cases += [
        plain,
        plain,
        (tokens.repeat_interleave(2)[::2], bounds.repeat_interleave(2)[::2], spread),
        (tokens, bounds, gy.t().contiguous().t()),
        (tokens[140:], bounds[2:] - 140, gy[140:]),
    ]
    results = interpret(cases, tmp_path)
    compare(cases, results)
    first, *others, alone = results[-5:]
    assert all(torch.equal(other, first) for other in others)
    assert torch.equal(alone, first[2:])  # a sample's result does not depend on the batch around it


def check_compiled(dtype, architecture, folder, aligned=True):
    block_t, block_d, warps = module.CONFIGS[dtype.itemsize]
    wide = POINTER[torch.float64 if dtype == torch.float64 else torch.float32]
    given = dict.fromkeys(("tokens_ptr", "order_ptr", "bounds_ptr"), "*i64") | {"stride_gd": 1}
    given |= {"gy_ptr": POINTER[dtype], "partials_ptr": wide, "BLOCK_T": block_t, "BLOCK_D": block_d}
    given = {p: given.get(p, "i32") for p in module.embedding_sq_norms_kernel.arg_names}
    divisible = [p for p in given if p.endswith("_ptr") or (aligned and p in ("D", "stride_gn"))]
    compiled = cross_compile(module.embedding_sq_norms_kernel, given, architecture, warps, folder, divisible)
    assert not compiled.spills
    assert compiled.shared <= SHARED_LIMIT[architecture]
    if dtype.itemsize == 2:
        assert "mma.sync" in compiled.ptx
    if aligned:
        assert "cp.async.cg.shared.global" in compiled.ptx  # 16 bytes at a time


def test_compiles_for_one_gpu(tmp_path):
    check_compiled(torch.bfloat16, 90, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_in_every_configuration(architecture, tmp_path):
    for dtype, aligned in itertools.product(POINTER, (True, False)):
        check_compiled(dtype, architecture, tmp_path, aligned)
    block_b, block_n = module.TOTAL_BLOCK
    given = {
        "partials_ptr": "*fp32",
        "out_ptr": "*fp32",
        "B": "i32",
        "N": "i32",
        "BLOCK_B": block_b,
        "BLOCK_N": block_n,
    }
    assert not cross_compile(module.embedding_sq_norms_total_kernel, given, architecture, 1, tmp_path).spills


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", POINTER, ids=str)
def test_on_a_gpu_equals_the_gradient_of_the_table(dtype):
    for lengths, D, V in (((512, 511, 0), 768, 300), ((127, 127), 63, 5), ((65, 64), 40, 10**6)):
        case = arguments(lengths, D, V, dtype)
        first, second = (module.embedding_sq_norms(*(t.cuda() for t in case)) for _ in range(2))
        assert torch.equal(first, second)
        compare([case], [first.cpu()])


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
