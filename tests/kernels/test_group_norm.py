"""The Triton kernels of group norm without a GPU: interpreted against float64, and cross-compiled."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bootgrad.ops.backends import eager_norms

from ..ops.test_group_norm import OPS, TOLERANCES, arguments
from .compiling import ARCHITECTURES, SHARED_LIMIT, cross_compile
from .interpreter import run_interpreted
from .loading import load_kernel

module = load_kernel("group_norm")

NAMES = ("group_norm_backward", "group_norm_double_backward")
SHAPES = (((2, 6, 7, 9), 3), ((2, 4, 1), 4), ((1, 8, 63), 1), ((0, 4, 3), 2), ((3, 2, 127), 2), ((2, 6), 3))
# Groups that are walked along: several blocks of channels, of positions, of both.
WALKED = (((1, 6, 5, 9), 1), ((2, 4, 37), 2), ((1, 40, 3), 2), ((1, 1, 45), 1))


def interpret(calls, folder):
    torch.save([(name, walked, args) for name, args, walked in calls], folder / "calls.pt")
    run_interpreted("-m", __name__, str(folder))
    return torch.load(folder / "results.pt")


def _main(folder):
    torch.use_deterministic_algorithms(True)  # with this torch.empty is filled with NaN
    assert torch.empty(1).isnan().all()
    whole, block, run = module.LARGEST_WHOLE, module.LARGEST_BLOCK, module.LONGEST_RUN
    results = []
    for name, walked, args in torch.load(folder / "calls.pt"):
        module.LARGEST_WHOLE = dict.fromkeys(whole, 0) if walked else whole
        module.LARGEST_BLOCK, module.LONGEST_RUN = (16, 4) if walked else (block, run)
        results.append(getattr(module, name)(*args))
    torch.save(results, folder / "results.pt")


def compare(calls, results):
    for (name, args, _), ours in zip(calls, results, strict=True):
        x = next(t for t in reversed(args[:-3] if name == NAMES[1] else args[:2]) if t is not None)
        expected = getattr(eager_norms, name)(*(t.double() if isinstance(t, torch.Tensor) else t for t in args))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        dtypes = [x.dtype, wide, wide] if name == NAMES[0] else [x.dtype, x.dtype, wide]
        for a, b, dtype in zip(ours, expected, dtypes, strict=True):
            assert a.dtype == dtype and a.is_contiguous()
            torch.testing.assert_close(a.double(), b, **TOLERANCES[x.dtype])


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def with_activations(args, change):
    return tuple(change(t) if isinstance(t, torch.Tensor) and t.dim() > 2 else t for t in args)


def test_interpreted_equals_the_formulas(tmp_path):
    calls = [
        (name, arguments(name, shape, groups, dtype, weighted), walked)
        for name in NAMES
        for walked in (False, True)
        for shape, groups in (WALKED if walked else SHAPES)
        for dtype, weighted in ((torch.float64, True), (torch.float32, False), (torch.float16, True))
    ]
    calls += [(name, arguments(name, (2, 6, 5), 2, torch.bfloat16), False) for name in NAMES]
    compare(calls, interpret(calls, tmp_path))


def test_absent_arguments_are_zeros(tmp_path):
    *cotangents, gy, x, weight, mean, rstd = arguments(NAMES[1], (1, 4, 3, 5), 2, torch.float64)
    calls = []
    for given, walked in itertools.product(itertools.product((True, False), repeat=3), (False, True)):
        present = [c if wanted else None for c, wanted in zip(cotangents, given, strict=True)]
        calls.append((NAMES[1], (*present, gy, x, weight, mean, rstd), walked))
    compare(calls, interpret(calls, tmp_path))


def test_the_input_s_gradient_may_be_left_out_and_nothing_gives_zeros(tmp_path):
    args = arguments(NAMES[0], (1, 4, 3, 5), 2, torch.float64)
    calls = [(NAMES[0], (*args[:-1], wanted), walked) for walked in (False, True) for wanted in (True, False)]
    for name in NAMES:
        empty = with_activations(arguments(name, (2, 4, 3), 2, torch.float32), lambda t: t[:, :, :0])
        calls.append((name, empty, False))
    *results, first, second = interpret(calls, tmp_path)
    for both, rows in itertools.batched(results, 2) if hasattr(itertools, "batched") else (results[:2], results[2:]):
        assert rows[0].shape == (0,) and same(rows[1:], both[1:])
    assert all(not t.count_nonzero() for t in (*first, *second))


def test_strides_and_the_batch_change_no_bit(tmp_path):
    calls = []
    for name, walked in itertools.product(NAMES, (False, True)):
        args = arguments(name, (3, 4, 3, 5), 2, torch.float32)
        rows_apart = with_activations(args, lambda t: t.new_full((3, 4, 3, 6), torch.nan)[..., :5].copy_(t))
        of_more = with_activations(args, lambda t: t.new_full((3, 9, 3, 5), torch.nan)[:, 2:6].copy_(t))
        transposed = [
            t.t().contiguous().t() if isinstance(t, torch.Tensor) and t.dim() == 2 else t for t in args
        ]  # means and cotangents
        alone = [t[2:] if isinstance(t, torch.Tensor) and t.dim() > 1 else t for t in args]
        last = with_activations(args, lambda t: t.to(memory_format=torch.channels_last))
        mixed = [last[i] if i % 2 else t for i, t in enumerate(args)]
        calls += [(name, a, walked) for a in (args, args, rows_apart, of_more, transposed, alone, last, last, mixed)]
    results = interpret(calls, tmp_path)
    compare(calls, results)
    for start in range(0, len(results), 9):
        plain, again, apart, of_more, transposed, alone, last, last_again, _ = results[start : start + 9]
        assert all(same(other, plain) for other in (again, apart, of_more, transposed))
        assert same(alone, [t[2:] for t in plain])
        assert same(last, last_again)  # other blocks, so other sums, where the group is walked along


def test_blocks_hold_a_group_or_runs_of_it():
    assert module.choose_config(4, 784, False, 2) == (4, 1024, True, 8)
    assert module.choose_config(16, 1024, False, 2).WHOLE and not module.choose_config(16, 1024, False, 3).WHOLE
    assert not module.choose_config(16, 1024, False, 2, itemsize=8).WHOLE
    assert module.choose_config(64, 3136, False, 3)[:3] == (1, 2048, False)
    assert module.choose_config(96, 3136, True, 3)[:3] == (64, 32, False)
    assert module.choose_config(5, 300, False, 2)[:3] == (8, 512, True)


POINTER = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# (channels, positions, channels last) of groups: small, the largest that stay in registers, walked along.
GROUPS = (
    (2, 64, False),
    (4, 784, False),
    (8, 784, True),
    (4, 2048, False),
    (4, 4096, False),
    (16, 1024, False),
    (16, 1024, True),
    (64, 3136, False),
    (64, 3136, True),
)


def check_compiled(name, dtype, group, architecture, folder, absent=(), aligned=True):
    channels, N, last = group
    itemsize = 8 if dtype == torch.float64 else 4
    config = module.choose_config(channels, N, last, 2 if name == NAMES[0] else 3, itemsize)
    kernel = getattr(module, f"{name}_kernel")
    given = config._asdict() | {"INPUT_GRAD": True} | dict.fromkeys(absent)
    for p in kernel.arg_names:
        if p.endswith("_ptr"):
            small = p in ("weight_ptr", "a_ptr", "b_ptr", "mean_ptr", "rstd_ptr", "rows_ptr", "bias_rows_ptr")
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            given.setdefault(p, POINTER[wide if small else dtype])
    given |= {f"stride_{t}{'c' if last else 'n'}": 1 for t in "ugx"}
    given |= dict.fromkeys(("stride_ac", "stride_bc", "stride_w", "stride_mg", "stride_rg"), 1)
    given = {p: given.get(p, "i32") for p in kernel.arg_names}
    sizes = ("channels", "N", *(f"stride_{t}{d}" for t in "ugx" for d in "bcn"))
    divisible = [p for p, v in given.items() if isinstance(v, str) and (p.endswith("_ptr") or (aligned and p in sizes))]
    compiled = cross_compile(kernel, given, architecture, config.num_warps, folder, divisible)
    assert not compiled.spills, (group, config)
    assert compiled.shared <= SHARED_LIMIT[architecture]
    if aligned and channels * N >= 4096 and N % 16 == 0 and (channels % 16 == 0 or not last):
        widest = "ld.global.v2.b64" if dtype == torch.float64 else "ld.global.v4.b32"
        assert widest in compiled.global_loads()


@pytest.mark.parametrize("name", NAMES)
def test_compiles_for_one_gpu(name, tmp_path):
    for group in (GROUPS[3], GROUPS[8]):
        check_compiled(name, torch.bfloat16, group, 90, tmp_path)


@pytest.mark.slow
@pytest.mark.every_configuration
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", POINTER, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills_in_every_configuration(architecture, dtype, name, tmp_path):
    for group in GROUPS:
        check_compiled(name, dtype, group, architecture, tmp_path)
    check_compiled(name, dtype, GROUPS[1], architecture, tmp_path, aligned=False)
    for absent in (("weight_ptr",), ("u_ptr",), ("a_ptr", "b_ptr")):
        if name == NAMES[1] or absent == ("weight_ptr",):
            check_compiled(name, dtype, GROUPS[1], architecture, tmp_path, absent)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@OPS
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_on_a_gpu_equals_the_formulas(name, dtype):
    for (shape, groups), last in itertools.product(
        (*SHAPES, ((2, 64, 14, 14), 8), ((2, 64, 56, 56), 4), ((1, 40, 127, 33), 1)), (False, True)
    ):
        if last and len(shape) != 4:
            continue
        args = arguments(name, shape, groups, dtype)
        if last:
            args = with_activations(args, lambda t: t.to(memory_format=torch.channels_last))
        cuda = [t.cuda() if isinstance(t, torch.Tensor) else t for t in args]
        first, second = (getattr(module, name)(*cuda) for _ in range(2))
        assert same(first, second)
        compare([(name, args, False)], [[t.cpu() for t in first]])


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
