"""The canonical form in which every launcher takes a layer: a convolution in three dimensions, as strided views.

    G_i[o, c, k] = Σ_t gy_i[o, t] · x_i[c, stride·t + dilation·k − padding]

    x (B, C, S0, S1, S2)        gy (B, O, P0, P1, P2)        weights (O, C/groups, K0, K1, K2)

Convolutions in one or two dimensions get leading dimensions of size 1. A linear layer, x (B, T, I) and gy (B, T, O), is a
1×1×1 convolution over T positions: x (B, I, 1, 1, T). A pointwise convolution is brought to this form, too, where its
strides allow, which saves kernels the arithmetic of three dimensions. Nothing is copied: kernels take any strides, and
coalesce along the channels or along the last dimension of space, whichever has stride 1.

Inside of the kernels a weight is a matrix (O, R) of rows r = k·(C/groups) + c, R = K·C/groups: channels run fastest, so a
block of rows is mostly one kernel position, and its loads coalesce where the channels are last.

Letters: ``B`` samples, ``C`` channels in, ``O`` out, ``S`` space in, ``P`` space out, ``T`` = P0·P1·P2 positions, ``K``
kernel positions, ``R`` rows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Triple = tuple[int, int, int]


class Layer(NamedTuple):
    """What a layer is beside its tensors.

    Attributes:
        kernel: kernel positions per dimension.
        stride: pixels between neighbouring positions.
        padding: zeros on either side of x.
        dilation: pixels between neighbouring kernel positions.
        groups: G_i is block diagonal over this many groups of channels.
        channels_last: the op's own tensors are (B, T, ·), so results are laid out so; x and gy may have any strides.
    """

    kernel: Triple = (1, 1, 1)
    stride: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)
    groups: int = 1
    channels_last: bool = False

    @property
    def taps(self) -> int:
        """K, the number of kernel positions."""
        return math.prod(self.kernel)

    def empty_like(self, t: Tensor) -> Tensor:
        """An uninitialized result with the shape and dtype of x or gy, such that `as_op` need not copy."""
        if not self.channels_last:
            return torch.empty(t.shape, dtype=t.dtype, device=t.device)
        B, C, *space = t.shape
        return torch.empty((B, *space, C), dtype=t.dtype, device=t.device).movedim(-1, 1)

    def as_op(self, t: Tensor, shape: Sequence[int]) -> Tensor:
        """A result of `empty_like` as the contiguous tensor (B, T, ·) or (B, ·, *S) that the op returns."""
        return (t.movedim(1, -1) if self.channels_last else t).view(shape)

    def weight_rows(self, weight: Tensor) -> Tensor:
        """(O, C/groups, *K) as a contiguous matrix (O, R), copied where there is more than one kernel position."""
        O, C = weight.shape[:2]  # noqa: E741
        return weight.reshape(O, C, self.taps).transpose(1, 2).reshape(O, C * self.taps).contiguous()

    def weight(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """A matrix (O, R) as a contiguous weight of ``shape``, (O, C/groups, *K): the inverse of `weight_rows`."""
        O, R = rows.shape  # noqa: E741
        return rows.reshape(O, self.taps, R // self.taps).transpose(1, 2).reshape(shape).contiguous()


LINEAR = Layer(channels_last=True)


def linear_layer(x: Tensor, gy: Tensor) -> tuple[Tensor, Tensor, Layer]:
    """X (B, T, I) and gy (B, T, O) of a linear layer in canonical form: (B, I, 1, 1, T) and (B, O, 1, 1, T), views."""
    return _last(x.transpose(1, 2)), _last(gy.transpose(1, 2)), LINEAR


def conv_layer(
    x: Tensor,
    gy: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Layer]:
    """X (B, C, *S) and gy (B, O, *P) of a convolution in canonical form, views, and its geometry.

    Args:
        x: the input, of one to three dimensions of space.
        gy: the gradient by the output, of the size that the geometry gives.
        kernel_size: one number per dimension of space; so are stride, padding and dilation.
        stride: see `Layer`.
        padding: see `Layer`.
        dilation: see `Layer`.
        groups: see `Layer`.

    Raises:
        ValueError: more than three dimensions of space.
    """
    if not 1 <= x.dim() - 2 <= 3:
        raise ValueError(f"x must be (B, C, *S) with one to three dimensions of space; got shape {tuple(x.shape)}")
    layer = Layer(_triple(kernel_size, 1), _triple(stride, 1), _triple(padding, 0), _triple(dilation, 1), groups)
    pointwise = layer._replace(dilation=(1, 1, 1)) == Layer(groups=groups)
    if pointwise and is_flat(x) and is_flat(gy):
        return _last(x.flatten(2)), _last(gy.flatten(2)), Layer(groups=groups)
    return _three(x), _three(gy), layer


def strides(t: Tensor) -> tuple[int, ...]:
    """The strides of a canonical tensor in elements, zero where a dimension has one entry.

    Such a stride is never used but could be anything, and kernels are compiled anew for strides of 1 and multiples of 16.
    """
    return tuple(0 if n == 1 else stride for n, stride in zip(t.shape, t.stride(), strict=True))


def is_flat(t: Tensor) -> bool:
    """Whether the dimensions of space, the third and later, are one dimension to their strides."""
    space = [(n, stride) for n, stride in zip(t.shape[2:], t.stride()[2:], strict=True) if n != 1]
    return t.numel() > 0 and all(a[1] == b[0] * b[1] for a, b in zip(space, space[1:], strict=False))


def _triple(numbers: Sequence[int], fill: int) -> Triple:
    a, b, c = (fill,) * (3 - len(numbers)) + tuple(numbers)
    return a, b, c


def _three(t: Tensor) -> Tensor:
    """(B, ·, *S) with leading dimensions of space of size 1, three in all."""
    while t.dim() < 5:
        t = t.unsqueeze(2)
    return t


def _last(t: Tensor) -> Tensor:
    """(B, ·, T) as (B, ·, 1, 1, T)."""
    return _three(t)
