"""Per-sample gradients of the weight and bias of layer norm and RMS norm: one read of x and gy.

    rows = Σ_t gy_t x̂_t        bias_rows = Σ_t gy_t        x̂_t = (x_t − μ_t) r_t, without μ for RMS norm

Not registered yet: no op of `ops.schema` has this form. Bound by memory: 2·T·N numbers read and 2·N written per sample, 4
operations each. A program takes BLOCK_N columns of a sample and walks along T, each column of its block with sums of its
own, added up once at the end. Long sequences are cut into runs of RUN positions, a program each, whose sums a second
kernel adds up in order. Letters: ``B`` samples, ``T`` positions, ``N`` normalized entries.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import accumulation_dtype


class Config(NamedTuple):
    """Blocks of BLOCK_T positions by BLOCK_N entries, on ``num_warps`` warps."""

    BLOCK_T: int
    BLOCK_N: int
    num_warps: int


# (longest row, configuration): 16 entries per thread and tensor, rows of 128 bytes in half precision, 256 in float32.
CONFIGS = (
    (32, Config(BLOCK_T=64, BLOCK_N=32, num_warps=4)),
    (None, Config(BLOCK_T=32, BLOCK_N=64, num_warps=4)),
)
# Positions of a program: 8 samples of 4096 positions by 768 entries are 1536 programs.
RUN = 256
TOTAL_BLOCK = 256


def norm_rows(x: Tensor, gy: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Rows Σ_t gy x̂ of the weight's and Σ_t gy of the bias's gradient, for each sample.

    Args:
        x: (B, T, N), any strides.
        gy: as x.
        mean: (B, T) of the accumulation dtype, any strides; None for RMS norm.
        rstd: as mean; 1/√(mean(x²) + ε) for RMS norm.

    Returns:
        (B, N) twice, of the accumulation dtype.
    """
    B, T, N = x.shape
    dtype = accumulation_dtype(x.dtype)
    rows, bias_rows = (torch.empty(B, N, dtype=dtype, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return rows.zero_(), bias_rows.zero_()
    runs = triton.cdiv(T, RUN)
    partials = (rows, bias_rows) if runs == 1 else torch.empty(2, B, runs, N, dtype=dtype, device=x.device).unbind()
    config = choose_config(N)
    with torch.cuda.device_of(x):
        norm_rows_kernel[(B * runs * triton.cdiv(N, config.BLOCK_N),)](
            x,
            gy,
            mean,
            rstd,
            *partials,
            T,
            N,
            runs,
            *x.stride(),
            *gy.stride(),
            *((0, 0) if mean is None else mean.stride()),
            *rstd.stride(),
            RUN=RUN,
            BLOCK_T=config.BLOCK_T,
            BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps,
        )
        if runs > 1:
            grid = (B * triton.cdiv(N, TOTAL_BLOCK),)
            norm_rows_total_kernel[grid](*partials, rows, bias_rows, N, runs, BLOCK_N=TOTAL_BLOCK, num_warps=4)
    return rows, bias_rows


def choose_config(N: int) -> Config:
    """The first configuration of the table whose rows are long enough for N."""
    return next(config for longest, config in CONFIGS if longest is None or N <= longest)


@triton.jit
def norm_rows_kernel(
    x_ptr,
    gy_ptr,
    mean_ptr,
    rstd_ptr,
    rows_ptr,
    bias_rows_ptr,
    T,
    N,
    runs,
    stride_xb,
    stride_xt,
    stride_xn,
    stride_gb,
    stride_gt,
    stride_gn,
    stride_mb,
    stride_mt,
    stride_rb,
    stride_rt,
    RUN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per sample, run of positions and block of entries; the blocks of a run are neighbours."""
    ACC: tl.constexpr = rows_ptr.dtype.element_ty
    pid, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(N, BLOCK_N)
    run, offs_n = pid // blocks, pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b, first = run // runs, run % runs * RUN
    mask_n = offs_n < N
    x_ptrs = x_ptr + b * stride_xb + offs_n[None, :] * stride_xn
    gy_ptrs = gy_ptr + b * stride_gb + offs_n[None, :] * stride_gn
    sums, bias_sums = tl.zeros([BLOCK_T, BLOCK_N], ACC), tl.zeros([BLOCK_T, BLOCK_N], ACC)
    for start in range(0, RUN, BLOCK_T):
        offs_t = first + start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        mask = mask_t[:, None] & mask_n[None, :]
        x = tl.load(x_ptrs + offs_t[:, None] * stride_xt, mask=mask, other=0.0).to(ACC)
        gy = tl.load(gy_ptrs + offs_t[:, None] * stride_gt, mask=mask, other=0.0).to(ACC)
        if mean_ptr is not None:
            x -= tl.load(mean_ptr + b * stride_mb + offs_t * stride_mt, mask=mask_t, other=0.0)[:, None]
        x *= tl.load(rstd_ptr + b * stride_rb + offs_t * stride_rt, mask=mask_t, other=0.0)[:, None]
        sums += gy * x
        bias_sums += gy
    tl.store(rows_ptr + run * N + offs_n, tl.sum(sums, axis=0), mask=mask_n)
    tl.store(bias_rows_ptr + run * N + offs_n, tl.sum(bias_sums, axis=0), mask=mask_n)


@triton.jit
def norm_rows_total_kernel(partials_ptr, bias_partials_ptr, rows_ptr, bias_rows_ptr, N, runs, BLOCK_N: tl.constexpr):
    """Sums over the runs of a sample, one program per sample and block of entries."""
    pid, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(N, BLOCK_N)
    b, offs_n = pid // blocks, pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    sums = tl.zeros([BLOCK_N], rows_ptr.dtype.element_ty)
    bias_sums = tl.zeros([BLOCK_N], rows_ptr.dtype.element_ty)
    for run in range(0, runs):
        offs = (b * runs + run) * N + offs_n
        sums += tl.load(partials_ptr + offs, mask=mask, other=0.0)
        bias_sums += tl.load(bias_partials_ptr + offs, mask=mask, other=0.0)
    tl.store(rows_ptr + b * N + offs_n, sums, mask=mask)
    tl.store(bias_rows_ptr + b * N + offs_n, bias_sums, mask=mask)
