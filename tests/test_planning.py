"""The cost model against counts made by hand, and against the savings that the design promises."""

import ast
import dataclasses
import math
import pathlib
import sys
import timeit

import pytest
import torch
import torch.nn.functional as F

from bootgrad import planning
from bootgrad.planning import ConvLayer, LinearLayer, choose_path, cost


def conv(C, O, S, K=3, stride=1, padding=None, dilation=1, groups=1, n=2):  # noqa: E741
    padding = K // 2 if padding is None else padding
    return ConvLayer(8, C, (S,) * n, O, *((v,) * n for v in (K, stride, padding, dilation)), groups)


def test_counts_of_a_linear_layer():
    layer = LinearLayer(B=8, T=5, I=3, O=4)
    expected = {
        ("direct", "norms", False): 5 * 4 * 3,
        ("direct", "norms", True): 60,
        ("direct", "grad", False): 3 * 60,
        ("direct", "grad", True): 3 * 60,
        ("direct", "statistics", True): 60,
        ("gram", "norms", False): 25 * 7 / 2,
        ("gram", "norms", True): 25 * 7 / 2 + 60,
        ("gram", "grad", False): 25 * 7 * 3 / 2,
        ("gram", "grad", True): 25 * 7 * 3 / 2 + 2 * 60,
        ("gram", "statistics", False): 25 * 7 / 2 + 60,
        ("gram", "statistics", True): 25 * 7 / 2 + 2 * 60,
    }
    assert {key: cost(layer, *key).operations for key in expected} == expected
    assert cost(layer, "gram", "grad", True, summed=True).operations == 25 * 7 * 3 / 2 + 3 * 60
    assert cost(layer, "gram", "norms", summed=True) == cost(layer, "gram", "statistics")
    assert cost(layer, "direct", "grad", summed=True) == cost(layer, "direct", "grad")
    assert cost(layer, "direct").bytes == 4 * 4 * 3
    assert cost(layer, "gram", itemsize=8).bytes == 8 * 2 * 25


def test_counts_of_one_position():
    layer = LinearLayer(B=8, T=1, I=300, O=400)
    assert layer.paths == ("rank1",)
    assert choose_path(layer, "grad", True) == "rank1"
    assert cost(layer, "rank1").operations == 700
    assert cost(layer, "rank1", "grad").operations == 1400
    assert cost(layer, "rank1", "grad", True).operations == 1400 + 2 * 120_000
    assert cost(layer, "rank1", "statistics").operations == 700 + 120_000
    assert cost(layer, "rank1").bytes == 0


def test_counts_of_a_convolution():
    layer = ConvLayer(2, 6, (5, 7), 4, (3, 2), (2, 1), (1, 0), (1, 2), 2)
    T, N, K, M = 3 * 5, 35, 6, 3
    assert (layer.T, layer.weight_entries, layer.forward_operations) == (T, 4 * M * K, T * 4 * M * K)
    pixels = (T**2 * 4 + N**2 * 6) / 2 + 2 * T**2 * K / 2
    patches = T**2 * (4 + 6 * K) / 2
    assert layer.pixel_gram(False)[0] == pixels
    assert layer.patch_gram(False)[0] == patches
    assert layer.pixel_gram(True)[0] == pixels + T**2 * 4 + N**2 * 6 + T**2 * K
    assert layer.patch_gram(True)[0] == 3 * patches
    assert layer.pixel_gram(False)[1] == 2 * (2 * T**2 + N**2)
    assert cost(layer, "direct", "grad", True).operations == 3 * layer.forward_operations
    assert cost(layer, "direct").bytes == 4 * layer.weight_entries


@pytest.mark.parametrize("channels, size, saved", [(128, 16, 4.3), (256, 8, 4.9), (256, 14, 4.9)])
def test_the_pixel_gram_saves_what_the_design_says(channels, size, saved):
    layer = conv(channels, channels, size)
    assert layer.pixels_first
    better = min(cost(layer, "direct").operations, layer.patch_gram(False)[0])
    assert better / cost(layer, "gram").operations == pytest.approx(saved, abs=0.06)


@pytest.mark.parametrize("layer, units", [(conv(64, 64, 7), 0.25), (conv(32, 64, 14), 1.6)])
def test_norms_and_derivatives_cost_the_units_that_the_design_says(layer, units):
    assert cost(layer, "gram", "grad").operations / layer.forward_operations == pytest.approx(units, rel=0.08)


def test_patches_where_strides_leave_pixels_unused():
    assert not conv(64, 128, 28, K=1, stride=2, padding=0).pixels_first
    assert not conv(64, 128, 28, stride=2).pixels_first
    assert conv(64, 64, 28).pixels_first


@pytest.mark.parametrize("purpose", planning.PURPOSES)
def test_choices_at_the_ends(purpose):
    """Many positions and few channels: direct. Few positions and many channels: Gram."""
    assert choose_path(conv(3, 64, 224, K=7, stride=2), purpose) == "direct"
    assert choose_path(conv(512, 512, 3), purpose) == "gram"
    assert choose_path(conv(512, 512, 14, groups=512), purpose) == "direct"
    assert choose_path(LinearLayer(8, 2048, 64, 64), purpose) == "direct"
    assert choose_path(LinearLayer(8, 8, 4096, 4096), purpose) == "gram"


