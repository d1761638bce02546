"""Where the numbers of a convolution lie: index arithmetic that its kernels share, and what it needs to be told.

Position t of the output and kernel position k meet pixel stride·t + dilation·k − padding, so the offset of a patch's entry
is a sum of one number per position and one per row: two vectors are computed, and a tile of pointers takes one addition an
entry. A block of rows is one kernel position and a range of channels (ONE_TAP: bounds are checked per position) or, where
a group has few channels, any BLOCK_R neighbouring rows r = k·(C/groups) + c (bounds are checked per entry).

For the gradient by the input the pixels are sorted into *phases*, pixels that agree modulo the stride: with those of phase
φ the kernel positions k that dilation·k ≡ φ + padding modulo the stride meet positions of gy, and no others, so no product
is masked away. In each dimension they are an arithmetic progression.

A sample's, group's or block's place is a 64-bit offset, added to the pointer once. Offsets from there are as many as there
are loads, and each takes a register or two: they have 32 bits (INDEX) unless a sample's numbers lie further apart.
Coordinates of space have 32 bits. Letters as in `layer`.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from .layer import Layer, Triple

MOST_BLOCK_O = 128  # of the tables in `conv_configs`


def geometry(layer: Layer) -> tuple[Triple, Triple, Triple, Triple]:
    """The kernels' arguments kernel, stride, padding and dilation."""
    return layer.kernel, layer.stride, layer.padding, layer.dilation


def dims(size: tuple[int, ...]) -> int:
    """DIMS: how many trailing dimensions of space are needed to count its positions."""
    return 3 if size[0] > 1 else 2 if size[1] > 1 else 1


def padded(layer: Layer) -> int:
    """PADDED: bit d is set where a patch may leave x in dimension d."""
    return sum(1 << d for d in range(3) if layer.padding[d])


