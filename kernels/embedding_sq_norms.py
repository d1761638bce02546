"""Per-sample squared norms of an embedding's gradient: rows of a table, where tokens repeat, at the cost of the tokens.

    s_i = Σ_{t,t'} [tok_t = tok_t'] ⟨gy_t, gy_t'⟩ = Σ_{tokens v of sample i} ‖Σ_{t: tok_t = v} gy_t‖²

Tokens are sorted, stably, sample by sample, so that equal ones are neighbours; then one read of gy's rows, gathered in that
order, sums them token by token: T·D numbers read, T·D·BLOCK_T multiply-adds, against T²·D/2 for the Gram matrix above, and
nothing of the size of the vocabulary.

A program takes BLOCK_D columns of a sample and walks along its sorted tokens BLOCK_T at a time. In a block the sums of the
tokens are a product with the matrix [token of row j = token of t], of zeros and ones, which tensor cores multiply
exactly; the sum of the last token goes on into the next block. Letters: ``B`` samples, ``N`` tokens, of which a sample has
``T``, as many as it has, ``D`` dimensions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import accumulation_dtype

# Tokens, columns and warps of a block, by bytes of a number: the sums take BLOCK_T·BLOCK_D/(32·warps) registers a thread.
CONFIGS = {2: (32, 128, 4), 4: (16, 128, 4), 8: (16, 64, 4)}
TOTAL_BLOCK = (4, 64)


def embedding_sq_norms(tokens: Tensor, bounds: Tensor, gy: Tensor) -> Tensor:
    """Squared norms of the per-sample gradients of an embedding's table.

    Args:
        tokens: (N,) int64, negative where there is none.
        bounds: (B + 1,) int64, where the samples' tokens begin, from 0 to N.
        gy: (N, D), any strides.

    Returns:
        (B,) of the accumulation dtype.
    """
    (N, D), B = gy.shape, bounds.size(0) - 1
    out = torch.empty(B, dtype=accumulation_dtype(gy.dtype), device=gy.device)
    if gy.numel() == 0 or B == 0:
        return out.zero_()
    bounds = bounds.contiguous()
    order = tokens.argsort(stable=True)
    samples = torch.searchsorted(bounds[1:], torch.arange(N, device=gy.device), right=True)
    order = order[samples[order].argsort(stable=True)]
    block_t, block_d, num_warps = CONFIGS[gy.dtype.itemsize]
    partials = torch.empty(B, triton.cdiv(D, block_d), dtype=out.dtype, device=gy.device)
    with torch.cuda.device_of(gy):
        embedding_sq_norms_kernel[(partials.numel(),)](
            tokens[order],
            order,
            bounds,
            gy,
            partials,
            D,
            *gy.stride(),
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=num_warps,
        )
        block_b, block_n = TOTAL_BLOCK
        grid = (triton.cdiv(B, block_b),)
        embedding_sq_norms_total_kernel[grid](
            partials, out, B, partials.size(1), BLOCK_B=block_b, BLOCK_N=block_n, num_warps=1
        )
    return out


@triton.jit
def embedding_sq_norms_kernel(
    tokens_ptr,
    order_ptr,
    bounds_ptr,
    gy_ptr,
    partials_ptr,
    D,
    stride_gn,
    stride_gd,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per sample and block of columns."""
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    pid, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(D, BLOCK_D)
    b, offs_d = pid // blocks, pid % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    first, end = tl.load(bounds_ptr + b), tl.load(bounds_ptr + b + 1)
    mask_d = offs_d < D
    gy_ptrs = gy_ptr + offs_d[None, :] * stride_gd
    j = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_D], ACC)
    carried = tl.zeros([BLOCK_D], ACC)  # the sum of the last token so far
    for start in range(first, end, BLOCK_T):
        offs_t = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        # Beyond the end the last token goes on, with rows of zeros.
        at = tl.minimum(offs_t, end - 1)
        token = tl.load(tokens_ptr + at)
        before = tl.load(tokens_ptr + tl.maximum(at - 1, first))
        new = (token != before) & mask_t
        ended = tl.sum((new & (j == 0)).to(tl.int32), axis=0) > 0  # the token before this block does not go on
        total += tl.where(ended, carried * carried, 0.0)
        carried = tl.where(ended, 0.0, carried)
        index = tl.cumsum((new & (j > 0)).to(tl.int32), axis=0)  # of the token in this block
        last = tl.max(index, axis=0)
        row = tl.load(order_ptr + at)
        mask_t = mask_t & (token >= 0)
        gy = tl.load(gy_ptrs + row[:, None] * stride_gn, mask=mask_t[:, None] & mask_d[None, :], other=0.0)
        # A token of row j times a number is exact in every precision.
        member = (j[:, None] == index[None, :]).to(gy.dtype)
        sums = tl.dot(member, gy, input_precision="ieee", out_dtype=ACC)  # [BLOCK_T, BLOCK_D]
        sums += tl.where((j == 0)[:, None], carried[None, :], 0.0)
        total += tl.sum(tl.where((j < last)[:, None], sums * sums, 0.0), axis=0)
        carried = tl.sum(tl.where((j == last)[:, None], sums, 0.0), axis=0)
    total += carried * carried
    tl.store(partials_ptr + pid, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["B"])
def embedding_sq_norms_total_kernel(partials_ptr, out_ptr, B, N, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums of the rows of (B, N), one program per BLOCK_B samples."""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    acc = tl.zeros([BLOCK_B, BLOCK_N], out_ptr.dtype.element_ty)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_b < B)[:, None] & (offs_n < N)[None, :]
        acc += tl.load(partials_ptr + offs_b[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_b, tl.sum(acc, axis=1), mask=offs_b < B)
