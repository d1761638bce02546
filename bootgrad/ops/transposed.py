"""Transposed convolutions, and the transpose of any product: y = Wᵀ ∗ x is its input gradient for x.

The trilinear form is the same, ⟨x, W ∗ gy⟩, with x and gy in exchanged roles: G_i = Σ_t x_{i,t} ⊗ (the patch of gy_i at t).
"""

from dataclasses import dataclass

from torch import Tensor

from .convolution import ConvProduct
from .product import Mask, Product, VisitResult


@dataclass(frozen=True)
class TransposedConvProduct(Product):
    """The transpose of ``product``, a convolution of y (B, O, *S') to x (B, C, *S), whose weights are (C, O/groups, *K).

    ``output_padding`` says which of the S' that the product takes to S is meant: how much S' exceeds the smallest.
    """

    product: ConvProduct
    output_padding: tuple[int, ...]

    def factor(self, x, gy, weight_shape, batch_size):  # noqa: D102
        product, gy, x, inner = self.product.factor(gy, x, weight_shape, batch_size)
        added = (0,) * (len(product.stride) - len(self.output_padding))
        return TransposedConvProduct(product, (*added, *self.output_padding)), x, gy, inner

    def output(self, x, weight, bias=None):  # noqa: D102
        conv = self.product
        channels = weight.size(1) * conv.groups
        y = conv.input_grad(x, weight, x.new_empty(()).expand(x.size(0), channels, *self.output_size(x)))
        return y if bias is None else y.add_(bias.view(-1, *[1] * (y.dim() - 2)))

    def output_size(self, x: Tensor) -> list[int]:
        """S' of the output for x (B, C, *S)."""
        conv = self.product
        sizes = zip(
            x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation, self.output_padding, strict=True
        )
        return [(s - 1) * stride - 2 * p + d * (k - 1) + added + 1 for s, k, stride, p, d, added in sizes]

    def input_grad(self, gy, weight, x):  # noqa: D102
        return self.product.output(gy, weight)

    def weight_grad(self, x, gy, w=None):  # noqa: D102
        return self.product.weight_grad(gy, x, w)

    def bias_grad(self, gy):  # noqa: D102
        return self.product.bias_grad(gy)

    def bias_rows(self, gy):  # noqa: D102
        return self.product.bias_rows(gy)

    def statistics(self, x, gy, center):  # noqa: D102
        return self.product.statistics(gy, x, center)._replace(bias_rows=self.bias_rows(gy))

    def sq_norms(self, x, gy, center):  # noqa: D102
        return self.product.sq_norms(gy, x, center)

    def visit(self, x, gy, centers, mask, scale=1.0):  # noqa: D102
        center, bias_center = centers
        s, dgy, dx, total, _ = self.product.visit(
            gy, x, (center, None), Mask(mask.gy_grad, mask.x_grad, mask.total, False), scale
        )
        if not mask.bias:
            return VisitResult(s, dx, dgy, total, None)
        rows = gy.flatten(2).sum(2, dtype=s.dtype)
        apart = rows if bias_center is None else rows - bias_center
        if dgy is not None:
            dgy.add_(apart.view(*apart.shape, *[1] * (dgy.dim() - 2)).to(dgy.dtype), alpha=2 * scale)
        return VisitResult(s + apart.square().sum(1), dx, dgy, total, rows)

    def jvp(self, x, gy, v):  # noqa: D102
        return self.product.jvp(gy, x, v)

    def layer(self, x, gy):  # noqa: D102
        return self.product.layer(gy, x)

    def rows(self, x, gy):  # noqa: D102
        return self.product.rows(gy, x)
