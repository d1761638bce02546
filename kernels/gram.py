"""‖G_i‖² and its derivatives by the Gram matrices ("ghost norm"), without any G_i.

    s_i = ‖G_i‖² = Σ_groups ⟨U Uᵀ, K⟩        K = gy gyᵀ, T×T        ∂s/∂gy = 2 (U Uᵀ) gy        ∂s/∂x = 2 Q x

Linear layers (and pointwise convolutions): U is x and Q is K. Norms alone are one kernel: both tiles of a pair stay in
registers, T²(C + O)/2 multiply-adds, and one number per pair of tiles is written.

With derivatives the tiles are written down, once, for as many samples as fit the workspace, and a second kernel
multiplies them while they are in L2: T²(C + O)/2 multiply-adds to make them and T²(C + O) to use them, T² numbers written
and T²·C/128 read per matrix. Making them again in each program that uses them would write nothing but needs T²·O for
every 128 channels of x, and the other way round: at 512 channels twice the operations in all, and this path is chosen where
T is less than the channels, where T² numbers are few beside x and gy.

Convolutions by pixels: the pixel Gram P = X Xᵀ, N×N, is made once, N²·C/2, and (U Uᵀ)[t, t'] = Σ_k P[pixel of t and k, pixel
of t' and k] is gathered, T²/2 reads from L1 and L2 for each kernel position, in the kernel that makes K's tile. The adjoint,
Q[u, u'] = Σ_k K at the positions that meet u and u' with k, is gathered from K into P's place. Convolutions by patches,
where the caller says so (strides leave most pixels unused): U Uᵀ is a product over C·k² that loads patches straight
from x, and dx is made by phases, pixels that leave the same remainder by the stride, so no multiplication is by zero.

Products of half precisions accumulate in float32, and so are P and the K that is gathered stored. A matrix that is only
multiplied is stored as the product takes it: in bfloat16 for bfloat16, in float32, rounded to TF32 when read, for float16,
whose range squares of gradients would leave. Float32 is multiplied as such unless torch allows TF32.

No atomics, and every choice is by shape without B: a sample's bits depend neither on the run nor on the batch around it.
Letters as in `layer`, and ``N`` pixels.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import allows_tf32
from .conv_reduce import sum_rows
from .gram_kernels import (
    gram_apply_kernel,
    gram_apply_patches_kernel,
    gram_norms_kernel,
    gram_pixels_kernel,
    gram_spread_kernel,
)
from .layer import Layer, is_flat, strides


class Tiles(NamedTuple):
    """Tiles of BLOCK_T×BLOCK_T entries of a symmetric matrix, made BLOCK_C channels at a time."""

    BLOCK_T: int
    BLOCK_C: int
    num_warps: int


class Product(NamedTuple):
    """Tiles of BLOCK_M rows by BLOCK_N channels of a matrix times x or gy, BLOCK_K columns of the matrix at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int


