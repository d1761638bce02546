"""ReLU and max pooling: values and derivatives as torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import bootgrad
from bootgrad.ops.piecewise import max_pool2d, relu
from bootgrad.rules.stand_ins import StandIns

WINDOWS = pytest.mark.parametrize(
    "window",
    [dict(kernel_size=2), dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=(2, 1), stride=1, ceil_mode=True)],
)


def spread(*shape):
    """Values far enough from each other and from zero for finite differences."""
    values = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64) - 7.5
    generator = torch.Generator().manual_seed(0)
    return values[torch.randperm(len(values), generator=generator)].reshape(shape).requires_grad_()


def test_relu():
    x = spread(3, 5)
    for function in (relu, lambda x: relu(x * 1, True)):
        torch.testing.assert_close(function(x), F.relu(x))
        assert gradcheck(function, x)
        assert gradgradcheck(function, x)


@WINDOWS
def test_max_pool2d(window):
    x = spread(2, 2, 5, 4)
    torch.testing.assert_close(max_pool2d(x, **window), F.max_pool2d(x, **window))
    assert gradcheck(lambda x: max_pool2d(x, **window), x)
    assert gradgradcheck(lambda x: max_pool2d(x, **window), x)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "window",
    [
        ((2, 2), (2, 2), (0, 0), (1, 1), False),
        ((2, 2), (2, 2), (1, 1), (1, 1), True),
        ((3, 2), (1, 3), (1, 1), (2, 1), False),
        ((3, 3), (2, 2), (1, 0), (1, 2), True),
        ((1, 4), (4, 1), (0, 2), (3, 2), True),
    ],
)
def test_maxima_and_their_places_are_torch_s(window, dtype):
    torch.manual_seed(0)
    for shape in ((2, 3, 7, 33), (1, 1, 6, 7), (3, 2, 28, 28), (0, 2, 8, 8)):
        x = torch.randn(shape).round(decimals=1).to(dtype)  # with ties
        if x.numel():
            x[0, 0, 3, 2:5] = torch.nan
            x[-1, -1, :4] = -torch.inf
            x[-1, 0, 4:, 1] = torch.inf
        expected = torch.ops.aten.max_pool2d_with_indices(x, *window)
        apart = x.new_zeros(*x.shape[:3], 2 * x.size(3))[..., ::2].copy_(x)
        for given in (x, apart, x.to(memory_format=torch.channels_last)):
            for ours, theirs in zip(torch.ops.bootgrad.max_pool2d(given, *window), expected, strict=True):
                assert ours.is_contiguous() and torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))
    torch.library.opcheck(torch.ops.bootgrad.max_pool2d.default, (x.new_ones(2, 2, 8, 8), *window))


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ((3, 4), {}, "3D or 4D|\\(B, C, H, W\\)"),
        ((1, 1, 4, 4), {0: (9, 9)}, "too small|as large as a window"),
        ((1, 1, 4, 4), {2: (2, 2)}, "pad should be|padding must be"),
        ((1, 1, 9, 9), {2: (2, 2), 3: (4, 4)}, "pad should be|padding must be"),
        ((1, 1, 4, 4), {1: (0, 1)}, "stride"),
    ],
)
def test_windows_that_do_not_fit_are_refused(shape, change, message):
    window = [(2, 2), (1, 1), (0, 0), (1, 1), False]
    for place, value in change.items():
        window[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bootgrad.max_pool2d(torch.zeros(shape), *window)


def test_what_a_recording_puts_in_their_place():
    """Every way of calling them, with the in-place forms in place, and torch's own where ours does not fit."""
    model = torch.nn.Conv2d(2, 2, 1).double()
    x = spread(2, 2, 5, 4).detach()
    calls = [
        torch.relu,
        F.relu,
        torch.Tensor.relu,
        torch.Tensor.relu_,
        torch.relu_,
        lambda t: F.relu(t, inplace=True),
        lambda t: F.max_pool2d(t, 2),
        lambda t: F.max_pool2d(t, 3, stride=1, padding=1, return_indices=True)[0],
        lambda t: F.max_pool2d(t.to(memory_format=torch.channels_last), 2),
        lambda t: F.max_pool2d(t[0], 2),
        lambda t: t[:, :1].relu_(),
        torch.nn.MaxPool2d(2, 1),
    ]
    for call in calls:
        expected = torch.autograd.grad(call(model(x)).square().sum(), model.weight)[0]
        with bootgrad.record(model):
            z = model(x)
            y = call(z)
        torch.testing.assert_close(y, call(model(x)))
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), model.weight)[0], expected)
        if call in (torch.Tensor.relu_, torch.relu_):
            assert y is z and z.min() == 0
    names = []
    with bootgrad.record(model):
        names += [torch.relu(model(x)).grad_fn.name(), F.max_pool2d(model(x), 2).grad_fn.name()]
    assert names == ["ReluBackward", "MaxPool2dBackward"]


@pytest.mark.parametrize("context", [bootgrad.record, lambda model: StandIns()], ids=["record", "StandIns"])
def test_transforms_of_functions_are_left_to_torch(context):
    """vmap, grad and jacrev over activations in a model's forward."""
    model, x = torch.nn.Conv2d(2, 2, 1).double(), spread(2, 2, 4, 4).detach()

    calls = [
        torch.func.vmap(F.relu),
        torch.func.vmap(lambda t: torch.relu_(t * 1)),
        torch.func.vmap(lambda t: F.max_pool2d(t[None], 2)[0]),
        torch.func.grad(lambda t: F.relu(t).square().sum()),
        torch.func.grad(lambda t: F.max_pool2d(t, 2).pow(3).sum()),
        torch.func.jacrev(lambda t: F.max_pool2d(F.relu(t), 2)),
        torch.func.vmap(torch.func.grad(lambda t: F.max_pool2d(t, 2).square().sum())),
    ]
    for call in calls:
        y = call(model(x))
        expected = torch.autograd.grad(y.square().sum(), model.weight)[0] if y.requires_grad else None
        with context(model):
            ours = call(model(x))
        torch.testing.assert_close(ours, y)
        assert ours.requires_grad == y.requires_grad
        if expected is not None:
            torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), model.weight)[0], expected)
