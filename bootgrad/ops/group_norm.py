"""Group norm, and its backward pass with the per-sample gradients of its affine parameters, differentiable to any order.

    y = γ_c x̂ + β_c          x̂ = r (x − μ)          μ, r = mean and 1/√(variance + ε) of each sample's group
    per-sample gradients of γ and β:  Σ gy x̂  and  Σ gy

With P(w) = w − mean(w) − x̂ mean(w x̂), means over a group, the adjoint of x ↦ x̂ is w ↦ r P(w): the input's gradient is
gx = r P(γ gy). Torch differentiates that by a long chain of elementwise passes over activations; here it is

    ∂⟨u, gx⟩/∂gy = γ r P(u)        ∂⟨u, gx⟩/∂γ = Σ gy r P(u)
    ∂⟨u, gx⟩/∂x  = −r² [ a P(γ gy) + b P(u) + s x̂ ]      a = mean(u x̂), b = mean(γ gy x̂), s = mean(γ gy P(u))

and cotangents a, b of the per-sample gradients add a x̂ + b to ∂/∂gy and r P(a gy) to ∂/∂x: all in one visit of u, gy and x.
A ReLU behind the norm, z = max(0, y), is passed in the same visits: gy is gz where z > 0, else 0, and so is ∂/∂gz of ∂/∂gy.
Letters: ``B`` samples, ``C`` channels, ``G`` groups, ``N`` positions of a channel.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from . import library
from .piecewise import relu_grad
from .schema import accumulation_dtype

_raw = torch.ops.bootgrad


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float):
    """(y, μ, r), values without a graph; on CPUs y lies in memory as torch's does, which dropout's masks depend on."""
    B, C = x.shape[:2]
    kept = x.device.type == "cpu" and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.native_group_norm(x if kept else x.contiguous(), weight, bias, B, C, _positions(x), groups, eps)


def backward(
    gy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    z: Tensor | None,
    groups: int,
    eps: float,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients by x, γ and β that ``mask`` asks for; differentiable to any order where gradients are enabled.

    Where ``z`` is given, the output of a ReLU behind the norm, ``gy`` is its gradient.
    """
    if torch.is_grad_enabled() or _is_ours_faster(x):
        gx, *rows = GroupNormBackward.apply(gy, x, weight, mean, rstd, z, groups, eps, mask[0])
        return gx, *(r.sum(0).to(gy.dtype) if wanted else None for r, wanted in zip(rows, mask[1:], strict=True))
    B, C = x.shape[:2]
    gy = gy if z is None else relu_grad(gy, z)
    args = (gy.contiguous(), x.contiguous(), mean, rstd, weight, B, C, _positions(x), groups, mask)
    grads = torch.ops.aten.native_group_norm_backward(*args)
    return tuple(g if wanted else None for g, wanted in zip(grads, mask, strict=True))


def _is_ours_faster(x: Tensor) -> bool:
    wide = x.dtype in (torch.float32, torch.float64)  # torch converts half precision faster
    return wide and x.device.type == "cpu" and library.is_loaded("_C")


def _positions(x: Tensor) -> int:
    return math.prod(x.shape[2:]) if x.numel() else 0


class GroupNormBackward(Function):
    """(gx, Σ gy x̂, Σ gy): r P(γ gy), None unless it is asked for, and the rows of γ and β, (B, C) each.

    With ``z``, the output of a ReLU behind the norm, in which nothing is differentiated, ``gy`` is the gradient of that.
    """

    @staticmethod
    def forward(ctx, gy, x, weight, mean, rstd, z, groups, eps, input_grad):
        """Compute all three in one visit."""
        ctx.save_for_backward(gy, x, weight, mean, rstd, z)
        ctx.groups, ctx.eps = groups, eps
        ctx.set_materialize_grads(False)
        op, given = (_raw.group_norm_backward, (gy,)) if z is None else (_raw.group_norm_relu_backward, (gy, z))
        gx, *rows = op(*given, x, *_wide(x, weight, mean, rstd), input_grad)
        return gx if input_grad else None, *rows

    @staticmethod
    def backward(ctx, u, a, b):
        """Differentiate by gy, x and γ."""
        gy, x, weight, mean, rstd, z = ctx.saved_tensors
        if torch.is_grad_enabled():
            dgy, dx, dw = _differentiable((u, a, b), (gy, x, weight), z, ctx.groups, ctx.eps)
        else:
            wide = _wide(x, weight, mean, rstd)
            if z is None:
                dgy, dx, rows = _raw.group_norm_double_backward(u, a, b, gy, x, *wide)
            else:
                dgy, dx, rows = _raw.group_norm_relu_double_backward(u, a, b, gy, z, x, *wide)
            dw = None if weight is None or u is None else rows.sum(0).to(weight.dtype)
        return dgy, dx, dw, None, None, None, None, None, None


def _wide(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    dtype = accumulation_dtype(x.dtype)
    return [None if t is None else t.to(dtype) for t in tensors]


def _plain(
    gy: Tensor, x: Tensor, weight: Tensor | None, z: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, ...]:
    """(gx, Σ gy x̂, Σ gy) in plain torch."""
    gy = gy if z is None else relu_grad(gy, z)
    grouped = x.reshape(x.size(0), groups, -1)
    centered = grouped - grouped.mean(2, keepdim=True)
    r = (centered.square().mean(2, keepdim=True) + eps).rsqrt()
    normal = centered * r  # (B, G, C/G · N)
    g = gy if weight is None else gy * weight.reshape(1, -1, *[1] * (gy.dim() - 2))
    g = g.reshape(normal.shape)
    gx = (r * (g - g.mean(2, keepdim=True) - normal * (g * normal).mean(2, keepdim=True))).reshape(x.shape)
    gy, normal = (t.reshape(*x.shape[:2], -1) for t in (gy, normal))
    return gx, (gy * normal).sum(2), gy.sum(2)


def _differentiable(
    cotangents: Sequence[Tensor | None], inputs: Sequence[Tensor | None], z: Tensor | None, groups: int, eps: float
) -> list[Tensor | None]:
    """The derivatives as plain torch has them, with a graph: third derivatives and beyond."""
    gy, x, weight = (None if t is None else t.view_as(t) for t in inputs)
    assert gy is not None and x is not None
    wanted = [t for t in (gy, x, weight) if t is not None and t.requires_grad]
    pairs = zip(_plain(gy, x, weight, z, groups, eps), cotangents, strict=True)
    used = [(out, c.to(out.dtype)) for out, c in pairs if c is not None and out.requires_grad]
    outputs, given = zip(*used, strict=True)
    grads = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True))
    return [next(grads) if t is not None and t.requires_grad else None for t in (gy, x, weight)]