# By what is multiplied and whether it is loaded in whole vectors, (most rows, configuration). Two accumulators of 64×64 on
# 4 warps are 64 registers, and so are two of 128×128 on 16. Numbers that are loaded one by one lie in registers with their
# addresses, as do the operands of float32, which is multiplied on the plain cores: narrow steps.
TILES = {
    ("half", True): (
        (16, Tiles(16, 64, 1)),
        (32, Tiles(32, 64, 2)),
        (512, Tiles(64, 64, 4)),
        (None, Tiles(128, 64, 8)),
    ),
    ("half", False): ((16, Tiles(16, 32, 1)), (32, Tiles(32, 32, 2)), (None, Tiles(64, 32, 8))),
    ("tf32", True): ((16, Tiles(16, 32, 1)), (32, Tiles(32, 16, 2)), (None, Tiles(64, 32, 4))),
    ("tf32", False): ((16, Tiles(16, 16, 1)), (32, Tiles(32, 16, 4)), (None, Tiles(64, 16, 8))),
    ("float", True): ((16, Tiles(16, 32, 1)), (32, Tiles(32, 32, 2)), (None, Tiles(64, 16, 4))),
    ("float", False): ((16, Tiles(16, 16, 1)), (None, Tiles(64, 16, 8))),
}
PRODUCTS = {
    ("half", True): (
        (16, Product(16, 128, 32, 4)),
        (32, Product(32, 128, 32, 4)),
        (512, Product(64, 128, 64, 4)),
        (None, Product(128, 128, 64, 8)),
    ),
    ("half", False): ((16, Product(16, 64, 32, 4)), (32, Product(32, 64, 32, 4)), (None, Product(64, 64, 32, 8))),
    ("tf32", True): ((16, Product(16, 128, 32, 4)), (32, Product(32, 128, 32, 4)), (None, Product(64, 128, 32, 4))),
    ("tf32", False): ((16, Product(16, 64, 16, 4)), (32, Product(32, 64, 32, 8)), (None, Product(64, 64, 32, 8))),
    ("float", True): ((16, Product(16, 64, 32, 2)), (32, Product(32, 64, 16, 4)), (None, Product(64, 64, 16, 4))),
    ("float", False): ((16, Product(16, 64, 16, 4)), (32, Product(32, 64, 16, 4)), (None, Product(64, 64, 16, 8))),
}
# Tiles that are gathered hold addresses of 64 bits, too: no larger than for so many rows.
MOST_GATHERED = 512
MOST_PROGRAMS = 2**31 - 1  # of a launch


