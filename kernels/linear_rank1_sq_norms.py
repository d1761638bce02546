"""‖G_i‖² of a linear layer with one position: G_i = gy_i ⊗ x_i has rank one, so its norm is a product of two.

    s_i = ‖x_i‖² ‖gy_i‖²           x (B, I), gy (B, O), s (B,)

Bound by memory: one read of x and gy, I + O multiply-adds per sample. A program takes BLOCK_B samples and walks along
their rows BLOCK_N numbers at a time; each column of the block has its own partial sum, added up once at the end.
Letters: ``B`` samples, ``I`` in, ``O`` out, ``N`` either.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import accumulation_dtype


class Config(NamedTuple):
    """A block of BLOCK_B samples by BLOCK_N numbers, on ``num_warps`` warps."""

    BLOCK_B: int
    BLOCK_N: int
    num_warps: int


# (longest row, configuration): a block holds 16 bytes or more per thread and load, and short rows share a program.
CONFIGS = (
    (64, Config(BLOCK_B=16, BLOCK_N=64, num_warps=4)),
    (256, Config(BLOCK_B=4, BLOCK_N=256, num_warps=4)),
    (2048, Config(BLOCK_B=1, BLOCK_N=1024, num_warps=4)),
    (None, Config(BLOCK_B=1, BLOCK_N=4096, num_warps=8)),
)


def linear_rank1_sq_norms(x: Tensor, gy: Tensor) -> Tensor:
    """Squared norms s_i = ‖x_i‖² ‖gy_i‖² of the outer products of two tensors' rows.

    Args:
        x: (B, I), any strides.
        gy: (B, O) of the dtype and on the device of x, any strides.

    Returns:
        (B,) in the accumulation dtype.
    """
    B, I, O = x.size(0), x.size(1), gy.size(1)  # noqa: E741
    out = torch.empty(B, dtype=accumulation_dtype(x.dtype), device=x.device)
    if B == 0:
        return out
    config = choose_config(I, O)
    with torch.cuda.device_of(x):
        linear_rank1_sq_norms_kernel[(triton.cdiv(B, config.BLOCK_B),)](
            x,
            gy,
            out,
            B,
            I,
            O,
            *x.stride(),
            *gy.stride(),
            BLOCK_B=config.BLOCK_B,
            BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps,
        )
    return out


def choose_config(I: int, O: int) -> Config:  # noqa: E741
    """The first configuration of the table whose rows are long enough for both I and O."""
    return next(config for longest, config in CONFIGS if longest is None or max(I, O) <= longest)


@triton.jit(do_not_specialize=["B"])
def linear_rank1_sq_norms_kernel(
    x_ptr,
    gy_ptr,
    out_ptr,
    B,
    I,  # noqa: E741
    O,  # noqa: E741
    stride_xb,
    stride_xi,
    stride_gb,
    stride_go,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per BLOCK_B samples."""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    xx = _row_sq_norms(x_ptr, offs_b, mask_b, I, stride_xb, stride_xi, BLOCK_B, BLOCK_N, ACC)
    gg = _row_sq_norms(gy_ptr, offs_b, mask_b, O, stride_gb, stride_go, BLOCK_B, BLOCK_N, ACC)
    tl.store(out_ptr + offs_b, xx * gg, mask=mask_b)


@triton.jit
def _row_sq_norms(
    ptr, offs_b, mask_b, N, stride_b, stride_n, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr
):
    acc = tl.zeros([BLOCK_B, BLOCK_N], dtype=ACC)
    row_ptrs = ptr + offs_b[:, None] * stride_b  # [BLOCK_B, 1]
    for start in range(0, N, BLOCK_N):
        offs_n = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
        mask = mask_b[:, None] & (offs_n < N)[None, :]
        u = tl.load(row_ptrs + offs_n[None, :] * stride_n, mask=mask, other=0.0).to(ACC)  # [BLOCK_B, BLOCK_N]
        acc += u * u
    return tl.sum(acc, axis=1)  # [BLOCK_B]
