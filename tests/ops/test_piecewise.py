"""ReLU and max pooling: values and derivatives as torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import bootgrad
from bootgrad.ops.backends import eager_pooling
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


@WINDOWS
@pytest.mark.parametrize("inplace", [False, True])
def test_pooling_what_a_relu_let_go(window, inplace):
    x = spread(2, 2, 5, 4)

    def ours(x):
        return max_pool2d(relu(x * 1, inplace), **window)

    y = ours(x)
    h = torch.randn_like(y, requires_grad=True)
    expected = torch.autograd.grad(F.max_pool2d(F.relu(x), **window), x, h)[0]
    torch.testing.assert_close(torch.autograd.grad(y, x, h)[0], expected)
    assert gradcheck(ours, x)
    assert gradgradcheck(ours, x)


def read_later(y):
    return torch.autograd.grad(max_pool2d(y, 2).square().sum(), y, retain_graph=True)[0]


def read_retained(y):
    y.retain_grad()
    max_pool2d(y, 2).square().sum().backward(retain_graph=True)
    return y.grad


def read_by_a_hook(y):
    seen = []
    y.register_hook(seen.append)
    max_pool2d(y, 2).square().sum().backward(retain_graph=True)
    return seen[0]


def read_by_a_late_hook(y):
    seen = []
    p = max_pool2d(y, 2)
    y.register_hook(seen.append)
    return p, seen


@pytest.mark.parametrize("read", [read_later, read_retained, read_by_a_hook])
def test_gradients_between_relu_and_pooling_are_there_for_those_who_look(read):
    x = spread(2, 2, 5, 4)
    y = F.relu(x)
    expected = torch.autograd.grad(F.max_pool2d(y, 2).square().sum(), y)[0]
    torch.testing.assert_close(read(relu(x)), expected)


def test_hooks_of_a_relu_s_output_run_and_change_the_gradient_when_it_is_gone():
    x = spread(2, 2, 5, 4)
    p, seen = read_by_a_late_hook(relu(x))
    p.square().sum().backward()
    expected = torch.autograd.grad(F.max_pool2d(F.relu(x), 2).square().sum(), x)[0]
    assert len(seen) == 1
    torch.testing.assert_close(x.grad, expected)

    def pooled(x):
        y = relu(x)
        p = max_pool2d(y, 2)
        y.register_hook(lambda g: 3 * g)
        return p

    torch.testing.assert_close(torch.autograd.grad(pooled(x).square().sum(), x)[0], 3 * expected)


def test_other_readers_of_a_relu_s_output():
    x = spread(2, 2, 6, 4)

    def function(x, relu, max_pool2d):
        y = relu(x)
        out = max_pool2d(y, 2).square().sum() + (y * y[:, :1]).sum()
        return out + max_pool2d(max_pool2d(relu(x), 2), 3, 1, 1).pow(2).sum()

    ours, theirs = function(x, relu, max_pool2d), function(x, F.relu, F.max_pool2d)
    for a, b in zip(*(torch.autograd.grad(f, x, create_graph=True) for f in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(*(torch.autograd.grad(g.square().sum(), x)[0] for g in (a, b)))
    with torch.no_grad():
        assert not max_pool2d(relu(x), 2).requires_grad


def test_changes_in_place_around_pooling():
    x = spread(2, 2, 6, 4)

    def after(x, relu, max_pool2d):
        p = max_pool2d(relu(x), 2)
        p *= 3
        p += 1
        return p.pow(3).sum()

    ours, theirs = (torch.autograd.grad(after(x, *f), x)[0] for f in ((relu, max_pool2d), (F.relu, F.max_pool2d)))
    torch.testing.assert_close(ours, theirs)

    def before(relu, max_pool2d):
        y = relu(x * 1)
        with torch.no_grad():
            y -= 0.5  # behind the graph's back
        return max_pool2d(y, 2)

    for functions in ((relu, max_pool2d), (F.relu, F.max_pool2d)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(before(*functions).sum(), x)


def test_relu_of_a_scalar():
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert gradcheck(relu, x) and relu(x).shape == ()


def test_the_ways_of_adjoints_of_pooling():
    torch.manual_seed(0)
    for shape, window in (((2, 3, 28, 28), (2, 2, 0)), ((1, 2, 7, 5), (3, 1, 1)), ((0, 2, 4, 4), (2, 2, 0))):
        k, stride, padding = ((v, v) for v in window)
        for dtype in DTYPES:
            x = torch.randn(shape).to(dtype)
            y, index = torch.ops.aten.max_pool2d_with_indices(x, k, stride, padding)
            gy, h = torch.randn(y.shape).to(dtype), torch.randn(shape).to(dtype)
            for mask in (None, y.le(0)):
                for name, arguments in (("backward", (gy, index, mask, shape[2:])), ("gather", (h, index, mask))):
                    ours = getattr(torch.ops.bootgrad, f"max_pool2d_{name}")(*arguments)
                    twice = [
                        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
                    ]
                    plain = getattr(eager_pooling, f"max_pool2d_{name}")(*twice)
                    torch.testing.assert_close(ours, plain.to(dtype))
    gy = torch.randn(2, 3, 2, 2)
    index = torch.randint(16, gy.shape)
    for arguments in ((gy, index, gy.le(0), [4, 4]), (gy, index, None, [4, 4])):
        torch.library.opcheck(torch.ops.bootgrad.max_pool2d_backward.default, arguments)
        torch.library.opcheck(torch.ops.bootgrad.max_pool2d_gather.default, (torch.randn(2, 3, 4, 4), *arguments[1:3]))
    for wrong in (16, -1):
        index[1, 0, 1, 1] = wrong
        with pytest.raises((RuntimeError, IndexError), match="index"):
            torch.ops.bootgrad.max_pool2d_backward(gy, index, None, [4, 4])
        with pytest.raises((RuntimeError, IndexError), match="index"):
            torch.ops.bootgrad.max_pool2d_gather(torch.randn(2, 3, 4, 4), index, None)


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
