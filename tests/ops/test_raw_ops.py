"""Every op, backend, dtype and path against the oracle."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from bootgrad import reference
from bootgrad.ops import schema
from bootgrad.ops.backends import eager

from ..tolerances import TOLERANCES
from . import test_group_norm as test_group_norm_ops
from .cases import (
    CONV_OPS,
    DTYPES,
    LINEAR_OPS,
    WEIGHT_LAYOUTS,
    arguments,
    check,
    conv_case,
    conv_shapes,
    exact,
    linear_case,
    takes,
    variants,
)

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# B, T, I, O
LINEAR_SIZES = [
    (3, 1, 1, 1),
    (0, 63, 63, 1),
    (2, 0, 63, 127),
    (1, 1, 127, 63),
    (2, 63, 1, 127),
    (3, 127, 63, 1),
    (2, 127, 127, 63),
    (5, 4, 63, 127),
    (2, 700, 3, 2),
    (2, 3, 0, 70),
    (2, 3, 4, 0),
]
CONV_SIZES = {
    "3×3": (3, 17, (9, 7), 33, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1×1, strided": (2, 63, (7, 9), 16, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "strides beyond the image": (2, 3, (3, 4), 4, (1, 1), (2**30, 2**30), (0, 0), (1, 1), 1),
    "patches": (2, 3, (8, 12), 5, (4, 4), (4, 4), (0, 0), (1, 1), 1),
    "depthwise": (2, 63, (11, 13), 63, (3, 3), (1, 1), (1, 1), (1, 1), 63),
    "multiplied depthwise": (2, 5, (8, 8), 15, (3, 3), (2, 2), (1, 1), (1, 1), 5),
    "grouped": (2, 36, (6, 6), 20, (2, 2), (1, 1), (0, 0), (1, 1), 4),
    "dilated": (1, 8, (31, 3), 8, (5, 2), (1, 1), (4, 1), (3, 2), 1),
    "patches larger than the image": (2, 7, (3, 3), 9, (7, 7), (1, 1), (3, 3), (1, 1), 1),
    "mostly padding": (2, 3, (2, 2), 4, (3, 3), (2, 1), (7, 5), (1, 1), 1),
    "many weights": (5, 130, (4, 3), 125, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "many weights, grouped and strided": (3, 70, (5, 4), 134, (7, 7), (2, 1), (3, 3), (1, 1), 2),
    "channels over margins": (3, 37, (4, 4), 19, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1d": (2, 12, (127,), 31, (5,), (3,), (2,), (2,), 1),
    "3d": (2, 6, (5, 4, 7), 10, (3, 2, 3), (1, 2, 2), (1, 0, 1), (1, 1, 2), 2),
    "one position": (3, 63, (4, 4), 127, (4, 4), (1, 1), (0, 0), (1, 1), 1),
    "no samples": (0, 4, (5, 5), 6, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no channels in": (2, 0, (5, 4), 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no channels in any group": (2, 0, (5, 4), 6, (3, 2), (2, 1), (1, 1), (1, 1), 3),
    "no channels out": (2, 3, (5, 4), 0, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no positions": (2, 4, (2, 5), 6, (3, 3), (1, 1), (0, 0), (1, 1), 1),
}


def over_paths(names):
    """(op, path), where a path is no argument once."""
    return pytest.mark.parametrize(
        "name, path", [(n, p) for n in names for p in (schema.PATHS if takes(n, "path") else schema.PATHS[:1])]
    )


def run(backend, name, case, path):
    """Check one op on all variants of a case, and that it leaves its arguments alone."""
    op = backend.op(name)
    for variant in variants(name, case):
        before = [t.clone() for t in variant.tensors()]
        ours = op(*arguments(name, variant, path))
        check(backend.name, name, variant, ours, path)
        assert all(map(torch.equal, before, variant.tensors()))


@EVERY_DTYPE
@over_paths(LINEAR_OPS)
@pytest.mark.parametrize("sizes", LINEAR_SIZES, ids=str)
def test_linear(backend, name, path, sizes, dtype):
    run(backend, name, linear_case(*sizes, dtype), path)


@EVERY_DTYPE
@pytest.mark.parametrize("sizes", [(3, 1, 1), (0, 63, 1), (2, 127, 63), (1, 1, 127), (3, 0, 63)], ids=str)
def test_rank1(backend, sizes, dtype):
    B, I, O = sizes  # noqa: E741
    case = linear_case(B, 1, I, O, dtype)
    case = case.but(x=case.x[:, 0], gy=case.gy[:, 0])
    run(backend, "linear_rank1_sq_norms", case, "direct")


@EVERY_DTYPE
@over_paths(CONV_OPS)
@pytest.mark.parametrize("sizes", CONV_SIZES.values(), ids=CONV_SIZES)
def test_convolution(backend, name, path, sizes, dtype):
    run(backend, name, conv_case(*sizes, dtype), path)


@EVERY_DTYPE
@over_paths(CONV_OPS)
@given(sizes=conv_shapes())
@example(sizes=(1, 3, (5,), 2, (3,), (2,), (3,), (2,), 1))
def test_drawn_convolutions(backend, name, path, dtype, sizes):
    op, case = backend.op(name), conv_case(*sizes, dtype)
    check(backend.name, name, case, op(*arguments(name, case, path)), path)


@EVERY_DTYPE
@pytest.mark.parametrize("name", [n for n in schema.SCHEMAS if n.startswith("group_norm")])
@pytest.mark.parametrize(
    "shape, groups", [((3, 6, 7, 9), 3), ((2, 4, 1), 2), ((1, 8, 63), 1), ((0, 4, 3), 2), ((5, 2, 127), 2)], ids=str
)
def test_group_norm(backend, name, shape, groups, dtype):
    values = test_group_norm_ops.arguments(name, shape, groups, dtype)
    ours = backend.op(name)(*values)
    tolerance = TOLERANCES[backend.name, dtype]
    for a, expected in zip(ours, getattr(reference, name)(*values), strict=True):
        assert a.shape == expected.shape
        assert a.dtype == (schema.accumulation_dtype(dtype) if a.dim() == 2 else dtype)
        bound = tolerance.derivatives if a.dtype == dtype else tolerance.sums
        # Projections take away a mean and a multiple of x̂: five terms of the result's size are rounded.
        assert (a.double() - expected).norm() <= 5 * bound * expected.norm()


LAYOUTS = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "samples last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "cut out": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
    "every other": lambda t: t.repeat_interleave(2, dim=0)[::2],
}
LINEAR_LAYOUT, CONV_LAYOUT = (3, 5, 17, 9), (3, 6, (7, 5), 10, (3, 2), (1, 2), (1, 0), (1, 1), 2)


def laid_out(name, dtype, layout):
    case = linear_case(*LINEAR_LAYOUT, dtype) if name in LINEAR_OPS else conv_case(*CONV_LAYOUT, dtype)
    changed = {"x": layout(case.x), "gy": layout(case.gy), "center": layout(case.center), "v": layout(case.v)}
    assert all(torch.equal(t, getattr(case, a)) for a, t in changed.items())
    return case.but(**changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@over_paths(LINEAR_OPS + CONV_OPS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(backend, name, path, layout, dtype):
    run(backend, name, laid_out(name, dtype, layout), path)


@over_paths(LINEAR_OPS + CONV_OPS)
def test_expanded_inputs(backend, name, path):
    """A sum's gradient is one number with strides of zero."""
    case = laid_out(name, torch.float32, lambda t: t)
    run(backend, name, case.but(gy=torch.tensor(0.7).expand(case.gy.shape)), path)
    run(backend, name, case.but(x=case.x[:, :1, :1].expand(case.x.shape)), path)


