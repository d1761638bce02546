"""A layer's per-sample gradients times other inputs: what a forward and a backward pass at weights W + f G_i need beside W.

    applied               G_i ∗ h_i       as the layer's output for the input h
    applied_transposed    G_iᵀ ∗ g_i      as its input, for the gradient g of such an output

with G_i = Σ_t gy_{i,t} ⊗ u_{i,t} held as (x, gy). With one position, T = 1, this is gy_i ⟨x_i, h_i⟩. Not differentiable:
as functions of h and of g they are linear, and each other's transposes. Letters as in `ops.schema`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import planning
from ..errors import UnsupportedError
from .backends.eager import CHUNK_BYTES, CHUNK_BYTES_ELSEWHERE
from .backends.eager_applied import AppliedConv, AppliedLinear
from .backends.eager_layers import Conv, Linear
from .convolution import ConvProduct
from .linear import LinearProduct
from .product import Product
from .schema import accumulation_dtype, output_size


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
        path = planning.choose_path(product.layer(x, gy), "applied")
        return _by_chunks(AppliedLinear.applied, AppliedLinear, [x, gy, h], path, (*h.shape[:2], gy.size(2)))
    layer, path = _convolution(product, x, gy, h)
    space = output_size(h.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return _by_chunks(layer.applied, layer, [x, gy, h], path, (x.size(0), gy.size(1), *space))


@torch.no_grad()
def applied_transposed(product: Product, x: Tensor, gy: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """G_iᵀ ∗ g_i, as h, of which only the shape is read; g is a gradient by `applied`'s result. The rest as there."""
    if isinstance(product, LinearProduct):
        return applied(product, gy, x, g)
    layer, path = _convolution(product, x, gy, h)
    return _by_chunks(layer.applied_transposed, layer, [x, gy, g, h], path, h.shape)


def _convolution(product: Product, x: Tensor, gy: Tensor, h: Tensor) -> tuple[AppliedConv, str]:
    if not isinstance(product, ConvProduct):
        raise UnsupportedError(
            f"per-sample gradients are applied for linear layers and convolutions; got {type(product).__name__}"
        )
    layer = AppliedConv(product.kernel_size, product.stride, product.padding, product.dilation, product.groups)
    return layer, planning.choose_path(product.layer(x, gy), "applied") if h.shape == x.shape else "direct"


def _by_chunks(
    function: Callable[..., Tensor],
    layer: type[Linear] | Conv,
    tensors: list[Tensor],
    path: str,
    shape: Sequence[int],
) -> Tensor:
    """``function`` of as many samples at a time as stay in cache with their G_i or Gram matrices, in the accumulation dtype."""
    x, gy, h = tensors[:3]
    if not all(t.numel() for t in tensors):
        return h.new_zeros(shape)
    dtype = accumulation_dtype(x.dtype)
    numbers = sum(t.numel() for t in tensors) // x.size(0) + layer.entries(x, gy, path)
    size = max(1, CHUNK_BYTES.get(x.device.type, CHUNK_BYTES_ELSEWHERE) // (numbers * dtype.itemsize))
    out = h.new_empty(shape)
    for start in range(0, x.size(0), size):
        rows = slice(start, start + size)
        out[rows] = function(*(t[rows].to(dtype) for t in tensors), path)
    return out
