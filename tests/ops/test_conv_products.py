"""Convolutions themselves and their transposes, with vectors along positions: both ops, and the choice of them."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from bootgrad import planning
from bootgrad.ops.backends import eager_convolution
from bootgrad.ops.convolution import ConvProduct
from bootgrad.ops.product import Output

OPS = torch.ops.bootgrad
# B, C, O, S, K, stride, padding, dilation, groups
SHAPES = {
    "few channels": (3, 1, 32, (28, 28), (5, 5), (1, 1), (2, 2), (1, 1), 1),
    "depthwise, stride 2": (3, 32, 32, (28, 28), (3, 3), (2, 2), (1, 1), (1, 1), 32),
    "depthwise, odd sizes": (2, 5, 5, (7, 9), (3, 3), (2, 2), (1, 1), (1, 1), 5),
    "depthwise, small planes": (17, 20, 20, (2, 3), (3, 3), (1, 1), (1, 1), (1, 1), 20),
    "groups": (2, 12, 24, (6, 11), (3, 3), (1, 1), (1, 1), (1, 1), 4),
    "1x1": (3, 7, 18, (14, 14), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 with stride": (2, 6, 4, (9, 8), (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "even padding, stride 2": (2, 3, 4, (33, 34), (5, 4), (2, 2), (2, 2), (1, 1), 1),
    "pixels that no tap meets": (2, 3, 4, (11, 13), (2, 2), (4, 5), (0, 1), (1, 1), 1),
    "stride 3 and 2": (2, 3, 4, (10, 37), (4, 3), (3, 2), (1, 2), (1, 1), 1),
    "dilation": (2, 3, 5, (9, 12), (3, 2), (1, 2), (2, 1), (2, 3), 1),
    "stride beyond the image": (2, 3, 4, (3, 4), (1, 2), (7, 9), (0, 0), (1, 1), 1),
    "more padding than image": (2, 2, 3, (1, 2), (3, 3), (1, 2), (4, 5), (1, 1), 1),
    "one dimension": (3, 4, 6, (40,), (5,), (2,), (2,), (1,), 2),
    "three dimensions": (2, 3, 4, (5, 6, 7), (2, 3, 3), (1, 2, 2), (1, 0, 1), (2, 1, 1), 1),
    "nothing goes in": (2, 0, 3, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def case(B, C, O, S, K, stride, padding, dilation, groups):  # noqa: E741
    torch.manual_seed(0)
    x, weight, bias = torch.randn(B, C, *S), torch.randn(O, C // groups, *K), torch.randn(O)
    gy = torch.randn(B, O, *planning.ConvLayer(B, C, S, O, K, stride, padding, dilation, groups).P)
    return x, weight, bias, gy, (stride, padding, dilation, groups)


def in_float64(x, weight, bias, gy, geometry):
    """(y, gx)."""
    leaf = x.double().requires_grad_()
    stride, padding, dilation, groups = geometry
    zeros = (0,) * len(stride)
    y = torch.convolution(
        leaf, weight.double(), None if bias is None else bias.double(), stride, padding, dilation, False, zeros, groups
    )
    return y, torch.autograd.grad(y, leaf, gy.double())[0]


def close(ours, expected):
    assert ours.dtype == torch.float32 and ours.shape == expected.shape and ours.is_contiguous()
    assert (ours - expected).norm() <= 1e-6 * expected.norm()


@EVERY_SHAPE
@pytest.mark.parametrize("backend", ["compiled", "eager"])
def test_against_torch_in_float64(shape, backend):
    x, weight, bias, gy, geometry = case(*shape)
    output = OPS.conv_output if backend == "compiled" else eager_convolution.conv_output
    input_grad = OPS.conv_input_grad if backend == "compiled" else eager_convolution.conv_input_grad
    if x.numel():
        for shift in (bias, None):
            y, gx = in_float64(x, weight, shift, gy, geometry)
            close(output(x, weight, shift, *geometry), y)
        close(input_grad(gy, weight, x.shape[2:], *geometry), gx)
    elif backend == "compiled":
        close(output(x, weight, bias, *geometry), bias.view(-1, 1, 1).expand(gy.shape))


@EVERY_SHAPE
def test_results_do_not_depend_on_threads_or_layout(shape):
    x, weight, bias, gy, geometry = case(*shape)
    threads, out = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            if n == 3:
                x, gy, weight = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, gy, weight))
            out.append(
                [OPS.conv_output(x, weight, bias, *geometry), OPS.conv_input_grad(gy, weight, x.shape[2:], *geometry)]
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))


@EVERY_SHAPE
def test_infinite_entries_stay_in_their_windows(shape):
    """Neither do margins nor what lies between planes enter."""
    x, weight, _, gy, geometry = case(*shape)
    if not x.numel():
        return
    weight = weight.abs() + 0.1
    for t in (x, gy):
        t.view(-1)[:: max(7, t.numel() // 5)] = torch.inf
    y, gx = in_float64(x, weight, None, gy, geometry)
    ours = OPS.conv_output(x, weight, None, *geometry), OPS.conv_input_grad(gy, weight, x.shape[2:], *geometry)
    for mine, expected in zip(ours, (y, gx), strict=True):
        assert torch.equal(mine.isfinite(), expected.isfinite())


def test_schemas_and_fakes():
    x, weight, bias, gy, geometry = case(*SHAPES["groups"])
    geometry = [list(g) if isinstance(g, tuple) else g for g in geometry]
    opcheck(OPS.conv_output.default, (x, weight, bias, *geometry))
    opcheck(OPS.conv_input_grad.default, (gy, weight, list(x.shape[2:]), *geometry))
    assert OPS.conv_output(x[:0], weight, bias, *geometry).shape == (0, *gy.shape[1:])
    assert OPS.conv_input_grad(gy[:0], weight, x.shape[2:], *geometry).shape == (0, *x.shape[1:])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 5)}, "weight must have 3 dimensions"),
        ({"x": torch.zeros(2, 3, 2, 2), "padding": [0, 0]}, "as large as the kernel"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, "weight must have shape"),
        ({"weight": torch.zeros(4, 3, 3, 3, dtype=torch.float64)}, "weight must have dtype"),
        ({"bias": torch.zeros(3)}, "bias must have shape"),
        ({"padding": [1]}, "padding"),
        ({"groups": 2}, "groups must divide"),
    ],
)
@pytest.mark.parametrize("backend", ["compiled", "fake"])
def test_what_does_not_fit_is_refused(change, message, backend):
    inputs = {
        "x": torch.zeros(2, 3, 5, 5),
        "weight": torch.zeros(4, 3, 3, 3),
        "bias": None,
        "padding": [1, 1],
        "groups": 1,
    }
    inputs |= change
    device = "cpu" if backend == "compiled" else "meta"
    tensors = [t if t is None else t.to(device) for t in (inputs["x"], inputs["weight"], inputs["bias"])]
    with pytest.raises(RuntimeError, match=message):
        OPS.conv_output(*tensors, [1, 1], inputs["padding"], [1, 1], inputs["groups"])


@pytest.mark.parametrize("backend", ["compiled", "fake"])
@pytest.mark.parametrize(
    "size, groups, message", [([5], 1, "size must have"), ([6, 5], 1, "gy must"), ([5, 5], 3, "groups")]
)
def test_a_size_that_does_not_fit_is_refused(size, groups, message, backend):
    device = "cpu" if backend == "compiled" else "meta"
    gy, weight = torch.zeros(2, 4, 5, 5, device=device), torch.zeros(4, 3, 3, 3, device=device)
    with pytest.raises(RuntimeError, match=message):
        OPS.conv_input_grad(gy, weight, size, [1, 1], [1, 1], [1, 1], groups)


@pytest.mark.parametrize(
    "shape, output, input_grad",
    [
        ((16, 1, (28, 28), 32, (3, 3), (1, 1), (1, 1), (1, 1), 1), "planes", "planes"),
        ((15, 1, (28, 28), 32, (3, 3), (1, 1), (1, 1), (1, 1), 1), "default", "default"),
        ((16, 32, (28, 28), 32, (3, 3), (2, 2), (1, 1), (1, 1), 32), "planes", "planes"),
        ((16, 64, (32, 32), 128, (1, 1), (2, 2), (0, 0), (1, 1), 1), "planes", "planes"),
        ((16, 3, (32, 32), 64, (3, 3), (2, 2), (1, 1), (1, 1), 1), "planes", "planes"),
        ((16, 16, (32, 32), 64, (3, 3), (2, 2), (1, 1), (1, 1), 1), "default", "default"),
        ((16, 512, (8, 8), 64, (1, 1), (1, 1), (0, 0), (1, 1), 1), "default", "planes"),
        ((64, 16, (8, 8), 16, (3, 3), (1, 1), (1, 1), (1, 1), 1), "minimal_filtering", "minimal_filtering"),
        ((64, 16, (8, 8), 16, (3, 3), (1, 1), (3, 3), (1, 1), 1), "default", "default"),
    ],
    ids=str,
)
def test_which_layers_go_that_way(shape, output, input_grad):
    B, C, S, O, *geometry = shape  # noqa: E741
    layer = planning.ConvLayer(B, C, S, O, *geometry)
    assert planning.cpu_product(layer, "output") == output
    assert planning.cpu_product(layer, "input_grad") == input_grad


def test_products_go_that_way_unless_the_switch_is_set(monkeypatch):
    x, weight, bias, gy, geometry = case(16, *SHAPES["few channels"][1:])
    product = ConvProduct((5, 5), *geometry)
    y, gx = in_float64(x, weight, bias, gy, geometry)
    close(product.output(x, weight, bias), y)
    close(product.input_grad(gy, weight, x), gx)
    called = calls(lambda: (product.output(x, weight, bias), product.input_grad(gy, weight, x)))
    assert called == ["conv_output", "conv_input_grad"]
    doubles = x.double(), weight.double()
    assert calls(lambda: product.output(*doubles)) == ["convolution"]
    monkeypatch.setattr("bootgrad.ops.convolution._OWN_PRODUCTS", False)
    called = calls(lambda: (product.output(x, weight, bias), product.input_grad(gy, weight, x)))
    assert called == ["convolution", "convolution_backward"]


def calls(function):
    """The names of the ops that a function calls."""
    names = []

    class Listing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name.split("::")[1])
            return func(*args, **(kwargs or {}))

    with Listing():
        function()
    return names


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("path", ["direct", "gram"])
@pytest.mark.parametrize(
    "shape", ["few channels", "depthwise, stride 2", "groups", "stride 3 and 2", "1x1", "nothing goes in"]
)
@pytest.mark.parametrize("backend", ["compiled", "eager"])
def test_visits(backend, shape, path, biased):
    """Against sums of squares of the rows, made in float64 and differentiated."""
    x, weight, bias, gy, geometry = case(*SHAPES[shape])
    product, scale = ConvProduct(weight.shape[2:], *geometry), -0.3
    visit = OPS.conv_visit if backend == "compiled" else eager_convolution.conv_visit
    for center, bias_center in ((None, None), (weight, None), (None, bias), (weight, bias)):
        if bias_center is not None and not biased:
            continue
        leaves = x_leaf, gy_leaf = x.double().requires_grad_(), gy.double().requires_grad_()
        zero = 0 * (x_leaf.sum() + gy_leaf.sum())
        G, b = product.rows(*leaves), gy_leaf.flatten(2).sum(2)
        s = (G - (0 if center is None else center)).flatten(1).square().sum(1) + zero
        if biased:
            s = s + (b - (0 if bias_center is None else bias_center)).square().sum(1)
        exact = s, *torch.autograd.grad(scale * s.sum(), leaves, retain_graph=True), G.sum(0), b
        for mask in itertools.product([False, True], repeat=3):
            call = x, gy, center, biased, bias_center, weight.shape[2:], *geometry, path, list(mask), scale
            for ours, expected, wanted in zip(visit(*call), exact, (True, *mask, biased), strict=True):
                assert ours.dtype == torch.float32
                if wanted:
                    assert ours.shape == expected.shape and (ours - expected).norm() <= 1e-5 * expected.norm()
                else:
                    assert ours.numel() == 0


def test_a_visit_in_half_precision():
    x, weight, bias, gy, geometry = case(*SHAPES["groups"])
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        rest = weight, True, bias, weight.shape[2:], *geometry, "direct", [True, True, True], 0.5
        for ours, exact in zip(
            OPS.conv_visit(x.to(dtype), gy.to(dtype), *rest),
            OPS.conv_visit(x.to(dtype).float(), gy.to(dtype).float(), *rest),
            strict=True,
        ):
            assert ours.dtype == (dtype if ours.shape in (x.shape, gy.shape) else torch.float32)
            assert (ours - exact).norm() <= tolerance * exact.norm()


def test_schema_of_visits():
    x, weight, bias, gy, geometry = case(*SHAPES["groups"])
    geometry = [list(g) if isinstance(g, tuple) else g for g in geometry]
    for mask, biased in (([True, True, False], True), ([False, True, True], False)):
        call = x, gy, weight, biased, bias if biased else None, list(weight.shape[2:]), *geometry, "direct", mask, 0.5
        opcheck(OPS.conv_visit.default, call)
    for backend in (OPS.conv_visit, eager_convolution.conv_visit):
        with pytest.raises(RuntimeError, match="biased must be true"):
            backend(x, gy, None, False, bias, weight.shape[2:], *geometry, "direct", [True] * 3, 1.0)
        with pytest.raises(RuntimeError, match="bias_center must have shape"):
            backend(x, gy, None, True, bias[1:], weight.shape[2:], *geometry, "direct", [True] * 3, 1.0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_tangents_are_not_lost():
    """Of a backward pass without a graph, too: they raise."""
    x, weight, _, gy, geometry = case(16, *SHAPES["few channels"][1:])
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = Output.apply(ConvProduct((5, 5), *geometry), *leaves)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        torch.autograd.grad(y, leaves, forward_ad.make_dual(gy, torch.randn_like(gy)))