@pytest.mark.parametrize("name", [n for n in schema.SCHEMAS if takes(n, "w")])
@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS.values(), ids=WEIGHT_LAYOUTS)
def test_layouts_of_weights(backend, name, layout):
    case = laid_out(name, torch.float32, lambda t: t)
    run(backend, name, case.but(w=layout(case.w)), "direct")


@pytest.mark.parametrize("name", [n for n in LINEAR_OPS + CONV_OPS if takes(n, "center")])
def test_deviations_of_samples_that_nearly_agree(backend, name):
    """The direct path subtracts before it squares; ‖G_i‖² − 2⟨G_i, c⟩ + ‖c‖² has no digit left here."""
    case = laid_out(name, torch.float32, lambda t: t)
    x, gy = (t[:1] + 1e-4 * t for t in (case.x, case.gy))
    is_linear = name in LINEAR_OPS
    rows = (
        reference.linear_rows(x, gy)
        if is_linear
        else reference.conv_rows(x, gy, tuple(case.v.shape[2:]), *case.geometry)
    )
    case = case.but(x=x, gy=gy, center=rows.mean(0).float())
    flat, c = rows.float().flatten(1), case.center.flatten()
    deviation = (rows - case.center).flatten(1).square().sum(1)
    expanded = flat.square().sum(1) - 2 * flat @ c + c.square().sum()
    assert ((expanded - deviation).abs() / deviation).max() > 0.1
    check(backend.name, name, case, backend.op(name)(*arguments(name, case)))


