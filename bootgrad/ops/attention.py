"""Scaled dot-product attention: a second derivative for torch's fused kernels, which have none.

    P = softmax(s Q Kᵀ + M)        O = P V

The kernels make O and its first derivatives without holding a T×T number. Here the derivatives of these are made from q, k, v
and gO alone, for as few heads at a time that the T×T numbers held are few, too. With A = gO Vᵀ and ⟨·⟩ a row's mean under P,

    gV = Pᵀ gO        gS = P∘(A − ⟨A⟩)        gQ = s gS K        gK = s gSᵀ Q

and for cotangents u of (gQ, gK, gV), with T = s (u_Q Kᵀ + Q u_Kᵀ), P' = P∘(T − ⟨T⟩), E = (T − ⟨T⟩)∘(A − ⟨A⟩) + gO u_Vᵀ,
hS = P∘(E − ⟨E⟩), the derivatives of Σ ⟨u, g⟩ are

    by gO   P' V + P u_V        by v   P'ᵀ gO        by q   s (gS u_K + hS K)        by k   s (gSᵀ u_Q + hSᵀ Q)

Fourteen products of L·S·D where the forward pass has two. Letters: ``N`` samples, ``H`` heads, ``L`` queries, ``S`` keys, ``D``
features; s the scale, M a constant mask, added to what it masks.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function

from .schema import accumulation_dtype

# T×T numbers that are held at a time: on a CPU they stay in its caches, which takes two thirds of the time.
CHUNK_BYTES = 32 * 2**20
CPU_CHUNK_BYTES = 4 * 2**20


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
    like = (q, k, v)
    uq, uk, uv = (torch.zeros_like(t) if u is None else u for u, t in zip(cotangents, like, strict=True))
    out = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (g, *like))
    s, dtype = _scale(q, scale), accumulation_dtype(q.dtype)
    for at in _chunks(q, k):
        qc, kc, vc, gc, uqc, ukc, uvc = (t[at].to(dtype) for t in (q, k, v, g, uq, uk, uv))
        P = _weights(qc, kc, _part(mask, at, q, k), is_causal, s)
        T = (torch.cat([uqc, qc], -1) * s) @ torch.cat([kc, ukc], -1).mT
        A = gc @ vc.mT
        for t in (T, A):
            t.sub_((P * t).sum(-1, keepdim=True))
        E = (gc @ uvc.mT).addcmul_(T, A)
        E.sub_((P * E).sum(-1, keepdim=True))
        tangent, gS, hS = T.mul_(P), A.mul_(P), E.mul_(P)  # P', and the gradients by S
        out[0][at] = tangent @ vc + P @ uvc
        out[1][at] = (gS @ ukc + hS @ kc) * s
        out[2][at] = (gS.mT @ uqc + hS.mT @ qc) * s
        out[3][at] = tangent.mT @ gc
    return out


def _chunks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Samples and heads whose T×T numbers, eight of a pair, fit into the budget."""
    N, H, L, _ = q.shape
    head = 8 * accumulation_dtype(q.dtype).itemsize * L * k.size(2)
    budget = CPU_CHUNK_BYTES if q.device.type == "cpu" else CHUNK_BYTES
    heads = max(1, min(H, budget // max(1, head)))
    samples = max(1, budget // max(1, head * H)) if heads == H else 1
    for n in range(0, N, samples):
        for h in range(0, H, heads):
            yield slice(n, n + samples), slice(h, h + heads)


def _part(mask: Tensor | None, at: tuple[slice, slice], q: Tensor, k: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(*q.shape[:3], k.size(2))[at]


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, s: float) -> Tensor:
    """P, (…, L, S); zeros where no key counts."""
    scores = (q * s) @ k.mT
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)


def _by_torch(cotangents, g, q, k, v, mask, is_causal, scale):
    """`attention_double_backward` in operations that can be differentiated further."""
    # Aliases, so that a path from one to another outside of this function is not walked here.
    g, q, k, v = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (g, q, k, v))
    y = _weights(q, k, mask, is_causal, _scale(q, scale)) @ v
    first = torch.autograd.grad(y, (q, k, v), g, create_graph=True)
    total = torch.stack([(t * u).sum() for t, u in zip(first, cotangents, strict=True) if u is not None]).sum()
    return torch.autograd.grad(total, (g, q, k, v), create_graph=True, allow_unused=True)


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.size(-1)) if scale is None else scale
