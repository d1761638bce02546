"""Group norm's backward pass with the rows of γ and β, and its adjoint: a program per group of a sample.

    x̂ = r (x − μ)        P(w) = w − mean(w) − x̂ mean(w x̂), means over the group        h = γ gy
    backward            dx = r P(h)         rows = Σ gy x̂          bias_rows = Σ gy
    double backward     dgy = γ r P(u) + a x̂ + b                    rows = Σ gy r P(u)
                        dx = −r [ mean(u x̂) r P(h) + mean(h x̂) r P(u) + mean(h r P(u)) x̂ ] + r P(a gy)

Bound by memory: 2 reads and 1 write per entry backward, 3 and 2 for the adjoint, some 20 operations each. A group of up
to 16384 entries backward, 8192 in the adjoint (padded to powers of two), stays in registers between its sums and its
results, so each number is read once. Larger groups are read twice: from L2 as long as the groups in flight, one or two for
each multiprocessor, fit it together, on an H100 up to about 60,000 entries in half precision; beyond, from memory.

Sums over a block that is walked along are kept entry by entry and added up at its end: Triton 3.6 fails to compile a sum
over a block in a loop whose result is used twice. Where channels are last, a program's reads are runs of
C/G numbers; neighbouring groups' programs find the rest of the sectors in L2.

Letters: ``B`` samples, ``C`` channels, ``G`` groups, ``N`` positions of a channel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import accumulation_dtype


class Config(NamedTuple):
    """Blocks of BLOCK_C channels by BLOCK_N positions; with WHOLE, one block is the group."""

    BLOCK_C: int
    BLOCK_N: int
    WHOLE: bool
    num_warps: int


# Entries of a group that stay in registers, of two tensors backward and of three in the adjoint: 512 threads have 128
# registers each. Numbers of double precision take two.
LARGEST_WHOLE = {2: 16384, 3: 8192}
# Of a group that is walked along; with channels last, a run of up to 64 of them per position.
LARGEST_BLOCK = 2048
LONGEST_RUN = 64


def group_norm_backward(
    gy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The input's gradient r P(γ gy), and the rows of γ and β, Σ gy x̂ and Σ gy, for each sample.

    Args:
        gy: (B, C, …), contiguous or channels last; other layouts are copied.
        x: as gy.
        weight: γ (C,) of the accumulation dtype, ones when absent.
        mean: (B, G) of the accumulation dtype.
        rstd: as mean.
        input_grad: whether the first result is wanted; it is empty (0,) otherwise.

    Returns:
        (B, C, …) typed as x, (B, C) and (B, C) of the accumulation dtype; all contiguous.
    """
    dx = torch.empty(x.shape if input_grad else 0, dtype=x.dtype, device=x.device)
    rows, bias_rows = _rows(x), _rows(x)
    if x.numel() == 0:
        return dx, rows.zero_(), bias_rows.zero_()
    gys, xs = _channels(gy), _channels(x)
    channels = x.size(1) // mean.size(1)
    config = choose_config(channels, xs.size(2), _channels_last(xs), 2, rows.itemsize)
    with torch.cuda.device_of(x):
        group_norm_backward_kernel[(mean.numel(),)](
            gys,
            xs,
            weight,
            mean,
            rstd,
            dx,
            rows,
            bias_rows,
            mean.size(1),
            channels,
            xs.size(2),
            *gys.stride(),
            *xs.stride(),
            *_strides(weight, 1),
            *mean.stride(),
            *rstd.stride(),
            INPUT_GRAD=input_grad,
            WHOLE=config.WHOLE,
            BLOCK_C=config.BLOCK_C,
            BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps,
        )
    return dx, rows, bias_rows