def gram_sq_norms(
    x: Tensor,
    gy: Tensor,
    layer: Layer,
    workspace_bytes: int,
    by_pixels: bool,
    mask: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Squared norms ‖G_i‖² and their derivatives by x_i and gy_i.

    Args:
        x: (B, C, S0, S1, S2) of float32, bfloat16 or float16, any strides; see `layer`.
        gy: (B, O, P0, P1, P2) of the dtype and on the device of x, any strides.
        layer: the geometry.
        workspace_bytes: to keep the matrices of some samples in; those of one sample are taken anyway.
        by_pixels: whether to go by the pixel Gram. Ignored where U is x.
        mask: which of the derivatives are wanted.

    Returns:
        s (B,) float32, not below zero, and dx and dgy as `Layer.empty_like` makes them, or None where not asked for.
    """
    call = _Call(x, gy, layer, mask, by_pixels)
    B = x.size(0)
    dx, dgy = (layer.empty_like(t) if wanted else None for t, wanted in zip((x, gy), mask, strict=True))
    if x.numel() == 0 or gy.numel() == 0:
        return x.new_zeros(B, dtype=torch.float32), *(None if d is None else d.zero_() for d in (dx, dgy))
    partials = torch.empty(B, layer.groups * call.pairs(call.T), dtype=torch.float32, device=x.device)
    size = call.chunk(workspace_bytes)
    buffers = [torch.empty(size * n, dtype=dtype, device=x.device) if n else None for n, dtype in call.buffers]
    with torch.cuda.device_of(x):
        for start in range(0, B, size):
            part = slice(start, min(start + size, B))
            outs = [None if d is None else d[part] for d in (dx, dgy)]
            call.run(x[part], gy[part], partials[part], buffers, *outs)
    return sum_rows(partials).clamp_(min=0), dx, dgy


def whole_vectors(t: Tensor, flat: bool) -> bool:
    """Whether 16 numbers in a row may be loaded at once: channels last, or positions if they are ``flat``, and aligned."""
    B, C, *_, step = _strides(t, flat)
    if C == 1 or (t.size(1) == 1 and not flat):
        return t.size(1) % 16 == 0 and all(s % 16 == 0 for s in (B, *strides(t)[2:]))
    return flat and step == 1 and math.prod(t.shape[2:]) % 16 == 0 and B % 16 == 0 and C % 16 == 0


def choose(table: tuple, rows: int) -> NamedTuple:
    """The first configuration of a table that takes as many rows."""
    return next(config for most, config in table if most is None or rows <= most)


class _Call:
    """What a call comes down to for every chunk of samples."""

    def __init__(self, x: Tensor, gy: Tensor, layer: Layer, mask: tuple[bool, bool], by_pixels: bool):
        self.layer, self.mask = layer, mask
        self.C, self.O = x.size(1) // layer.groups, gy.size(1) // layer.groups
        self.S, self.P = tuple(x.shape[2:]), tuple(gy.shape[2:])
        self.N, self.T = math.prod(self.S), math.prod(self.P)
        self.ld_n, self.ld_t = (triton.cdiv(n, 16) * 16 for n in (self.N, self.T))
        self.flat_x, self.flat_gy = is_flat(x), is_flat(gy)
        self.plain = self.flat_x and layer.taps == 1 and layer.stride == (1, 1, 1) and layer.padding == (0, 0, 0)
        self.by_pixels = by_pixels and not self.plain
        self.stored = x.dtype if x.dtype == torch.bfloat16 else torch.float32
        self.tf32 = allows_tf32(x.dtype)
        self.product_tf32 = self.tf32 or x.dtype == torch.float16
        vectors = whole_vectors(x, self.flat_x and (self.plain or self.by_pixels)) and whole_vectors(gy, self.flat_gy)
        self.tiles = TILES[_kind(x.dtype, self.tf32), vectors]
        self.products = {vectors: PRODUCTS[_kind(self.stored, self.product_tf32), vectors] for vectors in (True, False)}
        self.geometry = *layer.stride, *layer.padding, *layer.dilation
        groups, (with_dx, with_dgy) = layer.groups, mask
        # Numbers per sample of P or Q, of U Uᵀ and of K.
        self.buffers = (
            (groups * self.N * self.ld_n * self.by_pixels, torch.float32),
            (groups * self.T * self.ld_t * with_dgy, self.stored),
            (groups * self.T * self.ld_t * with_dx, torch.float32 if self.by_pixels else self.stored),
        )
        self.bytes_per_sample = sum(n * dtype.itemsize for n, dtype in self.buffers)
        self.samples = x.size(0)

    def chunk(self, workspace_bytes: int) -> int:
        """Samples at a time: as many as the workspace and a launch hold."""
        programs = self.layer.groups * max(self.pairs(self.T), self.pairs(self.N) if self.by_pixels else 0)
        torch._check(
            programs <= MOST_PROGRAMS,
            lambda: (
                f"the Gram path takes {MOST_PROGRAMS} pairs of tiles a sample at most; got {programs} for {self.T} "
                f'positions and {self.N} pixels: take path="direct"'
            ),
        )
        most = MOST_PROGRAMS // programs
        if self.bytes_per_sample:
            most = min(most, workspace_bytes // self.bytes_per_sample)
        return max(1, min(self.samples, most))

    def choose_tiles(self, rows: int) -> Tiles:
        """The tiles of a symmetric matrix with so many rows."""
        return choose(self.tiles, min(rows, MOST_GATHERED) if self.by_pixels else rows)

    def pairs(self, rows: int) -> int:
        """Pairs of tiles of a matrix with so many rows."""
        tiles = triton.cdiv(rows, self.choose_tiles(rows).BLOCK_T)
        return tiles * (tiles + 1) // 2

    def run(self, x: Tensor, gy: Tensor, partials: Tensor, buffers: list, dx: Tensor | None, dgy: Tensor | None):
        """Partial sums of s and the derivatives for a chunk."""
        layer, T, N = self.layer, self.T, self.N
        blocks = x.size(0) * layer.groups
        pixels, uu, k = buffers
        if self.by_pixels:
            tiles = self.choose_tiles(N)
            gram_pixels_kernel[(blocks * self.pairs(N),)](
                x,
                pixels,
                layer.groups,
                self.C,
                N,
                self.ld_n,
                *self.S[1:],
                *_strides(x, self.flat_x),
                FLAT=self.flat_x,
                BLOCK_T=tiles.BLOCK_T,
                BLOCK_C=tiles.BLOCK_C,
                TF32=self.tf32,
                num_warps=tiles.num_warps,
            )
        tiles = self.choose_tiles(T)
        gram_norms_kernel[(blocks * self.pairs(T),)](
            x,
            gy,
            pixels,
            partials,
            uu,
            k,
            layer.groups,
            self.C,
            self.O,
            T,
            N,
            self.ld_t,
            self.ld_n,
            *self.S,
            *self.P[1:],
            *layer.kernel,
            *self.geometry,
            *_strides(x, self.plain),
            *_strides(gy, self.flat_gy),
            PLAIN=self.plain,
            FLAT=self.flat_gy,
            BLOCK_T=tiles.BLOCK_T,
            BLOCK_C=tiles.BLOCK_C,
            TF32=self.tf32,
            num_warps=tiles.num_warps,
        )
        if dgy is not None:
            self._apply(uu, gy, dgy, T, self.ld_t, self.O)
        if dx is None:
            return
        if self.plain:
            self._apply(k, x, dx, T, self.ld_t, self.C)
        elif self.by_pixels:
            q, tiles = pixels.view(self.stored), self.choose_tiles(N)
            gram_spread_kernel[(blocks * self.pairs(N),)](
                k,
                q,
                T,
                N,
                self.ld_t,
                self.ld_n,
                *self.S[1:],
                *self.P,
                *layer.kernel,
                *self.geometry,
                BLOCK_T=tiles.BLOCK_T,
                num_warps=tiles.num_warps,
            )
            self._apply(q, x, dx, N, self.ld_n, self.C)
        else:
            self._apply_patches(k, x, dx)

    def _apply(self, matrix: Tensor, v: Tensor, out: Tensor, M: int, ld: int, channels: int) -> None:
        flat = is_flat(v) and is_flat(out)
        config = choose(self.products[whole_vectors(v, flat)], M)
        tiles = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(channels, config.BLOCK_N)
        gram_apply_kernel[(v.size(0) * self.layer.groups * tiles,)](
            matrix,
            v,
            out,
            self.layer.groups,
            channels,
            M,
            ld,
            *v.shape[3:],
            *_strides(v, flat),
            *_strides(out, flat),
            FLAT=flat,
            **self._product(config),
        )

    def _apply_patches(self, k: Tensor, x: Tensor, dx: Tensor) -> None:
        phases = [triton.cdiv(n, stride) for n, stride in zip(self.S, self.layer.stride, strict=True)]
        config = choose(self.products[False], math.prod(phases))
        tiles = triton.cdiv(math.prod(phases), config.BLOCK_M) * triton.cdiv(self.C, config.BLOCK_N)
        gram_apply_patches_kernel[(x.size(0) * self.layer.groups * math.prod(self.layer.stride) * tiles,)](
            k,
            x,
            dx,
            self.layer.groups,
            self.C,
            self.T,
            self.ld_t,
            *self.S,
            *self.P,
            *self.layer.kernel,
            *self.geometry,
            *strides(x),
            *strides(dx),
            **self._product(config),
        )

    def _product(self, config: Product) -> dict:
        return dict(
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K,
            DOT=tl.bfloat16 if self.stored == torch.bfloat16 else tl.float32,
            TF32=self.product_tf32,
            num_warps=config.num_warps,
        )


def _kind(dtype: torch.dtype, tf32: bool) -> str:
    return "tf32" if tf32 else "half" if dtype.itemsize == 2 else "float"


def _strides(t: Tensor, flat: bool) -> tuple[int, ...]:
    """The strides of a canonical tensor; where its space is flat, that of a step through it takes the last place."""
    B, C, *space = strides(t)
    if not flat:
        return B, C, *space
    return B, C, 0, 0, min((s for s, n in zip(space, t.shape[2:], strict=True) if n > 1), default=0)
