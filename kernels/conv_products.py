"""A layer's two linear maps, with one weight for all samples or one each.

    y_i[o, t]  = Σ_r W_i[o, r] · U_i[r, t]                                              output
    gx_i[c, p] = Σ_{k,o} W_i[o, k, c] · gy_i[o, (p + padding − dilation·k)/stride]      gradient by the input

Tiles of y are stored, or multiplied with those of gy in registers: ⟨y_i, gy_i⟩ = ⟨G_i, W_i⟩. Pixels are taken by phase, so
strides waste no product (`conv_index`). Groups with few channels go to `conv_narrow`.

Products, by dtype of x: float32 as it is (or TF32 where torch may); bfloat16 by weights that are bfloat16 or, where they are
float32, by the sum of two bfloat16 numbers, 16 digits; float16 by float32 in TF32 (see `conv_configs`).
Operations: T·O·R multiply-adds a sample for each map, twice that for float32 weights and bfloat16. Letters as in `layer`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_configs import input_config, output_config, product_kind
from .conv_index import (
    coordinates,
    dims,
    first_pixels,
    geometry,
    index_type,
    inside,
    load_patches,
    one_tap,
    padded,
    phase_of_tile,
    phase_pixels,
    phase_sizes,
    phase_steps,
    phase_taps,
    precision,
    row_block,
    row_blocks,
    space_offset,
    space_offsets,
    store_or_add,
    tap_of,
    tap_shifts,
)
from .conv_narrow import BLOCK_C, block_t, conv_narrow_input_kernel, conv_narrow_output_kernel, is_narrow
from .layer import Layer, strides


def launch_output(
    x: Tensor,
    gy: Tensor,
    layer: Layer,
    rows: Tensor,
    *,
    out: Tensor | None = None,
    dots: bool = False,
    factor: float = 1.0,
    add: bool = False,
) -> Tensor | None:
    """One launch of y_i = W_i ∗ x_i over samples that are not empty.

    Args:
        x: canonical.
        gy: canonical; without ``dots`` only its shape counts.
        layer: the geometry.
        rows: W, (O, R) float32 for all or (B, O, R) for each.
        out: as gy; gets factor·y_i.
        dots: ask for ⟨y_i, gy_i⟩.
        factor: of ``out``.
        add: to what is in ``out`` already.

    Returns:
        Partial inner products (B, tiles) float32.
    """
    B, O = gy.shape[:2]  # noqa: E741
    Cg, Og, T = x.size(1) // layer.groups, O // layer.groups, math.prod(gy.shape[2:])
    stride_wb = rows.stride(0) if rows.dim() == 3 else 0
    target = gy if out is None else out
    common = (strides(x), strides(gy), strides(target), stride_wb, tuple(x.shape[2:]), tuple(gy.shape[2:]))
    flags = dict(ADD=add, DIMS=dims(tuple(gy.shape[2:])), PADDED=padded(layer))
    flags["INDEX"] = index_type(Cg * layer.taps, x, gy, target)
    narrow = is_narrow(x, gy, layer)
    if narrow:
        tiles = triton.cdiv(O, BLOCK_C) * triton.cdiv(T, block_t(T))
    else:
        kind = product_kind(x.dtype)
        config = output_config(kind, x.device, Og, Cg, layer.taps, T)
        tiles = layer.groups * triton.cdiv(Og, config.BLOCK_O) * triton.cdiv(T, config.BLOCK_T)
    partial = torch.empty(B, tiles, dtype=torch.float32, device=x.device) if dots else None
    with torch.cuda.device_of(x):
        if narrow:
            conv_narrow_output_kernel[(B * tiles,)](
                x,
                gy,
                rows,
                out,
                partial,
                *common,
                *geometry(layer),
                Cg,
                Og,
                O,
                T,
                tiles,
                factor,
                BLOCK_O=BLOCK_C,
                BLOCK_T=block_t(T),
                num_warps=4,
                **flags,
            )
        else:
            conv_output_kernel[(B * tiles,)](
                x,
                gy,
                rows,
                out,
                partial,
                *common,
                *geometry(layer),
                Cg,
                Og,
                layer.groups,
                T,
                tiles,
                row_blocks(Cg, layer.taps, config.BLOCK_R),
                factor,
                ONE_TAP=one_tap(Cg, config.BLOCK_R),
                PRECISION=precision(kind),
                **flags,
                **config._asdict(),
            )
    return partial


def launch_input(
    gy: Tensor, layer: Layer, rows: Tensor, out: Tensor, *, factor: float = 1.0, add: bool = False
) -> None:
    """One launch of gx_i = W_iᵀ ∗ gy_i over samples that are not empty.

    Args:
        gy: canonical.
        layer: the geometry.
        rows: W, (O, R) float32 for all or (B, O, R) for each.
        out: as x; gets factor·gx_i.
        factor: of ``out``.
        add: to what is in ``out`` already.
    """
    B, O, C = *gy.shape[:2], out.size(1)  # noqa: E741
    Cg, Og = C // layer.groups, O // layer.groups
    stride_wb = rows.stride(0) if rows.dim() == 3 else 0
    sizes = phase_sizes(tuple(out.shape[2:]), layer)
    M, phases = math.prod(sizes), math.prod(layer.stride)
    common = (
        strides(gy),
        strides(out),
        stride_wb,
        tuple(out.shape[2:]),
        tuple(gy.shape[2:]),
        sizes,
        *geometry(layer),
        phase_steps(layer),
        Cg,
        Og,
    )
    flags = dict(ADD=add, DIMS=dims(sizes), INDEX=index_type(Cg * layer.taps, gy, out))
    with torch.cuda.device_of(gy):
        if is_narrow(out, gy, layer):
            tiles = phases * triton.cdiv(C, BLOCK_C) * triton.cdiv(M, block_t(M))
            conv_narrow_input_kernel[(B * tiles,)](
                gy,
                rows,
                out,
                *common,
                C,
                tiles,
                factor,
                BLOCK_C=BLOCK_C,
                BLOCK_T=block_t(M),
                num_warps=4,
                **flags,
            )
        else:
            kind = product_kind(gy.dtype)
            config = input_config(kind, gy.device, Og, Cg, M)
            tiles = layer.groups * phases * triton.cdiv(Cg, config.BLOCK_C) * triton.cdiv(M, config.BLOCK_T)
            conv_input_kernel[(B * tiles,)](
                gy,
                rows,
                out,
                *common,
                layer.groups,
                tiles,
                factor,
                PRECISION=precision(kind),
                **flags,
                **config._asdict(),
            )


@triton.jit
def dot_weights(weight, u, acc, PRECISION: tl.constexpr):
    """Add weight·u to acc: weights of more digits than bfloat16 u as two of them; float16 u as float32."""
    if u.dtype == tl.float16:
        return tl.dot(weight.to(tl.float32), u.to(tl.float32), acc, input_precision=PRECISION)
    elif (u.dtype == tl.bfloat16) & (weight.dtype == tl.float32):
        high = weight.to(tl.bfloat16)
        acc = tl.dot((weight - high.to(tl.float32)).to(tl.bfloat16), u, acc)
        return tl.dot(high, u, acc)
    else:
        return tl.dot(weight, u, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tiles"])
def conv_output_kernel(
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
    groups,
    T,
    tiles,
    blocks_r,
    factor,
    ONE_TAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ADD: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program per tile of a sample. A null pointer asks for nothing."""
    R = Cg * kernel[0] * kernel[1] * kernel[2]
    tile, b = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    blocks_o = tl.cdiv(Og, BLOCK_O)
    # Blocks of channels next to each other: they share the patches.
    block_o, block_t = tile % blocks_o, tile // blocks_o // groups
    group = tile // blocks_o % groups
    offs_o = block_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_t = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_o, mask_t = offs_o < Og, offs_t < T
    first_o = (group * Og + block_o * BLOCK_O).to(tl.int64)
    from_first = tl.arange(0, BLOCK_O)
    t = coordinates(offs_t, P, DIMS)
    pixels = first_pixels(t, stride, padding)
    x_base = x_ptr + b * x_strides[0] + (group * Cg).to(tl.int64) * x_strides[1]
    w_block = rows_ptr + b * stride_wb + first_o * R
    acc = tl.zeros([BLOCK_O, BLOCK_T], dtype=tl.float32)
    for j in tl.range(0, blocks_r):
        c, k, offs_r, mask_r = row_block(j, Cg, R, BLOCK_R, ONE_TAP)
        shifts = tap_shifts(k, kernel, dilation)
        u = load_patches(x_base, pixels, mask_t, c, shifts, mask_r, x_strides, S, PADDED, INDEX)  # [BLOCK_T, BLOCK_R]
        w_ptrs = w_block + ((from_first.to(INDEX) * R)[:, None] + offs_r[None, :])
        weight = tl.load(w_ptrs, mask=mask_o[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_O, BLOCK_R]
        acc = dot_weights(weight, tl.trans(u), acc, PRECISION)
    mask = mask_o[:, None] & mask_t[None, :]
    if dots_ptr is not None:
        gy_tile = (from_first.to(INDEX) * gy_strides[1])[:, None] + space_offsets(t, gy_strides, INDEX)[None, :]
        gy_ptrs = gy_ptr + b * gy_strides[0] + first_o * gy_strides[1] + gy_tile
        gy = tl.load(gy_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dots_ptr + b * tiles + tile, tl.sum(acc * gy))
    if out_ptr is not None:
        out_tile = (from_first.to(INDEX) * out_strides[1])[:, None] + space_offsets(t, out_strides, INDEX)[None, :]
        out_ptrs = out_ptr + b * out_strides[0] + first_o * out_strides[1] + out_tile
        store_or_add(out_ptrs, factor * acc, mask, ADD)


@triton.jit(do_not_specialize=["tiles"])
def conv_input_kernel(
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
    groups,
    tiles,
    factor,
    PRECISION: tl.constexpr,
    ADD: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """One program per tile of a sample: channels of a group by pixels of one phase, which are (M0, M1, M2) or fewer."""
    R = Cg * kernel[0] * kernel[1] * kernel[2]
    tile, b = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    blocks_c, blocks_m = tl.cdiv(Cg, BLOCK_C), tl.cdiv(M[0] * M[1] * M[2], BLOCK_T)
    # Blocks of channels next to each other: they share gy.
    offs_c = tile % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    group, rest = tile // blocks_c % groups, tile // blocks_c // groups
    offs_m = rest % blocks_m * BLOCK_T + tl.arange(0, BLOCK_T)
    phase = phase_of_tile(rest // blocks_m, stride)
    mask_c = offs_c < Cg
    m, pixels, mask_m = phase_pixels(offs_m, phase, M, S, stride, DIMS)
    first, count, taps = phase_taps(phase, kernel, stride, padding, dilation, phase_step)
    w_base = rows_ptr + b * stride_wb + (group * Og).to(tl.int64) * R
    gy_base = gy_ptr + b * gy_strides[0] + (group * Og).to(tl.int64) * gy_strides[1]
    gy_columns = space_offsets(m, gy_strides, INDEX)  # [BLOCK_T]
    blocks_o, from_first = tl.cdiv(Og, BLOCK_O), tl.arange(0, BLOCK_O)
    acc = tl.zeros([BLOCK_C, BLOCK_T], dtype=tl.float32)
    for j in tl.range(0, taps * blocks_o):
        tap, first_o = j // blocks_o, j % blocks_o * BLOCK_O
        offs_o = first_o + from_first
        mask_o = offs_o < Og
        k, e = tap_of(tap, first, count, phase, kernel, stride, padding, dilation, phase_step)
        mask_t = inside(mask_m, m[0] + e[0], m[1] + e[1], m[2] + e[2], P, 7)
        gy_ptrs = (
            gy_base + space_offset(e, gy_strides) + ((offs_o.to(INDEX) * gy_strides[1])[:, None] + gy_columns[None, :])
        )
        gy = tl.load(gy_ptrs, mask=mask_o[:, None] & mask_t[None, :], other=0.0)  # [BLOCK_O, BLOCK_T]
        w_block = w_base + first_o.to(tl.int64) * R + k * Cg
        w_ptrs = w_block + ((from_first.to(INDEX) * R)[:, None] + offs_c[None, :])
        weight = tl.load(w_ptrs, mask=mask_o[:, None] & mask_c[None, :], other=0.0)  # [BLOCK_O, BLOCK_C]
        acc = dot_weights(tl.trans(weight), gy, acc, PRECISION)
    mask = mask_c[:, None] & mask_m[None, :]
    out_tile = (offs_c.to(INDEX) * out_strides[1])[:, None] + space_offsets(pixels, out_strides, INDEX)[None, :]
    out_ptrs = out_ptr + b * out_strides[0] + (group * Cg).to(tl.int64) * out_strides[1] + out_tile
    store_or_add(out_ptrs, factor * acc, mask, ADD)
