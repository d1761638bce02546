"""Every op in plain torch, for every device and dtype: the implementation where no compiled one is registered.

Samples go through in chunks that are bounded in bytes, so that memory grows neither with B·P nor with the patches of
the whole batch. Half precisions are cast to float32 chunk by chunk. The direct path subtracts a center before it
squares; on the Gram path ‖G_i − c‖² = ‖G_i‖² − 2⟨G_i, c⟩ + ‖c‖², and what rounding leaves below zero is set to zero.

Letters as in `ops.schema`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import schema
from ..schema import accumulation_dtype
from .eager_embedding import embedding_sq_norms  # noqa: F401
from .eager_layers import Conv, Linear
from .eager_norms import group_norm_backward, group_norm_double_backward  # noqa: F401

# A chunk stays in the last cache of a processor; elsewhere it keeps the device busy.
CHUNK_BYTES = {"cpu": 4 * 2**20}
CHUNK_BYTES_ELSEWHERE = 128 * 2**20

Layer = type[Linear] | Conv


@torch.no_grad()
def linear_rank1_sq_norms(x: Tensor, gy: Tensor) -> Tensor:
    """‖x_i‖² ‖gy_i‖²."""
    torch._check(x.dim() == 2 and gy.dim() == 2, lambda: "x and gy must be (B, I) and (B, O)")
    schema.check_pair(x, gy)
    dtype = accumulation_dtype(x.dtype)
    return _squares(x.to(dtype)) * _squares(gy.to(dtype))


@torch.no_grad()
def linear_sq_norms(x: Tensor, gy: Tensor, path: str) -> Tensor:
    """‖G_i‖²."""
    return _sq_norms_with_grad(_linear(x, gy, path), x, gy, None, path, (False, False, False))[0]


@torch.no_grad()
def linear_deviation_sq_norms(x: Tensor, gy: Tensor, center: Tensor, path: str) -> Tensor:
    """‖G_i − center‖²."""
    layer = _linear(x, gy, path, center=center)
    return _sq_norms_with_grad(layer, x, gy, center, path, (False, False, False))[0]


@torch.no_grad()
def linear_jvp(x: Tensor, gy: Tensor, v: Tensor) -> Tensor:
    """⟨G_i, v⟩."""
    return _jvp(_linear(x, gy, v=v), x, gy, v)


@torch.no_grad()
def linear_weighted_sum(x: Tensor, gy: Tensor, w: Tensor | None) -> Tensor:
    """Σ_i w_i G_i."""
    return _weighted_sum(_linear(x, gy, w=w), x, gy, w)


@torch.no_grad()
def linear_statistics(x: Tensor, gy: Tensor, center: Tensor | None, path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ_i G_i, ‖G_i‖², ‖G_i − center‖² and the bias's rows."""
    layer = _linear(x, gy, path, center=center)
    return *_statistics(layer, x, gy, center, path), gy.sum(1, dtype=accumulation_dtype(gy.dtype))