def group_norm_double_backward(
    u: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    gy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of `group_norm_backward`: its derivatives by gy, by x, and by γ for each sample.

    Args:
        u: cotangent of the input's gradient, as x; zeros when absent.
        a: cotangent of the rows of γ, (B, C) of the accumulation dtype, any strides; zeros when absent.
        b: as a, of the rows of β.
        gy: as in `group_norm_backward`, and so are x, weight, mean and rstd.
        x: see gy.
        weight: see gy.
        mean: see gy.
        rstd: see gy.

    Returns:
        (B, C, …) twice, typed as x, and (B, C) of the accumulation dtype; all contiguous.
    """
    dgy, dx = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rows = _rows(x)
    if x.numel() == 0:
        return dgy, dx, rows.zero_()
    gys, xs, us = _channels(gy), _channels(x), None if u is None else _channels(u)
    channels = x.size(1) // mean.size(1)
    config = choose_config(channels, xs.size(2), _channels_last(xs), 3, rows.itemsize)
    with torch.cuda.device_of(x):
        group_norm_double_backward_kernel[(mean.numel(),)](
            us,
            a,
            b,
            gys,
            xs,
            weight,
            mean,
            rstd,
            dgy,
            dx,
            rows,
            mean.size(1),
            channels,
            xs.size(2),
            *_strides(us, 3),
            *_strides(a, 2),
            *_strides(b, 2),
            *gys.stride(),
            *xs.stride(),
            *_strides(weight, 1),
            *mean.stride(),
            *rstd.stride(),
            WHOLE=config.WHOLE,
            BLOCK_C=config.BLOCK_C,
            BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps,
        )
    return dgy, dx, rows


def choose_config(channels: int, N: int, channels_last: bool, tensors: int, itemsize: int = 4) -> Config:
    """The blocks for groups of ``channels`` channels of N positions, with this many tensors in registers."""
    c, n = triton.next_power_of_2(channels), triton.next_power_of_2(N)
    if c * n * itemsize <= LARGEST_WHOLE[tensors] * 4:
        return Config(c, n, True, num_warps=max(1, min(16, c * n // 512)))
    if channels_last:
        BLOCK_C = min(c, LONGEST_RUN)
        return Config(BLOCK_C, min(n, LARGEST_BLOCK // BLOCK_C), False, num_warps=8)
    BLOCK_N = min(n, LARGEST_BLOCK)
    return Config(min(c, LARGEST_BLOCK // BLOCK_N), BLOCK_N, False, num_warps=8)


def _channels(t: Tensor) -> Tensor:
    """(B, C, N), a view where the dimensions of space are one to their strides."""
    return t.flatten(2) if t.dim() > 2 else t.unsqueeze(2)


def _channels_last(t: Tensor) -> bool:
    return t.stride(1) == 1 and t.stride(2) != 1


def _rows(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:2], dtype=accumulation_dtype(x.dtype), device=x.device)


def _strides(t: Tensor | None, dim: int) -> tuple[int, ...]:
    return (0,) * dim if t is None else t.stride()


@triton.jit
def group_norm_backward_kernel(
    gy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    rows_ptr,
    bias_rows_ptr,
    G,
    channels,
    N,
    stride_gb,
    stride_gc,
    stride_gn,
    stride_xb,
    stride_xc,
    stride_xn,
    stride_w,
    stride_mb,
    stride_mg,
    stride_rb,
    stride_rg,
    INPUT_GRAD: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per group of a sample."""
    ACC: tl.constexpr = rows_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    sample, group = pid // G, pid % G
    first = group * channels
    mean = tl.load(mean_ptr + sample * stride_mb + group * stride_mg)
    rstd = tl.load(rstd_ptr + sample * stride_rb + group * stride_rg)
    gy_ptr += sample * stride_gb + first * stride_gc
    x_ptr += sample * stride_xb + first * stride_xc
    dx_ptr += pid * channels * N
    rows_ptr += pid * channels
    bias_rows_ptr += pid * channels
    M = tl.cast(channels * N, ACC)

    if WHOLE:
        offs_c, offs_n = tl.arange(0, BLOCK_C).to(tl.int64), tl.arange(0, BLOCK_N).to(tl.int64)
        mask_c, mask_n = offs_c < channels, offs_n < N
        gy = _load(gy_ptr, offs_c, offs_n, stride_gc, stride_gn, mask_c, mask_n, ACC)
        normal = (_load(x_ptr, offs_c, offs_n, stride_xc, stride_xn, mask_c, mask_n, ACC) - mean) * rstd
        gamma = _vector(weight_ptr, first + offs_c, stride_w, mask_c, 1.0, BLOCK_C, ACC)
        sum_g, sum_gx = tl.sum(gy, axis=1), tl.sum(gy * normal, axis=1)
        tl.store(rows_ptr + offs_c, sum_gx, mask=mask_c)
        tl.store(bias_rows_ptr + offs_c, sum_g, mask=mask_c)
        if INPUT_GRAD:
            h_mean, hx = tl.sum(gamma * sum_g, axis=0) / M, tl.sum(gamma * sum_gx, axis=0) / M
            dx = rstd * (gamma[:, None] * gy - h_mean - normal * hx)
            _store(dx_ptr, dx, offs_c, offs_n, N, mask_c, mask_n)
    else:
        h_sum, hx_sum = tl.zeros([BLOCK_C], ACC), tl.zeros([BLOCK_C], ACC)
        for start_c in range(0, channels, BLOCK_C):
            offs_c = tl.cast(start_c, tl.int64) + tl.arange(0, BLOCK_C)
            mask_c = offs_c < channels
            of_g, of_gx = tl.zeros([BLOCK_C, BLOCK_N], ACC), tl.zeros([BLOCK_C, BLOCK_N], ACC)
            for start_n in range(0, N, BLOCK_N):
                offs_n = tl.cast(start_n, tl.int64) + tl.arange(0, BLOCK_N)
                mask_n = offs_n < N
                gy = _load(gy_ptr, offs_c, offs_n, stride_gc, stride_gn, mask_c, mask_n, ACC)
                normal = (_load(x_ptr, offs_c, offs_n, stride_xc, stride_xn, mask_c, mask_n, ACC) - mean) * rstd
                of_g += gy
                of_gx += gy * normal
            sum_g, sum_gx = tl.sum(of_g, axis=1), tl.sum(of_gx, axis=1)
            tl.store(rows_ptr + offs_c, sum_gx, mask=mask_c)
            tl.store(bias_rows_ptr + offs_c, sum_g, mask=mask_c)
            gamma = _vector(weight_ptr, first + offs_c, stride_w, mask_c, 1.0, BLOCK_C, ACC)
            h_sum += gamma * sum_g
            hx_sum += gamma * sum_gx
        if INPUT_GRAD:
            h_mean, hx = tl.sum(h_sum, axis=0) / M, tl.sum(hx_sum, axis=0) / M
            for start_c in range(0, channels, BLOCK_C):
                offs_c = tl.cast(start_c, tl.int64) + tl.arange(0, BLOCK_C)
                mask_c = offs_c < channels
                gamma = _vector(weight_ptr, first + offs_c, stride_w, mask_c, 1.0, BLOCK_C, ACC)
                for start_n in range(0, N, BLOCK_N):
                    offs_n = tl.cast(start_n, tl.int64) + tl.arange(0, BLOCK_N)
                    mask_n = offs_n < N
                    gy = _load(gy_ptr, offs_c, offs_n, stride_gc, stride_gn, mask_c, mask_n, ACC)
                    normal = (_load(x_ptr, offs_c, offs_n, stride_xc, stride_xn, mask_c, mask_n, ACC) - mean) * rstd
                    dx = rstd * (gamma[:, None] * gy - h_mean - normal * hx)
                    _store(dx_ptr, dx, offs_c, offs_n, N, mask_c, mask_n)


@triton.jit
def group_norm_double_backward_kernel(
    u_ptr,
    a_ptr,
    b_ptr,
    gy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dgy_ptr,
    dx_ptr,
    rows_ptr,
    G,
    channels,
    N,
    stride_ub,
    stride_uc,
    stride_un,
    stride_ab,
    stride_ac,
    stride_bb,
    stride_bc,
    stride_gb,
    stride_gc,
    stride_gn,
    stride_xb,
    stride_xc,
    stride_xn,
    stride_w,
    stride_mb,
    stride_mg,
    stride_rb,
    stride_rg,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per group of a sample."""
    ACC: tl.constexpr = rows_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    sample, group = pid // G, pid % G
    first = group * channels
    mean = tl.load(mean_ptr + sample * stride_mb + group * stride_mg)
    rstd = tl.load(rstd_ptr + sample * stride_rb + group * stride_rg)
    if u_ptr is not None:
        u_ptr += sample * stride_ub + first * stride_uc
    if a_ptr is not None:
        a_ptr += sample * stride_ab
    if b_ptr is not None:
        b_ptr += sample * stride_bb
    gy_ptr += sample * stride_gb + first * stride_gc
    x_ptr += sample * stride_xb + first * stride_xc
    dgy_ptr += pid * channels * N
    dx_ptr += pid * channels * N
    rows_ptr += pid * channels
    M = tl.cast(channels * N, ACC)

    if WHOLE:
        offs_c, offs_n = tl.arange(0, BLOCK_C).to(tl.int64), tl.arange(0, BLOCK_N).to(tl.int64)
        mask_c, mask_n = offs_c < channels, offs_n < N
        gy = _load(gy_ptr, offs_c, offs_n, stride_gc, stride_gn, mask_c, mask_n, ACC)
        normal = (_load(x_ptr, offs_c, offs_n, stride_xc, stride_xn, mask_c, mask_n, ACC) - mean) * rstd
        u = _load(u_ptr, offs_c, offs_n, stride_uc, stride_un, mask_c, mask_n, ACC)
        gamma = _vector(weight_ptr, first + offs_c, stride_w, mask_c, 1.0, BLOCK_C, ACC)
        a = _vector(a_ptr, first + offs_c, stride_ac, mask_c, 0.0, BLOCK_C, ACC)
        b = _vector(b_ptr, first + offs_c, stride_bc, mask_c, 0.0, BLOCK_C, ACC)
        sum_g, sum_gx = tl.sum(gy, axis=1), tl.sum(gy * normal, axis=1)
        h_mean, hx = tl.sum(gamma * sum_g, axis=0) / M, tl.sum(gamma * sum_gx, axis=0) / M
        a_mean, ax = tl.sum(a * sum_g, axis=0) / M, tl.sum(a * sum_gx, axis=0) / M
        u_mean, ux = tl.sum(tl.sum(u, axis=1), axis=0) / M, tl.sum(tl.sum(u * normal, axis=1), axis=0) / M
        uh = tl.sum(gamma * tl.sum(u * gy, axis=1), axis=0) / M
        dgy, dx, row = _adjoint(gy, normal, u, gamma, a, b, rstd, h_mean, hx, a_mean, ax, u_mean, ux, uh)
        _store(dgy_ptr, dgy, offs_c, offs_n, N, mask_c, mask_n)
        _store(dx_ptr, dx, offs_c, offs_n, N, mask_c, mask_n)
        tl.store(rows_ptr + offs_c, tl.sum(row, axis=1), mask=mask_c)
    else:
        h_sum, hx_sum, uh_sum = tl.zeros([BLOCK_C], ACC), tl.zeros([BLOCK_C], ACC), tl.zeros([BLOCK_C], ACC)
        a_sum, ax_sum = tl.zeros([BLOCK_C], ACC), tl.zeros([BLOCK_C], ACC)
        u_sum, ux_sum = tl.zeros([BLOCK_C], ACC), tl.zeros([BLOCK_C], ACC)
        for start_c in range(0, channels, BLOCK_C):
            offs_c = tl.cast(start_c, tl.int64) + tl.arange(0, BLOCK_C)
            mask_c = offs_c < channels
            of_g, of_gx = tl.zeros([BLOCK_C, BLOCK_N], ACC), tl.zeros([BLOCK_C, BLOCK_N], ACC)
            of_u, of_ux = tl.zeros([BLOCK_C, BLOCK_N], ACC), tl.zeros([BLOCK_C, BLOCK_N], ACC)
            of_ug = tl.zeros([BLOCK_C, BLOCK_N], ACC)
            for start_n in range(0, N, BLOCK_N):
                offs_n = tl.cast(start_n, tl.int64) + tl.arange(0, BLOCK_N)
                mask_n = offs_n < N
                gy = _load(gy_ptr, offs_c, offs_n, stride_gc, stride_gn, mask_c, mask_n, ACC)
                normal = (_load(x_ptr, offs_c, offs_n, stride_xc, stride_xn, mask_c, mask_n, ACC) - mean) * rstd
                u = _load(u_ptr, offs_c, offs_n, stride_uc, stride_un, mask_c, mask_n, ACC)
                of_g += gy
                of_gx += gy * normal
                of_u += u
                of_ux += u * normal
                of_ug += u * gy
            sum_g, sum_gx = tl.sum(of_g, axis=1), tl.sum(of_gx, axis=1)
            gamma = _vector(weight_ptr, first + offs_c, stride_w, mask_c, 1.0, BLOCK_C, ACC)
            a = _vector(a_ptr, first + offs_c, stride_ac, mask_c, 0.0, BLOCK_C, ACC)
            h_sum += gamma * sum_g
            hx_sum += gamma * sum_gx
            uh_sum += gamma * tl.sum(of_ug, axis=1)
            u_sum += tl.sum(of_u, axis=1)
            ux_sum += tl.sum(of_ux, axis=1)
            a_sum += a * sum_g
            ax_sum += a * sum_gx
        h_mean, hx, uh = tl.sum(h_sum, axis=0) / M, tl.sum(hx_sum, axis=0) / M, tl.sum(uh_sum, axis=0) / M
        a_mean, ax = tl.sum(a_sum, axis=0) / M, tl.sum(ax_sum, axis=0) / M
        u_mean, ux = tl.sum(u_sum, axis=0) / M, tl.sum(ux_sum, axis=0) / M
        for start_c in range(0, channels, BLOCK_C):
            offs_c = tl.cast(start_c, tl.int64) + tl.arange(0, BLOCK_C)
            mask_c = offs_c < channels
            gamma = _vector(weight_ptr, first + offs_c, stride_w, mask_c, 1.0, BLOCK_C, ACC)
            a = _vector(a_ptr, first + offs_c, stride_ac, mask_c, 0.0, BLOCK_C, ACC)
            b = _vector(b_ptr, first + offs_c, stride_bc, mask_c, 0.0, BLOCK_C, ACC)
            rows = tl.zeros([BLOCK_C, BLOCK_N], ACC)
            for start_n in range(0, N, BLOCK_N):
                offs_n = tl.cast(start_n, tl.int64) + tl.arange(0, BLOCK_N)
                mask_n = offs_n < N
                gy = _load(gy_ptr, offs_c, offs_n, stride_gc, stride_gn, mask_c, mask_n, ACC)
                normal = (_load(x_ptr, offs_c, offs_n, stride_xc, stride_xn, mask_c, mask_n, ACC) - mean) * rstd
                u = _load(u_ptr, offs_c, offs_n, stride_uc, stride_un, mask_c, mask_n, ACC)
                dgy, dx, row = _adjoint(gy, normal, u, gamma, a, b, rstd, h_mean, hx, a_mean, ax, u_mean, ux, uh)
                _store(dgy_ptr, dgy, offs_c, offs_n, N, mask_c, mask_n)
                _store(dx_ptr, dx, offs_c, offs_n, N, mask_c, mask_n)
                rows += row
            tl.store(rows_ptr + offs_c, tl.sum(rows, axis=1), mask=mask_c)


@triton.jit
def _adjoint(gy, normal, u, gamma, a, b, rstd, h_mean, hx, a_mean, ax, u_mean, ux, uh):
    """The results dgy and dx of a block, and gy r P(u), whose sum is a channel's."""
    of_u = rstd * (u - u_mean - normal * ux)  # r P(u), masked entries are not zero
    of_h = rstd * (gamma[:, None] * gy - h_mean - normal * hx)
    s = rstd * (uh - u_mean * h_mean - ux * hx)  # mean(h r P(u))
    dgy = gamma[:, None] * of_u + a[:, None] * normal + b[:, None]
    dx = rstd * (a[:, None] * gy - a_mean - normal * ax) - rstd * (ux * of_h + hx * of_u + s * normal)
    return dgy, dx, gy * of_u


@triton.jit
def _load(ptr, offs_c, offs_n, stride_c, stride_n, mask_c, mask_n, ACC: tl.constexpr):
    """A block, zeros where there is no tensor."""
    if ptr is None:
        return tl.zeros([offs_c.shape[0], offs_n.shape[0]], ACC)
    else:
        offs = offs_c[:, None] * stride_c + offs_n[None, :] * stride_n
        return tl.load(ptr + offs, mask=mask_c[:, None] & mask_n[None, :], other=0.0).to(ACC)


@triton.jit
def _store(ptr, values, offs_c, offs_n, N, mask_c, mask_n):
    offs = offs_c[:, None] * N + offs_n[None, :]
    tl.store(ptr + offs, values.to(ptr.dtype.element_ty), mask=mask_c[:, None] & mask_n[None, :])


@triton.jit
def _vector(ptr, offs, stride, mask, fill: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Numbers per channel, ``fill`` where there are none; zero beyond the last channel."""
    if ptr is None:
        return tl.where(mask, tl.full([BLOCK], fill, ACC), 0.0)
    else:
        return tl.load(ptr + offs * stride, mask=mask, other=0.0).to(ACC)
