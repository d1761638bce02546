"""Group norm and its ops: values against torch, derivatives of every order by gradcheck, eager against compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from bootgrad import record
from bootgrad.ops.backends import eager_norms
from bootgrad.ops.group_norm import GroupNormBackward, backward, forward

raw = torch.ops.bootgrad
SHAPES = pytest.mark.parametrize(
    ("shape", "groups"), [((2, 4, 3), 2), ((3, 6, 2, 2), 3), ((2, 3, 2), 1), ((2, 2, 3), 2), ((2, 4), 2)]
)
EPS = 1e-3


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def test_the_output_lies_in_memory_as_torch_s():
    x, weight = torch.randn(3, 4, 5, 6), torch.rand(4)
    for laid_out in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[..., ::2]):
        expected = F.group_norm(laid_out, 2, weight, None, EPS)
        y, mean, rstd = forward(laid_out, weight, None, 2, EPS)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected)
        args = (torch.randn_like(y), laid_out, weight, mean, rstd)
        ours = raw.group_norm_backward(*args, True)
        torch.testing.assert_close(ours, raw.group_norm_backward(*(t.contiguous() for t in args), True))


@SHAPES
@pytest.mark.parametrize("affine", [True, False])
def test_the_backward_pass_to_the_second_order(shape, groups, affine):
    torch.manual_seed(0)
    x, gy, weight = random(*shape), random(*shape), random(shape[1]) if affine else None
    biases = torch.zeros(shape[0], shape[1], dtype=x.dtype, requires_grad=True)
    weights = torch.ones_like(biases) if weight is None else weight.expand_as(biases)
    y = torch.cat(
        [F.group_norm(x[i : i + 1], groups, w, b, EPS) for i, (w, b) in enumerate(zip(weights, biases, strict=True))]
    )
    mean, rstd = (t.detach() for t in forward(x, weight, None, groups, EPS)[1:])

    def grads(gy, x, weight=None):
        mean, rstd = forward(x.detach(), None, None, groups, EPS)[1:]
        return GroupNormBackward.apply(gy, x, weight, mean, rstd, None, groups, EPS, True)

    inputs = (gy, x, weight) if affine else (gy, x)
    expected = torch.autograd.grad(y, (x, biases), gy, retain_graph=True)
    torch.testing.assert_close(grads(*inputs)[::2], expected)
    if affine:
        torch.testing.assert_close(grads(*inputs)[1].sum(0), torch.autograd.grad(y, weight, gy, retain_graph=True)[0])
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                ours = backward(gy, x, weight, mean, rstd, None, groups, EPS, [True, True, True])
            torch.testing.assert_close(ours[0], expected[0])
            torch.testing.assert_close(ours[2], expected[1].sum(0))
    assert gradcheck(grads, inputs)
    assert gradgradcheck(grads, inputs)


@SHAPES
@pytest.mark.parametrize("weighted", [True, False])
def test_a_relu_behind_it_is_a_gate_for_gradients(shape, groups, weighted):
    torch.manual_seed(0)
    x, gz, weight = random(*shape), random(*shape), random(shape[1]) if weighted else None
    mean, rstd = forward(x.detach(), None, None, groups, EPS)[1:]
    z = torch.randn(shape, dtype=x.dtype).relu()

    def grads(gz, x, weight=None, z=z):
        mean, rstd = forward(x.detach(), None, None, groups, EPS)[1:]
        return GroupNormBackward.apply(gz, x, weight, mean, rstd, z, groups, EPS, True)

    inputs = (gz, x, weight) if weighted else (gz, x)
    passed = gz * (z > 0)
    torch.testing.assert_close(grads(*inputs), grads(passed, *inputs[1:], z=None))
    assert gradcheck(grads, inputs)
    assert gradgradcheck(grads, inputs)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            ours = backward(gz, x, weight, mean, rstd, z, groups, EPS, [True, weighted, True])
            torch.testing.assert_close(
                ours, backward(passed, x, weight, mean, rstd, None, groups, EPS, [True, weighted, True])
            )


@SHAPES
@pytest.mark.parametrize("behind", ["nothing", "relu", "relu in place"])
def test_the_recorded_call_to_the_second_order(shape, groups, behind):
    torch.manual_seed(0)
    x, norm = random(*shape), torch.nn.GroupNorm(groups, shape[1], EPS, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    act = {"nothing": torch.nn.Identity(), "relu": torch.nn.ReLU(), "relu in place": torch.nn.ReLU(inplace=True)}[
        behind
    ]

    def recorded(x, *parameters):
        with record(norm) as rec:
            z = act(norm(x))
        if behind != "nothing":
            (joined,) = [o for o in rec.operations if o.covers is not None]
            joined.covers_all = True  # as a recording decides where nobody else reads what is between
        return z

    torch.testing.assert_close(recorded(x), act(norm(x)))
    inputs = (x, norm.weight, norm.bias)
    assert gradcheck(recorded, inputs)
    assert gradgradcheck(recorded, inputs)


def arguments(name, shape, groups, dtype, weighted=True):
    g = torch.Generator().manual_seed(0)
    u, gy, x = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    grouped = x.to(wide).reshape(shape[0], groups, x[:1].numel() // groups if shape[0] else 6)
    mean = grouped.mean(2)
    rstd = ((grouped - mean[..., None]).square().mean(2) + EPS).rsqrt()
    a, b = (torch.randn(*shape[:2], generator=g, dtype=torch.float64).to(wide) for _ in range(2))
    weight = torch.randn(shape[1], generator=g, dtype=torch.float64).to(wide) if weighted else None
    given = (gy, torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)) if "relu" in name else (gy,)
    if "double" not in name:
        return *given, x, weight, mean, rstd, True
    return u, a, b, *given, x, weight, mean, rstd


NAMES = [f"group_norm_{kind}" for kind in ("backward", "double_backward", "relu_backward", "relu_double_backward")]
OPS = pytest.mark.parametrize("name", NAMES)
TOLERANCES = {
    torch.float64: dict(rtol=1e-11, atol=1e-11),
    torch.float32: dict(rtol=1e-4, atol=1e-4),  # differences of sums of the size of N
    torch.bfloat16: dict(rtol=2e-2, atol=2e-2),  # results rounded to 8 bits
    torch.float16: dict(rtol=2e-3, atol=2e-3),
}


@OPS
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("shape", "groups"), [((3, 6, 7, 9), 3), ((2, 4, 1), 4), ((1, 8, 63), 1), ((0, 4, 3), 2), ((5, 2, 127), 2)]
)
@pytest.mark.parametrize("weighted", [True, False])
def test_the_registered_op_agrees_with_plain_torch(name, dtype, shape, groups, weighted):
    args = arguments(name, shape, groups, dtype, weighted)
    ours = getattr(raw, name)(*args)
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
    expected = getattr(eager_norms, name)(*wide)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, **TOLERANCES[dtype])
    for a, b in zip(ours, getattr(raw, name)(*args), strict=True):
        assert torch.equal(a, b)  # the same input gives the same bits


@pytest.mark.parametrize("given", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("weighted", [True, False])
def test_absent_cotangents_are_zeros(given, weighted):
    *cotangents, gy, x, weight, mean, rstd = arguments(
        "group_norm_double_backward", (3, 4, 5, 6), 2, torch.float64, weighted
    )
    present = [c if g else None for c, g in zip(cotangents, given, strict=True)]
    zeros = [c if g else torch.zeros_like(c) for c, g in zip(cotangents, given, strict=True)]
    rest = gy, x, weight, mean, rstd
    expected = eager_norms.group_norm_double_backward(*zeros, *rest)
    for function in (raw.group_norm_double_backward, eager_norms.group_norm_double_backward):
        torch.testing.assert_close(function(*present, *rest), expected)


def test_the_input_s_gradient_may_be_left_out():
    args = arguments("group_norm_backward", (3, 4, 5, 6), 2, torch.float64)
    for function in (raw.group_norm_backward, eager_norms.group_norm_backward):
        dx, *rows = function(*args[:-1], False)
        assert dx.shape == (0,)
        torch.testing.assert_close(tuple(rows), function(*args)[1:])


@OPS
def test_a_channel_without_positions_has_zero_gradients(name):
    empty = torch.zeros(2, 4, 0)
    args = [
        empty if isinstance(t, torch.Tensor) and t.dim() == 3 else t
        for t in arguments(name, (2, 4, 3), 2, torch.float32)
    ]
    for function in (getattr(raw, name), getattr(eager_norms, name)):
        assert all(t.eq(0).all() for t in function(*args))


@OPS
def test_opcheck(name):
    torch.library.opcheck(getattr(raw, name).default, arguments(name, (2, 4, 3, 3), 2, torch.float32))


@OPS
def test_layouts(name):
    args = arguments(name, (3, 4, 5, 6), 2, torch.float64)
    permuted = [
        t.to(memory_format=torch.channels_last) if isinstance(t, torch.Tensor) and t.dim() == 4 else t for t in args
    ]
    for a, b in zip(getattr(raw, name)(*args), getattr(raw, name)(*permuted), strict=True):
        torch.testing.assert_close(a, b)


@OPS
def test_wrong_shapes(name):
    args = list(arguments(name, (3, 4, 5), 2, torch.float32))
    index = next(k for k, t in enumerate(args) if isinstance(t, torch.Tensor) and t.dim() == 3)
    with pytest.raises(RuntimeError, match="must be"):
        getattr(raw, name)(*args[:index], args[index][:2], *args[index + 1 :])
