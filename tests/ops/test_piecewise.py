"""ReLU and max pooling: values and derivatives as torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import bootgrad
from bootgrad.ops.piecewise import max_pool2d, relu

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
