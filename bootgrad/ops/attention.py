"""Scaled dot-product attention: a second derivative for torch's fused kernels, which have none.

    P = softmax(s Q Kᵀ + M)        O = P V

The kernels make O and its first derivatives without holding a T×T number. Here the derivatives of these are made from q, k, v
and gO alone, a few heads at a time, so that the T×T numbers held are few, too. With A = gO Vᵀ and ⟨·⟩ a row's mean under P,

    gV = Pᵀ gO        gS = P∘(A − ⟨A⟩)        gQ = s gS K        gK = s gSᵀ Q

and for cotangents u of (gQ, gK, gV), with T = s (u_Q Kᵀ + Q u_Kᵀ), P' = P∘(T − ⟨T⟩), E = (T − ⟨T⟩)∘(A − ⟨A⟩) + gO u_Vᵀ,
hS = P∘(E − ⟨E⟩), the derivatives of Σ ⟨u, g⟩ are

    by gO   P' V + P u_V        by v   P'ᵀ gO        by q   s (gS u_K + hS K)        by k   s (gSᵀ u_Q + hSᵀ Q)

Twelve products of L·S·D where the forward pass has two. Letters: ``N`` samples, ``H`` heads, ``L`` queries, ``S`` keys, ``D``
features; s the scale, M a constant mask, added to what it masks.
"""

import math

import torch
from torch import Tensor
from torch.autograd import Function

from .backends.eager_attention import weights
from .schema import accumulation_dtype


class FusedAttention(Function):
    """O, as torch's fused kernel has made it: ``made`` is a list with that output, and its graph."""

    @staticmethod
    def forward(ctx, made, q, k, v, mask, is_causal, scale):
        """Hand on O."""
        ctx.options = is_causal, scale
        ctx.save_for_backward(q, k, v, mask, *made)
        return made.pop().detach()

    @staticmethod
    def backward(ctx, g):
        """Differentiate by q, k and v, by the fused kernel."""
        *inputs, y = ctx.saved_tensors
        grads = AttentionGrad.apply([y], g, *inputs, *ctx.options) if torch.is_grad_enabled() else y.grad_fn(g)[:3]
        return None, *grads, None, None, None


class AttentionGrad(Function):
    """The gradients by q, k and v; ``made`` as in `FusedAttention`."""

    @staticmethod
    def forward(ctx, made, g, q, k, v, mask, is_causal, scale):
        """Compute them, by the fused kernel."""
        ctx.options = is_causal, scale
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, q, k, v, mask)
        return made.pop().grad_fn(g)[:3]

    @staticmethod
    def backward(ctx, *cotangents):
        """Differentiate by g, q, k and v."""
        if all(u is None for u in cotangents):
            return (None,) * 8
        differentiate = _by_torch if torch.is_grad_enabled() else attention_double_backward
        return None, *differentiate(cotangents, *ctx.saved_tensors, *ctx.options), None, None, None


@torch.no_grad()
def attention_double_backward(
    cotangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, ...]:
    """Derivatives of ⟨u_Q, gQ⟩ + ⟨u_K, gK⟩ + ⟨u_V, gV⟩, by gO, q, k and v.

    Args:
        cotangents: u, as q, k and v; None for zeros.
        g: gO, (N, H, L, D).
        q: (N, H, L, D).
        k: (N, H, S, D).
        v: (N, H, S, D).
        mask: broadcast over (N, H, L, S), true where a key counts, or added; None for none.
        is_causal: whether query l counts keys up to l alone.
        scale: s; 1/√D when None.
    """
    if mask is not None:
        mask = as_added(mask, q).expand(*q.shape[:3], k.size(2))
    grads = torch.ops.bootgrad.attention_double_backward(*cotangents, g, q, k, v, mask, is_causal, _scale(q, scale))
    return tuple(t.transpose(1, 2) for t in grads)


def _by_torch(cotangents, g, q, k, v, mask, is_causal, scale):
    """`attention_double_backward` in operations that can be differentiated further."""
    # Aliases, so that a path from one to another outside of this function is not walked here.
    g, q, k, v = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (g, q, k, v))
    mask, dtype = None if mask is None else as_added(mask, q), accumulation_dtype(q.dtype)
    y = weights(q.to(dtype), k.to(dtype), mask, is_causal, _scale(q, scale)) @ v.to(dtype)
    first = torch.autograd.grad(y.to(g.dtype), (q, k, v), g, create_graph=True)
    total = torch.stack([(t * u).sum() for t, u in zip(first, cotangents, strict=True) if u is not None]).sum()
    return torch.autograd.grad(total, (g, q, k, v), create_graph=True, allow_unused=True)


def as_added(mask: Tensor, q: Tensor) -> Tensor:
    """A mask as what is added to the scores, in their dtype; what it repeats is there once, as before."""
    dtype, shape = accumulation_dtype(q.dtype), mask.shape
    mask = mask[tuple(slice(None) if stride else slice(1) for stride in mask.stride())]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)
    return mask.to(dtype).expand(shape)


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.size(-1)) if scale is None else scale
