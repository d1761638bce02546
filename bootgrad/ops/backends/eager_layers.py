"""Linear layers and convolutions over one chunk of samples, in plain torch: what the eager ops are put together from.

Both classes speak of ⟨gy, W ∗ x⟩ and offer the same methods; ``weights`` are one set a sample (b, *W), ``weight`` is
one for all (*W). A convolution with one set of weights a sample is a grouped convolution of one sample, with the
chunk's samples side by side in its channels.

Letters as in `ops.schema`, and ``b`` samples of the chunk, ``N`` pixels, ``g`` groups.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import planning

# Rows of T×T matrices that are held at once.
GRAM_ROWS = 512


class Linear:
    """y = x Wᵀ: x (b, T, I), gy (b, T, O), W (O, I)."""

    @staticmethod
    def weight_shape(x: Tensor, gy: Tensor) -> tuple[int, ...]:
        """Shape of W."""
        return gy.size(2), x.size(2)

    @staticmethod
    def entries(x: Tensor, gy: Tensor, path: str) -> int:
        """Intermediate numbers per sample."""
        return gy.size(2) * x.size(2) if path == "direct" else 2 * x.size(1) * min(x.size(1), GRAM_ROWS)

    @staticmethod
    def rows(x: Tensor, gy: Tensor) -> Tensor:
        """G_i, (b, O, I)."""
        return gy.mT @ x

    @staticmethod
    def weight_grad(x: Tensor, gy: Tensor) -> Tensor:
        """Σ_i G_i, (O, I)."""
        return gy.flatten(0, 1).t() @ x.flatten(0, 1)

    @staticmethod
    def output(x: Tensor, weight: Tensor) -> Tensor:
        """W ∗ x_i, as gy."""
        return x @ weight.t()

    @staticmethod
    def input_grad(gy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """Wᵀ ∗ gy_i, as x."""
        return gy @ weight

    @staticmethod
    def outputs(x: Tensor, weights: Tensor, gy: Tensor) -> Tensor:
        """W_i ∗ x_i, as gy."""
        return x @ weights.mT

    @staticmethod
    def input_grads(gy: Tensor, weights: Tensor, x: Tensor) -> Tensor:
        """W_iᵀ ∗ gy_i, as x."""
        return gy @ weights

    @staticmethod
    def gram(x: Tensor, gy: Tensor, mask: Sequence[bool]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """‖G_i‖² = ⟨X Xᵀ, Gy Gyᵀ⟩ (b,), ∂/∂x_i = 2 Gy Gyᵀ x and ∂/∂gy_i = 2 X Xᵀ gy where the mask asks for them."""
        s = x.new_zeros(x.size(0))
        dx, dgy = (torch.empty_like(t) if wanted else None for t, wanted in zip((x, gy), mask, strict=True))
        for start in range(0, x.size(1), GRAM_ROWS):
            some = slice(start, start + GRAM_ROWS)
            xx, gg = x[:, some] @ x.mT, gy[:, some] @ gy.mT  # (b, rows, T)
            if dx is not None:
                dx[:, some] = 2 * (gg @ x)
            if dgy is not None:
                dgy[:, some] = 2 * (xx @ gy)
            s += xx.mul_(gg).flatten(1).sum(1)
        return s, dx, dgy


@dataclass(frozen=True)
class Conv:
    """A convolution: x (b, C, *S), gy (b, O, *S'), W (O, C/g, *K)."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def weight_shape(self, x: Tensor, gy: Tensor) -> tuple[int, ...]:
        """Shape of W."""
        return gy.size(1), x.size(1) // self.groups, *self.kernel_size

    def entries(self, x: Tensor, gy: Tensor, path: str) -> int:
        """Intermediate numbers per sample."""
        layer = self._layer(x, gy)
        return layer.weight_entries if path == "direct" else int(layer.gram(True)[1])

    def rows(self, x: Tensor, gy: Tensor) -> Tensor:
        """G_i, (b, *W)."""
        shape = self.weight_shape(x, gy)
        weights = x.new_empty(()).expand(x.size(0) * shape[0], *shape[1:])  # only its shape is read
        g = self._backward(_side_by_side(gy), _side_by_side(x), weights, 1, x.size(0))
        return g.view(x.size(0), *shape)

    def weight_grad(self, x: Tensor, gy: Tensor) -> Tensor:
        """Σ_i G_i, (*W)."""
        return self._backward(gy, x, x.new_empty(()).expand(self.weight_shape(x, gy)), 1)

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """W ∗ x_i, as gy."""
        return self._convolution(x, weight)

    def input_grad(self, gy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """Wᵀ ∗ gy_i, as x."""
        return self._backward(gy, x, weight, 0)

    def outputs(self, x: Tensor, weights: Tensor, gy: Tensor) -> Tensor:
        """W_i ∗ x_i, as gy."""
        return self._convolution(_side_by_side(x), weights.flatten(0, 1), x.size(0)).view(gy.shape)

    def input_grads(self, gy: Tensor, weights: Tensor, x: Tensor) -> Tensor:
        """W_iᵀ ∗ gy_i, as x."""
        return self._backward(_side_by_side(gy), _side_by_side(x), weights.flatten(0, 1), 0, x.size(0)).view(x.shape)

    def gram(self, x: Tensor, gy: Tensor, mask: Sequence[bool]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """‖G_i‖² = ⟨U Uᵀ, Gy Gyᵀ⟩ (b,) and its derivatives where the mask asks for them.

            ∂/∂gy_i = 2 U Uᵀ gy        ∂/∂u_i = 2 Gy Gyᵀ u, gathered to the pixels under each patch

        By the pixel Gram P = X Xᵀ: (U Uᵀ)[t, t'] = Σ_o P[s·t + o, s·t' + o], and ∂/∂x_i = 2 Q x, where Q takes the sums
        of Gy Gyᵀ in the other direction. T×T and N×N numbers a sample and group are held.
        """
        groups = x.size(0) * self.groups
        y = gy.reshape(groups, -1, math.prod(gy.shape[2:]))  # (b·g, O/g, T)
        gg = y.mT @ y
        by_group = self._pixel_gram if self._layer(x, gy).pixels_first else self._patch_gram
        uu, dx = by_group(x.reshape(groups, -1, *x.shape[2:]), gy.shape[2:], gg, mask[0])
        dgy = (2 * (y @ uu)).view(gy.shape) if mask[1] else None
        s = uu.mul_(gg).view(x.size(0), -1).sum(1)
        return s, None if dx is None else dx.view(x.shape), dgy

    def _pixel_gram(self, x: Tensor, out: Sequence[int], gg: Tensor, with_dx: bool) -> tuple[Tensor, Tensor | None]:
        space, pixels = x.shape[2:], x.flatten(2)  # (b·g, C/g, N)
        P = (pixels.mT @ pixels).view(-1, *space, *space)
        uu = x.new_zeros(x.size(0), *out, *out)
        for t, p in self._shifts(space, out):
            uu[_at(*t, *t)] += P[_at(*p, *p)]
        if not with_dx:
            return uu.view_as(gg), None
        Q, gg = P.zero_(), gg.view_as(uu)
        for t, p in self._shifts(space, out):
            Q[_at(*p, *p)] += gg[_at(*t, *t)]
        N = pixels.size(2)
        return uu.view(-1, *[math.prod(out)] * 2), 2 * (pixels @ Q.view(-1, N, N))

    def _patch_gram(self, x: Tensor, out: Sequence[int], gg: Tensor, with_dx: bool) -> tuple[Tensor, Tensor | None]:
        shifts = list(self._shifts(x.shape[2:], out))
        u = x.new_zeros(*x.shape[:2], len(shifts), *out)  # (b·g, C/g, K, *S')
        for k, (t, p) in enumerate(shifts):
            u[_at(k, *t)] = x[_at(*p)]
        patches = u.view(x.size(0), -1, gg.size(1))
        uu = patches.mT @ patches
        if not with_dx:
            return uu, None
        du, dx = (2 * (patches @ gg)).view_as(u), torch.zeros_like(x)
        for k, (t, p) in enumerate(shifts):
            dx[_at(*p)] += du[_at(k, *t)]
        return uu, dx

    def _shifts(
        self, space: Sequence[int], out: Sequence[int]
    ) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """For each kernel position: the output positions at which it lies within the input, and the pixels it meets."""
        dimensions = []
        for S, T, K, stride, padding, dilation in zip(
            space, out, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
        ):
            pairs = []
            for k in range(K):
                o = dilation * k - padding  # position t meets pixel stride·t + o
                first = max(0, -(o // stride))
                end = max(first, min(T, (S - 1 - o) // stride + 1))
                pairs.append((slice(first, end), slice(stride * first + o, stride * end + o, stride)))
            dimensions.append(pairs)
        for combination in itertools.product(*dimensions):
            yield tuple(zip(*combination, strict=True))

    def _layer(self, x: Tensor, gy: Tensor) -> planning.ConvLayer:
        geometry = self.kernel_size, self.stride, self.padding, self.dilation, self.groups
        return planning.ConvLayer(x.size(0), x.size(1), tuple(x.shape[2:]), gy.size(1), *geometry)

    def _convolution(self, x: Tensor, weight: Tensor, samples: int = 1) -> Tensor:
        zeros, groups = (0,) * len(self.stride), samples * self.groups
        return torch.convolution(x, weight, None, self.stride, self.padding, self.dilation, False, zeros, groups)

    def _backward(self, gy: Tensor, x: Tensor, weight: Tensor, which: int, samples: int = 1) -> Tensor:
        """The gradient by x (0) or by the weight (1)."""
        zeros, mask = (0,) * len(self.stride), (which == 0, which == 1, False)
        geometry = self.stride, self.padding, self.dilation, False, zeros, samples * self.groups
        return torch.ops.aten.convolution_backward(gy, x, weight, None, *geometry, mask)[which]


def _at(*index: int | slice) -> Any:
    """The index of the last dimensions."""
    return (..., *index)


def _side_by_side(t: Tensor) -> Tensor:
    """(b, C, *S) as one sample with b·C channels."""
    return t.reshape(1, -1, *t.shape[2:])