def tupled(results):
    """The results of an op that may have one."""
    return results if isinstance(results, tuple) else (results,)


def squares(name, results):
    """The squared norms or, where there are, distances among an op's results."""
    return results[2 if results[2].numel() else 1] if name.endswith("statistics") else tupled(results)[0]


@over_paths([n for n in LINEAR_OPS + CONV_OPS if takes(n, "center")])
def test_squared_distances_are_not_negative(backend, name, path):
    """Where rounding outweighs the distance, ‖G_i‖² − 2⟨G_i, c⟩ + ‖c‖² is below zero for one sample in two."""
    case = laid_out(name, torch.float32, lambda t: t)
    case = case.but(x=case.x[:1], gy=case.gy[:1], w=None)
    total = "linear_weighted_sum" if name in LINEAR_OPS else "conv_weighted_sum"
    center = backend.op(total)(*arguments(total, case))
    x = torch.cat([case.x * scale for scale in torch.linspace(1, 1 + 1e-5, 64)])
    case = case.but(x=x, gy=case.gy.expand(64, *case.gy.shape[1:]), center=center)
    assert (squares(name, backend.op(name)(*arguments(name, case, path))) >= 0).all()


@over_paths([n for n in LINEAR_OPS + CONV_OPS if "norms" in n or n.endswith("statistics")])
def test_squares_beyond_the_largest_number_are_infinite(backend, name, path):
    """‖G_i‖² = 1e40 · ‖…‖² overflows; the entries of G_i do not."""
    case = laid_out(name, torch.float32, lambda t: t)
    x, gy = (torch.full_like(t, 1e10) for t in (case.x, case.gy))
    results = backend.op(name)(*arguments(name, case.but(x=x, gy=gy), path))
    assert (squares(name, results) == torch.inf).all()


@over_paths(CONV_OPS)
def test_pixels_between_the_kernel_positions_do_not_enter(backend, name, path):
    """A dilated kernel that fits once reaches the corners alone."""
    case = conv_case(2, 2, (3, 3), 3, (2, 2), (1, 1), (0, 0), (2, 2), 1, torch.float32)
    x = case.x.clone()
    x[:, :, 1] = x[:, :, :, 1] = torch.nan
    clean = case.but(x=x.nan_to_num(0.0))
    results = (backend.op(name)(*arguments(name, c, path)) for c in (case.but(x=x), clean))
    for ours, expected in zip(*map(tupled, results), strict=True):
        torch.testing.assert_close(ours, expected)


