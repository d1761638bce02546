"""Per-sample gradients times other inputs, in plain torch: G_i ∗ h_i and G_iᵀ ∗ g_i of linear layers and convolutions.

G_i = Σ_t gy_{i,t} ⊗ u_{i,t} is formed for a chunk of samples (direct), or never (Gram): with U'_i the patches of h_i,
G_i ∗ h_i = gy_i (U_i U'_iᵀ), and G_iᵀ ∗ g_i = (g_iᵀ gy_i) u_i, gathered to the pixels under each patch.

Letters as in `ops.schema`, and ``b`` samples of the chunk, ``N`` pixels, ``g`` groups.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import schema
from ..schema import accumulation_dtype
from .eager import CHUNK_BYTES, CHUNK_BYTES_ELSEWHERE
from .eager_layers import Conv, Linear, _at


def linear_applied(x: Tensor, gy: Tensor, h: Tensor, path: str) -> Tensor:
    """G_i h_i, (B, T', O), for h (B, T', I)."""
    return _by_chunks(AppliedLinear.applied, AppliedLinear, [x, gy, h], path, (*h.shape[:2], gy.size(2)))


@torch.no_grad()
def conv_applied(
    x: Tensor, gy: Tensor, h: Tensor, kernel_size, stride, padding, dilation, groups: int, path: str
) -> Tensor:
    """G_i ∗ h_i."""
    layer = _checked(x, gy, (kernel_size, stride, padding, dilation, groups), path)
    schema.check_applied("h", h, x)
    return _by_chunks(layer.applied, layer, [x, gy, h], path, gy.shape)


@torch.no_grad()
def conv_applied_transposed(
    x: Tensor, gy: Tensor, g: Tensor, kernel_size, stride, padding, dilation, groups: int, path: str
) -> Tensor:
    """G_iᵀ ∗ g_i."""
    layer = _checked(x, gy, (kernel_size, stride, padding, dilation, groups), path)
    schema.check_applied("g", g, gy)
    return _by_chunks(layer.applied_transposed, layer, [x, gy, g, x], path, x.shape)


@torch.no_grad()
def conv_displaced(
    x: Tensor,
    gy: Tensor,
    h: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    factor: float,
    stride,
    padding,
    dilation,
    groups: int,
) -> Tensor:
    """(weight + factor·G_i) ∗ h_i + shift_i."""
    schema.check_displaced(x, gy, weight, stride, padding, dilation, groups)
    layer = _checked(x, gy, (weight.shape[2:], stride, padding, dilation, groups), "direct")
    schema.check_applied("h", h, x)
    schema.check_layer("shift", shift, gy.shape[:2], x)

    def displaced(x, gy, h, _):
        return layer.outputs(h, layer.rows(x, gy).mul_(factor).add_(weight), gy)

    out = _by_chunks(displaced, layer, [x, gy, h], "direct", gy.shape)
    return out if shift is None else out.add_(shift.view(*shift.shape, *[1] * (gy.dim() - 2)))


@torch.no_grad()
def conv_displaced_transposed(
    x: Tensor, gy: Tensor, g: Tensor, weight: Tensor, factor: float, stride, padding, dilation, groups: int
) -> Tensor:
    """(weight + factor·G_i)ᵀ ∗ g_i."""
    schema.check_displaced(x, gy, weight, stride, padding, dilation, groups)
    layer = _checked(x, gy, (weight.shape[2:], stride, padding, dilation, groups), "direct")
    schema.check_applied("g", g, gy)

    def displaced(x, gy, g, _):
        return layer.input_grads(g, layer.rows(x, gy).mul_(factor).add_(weight), x)

    return _by_chunks(displaced, layer, [x, gy, g], "direct", x.shape)


def conv_applied_elsewhere(x: Tensor, gy: Tensor, h: Tensor, *geometry) -> Tensor:
    """G_i ∗ h_i for an h of another size of space than x, on the direct path."""
    layer = _checked(x, gy, geometry, "direct")
    space = schema.output_size(h.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return _by_chunks(layer.applied, layer, [x, gy, h], "direct", (x.size(0), gy.size(1), *space))


def conv_applied_transposed_elsewhere(x: Tensor, gy: Tensor, g: Tensor, h: Tensor, *geometry) -> Tensor:
    """G_iᵀ ∗ g_i as h, for a g that a convolution of h puts out, on the direct path."""
    layer = _checked(x, gy, geometry, "direct")
    return _by_chunks(layer.applied_transposed, layer, [x, gy, g, h], "direct", h.shape)


def _checked(x: Tensor, gy: Tensor, geometry: Sequence[Any], path: str) -> "AppliedConv":
    schema.check_paths(path)
    kernel_size, stride, padding, dilation, groups = geometry
    schema.check_conv(x, gy, kernel_size, stride, padding, dilation, groups)
    return AppliedConv(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), groups)


def _by_chunks(
    function: Callable[..., Tensor], layer: type[Linear] | Conv, tensors: list[Tensor], path: str, shape: Sequence[int]
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


class AppliedLinear(Linear):
    """x (b, T, I), gy (b, T, O), h (b, T', I)."""

    @staticmethod
    def applied(x: Tensor, gy: Tensor, h: Tensor, path: str) -> Tensor:
        """G_i h_i, (b, T', O); with x and gy in exchanged roles, G_iᵀ g_i."""
        return (h @ x.mT) @ gy if path == "gram" else h @ (x.mT @ gy)


class AppliedConv(Conv):
    """x and h (b, C, *S), gy and g (b, O, *S'); h and g may have other sizes of space than x and gy on the direct path."""

    def applied(self, x: Tensor, gy: Tensor, h: Tensor, path: str) -> Tensor:
        """G_i ∗ h_i, (b, O, …)."""
        if path == "direct":
            y = self._convolution(h.reshape(1, -1, *h.shape[2:]), self.rows(x, gy).flatten(0, 1), h.size(0))
            return y.view(h.size(0), -1, *y.shape[2:])
        uu = self._cross_gram(self._by_group(h), self._by_group(x), gy.shape[2:], self._layer(x, gy).pixels_first)
        return (self._by_group(gy).flatten(2) @ uu.mT).view(gy.shape)

    def applied_transposed(self, x: Tensor, gy: Tensor, g: Tensor, h: Tensor, path: str) -> Tensor:
        """G_iᵀ ∗ g_i, as h, of which only the shape is read."""
        if path == "direct":
            return self.input_grads(g, self.rows(x, gy), h)
        gg = self._by_group(g).flatten(2).mT @ self._by_group(gy).flatten(2)  # (b·g, T, T), rows of g
        gather = self._gather_pixels if self._layer(x, gy).pixels_first else self._gather_patches
        return gather(self._by_group(x), gg, gy.shape[2:]).view(x.shape)

    def _by_group(self, t: Tensor) -> Tensor:
        """(b·g, channels of a group, *space)."""
        return t.reshape(t.size(0) * self.groups, -1, *t.shape[2:])

    def _cross_gram(self, h: Tensor, x: Tensor, out: Sequence[int], pixels_first: bool) -> Tensor:
        """(b·g, T, T): inner products of the patches of h, by rows, with those of x."""
        if not pixels_first:
            return self._patches(h, out).mT @ self._patches(x, out)
        space, T = x.shape[2:], math.prod(out)
        P = (h.flatten(2).mT @ x.flatten(2)).view(-1, *space, *space)
        uu = x.new_zeros(x.size(0), *out, *out)
        for t, p in self._shifts(space, out):
            uu[_at(*t, *t)] += P[_at(*p, *p)]
        return uu.view(-1, T, T)

    def _gather_pixels(self, x: Tensor, gg: Tensor, out: Sequence[int]) -> Tensor:
        """Σ over the patches that reach a pixel, by way of Q, the sums of gg at pixels (N, N)."""
        space, pixels = x.shape[2:], x.flatten(2)
        Q, gg = x.new_zeros(x.size(0), *space, *space), gg.view(-1, *out, *out)
        for t, p in self._shifts(space, out):
            Q[_at(*p, *p)] += gg[_at(*t, *t)]
        return pixels @ Q.view(-1, pixels.size(2), pixels.size(2)).mT

    def _gather_patches(self, x: Tensor, gg: Tensor, out: Sequence[int]) -> Tensor:
        """Σ over the patches that reach a pixel, with the patches' gradients written out."""
        shifts = list(self._shifts(x.shape[2:], out))
        du = (self._patches(x, out) @ gg.mT).view(*x.shape[:2], len(shifts), *out)
        dx = torch.zeros_like(x)
        for k, (t, p) in enumerate(shifts):
            dx[_at(*p)] += du[_at(k, *t)]
        return dx

    def _patches(self, x: Tensor, out: Sequence[int]) -> Tensor:
        """(b·g, C/g · K, T)."""
        shifts = list(self._shifts(x.shape[2:], out))
        u = x.new_zeros(*x.shape[:2], len(shifts), *out)
        for k, (t, p) in enumerate(shifts):
            u[_at(k, *t)] = x[_at(*p)]
        return u.view(x.size(0), -1, math.prod(out))


for _name in schema.APPLIED_SCHEMAS:
    schema.library.impl(_name, globals()[_name], "CompositeExplicitAutograd")