@torch.no_grad()
def linear_sq_norms_with_grad(
    x: Tensor, gy: Tensor, center: Tensor | None, path: str, mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    """‖G_i − center‖², its derivatives by x and gy, and Σ_i G_i."""
    return _sq_norms_with_grad(_linear(x, gy, path, center=center), x, gy, center, path, mask)


@torch.no_grad()
def conv_sq_norms(x: Tensor, gy: Tensor, kernel_size, stride, padding, dilation, groups: int, path: str) -> Tensor:
    """‖G_i‖²."""
    layer = _conv(x, gy, kernel_size, stride, padding, dilation, groups, path)
    return _sq_norms_with_grad(layer, x, gy, None, path, (False, False, False))[0]


@torch.no_grad()
def conv_deviation_sq_norms(
    x: Tensor, gy: Tensor, center: Tensor, stride, padding, dilation, groups: int, path: str
) -> Tensor:
    """‖G_i − center‖²."""
    layer = _conv(x, gy, center.shape[2:], stride, padding, dilation, groups, path, center=center)
    return _sq_norms_with_grad(layer, x, gy, center, path, (False, False, False))[0]


@torch.no_grad()
def conv_jvp(x: Tensor, gy: Tensor, v: Tensor, stride, padding, dilation, groups: int) -> Tensor:
    """⟨G_i, v⟩."""
    return _jvp(_conv(x, gy, v.shape[2:], stride, padding, dilation, groups, v=v), x, gy, v)


@torch.no_grad()
def conv_weighted_sum(
    x: Tensor, gy: Tensor, w: Tensor | None, kernel_size, stride, padding, dilation, groups: int
) -> Tensor:
    """Σ_i w_i G_i."""
    return _weighted_sum(_conv(x, gy, kernel_size, stride, padding, dilation, groups, w=w), x, gy, w)


@torch.no_grad()
def conv_statistics(
    x: Tensor, gy: Tensor, center: Tensor | None, kernel_size, stride, padding, dilation, groups: int, path: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ_i G_i, ‖G_i‖², ‖G_i − center‖² and the bias's rows."""
    layer = _conv(x, gy, kernel_size, stride, padding, dilation, groups, path, center=center)
    return *_statistics(layer, x, gy, center, path), gy.flatten(2).sum(2, dtype=accumulation_dtype(gy.dtype))


@torch.no_grad()
def conv_sq_norms_with_grad(
    x: Tensor,
    gy: Tensor,
    center: Tensor | None,
    kernel_size,
    stride,
    padding,
    dilation,
    groups: int,
    path: str,
    mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """‖G_i − center‖², its derivatives by x and gy, and Σ_i G_i."""
    layer = _conv(x, gy, kernel_size, stride, padding, dilation, groups, path, center=center)
    return _sq_norms_with_grad(layer, x, gy, center, path, mask)


def _linear(x, gy, path="direct", *, w=None, **layer_shaped) -> Layer:
    schema.check_paths(path)
    schema.check_linear(x, gy)
    return _checked(Linear, x, gy, w, layer_shaped)


def _conv(x, gy, kernel_size, stride, padding, dilation, groups, path="direct", *, w=None, **layer_shaped) -> Layer:
    schema.check_paths(path)
    schema.check_conv(x, gy, kernel_size, stride, padding, dilation, groups)
    layer = Conv(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), groups)
    return _checked(layer, x, gy, w, layer_shaped)


def _checked(layer: Layer, x, gy, w, layer_shaped) -> Layer:
    schema.check_layer("w", w, (x.size(0),), x)
    for name, tensor in layer_shaped.items():
        schema.check_layer(name, tensor, layer.weight_shape(x, gy), x)
    return layer


def _sq_norms_with_grad(layer: Layer, x, gy, center, path: str, mask: Sequence[bool]) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(x.dtype)
    s = x.new_zeros(x.size(0), dtype=dtype)
    if center is not None:
        s += center.square().sum()
    # Zeros, since a layer without positions yields no chunks.
    dx, dgy = (t.new_zeros(t.shape if wanted else 0) for t, wanted in zip((x, gy), mask, strict=False))
    total = s.new_zeros(layer.weight_shape(x, gy) if mask[2] else 0)
    for rows, xs, gys in _chunks(layer, x, gy, path):
        if path == "direct":
            s[rows], *grads = _direct_chunk(layer, xs, gys, center, mask, total)
        else:
            s[rows], *grads = _gram_chunk(layer, xs, gys, center, mask[:2])
        for out, grad in zip((dx, dgy), grads, strict=True):
            if grad is not None:
                out[rows] = grad
    if mask[2] and path == "gram":
        total = _weighted_sum(layer, x, gy, None)
    return s, dx, dgy, total


def _direct_chunk(layer: Layer, x, gy, center, mask, total):
    g = layer.rows(x, gy)
    if mask[2]:
        total += g.sum(0)
    if center is not None:
        g -= center
    if not any(mask[:2]):
        return _squares_(g), None, None
    s = _squares(g)
    g *= 2
    return s, layer.input_grads(gy, g, x) if mask[0] else None, layer.outputs(x, g, gy) if mask[1] else None


def _gram_chunk(layer: Layer, x, gy, center, mask):
    s, dx, dgy = layer.gram(x, gy, mask[:2])
    if center is not None:
        cx = layer.output(x, center)
        s += center.square().sum() - 2 * (gy * cx).flatten(1).sum(1)
        if dx is not None:
            dx -= 2 * layer.input_grad(gy, center, x)
        if dgy is not None:
            dgy -= 2 * cx
    return s.clamp_(min=0), dx, dgy


def _statistics(layer: Layer, x, gy, center, path: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    total = x.new_zeros(layer.weight_shape(x, gy), dtype=dtype)
    s = x.new_zeros(x.size(0), dtype=dtype)
    deviation = s.new_zeros(0) if center is None else s + center.square().sum()
    for rows, xs, gys in _chunks(layer, x, gy, path):
        if path == "direct":
            g = layer.rows(xs, gys)
            total += g.sum(0)
            if center is not None:
                deviation[rows] = _squares_(g - center)
            s[rows] = _squares_(g)
        else:
            total += layer.weight_grad(xs, gys)
            s[rows] = layer.gram(xs, gys, (False, False))[0].clamp_(min=0)
            if center is not None:
                products = (gys * layer.output(xs, center)).flatten(1).sum(1)
                deviation[rows] += s[rows] - 2 * products
    return total, s, deviation.clamp_(min=0)


def _jvp(layer: Layer, x, gy, v) -> Tensor:
    out = x.new_zeros(x.size(0), dtype=accumulation_dtype(x.dtype))
    for rows, xs, gys in _chunks(layer, x, gy):
        out[rows] = (gys * layer.output(xs, v)).flatten(1).sum(1)
    return out


def _weighted_sum(layer: Layer, x, gy, w) -> Tensor:
    total = x.new_zeros(layer.weight_shape(x, gy), dtype=accumulation_dtype(x.dtype))
    for rows, xs, gys in _chunks(layer, x, gy):
        total += layer.weight_grad(xs, gys if w is None else gys * w[rows].view(-1, *[1] * (gy.dim() - 1)))
    return total


def _chunks(layer: Layer, x: Tensor, gy: Tensor, path: str | None = None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, x and gy of consecutive samples in the accumulation dtype; none where there are no entries: all G_i = 0."""
    if x.numel() == 0 or gy.numel() == 0:
        return
    dtype = accumulation_dtype(x.dtype)
    numbers = (x.numel() + 2 * gy.numel()) // x.size(0) + (layer.entries(x, gy, path) if path else 0)
    size = max(1, CHUNK_BYTES.get(x.device.type, CHUNK_BYTES_ELSEWHERE) // (numbers * dtype.itemsize))
    for start in range(0, x.size(0), size):
        rows = slice(start, start + size)
        yield rows, x[rows].to(dtype), gy[rows].to(dtype)


def _squares(t: Tensor) -> Tensor:
    return t.flatten(1).square().sum(1)  # summed pairwise: a norm over 10⁶ float32 entries would lose two digits


def _squares_(t: Tensor) -> Tensor:
    return t.square_().flatten(1).sum(1)


for _name in schema.SCHEMAS:
    # Under every device's own key, so that a compiled kernel registered for that device comes first.
    schema.library.impl(_name, globals()[_name], "CompositeExplicitAutograd")
