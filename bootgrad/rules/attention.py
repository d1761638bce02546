"""Attention: scaled dot products by torch's fused kernels, and multi-head attention with samples in dimension 0."""

import inspect
import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops.attention import FusedAttention
from .base import Recorder, as_autocast, rule
from .opened import opened
from .stand_ins import StandIns, of_parameters, plain_rule


@plain_rule(F.scaled_dot_product_attention)
def _scaled_dot_product_attention(func, args, kwargs):
    return _attend(*args, **kwargs)


@plain_rule(F.multi_head_attention_forward)
def _frozen_multi_head_attention(func, args, kwargs):
    """Torch's own, in which the scaled dot products have their stand-in, too."""
    body = opened(func)
    assert body is not None
    with StandIns():
        return body(*args, **kwargs)


def _attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
    """Torch's own; where that is a fused kernel, with a second derivative."""
    query, key, value, attn_mask = as_autocast(query, key, value, attn_mask)
    if enable_gqa:
        key, value = (t.repeat_interleave(query.size(-3) // t.size(-3), -3) for t in (key, value))
    # A gradient by the mask is none that the derivatives here have.
    learned = attn_mask is not None and attn_mask.requires_grad
    with sdpa_kernel(SDPBackend.MATH) if learned else nullcontext():
        y = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    fused = y.grad_fn is not None and "ScaledDotProduct" in y.grad_fn.name()
    if not fused or dropout_p:  # what was dropped is the kernel's secret
        return y
    return FusedAttention.apply([y], query, key, value, attn_mask, is_causal, scale)


@of_parameters(F.scaled_dot_product_attention)
def _written_out(func, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """In plain operations: `vmap` knows no second derivative of the fused kernels, and under autocast no first of the other."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.size(-3) // t.size(-3), -3) for t in (key, value))
    scores = (query * (query.size(-1) ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value


@of_parameters(F.multi_head_attention_forward)
def _with_weights(func, *args, **kwargs):
    """By the way that has the weights, which is plain operations."""
    o = inspect.signature(func).bind(*args, **kwargs).arguments
    y, weights = func(**o | {"need_weights": True})
    return y, weights if o.get("need_weights", True) else None


@rule(F.scaled_dot_product_attention)
def _attention_with_parameters(recorder: Recorder, func, args, kwargs):
    """With a mask, as of relative positions, or other inputs of parameters alone: each sample is handed its own."""
    bound = dict(zip(inspect.signature(_attend).parameters, args, strict=False)) | kwargs
    inputs = [bound.get(name) for name in ("query", "key", "value", "attn_mask")]
    data = [t for t in inputs[:3] if not recorder.is_tracked(t)]
    if not data or data[0].dim() < 3:
        return NotImplemented
    rows = {id(t): _row_for_each(recorder, t, data[0]) for t in inputs if recorder.is_tracked(t)}
    if any(t is None for t in rows.values()):
        return NotImplemented
    return _attend(**{name: rows.get(id(value), value) for name, value in bound.items()})


def _row_for_each(recorder: Recorder, tracked: Tensor, like: Tensor) -> Tensor | None:
    """A tracked tensor that is broadcast over the samples, or repeated for them, as data."""
    if tracked.dim() == like.dim() and tracked.size(0) != 1:
        return recorder.by_sample(tracked)
    return recorder.expand(tracked, like.shape[:1], like.dim())


@rule(F.multi_head_attention_forward)
def _multi_head_attention(recorder: Recorder, func, args, kwargs):
    """As torch's, of inputs (L, N, E), or (L, E) without a batch; options are named as there, letters as in `ops.attention`."""
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    o: dict[str, Any] = bound.arguments
    run, inputs, batched = recorder.run, [o["query"], o["key"], o["value"]], o["query"].dim() == 3
    first = {id(t): _sample_first(recorder, t, batched) for t in inputs}
    samples_first = [t for t in (first[id(t)] for t in inputs) if t is not None]
    if len(samples_first) < len(inputs):
        return NotImplemented
    q, k, v = _projections(recorder, o, *samples_first)  # (N, L, E), (N, S, E) twice
    if o["bias_k"] is not None:
        k, v = (
            run(torch.cat, [t, _shared(recorder, b, t.size(0))], 1) for t, b in ((k, o["bias_k"]), (v, o["bias_v"]))
        )
    N, L, E = q.shape
    q, k, v = (t.unflatten(-1, (o["num_heads"], -1)).transpose(1, 2) for t in (q, k, v))  # (N, H, ·, D)
    k, v = (t if own is None else own.unflatten(0, (N, -1)) for t, own in ((k, o["static_k"]), (v, o["static_v"])))
    if o["add_zero_attn"]:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    is_causal = o["is_causal"] and o["key_padding_mask"] is None and not o["need_weights"]
    mask = None if is_causal else _mask(o, q, k.size(2))
    dropout, weights = o["dropout_p"] if o["training"] else 0.0, None
    if o["need_weights"]:
        scores = (q / math.sqrt(q.size(-1))) @ k.mT
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        y = weights @ v
    else:
        y = run(F.scaled_dot_product_attention, q, k, v, mask, dropout, is_causal)
    y = run(F.linear, y.transpose(1, 2).reshape(N, L, E), o["out_proj_weight"], o["out_proj_bias"])
    y = y.transpose(0, 1) if batched else y.squeeze(0)
    if weights is not None:
        weights = weights.mean(1) if o["average_attn_weights"] else weights
        weights = weights if batched else weights.squeeze(0)
    return y, weights


def _sample_first(recorder: Recorder, t: Tensor, batched: bool) -> Tensor | None:
    """An input (L, N, E) or (L, E) as (N, L, E); one of parameters, if it repeats them for the samples."""
    if not recorder.is_tracked(t):
        return t.transpose(0, 1) if batched else t.unsqueeze(0)
    return recorder.by_sample(recorder.run(Tensor.transpose, t, 0, 1)) if batched else None


def _projections(recorder: Recorder, o: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The queries, keys and values; those of one input by one product where their weights are one parameter's."""
    run, bias = recorder.run, o["in_proj_bias"]
    if o["use_separate_proj_weight"]:
        weights = [o[f"{name}_proj_weight"] for name in "qkv"]
        biases = [None] * 3 if bias is None else run(torch.chunk, bias, 3)
        return [run(F.linear, *each) for each in zip((q, k, v), weights, biases, strict=True)]
    inputs = [q] if q is k and k is v else [q, k] if k is v else [q, k, v]
    sizes = [q.size(-1) * n for n in {1: [3], 2: [1, 2], 3: [1, 1, 1]}[len(inputs)]]
    whole = len(inputs) == 1
    weights = [o["in_proj_weight"]] if whole else run(torch.split, o["in_proj_weight"], sizes)
    biases = [bias] * len(inputs) if whole or bias is None else run(torch.split, bias, sizes)
    outputs = [run(F.linear, *each) for each in zip(inputs, weights, biases, strict=True)]
    return [part for y in outputs for part in y.split(q.size(-1), -1)]


def _shared(recorder: Recorder, bias: Tensor, samples: int) -> Tensor:
    """A key or value (1, 1, E) that all samples have, (N, 1, E)."""
    return recorder.expand(bias, (samples,), 3) if recorder.is_tracked(bias) else bias.expand(samples, -1, -1)


def _mask(o: dict[str, Any], q: Tensor, keys: int) -> Tensor | None:
    """What is added to the scores (N, H, L, S), for both masks; keys that were put behind count."""
    mask, padding = o["attn_mask"], o["key_padding_mask"]
    if mask is not None:
        mask = mask if mask.dim() == 2 else mask.unflatten(0, (q.size(0), -1))
    if padding is not None:
        padding = padding.reshape(q.size(0), 1, 1, -1)
    added = [
        torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -math.inf) if m.dtype == torch.bool else m.to(q.dtype)
        for m in (mask, padding)
        if m is not None
    ]
    if not added:
        return None
    total = added[0] if len(added) == 1 else added[0] + added[1]
    return F.pad(total, (0, keys - total.size(-1)))
