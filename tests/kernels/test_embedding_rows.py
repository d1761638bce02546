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

module = load_kernel("embedding_rows")

POINTER = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}


def arguments(B, T, D, V, dtype, padding_idx=None):
    g = torch.Generator().manual_seed(0)
    gy = torch.randn(B, T, D, generator=g, dtype=torch.float64).to(dtype)
    return torch.randint(0, V, (B, T), generator=g), gy, padding_idx


def expected(tokens, gy, padding_idx):
    rows = []
    for token, g in zip(tokens, gy.double(), strict=True):
        table = torch.zeros(int(tokens.max()) + 2, gy.size(2), dtype=torch.float64, requires_grad=True)
        used = padding_idx if padding_idx is not None and padding_idx < len(table) else None
        rows.append(torch.autograd.grad(F.embedding(token, table, used), table, g)[0].square().sum())
    return torch.stack(rows) if rows else gy.new_zeros(0).double()


def interpret(cases, folder):
    torch.save(list(cases), folder / "cases.pt")
    run_interpreted("-m", __name__, str(folder))
    return torch.load(folder / "results.pt")


def _main(folder):
    torch.use_deterministic_algorithms(True)  # with this torch.empty is filled with NaN
    assert torch.empty(1).isnan().all()
    cases = torch.load(folder / "cases.pt")
    torch.save([module.embedding_rows_sq_norms(*case) for case in cases], folder / "results.pt")


def compare(cases, results):
    for case, s in zip(cases, results, strict=True):
        dtype = case[1].dtype
        assert s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        exact = expected(*case) if case[1].numel() else torch.zeros(case[1].size(0), dtype=torch.float64)
        torch.testing.assert_close(s.double(), exact, rtol=TOLERANCE[dtype], atol=0)


def test_interpreted_equals_the_gradient_of_the_table(tmp_path):
    sizes = ((2, 37, 70, 5), (1, 1, 3, 4), (2, 64, 129, 1), (1, 50, 20, 1000), (2, 100, 33, 12), (1, 33, 5, 2))
    cases = [arguments(*size, dtype) for size in sizes for dtype in (torch.float32, torch.float64, torch.float16)]
    cases += [arguments(2, 70, 5, 4, torch.float32, padding) for padding in (0, 3, 99)]
    cases += [arguments(*size, torch.float32) for size in ((0, 5, 3, 2), (2, 0, 3, 2), (2, 5, 0, 2))]
    tokens, gy, _ = plain = arguments(3, 70, 33, 9, torch.float32)
    spread = torch.full((3, 70, 66), torch.nan)[..., ::2].copy_(gy)
    turned = gy.movedim(1, 0).contiguous().movedim(0, 1)
    cases += [
        plain,
        plain,
        (tokens.t().contiguous().t(), spread, None),
        (tokens, turned, None),
        (tokens[2:], gy[2:], None),
    ]
    results = interpret(cases, tmp_path)
    compare(cases, results)
    first, *others, alone = results[-5:]
    assert all(torch.equal(other, first) for other in others)
    assert torch.equal(alone, first[2:])  # a sample's result does not depend on the batch around it


def check_compiled(dtype, architecture, folder, aligned=True):
    block_t, block_d, warps = module.CONFIGS[dtype.itemsize]
    wide = POINTER[torch.float64 if dtype == torch.float64 else torch.float32]
    given = dict.fromkeys(("tokens_ptr", "order_ptr"), "*i64") | dict.fromkeys(
        ("stride_kt", "stride_ot", "stride_gd"), 1
    )
    given |= {"gy_ptr": POINTER[dtype], "partials_ptr": wide, "PADDING": True, "BLOCK_T": block_t, "BLOCK_D": block_d}
    given = {p: given.get(p, "i32") for p in module.embedding_rows_kernel.arg_names}
    divisible = [p for p in given if p.endswith("_ptr") or (aligned and p in ("D", "stride_gb", "stride_gt"))]
    compiled = cross_compile(module.embedding_rows_kernel, given, architecture, warps, folder, divisible)
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
    assert not cross_compile(module.embedding_rows_total_kernel, given, architecture, 1, tmp_path).spills


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", POINTER, ids=str)
def test_on_a_gpu_equals_the_gradient_of_the_table(dtype):
    for case in (
        arguments(3, 512, 768, 300, dtype, 7),
        arguments(2, 127, 63, 5, dtype),
        arguments(2, 65, 40, 10**6, dtype),
    ):
        tokens, gy, padding_idx = case
        first, second = (module.embedding_rows_sq_norms(tokens.cuda(), gy.cuda(), padding_idx) for _ in range(2))
        assert torch.equal(first, second)
        if tokens.max() < 1000:
            compare([case], [first.cpu()])


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
