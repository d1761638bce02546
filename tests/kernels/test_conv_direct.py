"""The direct path's Triton kernels without a GPU: interpreted against float64, and with one on it."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bootgrad import planning
from bootgrad.ops import schema
from bootgrad.ops.backends import triton as backend

from ..ops.cases import (
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
    variants,
)
from .interpreter import interpret_ops
from .loading import load_kernel

layers = load_kernel("layer")

# B, C, S, O, K, stride, padding, dilation, groups
SIZES = {
    "rows of several taps": (3, 5, (6, 7), 7, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "blocks of one tap": (2, 33, (3, 4), 17, (2, 3), (1, 1), (1, 1), (1, 1), 1),
    "strided and dilated": (2, 6, (9, 8), 5, (3, 2), (2, 3), (2, 0), (2, 1), 1),
    "strides pass over pixels": (2, 4, (7, 6), 3, (1, 1), (3, 2), (0, 0), (1, 1), 1),
    "grouped": (2, 8, (4, 5), 12, (2, 2), (1, 1), (0, 1), (1, 1), 2),
    "depthwise": (2, 5, (6, 5), 5, (3, 3), (1, 1), (1, 1), (1, 1), 5),
    "multiplied depthwise, strided": (2, 3, (6, 5), 9, (3, 2), (2, 1), (1, 1), (1, 2), 3),
    "1d": (2, 6, (23,), 5, (5,), (2,), (2,), (3,), 1),
    "3d": (2, 4, (4, 3, 5), 6, (3, 2, 2), (1, 2, 1), (1, 0, 1), (1, 1, 2), 2),
    "more kernel than image": (1, 3, (2, 2), 4, (3, 3), (2, 1), (3, 2), (1, 1), 1),
    "no samples": (0, 4, (3, 3), 6, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no positions": (2, 4, (2, 3), 6, (3, 3), (1, 1), (0, 0), (1, 1), 1),
}
LINEAR_SIZES = [(2, 35, 33, 18), (1, 1, 5, 3), (3, 9, 1, 1), (0, 5, 4, 3), (2, 0, 4, 3)]
LAYOUTS = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "samples last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "cut out": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
}


def calls(names, case, every=False):
    """(name, variant) of each op: two variants of it, or all."""
    return [(name, variant) for name in names for variant in variants(name, case)[: None if every else 2]]


def interpret_and_check(cases, folder, path="direct", **settings):
    results = interpret_ops([(name, arguments(name, case, path)) for name, case in cases], folder, **settings)
    for (name, case), ours in zip(cases, results, strict=True):
        check("compiled", name, case, ours, path)
    return results


def test_interpreted_equals_the_oracle(tmp_path):
    cases = [c for label, sizes in SIZES.items() for c in calls(CONV_OPS, conv_case(*sizes, torch.float32))]
    cases += [c for sizes in LINEAR_SIZES for c in calls(LINEAR_OPS, linear_case(*sizes, torch.float32))]
    interpret_and_check(cases, tmp_path)


def test_half_precision_every_mask_and_repetitions(tmp_path):
    """Bfloat16 is left to compilation and GPUs: in the interpreter its products are wrong."""
    geometry = (3, 6, (5, 4), 8, (3, 2), (2, 1), (1, 0), (1, 1), 2)
    cases = calls(CONV_OPS, conv_case(*geometry, torch.float16)) + calls(
        LINEAR_OPS, linear_case(2, 9, 7, 5, torch.float16)
    )
    cases += calls(["conv_sq_norms_with_grad"], conv_case(*geometry, torch.float32), every=True)
    cases += calls(["linear_sq_norms_with_grad"], linear_case(2, 9, 7, 5, torch.float32), every=True)

    whole = conv_case(*geometry, torch.float32)
    alone = whole.but(x=whole.x[1:2], gy=whole.gy[1:2], w=whole.w[1:2])
    names = ["conv_statistics", "conv_sq_norms_with_grad"]
    repeated = [(name, case) for case in (whole, whole, alone) for name in names]
    laid_out = [
        (name, whole.but(x=layout(whole.x), gy=layout(whole.gy), center=layout(whole.center)))
        for layout in LAYOUTS.values()
        for name in names
    ]
    results = interpret_and_check(cases + repeated + laid_out, tmp_path)[len(cases) :]
    first, second, one, *others = (results[i : i + 2] for i in range(0, len(results), 2))
    assert all(map(torch.equal, first[0] + first[1], second[0] + second[1]))
    for statistics, with_grad in others:  # the same numbers in the same order, wherever they lie; but for torch's sum
        assert all(map(torch.equal, first[0][:3] + first[1], statistics[:3] + with_grad))
    for of_batch, of_one, per_sample in zip(first, one, ((1, 2, 3), (0, 1, 2)), strict=True):
        assert all(torch.equal(of_batch[i][1:2], of_one[i]) for i in per_sample)


@pytest.mark.parametrize("workspace", [1, 4000])
def test_segments_and_a_workspace_that_holds_few_samples(tmp_path, workspace):
    """Positions in three segments, or in the two whose gradients are allowed; one sample in the workspace, or two."""
    sizes = [(3, 5, (6, 7), 7, (3, 3), (1, 1), (1, 1), (1, 1), 1), (3, 4, (9, 5), 4, (3, 3), (1, 1), (1, 1), (1, 1), 4)]
    names = [n for n in CONV_OPS if n != "conv_jvp"] if workspace == 1 else ["conv_sq_norms_with_grad"]
    cases = [c for size in sizes for c in calls(names, conv_case(*size, torch.float32))]
    settings = dict(conv_reduce__SEGMENT=16, planning__GPU_WORKSPACE_BYTES=workspace)
    if workspace > 1:
        settings["conv_reduce__SEGMENTS_BYTES"] = 3 * 4 * 7 * 45  # with their sum, of the larger layer
    interpret_and_check(cases, tmp_path, **settings)


def test_segments_of_a_large_gradient_fit_their_budget():
    reduce = load_kernel("conv_reduce")
    for O, R, T, expected in ((700, 800, 9000, 3), (768, 3072, 9000, 2), (1024, 4096, 9000, 1), (4096, 4096, 2**15, 1)):  # noqa: E741
        gy = torch.ones(1).expand(1, O, 1, 1, T)
        assert reduce.segments_of(gy, O * R) == expected
        assert expected == 1 or 4 * O * R * (expected + 1) <= reduce.SEGMENTS_BYTES


def test_layouts_of_weights(tmp_path):
    """Tiles and lanes read w each in their own kernel."""
    conv = [conv_case(*SIZES[size], torch.float32) for size in ("rows of several taps", "depthwise")]
    linear = linear_case(3, 35, 5, 4, torch.float32)
    cases = [
        (name, case.but(w=layout(case.w)))
        for layout in WEIGHT_LAYOUTS.values()
        for name, case in (*(("conv_weighted_sum", c) for c in conv), ("linear_weighted_sum", linear))
    ]
    interpret_and_check(cases, tmp_path)


def test_deviations_of_samples_that_nearly_agree(tmp_path):
    """The center is subtracted before squaring: ‖G_i‖² − 2⟨G_i, c⟩ + ‖c‖² would have no digit left."""
    cases = []
    for case, names in (
        (conv_case(3, 6, (5, 4), 8, (3, 2), (1, 2), (1, 0), (1, 1), 2, torch.float32), CONV_OPS),
        (conv_case(3, 4, (5, 4), 4, (3, 2), (1, 2), (1, 0), (1, 1), 4, torch.float32), CONV_OPS),
        (linear_case(3, 9, 7, 5, torch.float32), LINEAR_OPS),
    ):
        case = case.but(x=case.x[:1] + 1e-4 * case.x, gy=case.gy[:1] + 1e-4 * case.gy, w=None)
        mean = exact(names[3], case)[0] / 3
        cases += [(name, case.but(center=mean.float())) for name in names if "center" in schema.SCHEMAS[name]]
    interpret_and_check(cases, tmp_path)


def test_the_gram_path_s_centers_and_sums(tmp_path):
    names = [n for n in (*CONV_OPS, *LINEAR_OPS) if "str path" in schema.SCHEMAS[n]]
    conv = conv_case(2, 4, (3, 3), 6, (3, 2), (2, 1), (1, 0), (1, 1), 2, torch.float32)
    cases = [(n, conv) for n in names if n in CONV_OPS] + calls(["conv_statistics"], conv)[1:]
    cases += [(n, linear_case(2, 5, 9, 7, torch.float32)) for n in names if n in LINEAR_OPS]
    cases += calls(["linear_statistics"], linear_case(2, 0, 4, 3, torch.float32))
    interpret_and_check(cases, tmp_path, "gram")


@pytest.mark.slow
def test_interpreted_equals_the_oracle_on_drawn_convolutions(tmp_path):
    from hypothesis import HealthCheck, given, settings

    drawn = []

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(sizes=conv_shapes())
    def draw(sizes):
        drawn.append(sizes)

    draw()
    cases = [(name, conv_case(*sizes, torch.float32)) for sizes in drawn for name in CONV_OPS]
    for start in range(0, len(cases), 120):
        interpret_and_check(cases[start : start + 120], tmp_path)


def test_double_precision_is_left_to_others():
    with pytest.raises(RuntimeError, match="take no float64"):
        backend.linear_jvp(*arguments("linear_jvp", linear_case(2, 3, 4, 5, torch.float64)))


def test_canonical_forms_are_views_and_come_back():
    x, gy = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    a, b, layer = layers.linear_layer(x, gy)
    assert (a.shape, b.shape) == ((2, 3, 1, 1, 5), (2, 4, 1, 1, 5)) and a.data_ptr() == x.data_ptr()
    assert layers.strides(a) == (15, 1, 0, 0, 3)
    assert torch.equal(layer.as_op(layer.empty_like(a).copy_(a), x.shape), x)

    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    gy = torch.randn(2, 8, 5, 6)
    a, b, layer = layers.conv_layer(x, gy, (1, 1), (1, 1), (0, 0), (1, 1), 2)
    assert a.shape == (2, 4, 1, 1, 30) and a.data_ptr() == x.data_ptr() and layer == layers.Layer(groups=2)
    assert layers.conv_layer(x[..., :3], gy[..., :3], (1, 1), (1, 1), (0, 0), (1, 1), 2)[0].shape == (2, 4, 1, 5, 3)
    a, b, layer = layers.conv_layer(x, gy, (3, 3), (1, 1), (1, 1), (1, 1), 2)
    assert a.shape == (2, 4, 1, 5, 6) and layer.kernel == (1, 3, 3) and layer.padding == (0, 1, 1)
    assert layer.as_op(layer.empty_like(a), x.shape).is_contiguous()
    weight = torch.randn(8, 2, 3, 3)
    rows = layer.weight_rows(weight)
    assert rows[1, 5 * 2 + 1] == weight[1, 1, 1, 2] and torch.equal(layer.weight(rows, weight.shape), weight)
    with pytest.raises(ValueError, match="one to three dimensions of space"):
        layers.conv_layer(torch.randn(1, 1, 2, 2, 2, 2), gy, (1,) * 4, (1,) * 4, (0,) * 4, (1,) * 4, 1)


def test_planning_tells_the_workspace():
    reduce = load_kernel("conv_reduce")
    assert (planning.GPU_SEGMENT, planning.GPU_WORKSPACE_BYTES) == (reduce.SEGMENT, reduce.SEGMENTS_BYTES)
    cases = [(5, 700, torch.float32), (5, 700, torch.bfloat16), (9000, 700, torch.float32), (9000, 9000, torch.float32)]
    for T, I, dtype in cases:  # noqa: E741
        layer, entries = planning.LinearLayer(3, T, I, 800), 800 * I
        segments = reduce.segments_of(torch.ones(1).expand(3, 800, 1, 1, T), entries)
        itemsize = (2 if dtype == torch.bfloat16 else 4) + (4 * segments if segments > 1 else 0)
        allocated = min(3, reduce.samples_at_once(entries, itemsize, planning.GPU_WORKSPACE_BYTES)) * entries * itemsize
        assert planning.gpu_workspace(layer, "grad", str(dtype).removeprefix("torch.")) == allocated
        assert allocated <= planning.GPU_WORKSPACE_BYTES
    assert planning.gpu_workspace(planning.LinearLayer(3, 5, 700, 800), "norms") == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
def test_on_a_gpu_equals_the_oracle(dtype):
    from ..ops.test_raw_ops import CONV_SIZES
    from ..ops.test_raw_ops import LINEAR_SIZES as LARGER

    cases = [
        c for s in (*SIZES.values(), *CONV_SIZES.values()) for c in calls(CONV_OPS, conv_case(*s, dtype), every=True)
    ]
    cases += [c for s in (*LINEAR_SIZES, *LARGER) for c in calls(LINEAR_OPS, linear_case(*s, dtype), every=True)]
    cases += [c for s in ((2, 9000, 33, 70),) for c in calls(LINEAR_OPS, linear_case(*s, dtype))]
    for name, case in cases:
        given = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments(name, case)]
        ours, again = (getattr(backend, name)(*given) for _ in range(2))
        ours, again = (r if isinstance(r, tuple) else (r,) for r in (ours, again))
        assert all(map(torch.equal, ours, again))
        on_cpu = tuple(t.cpu() for t in ours)
        if dtype == torch.float32:
            check("compiled", name, case, on_cpu)
        for a, b in zip(on_cpu, exact(name, case), strict=True):
            assert (a.double() - b).norm() <= 2e-2 * b.norm() + 1e-6
