"""The Triton kernels of sums over two lists without a GPU: interpreted against float64, and cross-compiled."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from .compiling import ARCHITECTURES, SHARED_LIMIT, cross_compile
from .interpreter import run_interpreted
from .loading import load_kernel

module = load_kernel("sweeps")

POINTER = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
DTYPES = (
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
)
SHAPES = ((3, 5), (module.CHUNK + 77,), (), (0, 4), (2, 3, 4, 5), (1, 7), (127,))


def lists(a_dtype, b_dtype, device="cpu"):
    g = torch.Generator().manual_seed(0)
    pairs = []
    for shape in SHAPES:
        both = [torch.randn(shape, generator=g, dtype=torch.float64).to(d).to(device) for d in (a_dtype, b_dtype)]
        pairs.append([t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in both])
    return [list(side) for side in zip(*pairs, strict=True)]


def expected(a, b):
    products = [(s.double() * t.double()).sum().item() for s, t in zip(a, b, strict=True)]
    distances = [(s.double() - t.double()).square().sum().item() for s, t in zip(a, b, strict=True)]
    return sum(products), sum(distances)


def scale(a, b):
    return sum((s.double() * t.double()).square().sum().item() for s, t in zip(a, b, strict=True)) ** 0.5


def _main(folder):
    torch.use_deterministic_algorithms(True)  # with this torch.empty is filled with NaN
    assert torch.empty(1).isnan().all()
    results = []
    for a, b in torch.load(folder / "cases.pt"):
        pairs = module.Pairs(a, b)
        results.append([module.dot(pairs), module.sq_distance(pairs), module.dot(pairs), module.sq_distance(pairs)])
        b[0].mul_(2)
        results[-1].append(module.dot(pairs))
    torch.save(results, folder / "results.pt")


def test_interpreted_equals_the_formulas_and_sees_updates_in_place(tmp_path):
    cases = [lists(*dtypes) for dtypes in DTYPES]
    unaligned = [t[1:] for t in (torch.randn(100), torch.randn(100))]
    cases += [[[t] for t in unaligned], [[torch.zeros(0)], [torch.zeros(0)]]]
    torch.save(cases, tmp_path / "cases.pt")
    run_interpreted("-m", __name__, str(tmp_path))
    for (a, b), (products, distances, *again, after) in zip(cases, torch.load(tmp_path / "results.pt"), strict=True):
        double = all(t.dtype == torch.float64 for t in (*a, *b))
        tolerance = 1e-13 if double else 1e-6
        exact = expected(a, b)
        assert products.dtype == distances.dtype == (torch.float64 if double else torch.float32)
        assert abs(products.item() - exact[0]) <= tolerance * scale(a, b)
        assert distances.item() == pytest.approx(exact[1], rel=tolerance)
        assert torch.equal(products, again[0]) and torch.equal(distances, again[1])
        b[0].mul_(2)
        assert abs(after.item() - expected(a, b)[0]) <= tolerance * scale(a, b)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "at least one tensor"),
        ([torch.zeros(2), torch.zeros(2).double()], [torch.zeros(2)] * 2, "one dtype"),
        ([torch.zeros(2, 3)], [torch.zeros(3, 2).t()], "alike"),
        ([torch.zeros(2, 3)], [torch.zeros(6)], "alike"),
        ([torch.zeros(4)[::2]], [torch.zeros(4)[::2]], "without gaps"),
        ([torch.zeros(1).expand(4)], [torch.zeros(1).expand(4)], "without gaps"),
    ],
)
def test_pairs_that_cannot_be_read_in_order_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        module.Pairs(a, b)


def test_the_table_cuts_tensors_into_chunks():
    pairs = module.Pairs(*lists(torch.float32, torch.float32))
    assert pairs.table[:, 2].tolist() == [15, module.CHUNK, 77, 1, 120, 7, 127]
    assert pairs.table[2, 0] - pairs.table[1, 0] == 4 * module.CHUNK


def check_compiled(dtypes, distance, aligned, architecture, folder):
    wide = "*fp64" if torch.float64 in dtypes else "*fp32"
    given = {"a_ptr": POINTER[dtypes[0]], "b_ptr": POINTER[dtypes[1]], "table_ptr": "*i64", "partials_ptr": wide}
    given |= {"DISTANCE": distance, "ALIGNED": aligned, "BLOCK": module.BLOCK}
    pointers = [p for p in given if p.endswith("_ptr")]
    compiled = cross_compile(module.sweep_kernel, given, architecture, module.NUM_WARPS, folder, pointers)
    assert not compiled.spills and compiled.shared <= SHARED_LIMIT[architecture]
    assert (("ld.global.v2.b64" if wide == "*fp64" else "ld.global.v4.b32") in compiled.global_loads()) == aligned


def test_compiles_for_one_gpu(tmp_path):
    check_compiled((torch.float32, torch.float32), True, True, 90, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills_in_every_configuration(architecture, tmp_path):
    for dtypes, distance, aligned in itertools.product(DTYPES, (True, False), (True, False)):
        check_compiled(dtypes, distance, aligned, architecture, tmp_path)
    given = {"partials_ptr": "*fp32", "out_ptr": "*fp32", "N": "i32", "BLOCK": module.TOTAL_BLOCK}
    assert not cross_compile(module.sweep_total_kernel, given, architecture, 4, tmp_path, ("partials_ptr",)).spills


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_on_a_gpu_equals_the_formulas(dtypes):
    a, b = lists(*dtypes, device="cuda")
    pairs = module.Pairs(a, b)
    tolerance = 1e-13 if torch.float64 in dtypes else 1e-6
    assert abs(module.dot(pairs).item() - expected(a, b)[0]) <= tolerance * scale(a, b)
    assert module.sq_distance(pairs).item() == pytest.approx(expected(a, b)[1], rel=tolerance)
    assert torch.equal(module.dot(pairs), module.dot(pairs))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