@pytest.mark.parametrize("purpose", planning.PURPOSES)
@pytest.mark.parametrize("centered", [False, True])
def test_the_choice_is_the_least_time(purpose, centered):
    layers = [conv(c, o, s, k) for c in (3, 64, 512) for o in (16, 256) for s in (4, 14, 32) for k in (1, 3)]
    layers += [LinearLayer(4, t, i, o) for t in (2, 16, 256) for i in (8, 512) for o in (64, 4096)]
    for layer in layers:
        times = {path: cost(layer, path, purpose, centered).time for path in layer.paths}
        assert times[choose_path(layer, purpose, centered)] == min(times.values())


def test_a_sum_that_is_wanted_anyway_favours_direct():
    layer = conv(64, 64, 14)
    assert choose_path(layer, "norms") == "gram"
    assert choose_path(layer, "norms", summed=True) == choose_path(layer, "statistics") == "direct"


def test_more_positions_never_favour_gram():
    for purpose in planning.PURPOSES:
        chosen = [choose_path(LinearLayer(8, 2**k, 512, 512), purpose) for k in range(1, 14)]
        assert chosen == sorted(chosen, reverse=True), chosen  # "gram" up to some T, "direct" from there on
        assert chosen[-1] == "direct"


def test_choosing_takes_microseconds():
    layer = conv(64, 64, 14)

    def choose():
        return choose_path(dataclasses.replace(layer), "grad", True)

    assert min(timeit.repeat(choose, number=200, repeat=5)) / 200 < 100e-6


def test_layers_are_hashable_and_compare_by_value():
    assert len({conv(3, 4, 5), conv(3, 4, 5), LinearLayer(1, 2, 3, 4), LinearLayer(1, 2, 3, 4)}) == 2


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="purpose must be one of norms, grad, statistics, applied; got 'norm'"):
        choose_path(LinearLayer(1, 2, 3, 4), "norm")
    with pytest.raises(ValueError, match="purpose must be one of"):
        cost(LinearLayer(1, 2, 3, 4), "direct", "norm")
    with pytest.raises(ValueError, match="path of linear 3→4, T = 2 must be one of direct, gram; got 'rank1'"):
        cost(LinearLayer(1, 2, 3, 4), "rank1")


def test_gpu_backends_follow_the_table_and_what_is_usable():
    backend = planning.gpu_backend
    assert backend("conv_sq_norms", "bfloat16") == "triton"
    assert backend("conv_sq_norms", "bfloat16", usable=("cuda",)) == "cuda"
    assert backend("conv_sq_norms", "float64") == "cuda"
    assert backend("conv_sq_norms", "float64", usable=("triton",)) == "eager"
    assert backend("linear_rank1_sq_norms", "float32") == "cuda"
    assert backend("linear_rank1_sq_norms", "float32", usable=["triton"]) == "triton"
    assert backend("group_norm_backward", "float16", "triton", ["cuda"]) == "eager"
    assert backend("linear_jvp", "float32", "cuda") == "cuda"
    assert backend("linear_jvp", "float32", "eager") == "eager"
    assert backend("linear_jvp", "float8_e4m3fn") == backend("unheard_of", "float32") == "eager"


def test_gpu_workspaces_hold_samples_up_to_a_budget():
    budget, entries = planning.GPU_WORKSPACE_BYTES, 64 * 64 * 9
    workspace = planning.gpu_workspace
    assert workspace(conv(64, 64, 14), "norms") == workspace(conv(64, 64, 14), "statistics") == 0
    assert workspace(conv(64, 64, 14), "grad") == 8 * 4 * entries
    assert workspace(conv(64, 64, 14), "grad", "bfloat16") == 8 * 2 * entries
    many = dataclasses.replace(conv(64, 64, 14), B=10**6)
    assert budget - 4 * entries < workspace(many, "grad") <= budget
    assert workspace(LinearLayer(8, 5, 4096, 4096), "grad") == 4 * 4096**2  # one sample is more than the budget
    assert workspace(conv(64, 64, 80), "norms") == 8 * 2 * 4 * entries  # 6400 positions: two segments
    assert workspace(dataclasses.replace(many, B=0)) == workspace(LinearLayer(8, 5, 0, 4)) == 0


def test_imports_the_standard_library_only():
    tree = ast.parse(pathlib.Path(planning.__file__).read_text(encoding="utf-8"))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {"." * n.level + (n.module or "") for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {n.split(".")[0] for n in names} <= sys.stdlib_module_names


def test_output_positions():
    layer = ConvLayer(1, 1, (9, 1), 1, (3, 1), (2, 1), (1, 0), (2, 1), 1)
    assert layer.T == math.prod([(9 + 2 - 2 * 2 - 1) // 2 + 1, 1])


@pytest.mark.parametrize(
    ("S", "K", "stride", "padding", "dilation"),
    [((7,), (3,), (1,), (1,), (1,)), ((9, 4), (3, 5), (2, 1), (1, 2), (2, 1)), ((2,), (7,), (3,), (6,), (1,))],
)
def test_the_share_of_products_with_pixels(S, K, stride, padding, dilation):
    layer = planning.ConvLayer(1, 1, S, 1, K, stride, padding, dilation)
    convolve = (F.conv1d, F.conv2d)[len(S) - 1]
    met = convolve(torch.ones(1, 1, *S), torch.ones(1, 1, *K), None, stride, padding, dilation)
    assert layer.unpadded == pytest.approx(met.sum().item() / (met.numel() * math.prod(K)))
