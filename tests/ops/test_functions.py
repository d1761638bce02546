"""The public ops and the functions behind them: values, first, second and third derivatives in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import bootgrad
from bootgrad import ops, planning
from bootgrad.ops.convolution import ConvProduct
from bootgrad.ops.linear import LinearProduct
from bootgrad.ops.product import CovarianceTrace, InputGrad, Output, SqNorms, SqNormsGrad, WeightGrad

GEOMETRIES = {
    "1d": ((2, 3, 7), 4, (3,), dict(stride=2, padding=1, dilation=1, groups=1)),
    "2d": ((2, 2, 4, 5), 2, (3, 2), dict(stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=1)),
    "grouped": ((2, 4, 3, 3), 6, (2, 2), dict(stride=1, padding=1, dilation=1, groups=2)),
    "depthwise": ((2, 3, 4, 4), 3, (3, 3), dict(stride=2, padding=1, dilation=1, groups=3)),
    "3d": ((2, 2, 2, 3, 3), 2, (1, 2, 2), dict(stride=1, padding=(0, 1, 0), dilation=1, groups=1)),
}
LINEARS = {
    "T=1": ((3, 4), 2, False),
    "T=3": ((2, 3, 4), 3, False),
    "transposed": ((2, 3, 4), 2, True),
    "4d": ((2, 2, 2, 3), 2, False),
}


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(params=[*GEOMETRIES, *LINEARS])
def layer(request):
    """(product, x, gy, weight), all of them random."""
    torch.manual_seed(0)
    if request.param in GEOMETRIES:
        shape, out, kernel, geometry = GEOMETRIES[request.param]
        n = len(kernel)
        full = {k: v if k == "groups" else ops.convolution.expand(v, n) for k, v in geometry.items()}
        product = ConvProduct(kernel, full["stride"], full["padding"], full["dilation"], full["groups"])
        x, weight = random(*shape), random(out, shape[1] // full["groups"], *kernel)
    else:
        shape, out, transposed = LINEARS[request.param]
        product = LinearProduct(transposed)
        x = random(*shape)
        weight = random(shape[-1], out) if transposed else random(out, shape[-1])
    gy = random(*product.output(x, weight).shape)
    return product, x, gy, weight


def canonical(product, x, gy):
    return product.factor(x, gy, torch.Size(), x.size(0))[1:3]


def test_the_products_are_each_others_derivatives(layer):
    product, x, gy, weight = layer
    for function, inputs in (
        (lambda x, w: Output.apply(product, x, w), (x, weight)),
        (lambda gy, w: InputGrad.apply(product, gy, w, x.detach()), (gy, weight)),
        (lambda x, gy: WeightGrad.apply(product, x, gy, x.dtype), (x, gy)),
    ):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("centered", [False, True])
def test_norms_are_three_times_differentiable(layer, centered):
    product, x, gy, weight = layer
    center = torch.randn_like(weight).requires_grad_() if centered else None
    inputs = (x, gy) + ((center,) if centered else ())

    def norms(x, gy, c=None):
        return SqNorms.apply(product, *canonical(product, x, gy), c, False)[0]

    def gradient(x, gy, c=None):
        return torch.autograd.grad((norms(x, gy, c) * weights).sum(), (x, gy), create_graph=True)

    weights = torch.tensor([0.7, -1.3, 2.0], dtype=torch.float64)[: x.size(0)]
    rows = product.rows(*canonical(product, x, gy))
    expected = (rows if center is None else rows - center).flatten(1).square().sum(1)
    torch.testing.assert_close(norms(*inputs), expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(norms, inputs)
    assert gradgradcheck(norms, inputs)
    assert gradcheck(gradient, inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    ours = torch.autograd.grad((norms(*inputs) * weights).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_second_backward_pass_finds_what_the_first_one_used(layer):
    product, x, gy, weight = layer
    x, gy = (t.detach().requires_grad_() for t in canonical(product, x, gy))
    mean = product.rows(x, gy).mean(0).detach()
    for s in (SqNorms.apply(product, x, gy, None, False)[0].sum(), CovarianceTrace.apply(product, x, gy, mean)):
        first, second = (torch.autograd.grad(s, (x, gy), retain_graph=True) for _ in range(2))
        third = torch.autograd.grad(s, (x, gy), create_graph=True)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(first, third)


def test_covariance_trace_is_differentiable_beyond_the_constant_mean(layer):
    product, x, gy, weight = layer
    x, gy = (t.detach().requires_grad_() for t in canonical(product, x, gy))

    def trace(x, gy):
        mean = product.rows(x, gy).mean(0).detach()
        return CovarianceTrace.apply(product, x, gy, mean)

    rows = product.rows(x, gy)
    torch.testing.assert_close(trace(x, gy), (rows - rows.mean(0)).square().sum(), rtol=1e-12, atol=1e-12)
    # Finite differences move the mean, too: its own derivative vanishes in the first order and not in the second.
    assert gradcheck(trace, (x, gy))
    assert gradgradcheck(trace, (x, gy))


def test_the_kept_derivatives_have_derivatives(layer):
    product, x, gy, weight = layer
    x, gy = (t.detach().requires_grad_() for t in canonical(product, x, gy))
    center, alpha = torch.randn_like(weight).requires_grad_(), random(x.size(0))

    def kept(x, gy, center, alpha):
        with torch.no_grad():
            _, dx, dgy, _ = product.sq_norms_with_grad(x, gy, center, (True, True, False))
        return SqNormsGrad.apply(product, x, gy, center, alpha, dx, dgy)

    assert gradcheck(kept, (x, gy, center, alpha))


@pytest.mark.parametrize("mask", [(True, True, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_products_with_a_large_center_apart(stride, mask, monkeypatch):
    """A center that no cache holds is multiplied for all samples at once."""
    monkeypatch.setattr(planning, "choose_path", lambda *_: "gram")
    product = ConvProduct((3, 3), (stride,) * 2, (1, 1), (1, 1), 1)
    x, center = (t.detach() for t in (random(3, 130, 4, 4), random(120, 130, 3, 3)))
    assert product._multiplies_apart(x, center) and not product._multiplies_apart(x.half(), center)
    gy = torch.randn_like(product.output(x, center))
    ours = product.sq_norms_with_grad(x, gy, center, mask)
    x, gy = (t.requires_grad_() for t in (x, gy))
    rows = product.rows(x, gy)
    s = (rows - center).flatten(1).square().sum(1)
    expected = s, *torch.autograd.grad(s.sum(), (x, gy), retain_graph=True), rows.sum(0)
    for a, b, wanted in zip(ours, expected, (True, *mask), strict=True):
        if wanted:
            torch.testing.assert_close(a, b.detach(), rtol=1e-11, atol=1e-10)
        else:
            assert a is None


@pytest.mark.parametrize("name", GEOMETRIES)
def test_public_convolution_ops(name):
    torch.manual_seed(0)
    shape, out, kernel, geometry = GEOMETRIES[name]
    x, weight = random(*shape), random(out, shape[1] // geometry["groups"], *kernel)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    y = convolve(x, weight, **geometry)
    gy = random(*y.shape)
    rows = torch.stack([torch.autograd.grad(y[i], weight, gy[i], retain_graph=True)[0] for i in range(len(x))]).detach()
    v, w = random(*weight.shape), random(len(x))
    flat = rows.flatten(1)
    for ours, expected in (
        (ops.conv_sq_norms(x, gy, kernel, **geometry), flat.square().sum(1)),
        (ops.conv_deviation_sq_norms(x, gy, v, **geometry), (flat - v.flatten()).square().sum(1)),
        (ops.conv_jvp(x, gy, v, **geometry), flat @ v.flatten()),
        (ops.conv_weighted_sum(x, gy, w, kernel, **geometry), torch.einsum("b,b...->...", w, rows)),
        (ops.conv_weighted_sum(x, gy, None, kernel, **geometry), rows.sum(0)),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    for function, inputs in (
        (lambda x, gy: ops.conv_sq_norms(x, gy, kernel, **geometry), (x, gy)),
        (lambda x, gy, v: ops.conv_deviation_sq_norms(x, gy, v, **geometry), (x, gy, v)),
        (lambda x, gy, v: ops.conv_jvp(x, gy, v, **geometry), (x, gy, v)),
        (lambda x, gy, w: ops.conv_weighted_sum(x, gy, w, kernel, **geometry), (x, gy, w)),
    ):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 2, 2, 3), (1, 5), (2, 0, 3)])
def test_public_linear_ops(shape):
    torch.manual_seed(0)
    x, weight = random(*shape), random(2, shape[-1])
    gy = random(*shape[:-1], 2)
    rows = torch.einsum(
        "bto,bti->boi",
        gy.flatten(1, -2) if gy.dim() > 2 else gy[:, None],
        x.flatten(1, -2) if x.dim() > 2 else x[:, None],
    )
    v, w = random(*weight.shape), random(len(x))
    flat = rows.flatten(1)
    for ours, expected in (
        (ops.linear_sq_norms(x, gy), flat.square().sum(1)),
        (ops.linear_deviation_sq_norms(x, gy, v), (flat - v.flatten()).square().sum(1)),
        (ops.linear_jvp(x, gy, v), flat @ v.flatten()),
        (ops.linear_weighted_sum(x, gy, w), torch.einsum("b,b...->...", w, rows)),
        (ops.linear_weighted_sum(x, gy), rows.sum(0)),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    if x.numel():
        for function, inputs in (
            (ops.linear_sq_norms, (x, gy)),
            (ops.linear_deviation_sq_norms, (x, gy, v)),
            (ops.linear_jvp, (x, gy, v)),
            (ops.linear_weighted_sum, (x, gy, w)),
        ):
            assert gradcheck(function, inputs)
            assert gradgradcheck(function, inputs)


def test_public_ops_refuse_what_does_not_fit():
    x, gy = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 3, 3)
    for call in (
        lambda: ops.conv_sq_norms(x, gy, 4),
        lambda: ops.conv_sq_norms(x, gy, 3, padding=1),
        lambda: ops.conv_sq_norms(x, gy.double(), 3),
        lambda: ops.conv_sq_norms(x, gy[:1], 3),
        lambda: ops.conv_sq_norms(x, gy, (3, 3, 3)),
        lambda: ops.conv_sq_norms(x, gy, 3, groups=2),
        lambda: ops.conv_sq_norms(x[0, 0], gy, 3),
        lambda: ops.conv_deviation_sq_norms(x, gy, torch.zeros(4, 2, 3, 3)),
        lambda: ops.conv_jvp(x, gy, torch.zeros(4, 3, 2, 3)),
        lambda: ops.conv_weighted_sum(x, gy, torch.ones(3), 3),
        lambda: ops.linear_sq_norms(torch.randn(2, 3), torch.randn(3, 3)),
        lambda: ops.linear_sq_norms(torch.randn(2, 3, 4), torch.randn(2, 2, 4)),
        lambda: ops.linear_sq_norms(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)),
        lambda: ops.linear_jvp(torch.randn(2, 3), torch.randn(2, 4), torch.zeros(3, 4)),
        lambda: ops.linear_deviation_sq_norms(torch.randn(2, 3), torch.randn(2, 4), torch.zeros(3, 4)),
    ):
        with pytest.raises(bootgrad.BootgradError):
            call()


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("sizes", [(5, 3), (3, 5), (4, 4)])
@pytest.mark.parametrize("centered", [True, False])
def test_a_linear_layers_statistics_in_one_visit(sizes, transposed, centered, monkeypatch):
    torch.manual_seed(0)
    product = LinearProduct(transposed)
    x, gy = (torch.randn(4, 6, n, dtype=torch.float64) for n in sizes)
    rows = product.rows(x, gy)
    center = torch.randn_like(rows[0]) if centered else None
    for path in ("direct", "gram"):
        monkeypatch.setattr(planning, "choose_path", lambda *_, path=path: path)
        found = product.statistics(x, gy, center)
        torch.testing.assert_close(found.weight_grad, rows.sum(0))
        torch.testing.assert_close(found.sq_norms, rows.square().sum((1, 2)))
        torch.testing.assert_close(found.bias_rows, gy.sum(1))
        assert found.weight_grad.is_contiguous()
        if centered:
            torch.testing.assert_close(found.deviation_sq_norms, (rows - center).square().sum((1, 2)))
