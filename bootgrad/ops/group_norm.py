"""Group norm, its derivative, and the per-sample gradients of its affine parameters.

    y = γ_c x̂ + β_c          x̂ = r (x − μ)          μ, r = mean and 1/√(variance + ε) of each sample's group

With P(w) = w − mean(w) − x̂ mean(w x̂), means over a group, the adjoint of x ↦ x̂ is w ↦ r P(w): the input's gradient is
gx = r P(γ gy). Torch differentiates that by a long chain of elementwise passes over activations; here it is

    ∂⟨u, gx⟩/∂gy = γ r P(u)        ∂⟨u, gx⟩/∂γ = Σ gy r P(u)
    ∂⟨u, gx⟩/∂x  = −r² [ a P(γ gy) + b P(u) + s x̂ ]      a = mean(u x̂), b = mean(γ gy x̂), s = mean(γ gy P(u))

in one visit of u, gy and x. Letters: ``B`` samples, ``C`` channels, ``G`` groups, ``N`` positions of a channel.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from .schema import accumulation_dtype

_raw = torch.ops.bootgrad


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`torch.nn.functional.group_norm`, with a second derivative at the price of a first."""
    return GroupNorm.apply(x, weight, bias, groups, eps)[0]


def group_norm_rows(gy: Tensor, x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Per-sample gradients of γ and β, (B, C) each: Σ gy x̂ and Σ gy; twice differentiable.

    Args:
        gy: gradient by the output, (B, C, …).
        x: the input, (B, C, …).
        groups: number of groups.
        eps: ε.
    """
    return GroupNormRows.apply(gy, x, groups, eps)


def _native(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float):
    B, C = x.shape[:2]
    return torch.native_group_norm(x.contiguous(), weight, bias, B, C, x[0, 0].numel() if x.numel() else 0, groups, eps)


def _native_backward(gy: Tensor, x: Tensor, weight: Tensor | None, mean, rstd, groups: int, mask: list[bool]):
    B, C = x.shape[:2]
    N = x.numel() // max(1, B * C)
    args = (gy.contiguous(), x.contiguous(), mean, rstd, weight, B, C, N, groups, mask)
    return torch.ops.aten.native_group_norm_backward(*args)


class GroupNorm(Function):
    """(y, μ, r); only y is differentiable."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        """Compute y."""
        y, mean, rstd = _native(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        ctx.mark_non_differentiable(mean, rstd)
        return y, mean, rstd

    @staticmethod
    def backward(ctx, gy, *_):
        """Differentiate by x, γ and β."""
        x, weight, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            grads = _native_backward(gy, x, weight, mean, rstd, ctx.groups, list(needs))
            return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None
        gx = GroupNormGrad.apply(gy, x, weight, mean, rstd, ctx.groups, ctx.eps) if needs[0] else None
        rows = GroupNormRows.apply(gy, x, ctx.groups, ctx.eps) if any(needs[1:]) else ()
        return (
            gx,
            *(r.sum(0) if needed else None for r, needed in zip(rows or (None, None), needs[1:], strict=True)),
            None,
            None,
        )


class GroupNormGrad(Function):
    """gx = r P(γ gy)."""

    @staticmethod
    def forward(ctx, gy, x, weight, mean, rstd, groups, eps):
        """Compute gx."""
        ctx.save_for_backward(gy, x, weight, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return _native_backward(gy, x, weight, mean, rstd, groups, [True, False, False])[0]

    @staticmethod
    def backward(ctx, u):
        """Differentiate by gy, x and γ."""
        gy, x, weight, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable(_input_grad, u, (gy, x, weight), ctx.groups, ctx.eps), None, None, None, None
        dtype = accumulation_dtype(x.dtype)
        wide = (None if t is None else t.to(dtype) for t in (weight, mean, rstd))
        dgy, dx, rows = _raw.group_norm_grad_backward(u, gy, x, *wide)
        return dgy, dx, rows.sum(0).to(weight.dtype) if weight is not None else None, None, None, None, None


class GroupNormRows(Function):
    """(Σ gy x̂, Σ gy), (B, C) each."""

    @staticmethod
    def forward(ctx, gy, x, groups, eps):
        """Compute the rows."""
        _, mean, rstd = _native(x, None, None, groups, eps)
        mean, rstd = (t.to(accumulation_dtype(x.dtype)) for t in (mean, rstd))
        ctx.save_for_backward(gy, x, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return _raw.group_norm_rows(gy, x, mean, rstd)

    @staticmethod
    def backward(ctx, a, b):
        """Differentiate by gy and x: ∂/∂gy = a x̂ + b, ∂/∂x = r P(a gy)."""
        gy, x, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable(_rows, (a, b), (gy, x), ctx.groups, ctx.eps), None, None
        dgy, dx = _raw.group_norm_rows_backward(a, b, gy, x, mean, rstd)
        return dgy, dx, None, None


def _normalized(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """x̂ (B, G, C/G · N) and r (B, G, 1), in plain torch."""
    grouped = x.reshape(x.size(0), groups, -1)
    centered = grouped - grouped.mean(2, keepdim=True)
    r = (centered.square().mean(2, keepdim=True) + eps).rsqrt()
    return centered * r, r


def _input_grad(gy: Tensor, x: Tensor, weight: Tensor | None, groups: int, eps: float) -> Tensor:
    normal, r = _normalized(x, groups, eps)
    g = gy if weight is None else gy * weight.reshape(1, -1, *[1] * (gy.dim() - 2))
    g = g.reshape(normal.shape)
    return (r * (g - g.mean(2, keepdim=True) - normal * (g * normal).mean(2, keepdim=True))).reshape(x.shape)


def _rows(gy: Tensor, x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    normal = _normalized(x, groups, eps)[0].reshape(x.shape)
    gy, normal = (t.reshape(*x.shape[:2], -1) for t in (gy, normal))
    return (gy * normal).sum(2), gy.sum(2)


def _differentiable(function, cotangents, inputs, groups: int, eps: float):
    """The derivatives of ``function`` as plain torch has them, with a graph: third derivatives and beyond."""
    aliases = [None if t is None else t.view_as(t) for t in inputs]
    wanted = [t for t in aliases if t is not None and t.requires_grad]
    grads = iter(
        torch.autograd.grad(function(*aliases, groups, eps), wanted, cotangents, create_graph=True, allow_unused=True)
    )
    return [next(grads) if t is not None and t.requires_grad else None for t in aliases]