def index_type(R: int, *tensors: Tensor) -> tl.dtype:
    """INDEX: the type of offsets within a sample of canonical tensors and within a block of weights, rows of R numbers."""
    reach = max(sum((n - 1) * stride for n, stride in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)
    return tl.int32 if max(reach, MOST_BLOCK_O * R) < 2**31 else tl.int64


def phase_steps(layer: Layer) -> Triple:
    """How far apart the kernel positions are that reach one phase."""
    a, b, c = (s // math.gcd(s, d) for s, d in zip(layer.stride, layer.dilation, strict=True))
    return a, b, c


def phase_sizes(size: tuple[int, ...], layer: Layer) -> Triple:
    """(M0, M1, M2): pixels of the largest phase, per dimension."""
    a, b, c = (triton.cdiv(n, s) for n, s in zip(size, layer.stride, strict=True))
    return a, b, c


def one_tap(Cg: int, BLOCK_R: int) -> bool:
    """ONE_TAP: whether blocks of one kernel position each leave at most a quarter of their rows empty."""
    return 4 * triton.cdiv(Cg, BLOCK_R) * BLOCK_R <= 5 * Cg


def row_blocks(Cg: int, taps: int, BLOCK_R: int) -> int:
    """How many blocks the rows of a group are."""
    return taps * triton.cdiv(Cg, BLOCK_R) if one_tap(Cg, BLOCK_R) else triton.cdiv(Cg * taps, BLOCK_R)


def precision(kind: str) -> str:
    """``input_precision`` of a kind of product (`conv_configs`); it means nothing to factors of two bytes."""
    return "ieee" if kind == "ieee" else "tf32"


@triton.jit
def coordinates(offs, size, DIMS: tl.constexpr):
    """Numbers of positions, counted with the last dimension fastest, as three coordinates."""
    if DIMS == 1:
        return tl.zeros_like(offs), tl.zeros_like(offs), offs
    elif DIMS == 2:
        return tl.zeros_like(offs), offs // size[2], offs % size[2]
    else:
        return offs // (size[1] * size[2]), offs // size[2] % size[1], offs % size[2]


@triton.jit
def space_offsets(at, strides, INDEX: tl.constexpr):
    """Offsets of coordinates in a canonical tensor, but for sample and channel."""
    return at[0].to(INDEX) * strides[2] + at[1].to(INDEX) * strides[3] + at[2].to(INDEX) * strides[4]


@triton.jit
def first_pixels(t, stride, padding):
    """Coordinates of the pixels that positions meet with kernel position 0."""
    return t[0] * stride[0] - padding[0], t[1] * stride[1] - padding[1], t[2] * stride[2] - padding[2]


@triton.jit
def row_block(pid_r, Cg, R, BLOCK_R: tl.constexpr, ONE_TAP: tl.constexpr):
    """Block ``pid_r`` of rows: channel within the group, kernel position ([1] for ONE_TAP), row, and which exist."""
    if ONE_TAP:
        blocks = tl.cdiv(Cg, BLOCK_R)
        c = pid_r % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
        k = tl.zeros([1], tl.int32) + pid_r // blocks
        return c, k, k * Cg + c, c < Cg
    else:
        r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
        return r % Cg, r // Cg, r, r < R


@triton.jit
def tap_shifts(k, kernel, dilation):
    """How far kernel positions reach from position 0, per dimension."""
    return (
        k // (kernel[1] * kernel[2]) * dilation[0],
        k // kernel[2] % kernel[1] * dilation[1],
        k % kernel[2] * dilation[2],
    )


@triton.jit
def inside(mask, a0, a1, a2, size, PADDED: tl.constexpr):
    """``mask`` where the coordinates lie within ``size``; dimensions without their bit in PADDED are not asked."""
    if PADDED & 1:
        mask = mask & (a0 >= 0) & (a0 < size[0])
    if PADDED & 2:
        mask = mask & (a1 >= 0) & (a1 < size[1])
    if PADDED & 4:
        mask = mask & (a2 >= 0) & (a2 < size[2])
    return mask


@triton.jit
def load_patches(x_ptr, pixels, mask_t, c, shifts, mask_r, x_strides, S, PADDED: tl.constexpr, INDEX: tl.constexpr):
    """U[t, r] = x[c(r), pixels(t) + shifts(r)], zero in the padding: [BLOCK_T, BLOCK_R].

    ``x_ptr`` is at the sample and its group's first channel.
    """
    offs_t = space_offsets(pixels, x_strides, INDEX)  # [BLOCK_T]
    offs_r = space_offsets(shifts, x_strides, INDEX) + c.to(INDEX) * x_strides[1]  # [BLOCK_R]
    mask = inside(
        mask_t[:, None],
        pixels[0][:, None] + shifts[0][None, :],
        pixels[1][:, None] + shifts[1][None, :],
        pixels[2][:, None] + shifts[2][None, :],
        S,
        PADDED,
    )
    return tl.load(x_ptr + (offs_t[:, None] + offs_r[None, :]), mask=mask & mask_r[None, :], other=0.0)


@triton.jit
def phase_taps(phase, kernel, stride, padding, dilation, steps):
    """The kernel positions that reach a phase: per dimension the first of them, and how many there are; how many in all.

    ``steps`` is `phase_steps`.
    """
    first0, count0 = _phase_taps(phase[0], kernel[0], stride[0], padding[0], dilation[0], steps[0])
    first1, count1 = _phase_taps(phase[1], kernel[1], stride[1], padding[1], dilation[1], steps[1])
    first2, count2 = _phase_taps(phase[2], kernel[2], stride[2], padding[2], dilation[2], steps[2])
    return (first0, first1, first2), (count0, count1, count2), count0 * count1 * count2


@triton.jit
def tap_of(number, first, count, phase, kernel, stride, padding, dilation, steps):
    """A kernel position that reaches a phase, and how far from its pixels' quotients lie the positions that it meets."""
    k0 = first[0] + number // (count[1] * count[2]) * steps[0]
    k1 = first[1] + number // count[2] % count[1] * steps[1]
    k2 = first[2] + number % count[2] * steps[2]
    # Exact divisions, by the choice of the kernel positions; of numbers that may be negative.
    e0 = (phase[0] + padding[0] - dilation[0] * k0) // stride[0]
    e1 = (phase[1] + padding[1] - dilation[1] * k1) // stride[1]
    e2 = (phase[2] + padding[2] - dilation[2] * k2) // stride[2]
    return (k0 * kernel[1] + k1) * kernel[2] + k2, (e0, e1, e2)


@triton.jit
def space_offset(at, strides):
    """The 64-bit offset of one place in space, but for sample and channel."""
    return at[0].to(tl.int64) * strides[2] + at[1].to(tl.int64) * strides[3] + at[2].to(tl.int64) * strides[4]


@triton.jit
def store_or_add(ptrs, values, mask, ADD: tl.constexpr):
    """Store float32 values in the type that is there, or add them to it."""
    if ADD:
        values += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptrs, values.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def phase_of_tile(number, stride):
    """A phase's number as the remainders of its pixels, per dimension."""
    return number // (stride[1] * stride[2]), number // stride[2] % stride[1], number % stride[2]


@triton.jit
def phase_pixels(offs_m, phase, M, S, stride, DIMS: tl.constexpr):
    """Pixels of a phase by number: their quotients by the stride, their coordinates, and which of them exist."""
    m = coordinates(offs_m, M, DIMS)
    p0, p1, p2 = m[0] * stride[0] + phase[0], m[1] * stride[1] + phase[1], m[2] * stride[2] + phase[2]
    return m, (p0, p1, p2), (offs_m < M[0] * M[1] * M[2]) & (p0 < S[0]) & (p1 < S[1]) & (p2 < S[2])


@triton.jit
def _phase_taps(phase, kernel, stride, padding, dilation, steps):
    """The same in one dimension, whose are the arguments."""
    first = phase * 0 + kernel
    for k in range(0, steps):
        first = tl.where((phase + padding - dilation * k) % stride == 0, tl.minimum(first, k), first)
    # Of numbers below zero C and Python disagree on the remainder, but not on whether it is zero.
    return first, (kernel - first + steps - 1) // steps