LONG = {
    "linear": linear_case(1, 50_176, 3, 5, torch.float32),
    "conv": conv_case(1, 3, (224, 224), 5, (3, 3), (1, 1), (1, 1), (1, 1), 1, torch.float32),
    "depthwise": conv_case(1, 8, (224, 224), 8, (3, 3), (1, 1), (1, 1), (1, 1), 8, torch.float32),
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("op", ["sq_norms", "weighted_sum", "statistics", "sq_norms_with_grad"])
def test_long_sums_do_not_drift(backend, kind, op):
    """A chain of 50,176 equal terms is rounded to one side: to 4e-4. Runs of a few hundred and their sums err by 3e-6."""
    if backend.name == "eager":
        pytest.skip("the products are torch's own")
    name = f"{'linear' if kind == 'linear' else 'conv'}_{op}"
    case = LONG[kind].but(center=None, w=None, mask=(False, False, True))
    case = case.but(x=torch.full_like(case.x, 0.3), gy=torch.full_like(case.gy, 0.3))
    results = backend.op(name)(*arguments(name, case))
    for ours, expected in zip(tupled(results), exact(name, case), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)


@over_paths(LINEAR_OPS + CONV_OPS)
def test_same_input_same_bits(backend, name, path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        if name in LINEAR_OPS:
            case = linear_case(33, 20, 63, 65, torch.float32)
        else:
            case = conv_case(33, 16, (9, 9), 24, (3, 3), (1, 1), (1, 1), (1, 1), 1, torch.float32)
        results = [backend.op(name)(*arguments(name, case, path)) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    check(backend.name, name, case, results[0], path)
    for again in results[1:]:
        for a, b in zip(*map(tupled, (results[0], again)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", LINEAR_OPS + CONV_OPS)
def test_eager_chunks_add_up(monkeypatch, name):
    """One sample a chunk, two, and all at once."""
    case = laid_out(name, torch.float64, lambda t: t)
    for path in schema.PATHS if takes(name, "path") else schema.PATHS[:1]:
        for budget in (1, 12_000, 2**30):
            monkeypatch.setitem(eager.CHUNK_BYTES, "cpu", budget)
            check("eager", name, case, getattr(eager, name)(*arguments(name, case, path)), path)


class LargestResult(TorchDispatchMode):
    """The bytes of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for t in results if isinstance(results, tuple | list) else (results,):
            if isinstance(t, torch.Tensor) and not func.is_view and not t.is_meta:
                self.bytes = max(self.bytes, t.numel() * t.element_size())
        return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@over_paths(LINEAR_OPS + CONV_OPS)
def test_eager_holds_a_chunk_and_not_the_batch(monkeypatch, name, path, dtype):
    """Neither B×P, nor all patches, nor a float32 copy of a half-precision batch: they would be 4, 9 and 2 times x."""
    if name in LINEAR_OPS:
        case = linear_case(256, 12, 48, 48, dtype)
    else:
        case = conv_case(256, 16, (6, 6), 16, (3, 3), (1, 1), (1, 1), (1, 1), 1, dtype)
    budget = case.x.numel() * case.x.element_size() // 2
    monkeypatch.setitem(eager.CHUNK_BYTES, "cpu", budget)
    with LargestResult() as largest:
        results = getattr(eager, name)(*arguments(name, case, path))
    assert largest.bytes <= max(budget, *(t.numel() * t.element_size() for t in tupled(results)))


@pytest.mark.parametrize("name", LINEAR_OPS + CONV_OPS)
def test_eager_keeps_no_graph(name):
    case = laid_out(name, torch.float32, lambda t: t)
    for t in case.tensors():
        t.requires_grad_()
    results = getattr(eager, name)(*arguments(name, case))
    assert not any(t.requires_grad for t in tupled(results))


OPCHECK_LAYOUTS = {"contiguous": lambda t: t} | {k: LAYOUTS[k] for k in ("transposed", "channels last", "samples last")}


@over_paths(LINEAR_OPS + CONV_OPS)
@pytest.mark.parametrize("layout", OPCHECK_LAYOUTS.values(), ids=OPCHECK_LAYOUTS)
def test_opcheck(name, path, layout):
    """The op that the dispatcher finds, which is the compiled one where there is one."""
    case = laid_out(name, torch.float32, layout)
    for variant in variants(name, case)[:2]:
        opcheck(getattr(torch.ops.bootgrad, name).default, arguments(name, variant, path))


def test_opcheck_rank1():
    for dtype in DTYPES:
        x, gy = torch.randn(3, 5, dtype=dtype), torch.randn(4, 3, dtype=dtype).t()
        opcheck(torch.ops.bootgrad.linear_rank1_sq_norms.default, (x, gy))


LINEAR, CONV = "linear_sq_norms_with_grad", "conv_sq_norms_with_grad"
WRONG = {
    "linear: dimensions": (LINEAR, lambda c: dict(x=c.x[0]), r"must be \(B, T, ·\); got"),
    "linear: positions": (LINEAR, lambda c: dict(x=c.x[:, 1:]), "must share T; got 4 and 5"),
    "linear: samples": (LINEAR, lambda c: dict(gy=c.gy[1:]), "must have one batch size; got 3 and 2"),
    "linear: dtypes": (LINEAR, lambda c: dict(gy=c.gy.double()), "must have one dtype; got torch.float32 and"),
    "linear: integers": (LINEAR, lambda c: dict(x=c.x.long(), gy=c.gy.long()), "x must be .*float"),
    "linear: center": (LINEAR, lambda c: dict(center=c.center.t()), r"must have shape \(9, 17\); got \(17, 9\)"),
    "linear: center's dtype": (LINEAR, lambda c: dict(center=c.center.double()), "must have dtype torch.float32"),
    "linear: v": ("linear_jvp", lambda c: dict(v=c.v[1:]), r"v must have shape \(9, 17\); got \(8, 17\)"),
    "linear: w": ("linear_weighted_sum", lambda c: dict(w=c.w[1:]), r"w must have shape \(3,\); got \(2,\)"),
    "conv: no space": (CONV, lambda c: dict(x=c.x[:, :, 0, 0]), r"must be \(B, C, \*S\)"),
    "conv: kernel": (CONV, lambda c: dict(kernel_size=(3,)), "kernel_size must have 2 numbers"),
    "conv: stride": (CONV, lambda c: dict(stride=(1, 2, 1)), "stride must have 2 numbers"),
    "conv: groups": (CONV, lambda c: dict(groups=4), "groups must divide the channels; got 4 for 6 in and 10 out"),
    "conv: no groups": (CONV, lambda c: dict(groups=0), "groups must divide the channels; got 0"),
    "conv: space": (CONV, lambda c: dict(padding=(1, 1)), r"gy must have spatial size \(7, 3\)"),
    "conv: dtypes": (CONV, lambda c: dict(x=c.x.half()), "must have one dtype"),
    "conv: center": (CONV, lambda c: dict(center=c.center[:, :2]), r"center must have shape \(10, 3, 3, 2\)"),
    "conv: v": ("conv_jvp", lambda c: dict(v=c.v[1:]), r"v must have shape \(10, 3, 3, 2\)"),
    "conv: w's dtype": ("conv_weighted_sum", lambda c: dict(w=c.w.double()), "w must have dtype torch.float32"),
}


@pytest.mark.parametrize("name, change, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(backend, name, change, message):
    case = laid_out(name, torch.float32, lambda t: t)
    with pytest.raises(RuntimeError, match=message):
        backend.op(name)(*arguments(name, case.but(**change(case)), "direct"))


@pytest.mark.parametrize("name", [n for n in schema.SCHEMAS if takes(n, "path")])
def test_unknown_paths_are_named(backend, name):
    case = laid_out(name, torch.float32, lambda t: t)
    with pytest.raises(RuntimeError, match="path must be one of direct, gram; got 'ghost'"):
        backend.op(name)(*arguments(name, case, "ghost"))


def test_memory_that_there_is_not_is_said_to_be_missing(backend):
    """A padded plane of 2⁵³ bytes, which a worker asks for."""
    if backend.name == "eager":
        pytest.skip("torch's own message")
    x, gy = torch.ones(1, 1, 1), torch.ones(1, 1, 2)
    with pytest.raises(MemoryError, match="bad_alloc"):
        backend.op("conv_sq_norms")(x, gy, (1,), (2**51,), (2**50,), (1,), 1, "direct")


ISAS = ["avx512", "avx2", "baseline"]


def used_isa(wanted):
    """What a process that runs an op says of its instruction set, and its errors."""
    code = (
        "import torch, bootgrad\n"
        "from bootgrad.ops.library import build_info\n"
        "print(build_info()[0].isa)\n"
        "torch.ops.bootgrad.linear_rank1_sq_norms(torch.ones(2, 6), torch.ones(2, 4))\n"
    )
    env = {**os.environ, "BOOTGRAD_ISA": wanted}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    return done.stdout.strip(), done.stderr


def test_the_instruction_set_is_bounded_by_name(backend):
    """An empty name bounds nothing; another than the three is refused."""
    if backend.name == "eager":
        pytest.skip("has no instruction set")
    best, errors = used_isa("avx512")
    assert (best in ISAS, errors) == (True, "")
    for wanted, most in (("", "avx512"), ("AVX2", "avx2"), ("Baseline", "baseline")):
        assert used_isa(wanted) == (max(most, best, key=ISAS.index), "")
    isa, errors = used_isa("sse")
    assert isa == "" and "RuntimeError: BOOTGRAD_ISA must be one of avx512, avx2, baseline; got 'sse'" in errors
