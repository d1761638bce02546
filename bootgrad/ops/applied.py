"""A layer's per-sample gradients times other inputs: what a forward and a backward pass at weights W + f G_i need beside W.

    applied               G_i ∗ h_i       as the layer's output for the input h
    applied_transposed    G_iᵀ ∗ g_i      as its input, for the gradient g of such an output

with G_i = Σ_t gy_{i,t} ⊗ u_{i,t} held as (x, gy). With one position, T = 1, this is gy_i ⟨x_i, h_i⟩. Not differentiable:
as functions of h and of g they are linear, and each other's transposes. Letters as in `ops.schema`.
"""

import torch
from torch import Tensor

from .. import planning
from ..errors import UnsupportedError
from .backends.eager_applied import conv_applied_elsewhere, conv_applied_transposed_elsewhere, linear_applied
from .convolution import ConvProduct
from .linear import LinearProduct
from .product import Product
from .schema import accumulation_dtype
from .transposed import TransposedConvProduct

_raw = torch.ops.bootgrad


@torch.no_grad()
def applied(product: Product, x: Tensor, gy: Tensor, h: Tensor) -> Tensor:
    """G_i ∗ h_i.

    Args:
        product: a linear layer or convolution.
        x: input that the G_i are of, canonical: (B, T, I) or (B, C, *S).
        gy: gradient by the output, (B, T, O) or (B, O, *S').
        h: another input, as x; its T or S may differ.

    Returns:
        (B, T, O) or (B, O, *S') of h, in its dtype.

    Raises:
        UnsupportedError: another product than these two.
    """
    if isinstance(product, LinearProduct):
        if x.size(1) == 1:
            return ((h * x).sum(-1, keepdim=True, dtype=accumulation_dtype(h.dtype)) * gy).to(h.dtype)
        return linear_applied(x, gy, h, planning.choose_path(product.layer(x, gy), "applied"))
    if isinstance(product, TransposedConvProduct):
        like = h.new_empty(()).expand(*gy.shape[:2], *product.output_size(h))
        return applied_transposed(product.product, gy, x, h, like)
    product = _convolution(product)
    if h.shape != x.shape:
        return conv_applied_elsewhere(x, gy, h, product.kernel_size, *product._geometry)
    path = planning.choose_path(product.layer(x, gy), "applied")
    return _raw.conv_applied(x, gy, h, product.kernel_size, *product._geometry, path)


@torch.no_grad()
def applied_transposed(product: Product, x: Tensor, gy: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """G_iᵀ ∗ g_i, as h, of which only the shape is read; g is a gradient by `applied`'s result. The rest as there."""
    if isinstance(product, LinearProduct):
        return applied(product, gy, x, g)
    if isinstance(product, TransposedConvProduct):
        return applied(product.product, gy, x, g)
    product = _convolution(product)
    if h.shape != x.shape:
        return conv_applied_transposed_elsewhere(x, gy, g, h, product.kernel_size, *product._geometry)
    path = planning.choose_path(product.layer(x, gy), "applied")
    return _raw.conv_applied_transposed(x, gy, g, product.kernel_size, *product._geometry, path)


@torch.no_grad()
def displaced(
    product: Product, x: Tensor, gy: Tensor, h: Tensor, weight: Tensor, shift: Tensor | None, factor: float
) -> Tensor | None:
    """(W + f G_i) ∗ h_i + s_i in one product, where that is the quickest way; else None.

    Args:
        product: as `applied`.
        x: as there.
        gy: as there.
        h: as there.
        weight: W.
        shift: s (B, O), or None.
        factor: f.
    """
    if not _at_once(product, x, gy, h):
        return None
    dtype = accumulation_dtype(x.dtype)
    shift = None if shift is None else shift.to(dtype)
    return _raw.conv_displaced(x, gy, h, weight.to(dtype), shift, factor, *_convolution(product)._geometry)


@torch.no_grad()
def displaced_transposed(
    product: Product, x: Tensor, gy: Tensor, g: Tensor, weight: Tensor, factor: float, h: Tensor
) -> Tensor | None:
    """(W + f G_i)ᵀ ∗ g_i, as h, of which only the shape is read; the rest as `displaced`."""
    if not _at_once(product, x, gy, h):
        return None
    weight = weight.to(accumulation_dtype(x.dtype))
    return _raw.conv_displaced_transposed(x, gy, g, weight, factor, *_convolution(product)._geometry)


def _at_once(product: Product, x: Tensor, gy: Tensor, h: Tensor) -> bool:
    """Whether to form W + f G_i takes no longer than G_i by its best path and the product with W beside it."""
    if not isinstance(product, ConvProduct) or h.shape != x.shape or not (x.numel() and gy.numel()):
        return False
    layer = product.layer(x, gy)
    direct, gram = (planning.cost(layer, path, "applied").time for path in ("direct", "gram"))
    return direct <= gram + layer.forward_operations


def _convolution(product: Product) -> ConvProduct:
    if not isinstance(product, ConvProduct):
        raise UnsupportedError(
            f"per-sample gradients are applied for linear layers and convolutions; got {type(product).__name__}"
        )
    return product
