"""How samples are divided among programs, and how what they leave is put together: always in the same order.

A *unit* is one segment of one sample's positions: all of them up to SEGMENT, else equal parts, as many as a sample's gradient
can be kept in. Segments do not depend on the batch. A *run* is a stretch of units that one program takes; how long it is
does depend on the batch, and only sums over the batch are told by it.

    sum_rows   (B, tiles) → (B,)                              a sample's partial norms
    combine    (B, segments, O, R) → norms, total, rows       as a visit of samples with one segment yields them

Letters as in `layer`; ``E`` = O·R entries of a gradient.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT = 4096
SEGMENTS_BYTES = 32 * 2**20  # of a sample's gradient in segments, and of their sum
# Programs of a launch: some four waves on 132 or 148 multiprocessors, each with two or more programs at a time. More would
# not pay for the partial sums that they write.
PROGRAMS = 1024
PARTIAL_BYTES = 64 * 2**20
BLOCK_E = 1024


def segments_of(gy: Tensor, entries: int) -> int:
    """How many segments a sample's positions are cut into, where a gradient has so many entries."""
    return max(1, min(triton.cdiv(math.prod(gy.shape[2:]), SEGMENT), SEGMENTS_BYTES // (4 * max(1, entries)) - 1))


def runs_of(units: int, tiles: int, entries: int) -> tuple[int, int]:
    """Into how many runs the units are divided, and how long they are.

    Args:
        units: how many there are, at least one.
        tiles: programs per run.
        entries: numbers of a run's partial sum, 0 where none is wanted.
    """
    wanted = triton.cdiv(PROGRAMS if entries else 4 * PROGRAMS, tiles)
    if entries:
        wanted = min(wanted, max(1, PARTIAL_BYTES // (4 * entries)))
    per_run = triton.cdiv(units, min(units, wanted, 65535))
    return triton.cdiv(units, per_run), per_run


def samples_at_once(entries: int, itemsize: int, budget: int) -> int:
    """How many samples' gradients of ``entries`` numbers are kept at a time: those that fit ``budget`` bytes, at least 1."""
    return max(1, budget // max(1, entries * itemsize))


def sum_rows(partial: Tensor) -> Tensor:
    """Sums (B,) of the rows of a contiguous float32 matrix; a row's sum does not depend on the other rows."""
    B, N = partial.shape
    out = torch.empty(B, dtype=torch.float32, device=partial.device)
    if B:
        with torch.cuda.device_of(partial):
            sum_rows_kernel[(triton.cdiv(B, 8),)](partial, out, B, N, BLOCK_B=8, BLOCK_N=128, num_warps=4)
    return out


def combine_tiles(entries: int) -> int:
    """How many partial norms per sample `combine` writes."""
    return triton.cdiv(entries, BLOCK_E)


def combine(
    parts: Tensor,
    *,
    center: Tensor | None = None,
    w: Tensor | None = None,
    norms: Tensor | None = None,
    deviation: Tensor | None = None,
    rows: Tensor | None = None,
    total: bool = False,
) -> Tensor | None:
    """Add up the segments of samples' gradients (B, segments, O, R), and do with them what `launch_rows` does with whole ones.

    Args:
        parts: float32, contiguous, B ≥ 1.
        center: (O, R), contiguous, subtracted from what ``deviation`` and ``rows`` get.
        w: (B,), contiguous, weights of the total.
        norms: (B, tiles), written.
        deviation: (B, tiles), written.
        rows: (B, O, R), written.
        total: ask for Σ_i w_i G_i.

    Returns:
        The total (O, R).
    """
    B, segments, O, R = parts.shape  # noqa: E741
    tiles = combine_tiles(O * R)
    runs, per_run = runs_of(B, tiles, O * R if total else 0)
    partial = torch.empty(runs, O, R, dtype=torch.float32, device=parts.device) if total else None
    with torch.cuda.device_of(parts):
        conv_combine_kernel[(tiles, runs)](
            parts,
            center,
            w if total else None,
            norms,
            deviation,
            rows,
            partial,
            O * R,
            B,
            per_run,
            segments,
            BLOCK_E=BLOCK_E,
            num_warps=4,
        )
    return None if partial is None else partial.sum(0)


@triton.jit(do_not_specialize=["B"])
def sum_rows_kernel(partial_ptr, out_ptr, B, N, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program per BLOCK_B rows."""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    acc = tl.zeros([BLOCK_B, BLOCK_N], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        ptrs = partial_ptr + offs_b[:, None] * N + offs_n[None, :]
        acc += tl.load(ptrs, mask=mask_b[:, None] & (offs_n < N)[None, :], other=0.0)
    tl.store(out_ptr + offs_b, tl.sum(acc, axis=1), mask=mask_b)


@triton.jit(do_not_specialize=["B", "per_run"])
def conv_combine_kernel(
    parts_ptr,
    center_ptr,
    w_ptr,
    norms_ptr,
    deviation_ptr,
    rows_ptr,
    total_ptr,
    E,
    B,
    per_run,
    segments,
    BLOCK_E: tl.constexpr,
):
    """One program per BLOCK_E entries (axis 0) and run of samples (axis 1). A null pointer asks for nothing."""
    pid, run, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    offs_e = pid.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    total = tl.zeros([BLOCK_E], dtype=tl.float32)
    first = run * per_run
    for i in range(first, tl.minimum(first + per_run, B)):
        b = tl.cast(i, tl.int64)
        g = tl.zeros([BLOCK_E], dtype=tl.float32)
        for segment in range(0, segments):
            g += tl.load(parts_ptr + (b * segments + segment) * E + offs_e, mask=mask_e, other=0.0)
        if norms_ptr is not None:
            tl.store(norms_ptr + b * tiles + pid, tl.sum(g * g))
        if total_ptr is not None:
            if w_ptr is not None:
                total += g * tl.load(w_ptr + b)
            else:
                total += g
        if center_ptr is not None:
            g -= tl.load(center_ptr + offs_e, mask=mask_e, other=0.0)
        if deviation_ptr is not None:
            tl.store(deviation_ptr + b * tiles + pid, tl.sum(g * g))
        if rows_ptr is not None:
            tl.store(rows_ptr + b * E + offs_e, g.to(rows_ptr.dtype.element_ty), mask=mask_e)
    if total_ptr is not None:
        tl.store(total_ptr + run.to(tl.int64) * E + offs_e, total, mask=mask_e)
