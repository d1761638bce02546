"""The direct path of groups with few channels, depthwise convolutions above all, without tensor cores.

A group's gradient has Og·Cg ≤ 4 pairs of channels, a *lane* each, times K kernel positions, of which a product of matrices
would leave its 16×16 tiles almost empty. Instead lanes of all groups lie side by side, and numbers are multiplied one by
one: bound by loads, of which those from memory are x and gy once.

    G_i[k, l] = Σ_t gy_i[o(l), t] · x_i[c(l), stride·t + dilation·k − padding]          tile [BLOCK_K, BLOCK_L, BLOCK_T]
    y_i[o, t] = Σ_r W[o, r] · x_i[c(o, r), stride·t + dilation·k(r) − padding]          tile [BLOCK_O, BLOCK_T], r in turn
    gx_i[c, p] = Σ_{k,o} W[o, k, c] · gy_i[o, (p + padding − dilation·k)/stride]        tile [BLOCK_C, BLOCK_T], (k, o) in turn

Letters as in `layer`; ``L`` = O·Cg lanes, ``Og``, ``Cg`` channels of a group. Flags as in `conv_direct` and `conv_products`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_index import (
    coordinates,
    dims,
    first_pixels,
    geometry,
    index_type,
    inside,
    padded,
    phase_of_tile,
    phase_pixels,
    phase_taps,
    space_offset,
    space_offsets,
    store_or_add,
    tap_of,
    tap_shifts,
)
from .conv_reduce import runs_of
from .layer import Layer, strides

BLOCK_L = 8
BLOCK_T = 64  # fewer where there are fewer positions
BLOCK_C = 16  # of outputs and inputs
ROWS_WARPS = 8  # 32 sums a thread, and as many numbers of x in flight


def is_narrow(x: Tensor, gy: Tensor, layer: Layer) -> bool:
    """Whether a group has so few channels that these kernels are the ones to use."""
    return (x.size(1) // layer.groups) * (gy.size(1) // layer.groups) <= 4


def narrow_row_tiles(x: Tensor, gy: Tensor, layer: Layer) -> int:
    """How many partial norms there are per sample."""
    lanes = gy.size(1) * (x.size(1) // layer.groups)
    return triton.cdiv(layer.taps, block_k(layer)) * triton.cdiv(lanes, BLOCK_L)


def block_k(layer: Layer) -> int:
    """BLOCK_K: all kernel positions up to 16."""
    return min(16, triton.next_power_of_2(layer.taps))


def block_t(T: int) -> int:
    """BLOCK_T for so many positions or pixels."""
    return min(BLOCK_T, max(16, triton.next_power_of_2(T)))


def launch_narrow_rows(
    x: Tensor,
    gy: Tensor,
    layer: Layer,
    center: Tensor | None,
    w: Tensor | None,
    norms: Tensor | None,
    deviation: Tensor | None,
    rows: Tensor | None,
    total: bool,
    segments: int,
) -> Tensor | None:
    """As `conv_direct.launch_rows`."""
    B, O = gy.shape[:2]  # noqa: E741
    Cg, T = x.size(1) // layer.groups, math.prod(gy.shape[2:])
    R, block = Cg * layer.taps, block_t(T)
    segment = triton.cdiv(triton.cdiv(T, segments), block) * block
    tiles = narrow_row_tiles(x, gy, layer)
    runs, per_run = runs_of(B * segments, tiles, O * R if total else 0)
    partial = torch.empty(runs, O, R, dtype=torch.float32, device=x.device) if total else None
    with torch.cuda.device_of(x):
        conv_narrow_rows_kernel[(tiles, runs)](
            x,
            gy,
            center,
            w if total else None,
            norms,
            deviation,
            rows,
            partial,
            strides(x),
            strides(gy),
            tuple(x.shape[2:]),
            tuple(gy.shape[2:]),
            *geometry(layer),
            Cg,
            O // layer.groups,
            O * Cg,
            T,
            B * segments,
            per_run,
            segments,
            segment,
            DIMS=dims(tuple(gy.shape[2:])),
            INDEX=index_type(R, x, gy),
            PADDED=padded(layer),
            BLOCK_K=block_k(layer),
            BLOCK_L=BLOCK_L,
            BLOCK_T=block,
            num_warps=ROWS_WARPS,
        )
    return None if partial is None else partial.sum(0)


@triton.jit(do_not_specialize=["units", "per_run"])
def conv_narrow_rows_kernel(
    x_ptr,
    gy_ptr,
    center_ptr,
    w_ptr,
    norms_ptr,
    deviation_ptr,
    rows_ptr,
    total_ptr,
    x_strides,
    gy_strides,
    S,
    P,
    kernel,
    stride,
    padding,
    dilation,
    Cg,
    Og,
    L,
    T,
    units,
    per_run,
    segments,
    segment,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program per tile (axis 0) and run of units (axis 1). A null pointer asks for nothing."""
    K = kernel[0] * kernel[1] * kernel[2]
    pid, run, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    blocks_l = tl.cdiv(L, BLOCK_L)
    offs_k = pid // blocks_l * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_l = pid % blocks_l * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_k, mask_l = offs_k < K, offs_l < L
    o, c = offs_l // Cg, offs_l % Cg
    shifts = tap_shifts(offs_k, kernel, dilation)
    mask = mask_k[:, None] & mask_l[None, :]
    entries = (o.to(tl.int64) * (Cg * K) + c)[None, :] + (offs_k * Cg)[:, None]  # [BLOCK_K, BLOCK_L]
    gy_lanes = (o.to(INDEX) * gy_strides[1])[:, None]
    x_rows = ((o // Og * Cg + c).to(INDEX) * x_strides[1])[None, :] + space_offsets(shifts, x_strides, INDEX)[:, None]

    PER_UNIT: tl.constexpr = not (norms_ptr is None and deviation_ptr is None and rows_ptr is None and w_ptr is None)
    acc = tl.zeros([BLOCK_K, BLOCK_L, BLOCK_T], dtype=tl.float32)
    if total_ptr is not None:
        total = tl.zeros([BLOCK_K, BLOCK_L], dtype=tl.float32)
    first = run * per_run
    steps = segment // BLOCK_T
    for j in tl.range(0, tl.minimum(per_run, units - first) * steps):
        unit = first + j // steps
        step = j % steps
        b = (unit // segments).to(tl.int64)
        offs_t = unit % segments * segment + step * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = offs_t < tl.minimum(T, (unit % segments + 1) * segment)
        t = coordinates(offs_t, P, DIMS)
        gy_ptrs = gy_ptr + b * gy_strides[0] + (gy_lanes + space_offsets(t, gy_strides, INDEX)[None, :])
        gy = tl.load(gy_ptrs, mask=mask_l[:, None] & mask_t[None, :], other=0.0).to(tl.float32)  # [BLOCK_L, BLOCK_T]
        pixels = first_pixels(t, stride, padding)
        mask_u = inside(
            mask_k[:, None] & mask_t[None, :],
            shifts[0][:, None] + pixels[0][None, :],
            shifts[1][:, None] + pixels[1][None, :],
            shifts[2][:, None] + pixels[2][None, :],
            S,
            PADDED,
        )  # [BLOCK_K, BLOCK_T]
        x_tile = x_rows[:, :, None] + space_offsets(pixels, x_strides, INDEX)[None, None, :]
        mask_u = mask_u[:, None, :] & mask_l[None, :, None]
        u = tl.load(x_ptr + b * x_strides[0] + x_tile, mask=mask_u, other=0.0).to(tl.float32)
        acc += u * gy[None, :, :]
        if PER_UNIT:
            if step == steps - 1:
                g = tl.sum(acc, axis=2)  # [BLOCK_K, BLOCK_L]
                if norms_ptr is not None:
                    tl.store(norms_ptr + b * tiles + pid, tl.sum(g * g))
                if total_ptr is not None:
                    if w_ptr is not None:
                        total += g * tl.load(w_ptr + b)
                    else:
                        total += g
                if center_ptr is not None:
                    g -= tl.load(center_ptr + entries, mask=mask, other=0.0)
                if deviation_ptr is not None:
                    tl.store(deviation_ptr + b * tiles + pid, tl.sum(g * g))
                if rows_ptr is not None:
                    place = unit.to(tl.int64) * L * K
                    tl.store(rows_ptr + place + entries, g.to(rows_ptr.dtype.element_ty), mask=mask)
                acc = tl.zeros([BLOCK_K, BLOCK_L, BLOCK_T], dtype=tl.float32)
    if total_ptr is not None:
        if not PER_UNIT:
            total = tl.sum(acc, axis=2)
        tl.store(total_ptr + run.to(tl.int64) * L * K + entries, total, mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def conv_narrow_output_kernel(
    x_ptr,
    gy_ptr,
    rows_ptr,
    out_ptr,
    dots_ptr,
    x_strides,
    gy_strides,
    out_strides,
    stride_wb,
    S,
    P,
    kernel,
    stride,
    padding,
    dilation,
    Cg,
    Og,
    O,  # noqa: E741
    T,
    tiles,
    factor,
    ADD: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program per tile of a sample. A null pointer asks for nothing."""
    R = Cg * kernel[0] * kernel[1] * kernel[2]
    tile, b = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    blocks_t = tl.cdiv(T, BLOCK_T)
    offs_o = tile // blocks_t * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_t = tile % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_o, mask_t = offs_o < O, offs_t < T
    t = coordinates(offs_t, P, DIMS)
    pixels = first_pixels(t, stride, padding)
    x_lanes = (offs_o // Og * Cg).to(INDEX) * x_strides[1]
    x_tile = x_lanes[:, None] + space_offsets(pixels, x_strides, INDEX)[None, :]  # [BLOCK_O, BLOCK_T]
    w_ptrs = rows_ptr + b * stride_wb + offs_o.to(tl.int64) * R
    acc = tl.zeros([BLOCK_O, BLOCK_T], dtype=tl.float32)
    for r in range(0, R):
        c, k = r % Cg, r // Cg
        d0, d1, d2 = tap_shifts(k, kernel, dilation)
        shift = tl.cast(c, tl.int64) * x_strides[1] + tl.cast(d0, tl.int64) * x_strides[2]
        shift += tl.cast(d1, tl.int64) * x_strides[3] + tl.cast(d2, tl.int64) * x_strides[4]
        mask_u = inside(mask_t, pixels[0] + d0, pixels[1] + d1, pixels[2] + d2, S, PADDED)
        weight = tl.load(w_ptrs + r, mask=mask_o, other=0.0).to(tl.float32)
        x_ptrs = x_ptr + b * x_strides[0] + shift + x_tile
        u = tl.load(x_ptrs, mask=mask_o[:, None] & mask_u[None, :], other=0.0).to(tl.float32)
        acc += weight[:, None] * u
    mask = mask_o[:, None] & mask_t[None, :]
    if dots_ptr is not None:
        gy_tile = (offs_o.to(INDEX) * gy_strides[1])[:, None] + space_offsets(t, gy_strides, INDEX)[None, :]
        gy = tl.load(gy_ptr + b * gy_strides[0] + gy_tile, mask=mask, other=0.0).to(tl.float32)
        tl.store(dots_ptr + b * tiles + tile, tl.sum(acc * gy))
    if out_ptr is not None:
        out_tile = (offs_o.to(INDEX) * out_strides[1])[:, None] + space_offsets(t, out_strides, INDEX)[None, :]
        out_ptrs = out_ptr + b * out_strides[0] + out_tile
        store_or_add(out_ptrs, factor * acc, mask, ADD)


@triton.jit(do_not_specialize=["tiles"])
def conv_narrow_input_kernel(
    gy_ptr,
    rows_ptr,
    out_ptr,
    gy_strides,
    out_strides,
    stride_wb,
    S,
    P,
    M,
    kernel,
    stride,
    padding,
    dilation,
    phase_step,
    Cg,
    Og,
    C,
    tiles,
    factor,
    ADD: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program per tile of a sample: channels of all groups by pixels of one phase, which are (M0, M1, M2) or fewer."""
    R = Cg * kernel[0] * kernel[1] * kernel[2]
    tile, b = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    blocks_m = tl.cdiv(M[0] * M[1] * M[2], BLOCK_T)
    block_m, rest = tile % blocks_m, tile // blocks_m
    blocks_c = tl.cdiv(C, BLOCK_C)
    phase = phase_of_tile(rest // blocks_c, stride)
    offs_c = rest % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    m, pixels, mask_m = phase_pixels(block_m * BLOCK_T + tl.arange(0, BLOCK_T), phase, M, S, stride, DIMS)
    first, count, taps = phase_taps(phase, kernel, stride, padding, dilation, phase_step)
    group = offs_c // Cg
    w_lanes = rows_ptr + b * stride_wb + (group * Og).to(tl.int64) * R + offs_c % Cg
    gy_tile = ((group * Og).to(INDEX) * gy_strides[1])[:, None] + space_offsets(m, gy_strides, INDEX)[None, :]
    acc = tl.zeros([BLOCK_C, BLOCK_T], dtype=tl.float32)
    for j in range(0, taps * Og):
        o, tap = j % Og, j // Og
        k, e = tap_of(tap, first, count, phase, kernel, stride, padding, dilation, phase_step)
        mask_t = inside(mask_m, m[0] + e[0], m[1] + e[1], m[2] + e[2], P, 7)
        weight = tl.load(w_lanes + tl.cast(o, tl.int64) * R + k * Cg, mask=mask_c, other=0.0).to(tl.float32)
        shift = tl.cast(o, tl.int64) * gy_strides[1] + space_offset(e, gy_strides)
        gy_ptrs = gy_ptr + b * gy_strides[0] + shift + gy_tile
        gy = tl.load(gy_ptrs, mask=mask_c[:, None] & mask_t[None, :], other=0.0).to(tl.float32)
        acc += weight[:, None] * gy
    mask = mask_c[:, None] & mask_m[None, :]
    out_tile = (offs_c.to(INDEX) * out_strides[1])[:, None] + space_offsets(pixels, out_strides, INDEX)[None, :]
    out_ptrs = out_ptr + b * out_strides[0] + out_tile
    store_or_add(out_ptrs, factor * acc, mask, ADD)
