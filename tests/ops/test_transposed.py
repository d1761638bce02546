"""Transposed convolutions as products: their output is torch's, and their per-sample gradients those of plain autograd."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

import bootgrad
from bootgrad.ops.convolution import ConvProduct
from bootgrad.ops.product import Mask
from bootgrad.ops.transposed import TransposedConvProduct

FUNCTIONS = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}


@st.composite
def geometries(draw):
    n = draw(st.integers(1, 3))

    def numbers(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=n, max_size=n)))

    K, stride, dilation = numbers(1, 3), numbers(1, 3), numbers(1, 2)
    padding = tuple(draw(st.integers(0, d * (k - 1))) for k, d in zip(K, dilation, strict=True))
    added = tuple(draw(st.integers(0, s - 1)) for s in stride)
    groups, S = draw(st.integers(1, 2)), numbers(1, 5)
    return groups * draw(st.integers(1, 3)), S, draw(st.integers(1, 3)), K, stride, padding, added, groups, dilation


@given(geometries(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_against_torch(geometry, B):
    C, S, out, K, stride, padding, added, groups, dilation = geometry
    function = FUNCTIONS[len(K)]
    torch.manual_seed(0)
    x = torch.randn(B, C, *S, dtype=torch.float64)
    weight = torch.randn(C, out, *K, dtype=torch.float64)
    bias = torch.randn(out * groups, dtype=torch.float64)
    options = (stride, padding, added, groups, dilation)
    product = TransposedConvProduct(ConvProduct(K, stride, padding, dilation, groups), added)
    assume(min(product.output_size(x)) > 0)
    y = function(x, weight, bias, *options)
    torch.testing.assert_close(product.output(x, weight, bias), y)
    gy, center = torch.randn_like(y), torch.randn_like(weight)

    def loss(weight, bias, x, gy):
        return (function(x[None], weight, bias, *options) * gy).sum()

    rows, bias_rows = vmap(grad(loss, (0, 1)), (None, None, 0, 0))(weight, bias, x, gy)
    torch.testing.assert_close(product.rows(x, gy), rows)
    torch.testing.assert_close(product.bias_rows(gy), bias_rows)
    torch.testing.assert_close(product.jvp(x, gy, center), (rows * center).flatten(1).sum(1))
    statistics = product.statistics(x, gy, center)
    torch.testing.assert_close(statistics.weight_grad, rows.sum(0))
    torch.testing.assert_close(statistics.sq_norms, rows.square().flatten(1).sum(1))
    torch.testing.assert_close(statistics.deviation_sq_norms, (rows - center).square().flatten(1).sum(1))
    torch.testing.assert_close(statistics.bias_rows, bias_rows)

    x, gy = x.requires_grad_(), gy.requires_grad_()
    apart = vmap(grad(loss, (0, 1)), (None, None, 0, 0))(weight, bias, x, gy)
    s = (apart[0] - center).square().flatten(1).sum(1) + (apart[1] - 0.5).square().sum(1)
    expected = torch.autograd.grad(s.sum(), (x, gy))
    half = torch.full_like(bias, 0.5)
    visit = product.visit(x.detach(), gy.detach(), (center, half), Mask(True, True, True, True), 2.0)
    torch.testing.assert_close(visit.sq_norms, s.detach())
    torch.testing.assert_close((visit.x_grad, visit.gy_grad), tuple(2 * t for t in expected))
    torch.testing.assert_close((visit.total, visit.bias_rows), (rows.sum(0), bias_rows))


def test_more_padding_of_the_output_than_stride_is_not_taken():
    """A convolution of such an output has more positions than x has."""
    with pytest.warns(UserWarning, match="no rule"):
        model = torch.nn.ConvTranspose1d(2, 3, 3, stride=2, dilation=4, output_padding=3).double()
        assert bootgrad.verify(model, lambda x: model(x).sin().flatten(1).sum(1), torch.randn(4, 2, 5).double()).ok
