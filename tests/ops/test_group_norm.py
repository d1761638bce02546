"""Group norm and its ops: values against torch, derivatives of every order by gradcheck, eager against compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from bootgrad.ops.backends import eager_norms
from bootgrad.ops.group_norm import GroupNorm, GroupNormGrad, GroupNormRows, group_norm, group_norm_rows

raw = torch.ops.bootgrad
SHAPES = pytest.mark.parametrize(
    ("shape", "groups"), [((2, 4, 3), 2), ((3, 6, 2, 2), 3), ((2, 3, 2), 1), ((2, 2, 3), 2), ((2, 4), 2)]
)
EPS = 1e-3


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@SHAPES
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_to_the_third_order(shape, groups, affine):
    torch.manual_seed(0)
    x, gy = random(*shape), random(*shape)
    affines = (random(shape[1]), random(shape[1])) if affine else (None, None)
    torch.testing.assert_close(group_norm(x, groups, *affines, EPS), F.group_norm(x, groups, *affines, EPS))
    inputs = (x, *affines) if affine else (x,)

    def forward(x, weight=None, bias=None):
        return GroupNorm.apply(x, weight, bias, groups, EPS)[0]

    assert gradcheck(forward, inputs)
    assert gradgradcheck(forward, inputs)
    mean, rstd = (t.detach() for t in GroupNorm.apply(x, *affines, groups, EPS)[1:])

    def grad(gy, x, weight=None):
        stats = GroupNorm.apply(x, weight, None, groups, EPS)[1:]
        return GroupNormGrad.apply(gy, x, weight, *(t.detach() for t in stats), groups, EPS)

    inputs = (gy, x, affines[0]) if affine else (gy, x)
    expected = torch.autograd.grad(F.group_norm(x, groups, *affines, EPS), x, gy)[0]
    torch.testing.assert_close(grad(*inputs), expected)
    assert gradcheck(grad, inputs)
    assert gradgradcheck(grad, inputs)
    assert mean.shape == rstd.shape == (shape[0], groups)


@SHAPES
def test_rows_to_the_second_order(shape, groups):
    torch.manual_seed(0)
    x, gy, weight, bias = random(*shape), random(*shape), random(shape[1]), random(shape[1])
    y = F.group_norm(x, groups, weight, bias, EPS)
    rows = group_norm_rows(gy, x, groups, EPS)
    for i in range(shape[0]):
        expected = torch.autograd.grad(y[i], (weight, bias), gy[i], retain_graph=True)
        torch.testing.assert_close((rows[0][i], rows[1][i]), expected)

    def function(gy, x):
        return GroupNormRows.apply(gy, x, groups, EPS)

    assert gradcheck(function, (gy, x))
    assert gradgradcheck(function, (gy, x))


def arguments(name, shape, groups, dtype, weighted=True):
    g = torch.Generator().manual_seed(0)
    u, gy, x = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    grouped = x.to(wide).reshape(shape[0], groups, x[:1].numel() // groups if shape[0] else 6)
    mean = grouped.mean(2)
    rstd = ((grouped - mean[..., None]).square().mean(2) + EPS).rsqrt()
    a, b = (torch.randn(*shape[:2], generator=g, dtype=torch.float64).to(wide) for _ in range(2))
    weight = torch.randn(shape[1], generator=g, dtype=torch.float64).to(wide) if weighted else None
    return {
        "group_norm_rows": (gy, x, mean, rstd),
        "group_norm_rows_backward": (a, b, gy, x, mean, rstd),
        "group_norm_grad_backward": (u, gy, x, weight, mean, rstd),
    }[name]


OPS = pytest.mark.parametrize("name", ["group_norm_rows", "group_norm_rows_backward", "group_norm_grad_backward"])
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
