"""The direct path: G_i is formed tile by tile in registers, used there, and forgotten.

    G_i[o, r] = Σ_t gy_i[o, t] · U_i[r, t]         U_i[r, t] = x_i[c(r), stride·t + dilation·k(r) − padding]

A program owns a tile [BLOCK_O, BLOCK_R] of the gradient and walks through a run of samples, BLOCK_T positions at a time.
At the end of each sample it has the sample's tile complete, and
    adds its squares up, and those of its difference from the center's tile: one number per sample and tile, into a buffer
        (B, tiles) that `sum_rows` adds up in fixed order. The center is subtracted before squaring, so nothing cancels;
    adds it, times w_i, into Σ_i w_i G_i, which stays in registers: one partial sum per run of samples;
    stores it, where derivatives need it (`conv_grads`).
So the weight gradient and the norms cost what the weight gradient costs, and x and gy are read from memory about once: the
programs of one run of samples are launched side by side and share them in L2.

Where T > SEGMENT a sample's positions are cut into segments, the same for every batch size, and a *unit* of work is one
segment of one sample: that keeps the rounding of a unit's sums small, and a few large samples still fill a GPU. Squares need
all of a sample, so then the units' tiles are stored, a chunk of samples at a time within the caller's budget of bytes, and
`conv_combine_kernel` adds them in order before it squares; of a gradient so large that its segments would not fit, there is
one. Σ_i w_i G_i needs no such detour: without weights, a run of units is one sum.

Bytes: x and gy once from memory, and per tile BLOCK_O + BLOCK_R numbers a position from L2. Operations: T·O·R multiply-adds
a sample. The bias's rows Σ_t gy are not made here: only the programs of the first rows could, and all others would wait;
torch's sum is one more read of gy at the speed of memory.

Groups with one to four pairs of channels go to `conv_narrow`, as tiles of 16×16 would be mostly empty.
Letters as in `layer`; ``Og``, ``Cg`` channels of a group.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_configs import direct_config, direct_kind
from .conv_index import (
    coordinates,
    dims,
    first_pixels,
    geometry,
    index_type,
    load_patches,
    one_tap,
    padded,
    precision,
    row_block,
    row_blocks,
    space_offsets,
    tap_shifts,
)
from .conv_narrow import is_narrow, launch_narrow_rows, narrow_row_tiles
from .conv_reduce import combine, combine_tiles, runs_of, samples_at_once, segments_of, sum_rows
from .layer import Layer, strides


class Visit(NamedTuple):
    """What a visit of (x, gy) yields; None where not asked for.

    Attributes:
        total: (O, R) float32, Σ_i w_i G_i.
        sq_norms: (B,) float32, ‖G_i‖².
        deviation_sq_norms: (B,) float32, ‖G_i − center‖²; always where there is a center.
    """

    total: Tensor | None
    sq_norms: Tensor | None
    deviation_sq_norms: Tensor | None


def direct(
    x: Tensor,
    gy: Tensor,
    layer: Layer,
    workspace_bytes: int,
    *,
    center: Tensor | None = None,
    w: Tensor | None = None,
    norms: bool = False,
    total: bool = False,
) -> Visit:
    """Visit the samples' gradients tile by tile.

    Args:
        x: (B, C, S0, S1, S2) of float32, bfloat16 or float16; canonical, any strides.
        gy: (B, O, P0, P1, P2), likewise.
        layer: the geometry.
        workspace_bytes: what may be stored of the gradients at a time where samples have more than SEGMENT positions.
        center: (O, R) float32, contiguous; asks for deviations.
        w: (B,) float32, contiguous, the weights of the sum; ones when absent.
        norms: ask for ‖G_i‖².
        total: ask for Σ_i w_i G_i.
    """
    B, O = gy.shape[:2]  # noqa: E741
    R = x.size(1) // layer.groups * layer.taps
    buffers = _Buffers(x, gy, layer, norms, center is not None)
    result = x.new_zeros(O, R, dtype=torch.float32) if total else None
    squares = norms or center is not None
    if x.numel() and gy.numel() and O * R:
        if not squares:
            if result is not None:
                result += launch_rows(x, gy, layer, w=w, total=True)
        elif segments_of(gy, O * R) == 1:
            partial = launch_rows(
                x, gy, layer, w=w, center=center, norms=buffers.norms, deviation=buffers.deviation, total=total
            )
            if result is not None:
                result += partial
        else:
            step = samples_at_once(O * R * segments_of(gy, O * R), 4, workspace_bytes)
            for start in range(0, B, step):
                some = slice(start, start + step)
                partial = rows_by_segments(
                    x[some],
                    gy[some],
                    layer,
                    w=None if w is None else w[some],
                    center=center,
                    total=total,
                    **buffers.part(some),
                )
                if result is not None:
                    result += partial
    elif center is not None:
        return Visit(result, buffers.sq_norms(), center.square().sum().expand(B).contiguous())
    return Visit(result, buffers.sq_norms(), buffers.deviation_sq_norms())


def rows_by_segments(
    x: Tensor,
    gy: Tensor,
    layer: Layer,
    *,
    center: Tensor | None = None,
    w: Tensor | None = None,
    norms: Tensor | None = None,
    deviation: Tensor | None = None,
    rows: Tensor | None = None,
    total: bool = False,
) -> Tensor | None:
    """As `launch_rows`, by way of the segments' gradients in memory: B·segments·O·R float32 numbers."""
    O, R = gy.size(1), x.size(1) // layer.groups * layer.taps  # noqa: E741
    parts = torch.empty(x.size(0), segments_of(gy, O * R), O, R, dtype=torch.float32, device=x.device)
    launch_rows(x, gy, layer, rows=parts)
    return combine(parts, center=center, w=w, norms=norms, deviation=deviation, rows=rows, total=total)


