"""3×3 convolutions by minimal filtering: both ops, the choice of them, and steps that go by them, against float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

from bootgrad import planning
from bootgrad.ops.backends import eager_convolution
from bootgrad.ops.convolution import ConvProduct

from ..methods.steps import gradient_of, losses_of, regularizer

OPS = torch.ops.bootgrad
# B, C, O, (H, W), padding
SHAPES = {
    "vectors of channels": (5, 32, 16, (8, 6), (1, 1)),
    "odd sizes, few channels": (3, 5, 7, (7, 9), (1, 1)),
    "a channel over": (2, 17, 33, (5, 4), (0, 1)),
    "no padding, one window": (3, 16, 16, (3, 3), (0, 0)),
    "wide padding": (2, 4, 20, (4, 5), (2, 2)),
    "more padding than image": (2, 3, 2, (1, 2), (5, 4)),
    "several runs of tiles": (2, 16, 24, (31, 26), (1, 1)),
    "blocks of sums": (40, 16, 16, (12, 12), (1, 1)),
    "tasks of several images": (40, 16, 16, (4, 4), (1, 1)),
    "bands of an image": (1, 17, 16, (66, 70), (1, 1)),
    "parts of the channels": (2, 3, 256, (8, 8), (1, 1)),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def case(B, C, O, size, padding):  # noqa: E741
    torch.manual_seed(0)
    x, weight, bias = torch.randn(B, C, *size), torch.randn(O, C, 3, 3), torch.randn(O)
    gy = torch.randn(B, O, *(s + 2 * p - 2 for s, p in zip(size, padding, strict=True)))
    return x, weight, bias, gy, torch.randn(B)


def close(ours, expected):
    assert ours.dtype == torch.float32 and ours.shape == expected.shape
    assert (ours - expected).norm() <= 1e-6 * expected.norm()


@EVERY_SHAPE
@pytest.mark.parametrize("backend", ["compiled", "eager"])
def test_against_torch_in_float64(shape, backend):
    x, weight, bias, gy, w = case(*shape)
    padding = shape[-1]
    conv3x3 = OPS.conv3x3 if backend == "compiled" else eager_convolution.conv3x3
    weighted = OPS.conv3x3_weighted_sum if backend == "compiled" else eager_convolution.conv3x3_weighted_sum
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    y = F.conv2d(*leaves, bias.double(), 1, padding)
    close(conv3x3(x, weight, bias, padding, False), y)
    close(conv3x3(x, weight, None, padding, False), y - bias.double().view(-1, 1, 1))
    gx, gw = torch.autograd.grad(y, leaves, gy.double(), retain_graph=True)
    if max(padding) <= 2:
        close(conv3x3(gy, weight, None, [2 - p for p in padding], True), gx)
    close(weighted(x, gy, None, padding), gw)
    close(weighted(x, gy, w, padding), torch.autograd.grad(y, leaves[1], (gy * w.view(-1, 1, 1, 1)).double())[0])


@EVERY_SHAPE
def test_results_do_not_depend_on_threads_or_layout(shape):
    x, weight, bias, gy, w = case(*shape)
    padding, threads = shape[-1], torch.get_num_threads()
    turned = [max(0, 2 - p) for p in padding]
    out = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            if n == 3:
                x, gy, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, gy, weight))
            sums = [OPS.conv3x3_weighted_sum(x, gy, v, padding) for v in (w, None)]
            out.append(
                [OPS.conv3x3(x, weight, bias, padding, False), OPS.conv3x3(gy, weight, None, turned, True), *sums]
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))


def test_infinite_pixels_stay_in_their_windows():
    x, weight, bias, _, _ = case(2, 16, 16, (9, 9), (1, 1))
    x[0, 3, 4, 5] = torch.inf
    bad = ~OPS.conv3x3(x, weight, bias, (1, 1), False).isfinite()
    expected = torch.zeros_like(bad)
    expected[0, :, 3:6, 4:7] = True
    assert torch.equal(bad, expected)


def test_schemas_and_fakes():
    x, weight, bias, gy, w = case(2, 3, 4, (5, 6), (1, 0))
    opcheck(OPS.conv3x3.default, (x, weight, bias, [1, 0], False))
    opcheck(OPS.conv3x3.default, (gy, weight, None, [1, 2], True))
    opcheck(OPS.conv3x3_weighted_sum.default, (x, gy, w, [1, 0]))
    empty = OPS.conv3x3(x[:0], weight, bias, [1, 0], False)
    assert empty.shape == (0, *gy.shape[1:])
    assert not OPS.conv3x3_weighted_sum(x[:0], gy[:0], None, [1, 0]).any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 5)}, "x must be"),
        ({"weight": torch.zeros(4, 3, 3, 2)}, "3×3 kernel for 3 channels"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, "3×3 kernel for 3 channels"),
        ({"bias": torch.zeros(3)}, "bias must have shape"),
        ({"padding": [1]}, "padding must"),
        ({"padding": [1, -1]}, "padding must"),
        ({"x": torch.zeros(2, 3, 0, 5)}, "padding must"),
    ],
)
@pytest.mark.parametrize("backend", ["compiled", "fake"])
def test_what_does_not_fit_is_refused(change, message, backend):
    inputs = {"x": torch.zeros(2, 3, 5, 5), "weight": torch.zeros(4, 3, 3, 3), "bias": None, "padding": [1, 1]} | change
    device = "cpu" if backend == "compiled" else "meta"
    tensors = [t if t is None else t.to(device) for t in (inputs["x"], inputs["weight"], inputs["bias"])]
    with pytest.raises(RuntimeError, match=message):
        OPS.conv3x3(*tensors, inputs["padding"], False)


FITTING = {"B": 16, "C": 16, "S": (8, 8), "O": 32, "K": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}


@pytest.mark.parametrize(
    "change, fits",
    [
        ({}, True),
        ({"padding": (0, 2)}, True),
        ({"padding": (3, 3)}, False),
        ({"C": 8}, False),
        ({"O": 15}, False),
        ({"B": 3}, False),
        ({"S": (3, 3)}, False),
        ({"S": (4, 4)}, True),
        ({"S": (2, 2), "padding": (2, 2)}, False),
        ({"K": (3, 1)}, False),
        ({"stride": (2, 1)}, False),
        ({"dilation": (1, 2)}, False),
        ({"groups": 2}, False),
        ({"K": (3,), "S": (8,), "stride": (1,), "padding": (1,), "dilation": (1,)}, False),
    ],
    ids=str,
)
def test_which_layers_go_that_way(change, fits):
    assert planning.minimal_filtering(planning.ConvLayer(**FITTING | change)) is fits


def test_sums_want_more_tiles_than_outputs():
    few, many = (planning.ConvLayer(**FITTING | {"B": B, "O": 64}) for B in (16, 32))
    assert planning.minimal_filtering(few) and not planning.minimal_filtering(few, summed=True)
    assert planning.minimal_filtering(many, summed=True)


def test_the_switch_and_what_is_left_to_torch(monkeypatch):
    x, weight, bias, gy, _ = case(16, 16, 32, (8, 8), (1, 1))
    product = ConvProduct((3, 3), (1, 1), (1, 1), (1, 1), 1)
    plain = F.conv2d(x, weight, bias, 1, 1)
    assert not torch.equal(product.output(x, weight, bias), plain)
    for pair in itertools.product(*((t, t.to(memory_format=torch.channels_last)) for t in (x, weight))):
        assert product.output(*pair, bias).stride() == F.conv2d(*pair, bias, 1, 1).stride()
    for dtype in (torch.float64, torch.bfloat16):
        ours = product.output(x.to(dtype), weight.to(dtype))
        assert torch.equal(ours, F.conv2d(x.to(dtype), weight.to(dtype), None, 1, 1))
    monkeypatch.setattr("bootgrad.ops.convolution._OWN_PRODUCTS", False)
    assert torch.equal(product.output(x, weight, bias), plain)


STEPS = {
    "reg1": {},
    "about the mean": {"center": "batch_mean"},
    "both": {"reg2": 0.3},
    "reg2": {"reg1": 0.0, "reg2": 0.3},
    "random signs": {"method": "random_signs"},
}


@pytest.mark.parametrize("size", [8, 4])  # direct norms, and by Gram matrices
@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_steps(options, size):
    grads = [step(dtype, size, options) for dtype in (torch.float32, torch.float64)]
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


@pytest.mark.parametrize("filtered", [True, False])
def test_finite_differences(monkeypatch, filtered):
    monkeypatch.setattr("bootgrad.ops.convolution._OWN_PRODUCTS", filtered)
    options = {"method": "finite_difference", "center": "batch_mean"}
    grads = [step(dtype, 8, options) for dtype in (torch.float32, torch.float64)]
    assert (grads[0] - grads[1]).norm() <= 3e-3 * grads[1].norm()  # roundings over ε


def step(dtype, size, options):
    """The gradient of a penalized step on a smooth network, and in another dtype but alike."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(16, 64, 3, padding=1), nn.Tanh(), nn.Conv2d(64, 64, 3, padding=1), nn.Tanh()]
    model = nn.Sequential(*layers, nn.AvgPool2d(size), nn.Flatten(), nn.Linear(64, 4)).to(dtype)
    B = 2048 // size**2
    x, y = torch.randn(B, 16, size, size), torch.randint(0, 4, (B,))
    reg = regularizer(model, **{"center": "zero", "reg2": 0.0} | options)
    return gradient_of(reg, losses_of(model), x.to(dtype), y)[0].double()
