"""The second derivative of attention in plain torch, for as few heads at a time that the T×T numbers held are few, too.

Letters and formulas as in `ops.attention`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import schema

# T×T numbers that are held at a time: on a CPU they stay in its caches, which takes half of the time.
CHUNK_BYTES = {"cpu": 4 * 2**20}
CHUNK_BYTES_ELSEWHERE = 32 * 2**20


def attention_double_backward(
    uq: Tensor | None,
    uk: Tensor | None,
    uv: Tensor | None,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """As the schema says."""
    schema.check_attention(uq, uk, uv, g, q, k, v, mask)
    dtype, like = schema.accumulation_dtype(q.dtype), (q, k, v)
    u = [torch.zeros_like(t) if u is None else u for u, t in zip((uq, uk, uv), like, strict=True)]
    out = [t.new_empty((t.size(0), t.size(2), t.size(1), t.size(3))) for t in (g, *like)]  # (N, ·, H, ·)
    for at in _chunks(q, k):
        uqc, ukc, uvc, gc, qc, kc, vc = (t[at].to(dtype) for t in (*u, g, *like))
        P = weights(qc, kc, None if mask is None else mask[at], is_causal, scale)
        T = (torch.cat([uqc, qc], -1) * scale) @ torch.cat([kc, ukc], -1).mT
        A = gc @ vc.mT
        for t in (T, A):
            t.sub_((P * t).sum(-1, keepdim=True))
        E = (gc @ uvc.mT).addcmul_(T, A)
        E.sub_((P * E).sum(-1, keepdim=True))
        tangent, gS, hS = T.mul_(P), A.mul_(P), E.mul_(P)  # P', and the gradients by S
        dg, dq, dk, dv = (t.transpose(1, 2)[at] for t in out)
        dg.copy_(tangent @ vc + P @ uvc)
        dq.copy_((gS @ ukc + hS @ kc) * scale)
        dk.copy_((gS.mT @ uqc + hS.mT @ qc) * scale)
        dv.copy_(tangent.mT @ gc)
    return tuple(out)


def weights(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """P, (…, L, S); ``mask`` is added to the scores; zeros where no key counts."""
    scores = (q * scale) @ k.mT
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    if mask is None:
        return scores.softmax(-1)
    scores = scores + mask
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)


def _chunks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Samples and heads whose T×T numbers, eight of a pair, fit into the budget."""
    N, H, L, _ = q.shape
    head = 8 * schema.accumulation_dtype(q.dtype).itemsize * L * k.size(2)
    budget = CHUNK_BYTES.get(q.device.type, CHUNK_BYTES_ELSEWHERE)
    heads = max(1, min(H, budget // max(1, head)))
    samples = max(1, budget // max(1, head * H)) if heads == H else 1
    for n in range(0, N, samples):
        for h in range(0, H, heads):
            yield slice(n, n + samples), slice(h, h + heads)


for _name in schema.ATTENTION_SCHEMAS:
    schema.library.impl(_name, globals()[_name], "CompositeExplicitAutograd")