def row_tiles(x: Tensor, gy: Tensor, layer: Layer) -> int:
    """How many partial norms there are per sample."""
    entries = gy.size(1) * (x.size(1) // layer.groups) * layer.taps
    if segments_of(gy, entries) > 1:
        return combine_tiles(entries)
    if is_narrow(x, gy, layer):
        return narrow_row_tiles(x, gy, layer)
    Cg, Og = x.size(1) // layer.groups, gy.size(1) // layer.groups
    config = direct_config(direct_kind(x.dtype), x.device, Og, Cg, layer.taps, math.prod(gy.shape[2:]))
    return layer.groups * triton.cdiv(Og, config.BLOCK_O) * row_blocks(Cg, layer.taps, config.BLOCK_R)


class _Buffers:
    """Partial norms (B, tiles) of what is asked for."""

    def __init__(self, x: Tensor, gy: Tensor, layer: Layer, norms: bool, deviation: bool):
        # Zeros where no kernel will write: the norms of nothing.
        tiles = row_tiles(x, gy, layer) if x.numel() and gy.numel() else 0
        self.norms, self.deviation = (
            torch.empty(x.size(0), tiles, dtype=torch.float32, device=x.device) if wanted else None
            for wanted in (norms, deviation)
        )

    def part(self, some: slice) -> dict[str, Tensor | None]:
        """The buffers' rows of some samples, by the names that launchers give them."""
        return {
            name: None if t is None else t[some] for name, t in (("norms", self.norms), ("deviation", self.deviation))
        }

    def sq_norms(self) -> Tensor | None:
        return None if self.norms is None else sum_rows(self.norms)

    def deviation_sq_norms(self) -> Tensor | None:
        return None if self.deviation is None else sum_rows(self.deviation)


def launch_rows(
    x: Tensor,
    gy: Tensor,
    layer: Layer,
    *,
    center: Tensor | None = None,
    w: Tensor | None = None,
    norms: Tensor | None = None,
    deviation: Tensor | None = None,
    rows: Tensor | None = None,
    total: bool = False,
) -> Tensor | None:
    """One launch over samples that are not empty.

    Args:
        x: canonical.
        gy: canonical.
        layer: the geometry.
        center: (O, R) float32, contiguous, subtracted from what ``deviation`` and ``rows`` get.
        w: (B,) float32, contiguous, weights of the total.
        norms: (B, tiles) float32, written; one segment only.
        deviation: likewise.
        rows: (B, segments, O, R), written: each unit's G_i − center.
        total: ask for Σ_i w_i G_i.

    Returns:
        The total (O, R).
    """
    B, O = gy.shape[:2]  # noqa: E741
    Cg, Og, T = x.size(1) // layer.groups, O // layer.groups, math.prod(gy.shape[2:])
    R = Cg * layer.taps
    segments = segments_of(gy, O * R)
    if is_narrow(x, gy, layer):
        return launch_narrow_rows(x, gy, layer, center, w, norms, deviation, rows, total, segments)
    kind = direct_kind(x.dtype)
    config = direct_config(kind, x.device, Og, Cg, layer.taps, T)
    segment = triton.cdiv(triton.cdiv(T, segments), config.BLOCK_T) * config.BLOCK_T
    tiles = layer.groups * triton.cdiv(Og, config.BLOCK_O) * row_blocks(Cg, layer.taps, config.BLOCK_R)
    runs, per_run = runs_of(B * segments, tiles, O * R if total else 0)
    partial = torch.empty(runs, O, R, dtype=torch.float32, device=x.device) if total else None
    with torch.cuda.device_of(x):
        conv_rows_kernel[(tiles, runs)](
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
            Og,
            layer.groups,
            T,
            B * segments,
            per_run,
            segments,
            segment,
            ONE_TAP=one_tap(Cg, config.BLOCK_R),
            DIMS=dims(tuple(gy.shape[2:])),
            PADDED=padded(layer),
            INDEX=index_type(R, x, gy),
            PRECISION=precision(kind),
            **config._asdict(),
        )
    return None if partial is None else partial.sum(0)


@triton.jit(do_not_specialize=["units", "per_run"])
def conv_rows_kernel(
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
    groups,
    T,
    units,
    per_run,
    segments,
    segment,
    ONE_TAP: tl.constexpr,
    DIMS: tl.constexpr,
    PADDED: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program per tile (axis 0) and run of units (axis 1). A null pointer asks for nothing."""
    R = Cg * kernel[0] * kernel[1] * kernel[2]
    pid, run, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    per_group = tiles // groups
    blocks_r = per_group // tl.cdiv(Og, BLOCK_O)
    group = pid // per_group
    first_o = pid % per_group // blocks_r * BLOCK_O
    mask_o = first_o + tl.arange(0, BLOCK_O) < Og
    c, k, offs_r, mask_r = row_block(pid % blocks_r, Cg, R, BLOCK_R, ONE_TAP)
    shifts = tap_shifts(k, kernel, dilation)
    first_entry = (group * Og + first_o).to(tl.int64) * R
    rows = (tl.arange(0, BLOCK_O).to(INDEX) * R)[:, None]
    entries = rows + offs_r[None, :]  # [BLOCK_O, BLOCK_R], from the block's first row
    mask = mask_o[:, None] & mask_r[None, :]
    gy_rows = (tl.arange(0, BLOCK_O).to(INDEX) * gy_strides[1])[:, None]
    gy_block = gy_ptr + (group * Og + first_o).to(tl.int64) * gy_strides[1]
    x_group = x_ptr + (group * Cg).to(tl.int64) * x_strides[1]

    PER_UNIT: tl.constexpr = not (norms_ptr is None and deviation_ptr is None and rows_ptr is None and w_ptr is None)
    acc = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    if total_ptr is not None:
        total = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    first = run * per_run
    steps = segment // BLOCK_T
    # One loop over samples and positions, so that a sample's first loads are in flight while the last one is squared.
    for j in tl.range(0, tl.minimum(per_run, units - first) * steps):
        unit = first + j // steps
        step = j % steps
        b = (unit // segments).to(tl.int64)
        offs_t = unit % segments * segment + step * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = offs_t < tl.minimum(T, (unit % segments + 1) * segment)
        t = coordinates(offs_t, P, DIMS)
        gy_ptrs = gy_block + b * gy_strides[0] + (gy_rows + space_offsets(t, gy_strides, INDEX)[None, :])
        gy = tl.load(gy_ptrs, mask=mask_o[:, None] & mask_t[None, :], other=0.0)  # [BLOCK_O, BLOCK_T]
        pixels = first_pixels(t, stride, padding)
        x_base = x_group + b * x_strides[0]
        u = load_patches(x_base, pixels, mask_t, c, shifts, mask_r, x_strides, S, PADDED, INDEX)  # [BLOCK_T, BLOCK_R]
        acc = tl.dot(gy, u, acc, input_precision=PRECISION)
        if PER_UNIT:
            if step == steps - 1:
                if norms_ptr is not None:
                    tl.store(norms_ptr + b * tiles + pid, tl.sum(acc * acc))
                if total_ptr is not None:
                    if w_ptr is not None:
                        total += acc * tl.load(w_ptr + b)
                    else:
                        total += acc
                if center_ptr is not None:
                    acc -= tl.load(center_ptr + first_entry + entries, mask=mask, other=0.0)
                if deviation_ptr is not None:
                    tl.store(deviation_ptr + b * tiles + pid, tl.sum(acc * acc))
                if rows_ptr is not None:
                    place = unit.to(tl.int64) * (groups * Og) * R + first_entry
                    tl.store(rows_ptr + place + entries, acc.to(rows_ptr.dtype.element_ty), mask=mask)
                acc = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    if total_ptr is not None:
        if not PER_UNIT:
            total = acc
        place = run.to(tl.int64) * (groups * Og) * R + first_entry
        tl.store(total_ptr + place + entries, total, mask=mask)
