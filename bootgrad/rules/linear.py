"""Linear layers, however they are written: ``F.linear``, ``matmul``, ``@``, ``mm``, ``addmm`` and ``einsum``."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.linear import LinearProduct
from .base import ProductOperation, Recorder, rule

_Tensor = torch.Tensor
_MOST_HEADS = 64  # weights that are taken apart; more take longer one by one than by vmap


@rule(F.linear)
def _linear(recorder: Recorder, func, args, kwargs):
    return _apply_linear(recorder, *args, **kwargs)


def _apply_linear(recorder: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed=False):
    if recorder.is_tracked(input) or weight.dim() != 2 or input.dim() < 2:
        return NotImplemented
    if bias is not None and bias.shape != weight.shape[:1]:  # torch broadcasts it
        if not recorder.is_tracked(weight):
            return recorder.run(torch.add, F.linear(input, weight), bias)
        return recorder.run(torch.add, _apply_linear(recorder, input, weight), bias)
    source = recorder.transposed(weight)
    if source is not None:
        weight, transposed = source, not transposed
    tracked = (t if recorder.is_tracked(t) else None for t in (weight, bias))
    return ProductOperation(recorder, "linear", LinearProduct(transposed), *tracked)(input, weight, bias)


@rule(torch.matmul, torch.mm, _Tensor.matmul, _Tensor.mm, _Tensor.__matmul__)
def _matmul(recorder: Recorder, func, args, kwargs):
    return _apply_matmul(recorder, *args) if len(args) == 2 and not kwargs else NotImplemented


@rule(_Tensor.__rmatmul__)
def _rmatmul(recorder: Recorder, func, args, kwargs):
    return _apply_matmul(recorder, args[1], args[0])


def _apply_matmul(recorder: Recorder, left: Tensor, right: Tensor):
    if recorder.is_tracked(left) == recorder.is_tracked(right):
        return NotImplemented
    if recorder.is_tracked(left):  # W x = (xᵀ Wᵀ)ᵀ
        if left.dim() < 2 or right.dim() < 2:
            return NotImplemented
        if left.dim() == 2:
            return _apply_linear(recorder, right.mT, left).mT
        out = _apply_matmul(recorder, right.mT, recorder.run(_Tensor.transpose, left, -1, -2))
        return out if out is NotImplemented else out.mT
    if right.dim() == 1:
        row = recorder.run(_Tensor.unsqueeze, right, 0)
        return _apply_linear(recorder, left, row).squeeze(-1)
    while right.dim() > 2 and right.size(0) == 1 and left.dim() >= right.dim():
        right = recorder.run(_Tensor.squeeze, right, 0)
    if right.dim() == 2:
        return _apply_linear(recorder, left, right, transposed=True)
    if right.dim() > 3 or left.dim() < 4 or left.size(-3) not in (1, right.size(0)) or right.size(0) > _MOST_HEADS:
        return NotImplemented
    return _by_heads(recorder, left.transpose(-3, -2), right, transposed=True).transpose(-3, -2)


def _by_heads(recorder: Recorder, x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """(…, S, O) from (…, S, I) by S weights (S, O, I), or (S, I, O) ``transposed``: a layer for each."""
    each = x.expand(*x.shape[:-2], weight.size(0), x.size(-1)).unbind(-2)
    weights = (recorder.run(_Tensor.__getitem__, weight, s) for s in range(weight.size(0)))
    return torch.stack(
        [_apply_linear(recorder, x, w, transposed=transposed) for x, w in zip(each, weights, strict=True)], -2
    )


@rule(torch._grouped_mm)  # what F.grouped_mm calls
def _grouped_mm(recorder: Recorder, func, args, kwargs):
    return _apply_groups(recorder, *args, **kwargs)


def _apply_groups(recorder: Recorder, mat_a: Tensor, mat_b: Tensor, offs=None, bias=None, out_dtype=None):
    """Rows (N, I) that come in S groups, which end at ``offs``, times their groups' weights (S, I, O): a layer for each."""
    plain = bias is None and out_dtype in (None, mat_a.dtype)
    if recorder.is_tracked(mat_a) or mat_a.dim() != 2 or mat_b.dim() != 3 or offs is None or not plain:
        return NotImplemented
    ends, out = offs.tolist(), []
    with torch.autocast(mat_a.device.type, enabled=False):  # as torch's own, which autocast does not know
        for s, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
            if end > begin:
                weight = recorder.run(_Tensor.__getitem__, mat_b, s)
                out.append(_apply_linear(recorder, mat_a[begin:end], weight, transposed=True))
    behind = mat_a.new_zeros(mat_a.size(0) - ends[-1], mat_b.size(2))
    return torch.cat([*out, behind])


@rule(torch.addmm, _Tensor.addmm)
def _addmm(recorder: Recorder, func, args, kwargs):
    options = dict(kwargs)
    beta, alpha = options.pop("beta", 1), options.pop("alpha", 1)
    if options or len(args) != 3:
        return NotImplemented
    bias, left, right = args
    out = recorder.run(torch.matmul, left, right)
    out = out if alpha == 1 else out * alpha
    return recorder.run(torch.add, out, bias, alpha=beta).to(out.dtype)  # of a product under autocast, as torch's own


@rule(torch.einsum)
def _einsum(recorder: Recorder, func, args, kwargs):
    """A two-operand equation that is a linear layer, or one for each value of the letters that W, x and the output have.

    All other letters of W are either summed with x or in the output only.
    """
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if kwargs or len(operands) != 2 or not isinstance(args[0], str) or "->" not in args[0] or "." in args[0]:
        return NotImplemented
    inputs, out = args[0].replace(" ", "").split("->")
    letters = inputs.split(",")
    if recorder.is_tracked(operands[0]):
        operands, letters = operands[::-1], letters[::-1]
    (x, weight), (of_x, of_w) = operands, letters
    if recorder.is_tracked(x) or any(len(set(s)) != len(s) for s in (of_x, of_w, out)):
        return NotImplemented
    summed = [a for a in of_w if a in of_x and a not in out]
    heads = [a for a in of_w if a in of_x and a in out]
    free = [a for a in of_w if a in out and a not in of_x]
    kept = [a for a in of_x if a in out and a not in of_w]
    has_all = len(summed + heads + free) == len(of_w) and len(summed + heads + kept) == len(of_x)
    if not has_all or not kept or not summed:
        return NotImplemented
    size = dict(zip(of_x, x.shape, strict=True)) | dict(zip(of_w, weight.shape, strict=True))
    if [size[a] for a in of_x] != list(x.shape):  # a letter that is broadcast
        return NotImplemented
    S, I = (math.prod(size[a] for a in group) for group in (heads, summed))  # noqa: E741
    if S > _MOST_HEADS:
        return NotImplemented
    batch = out[0] if out[0] in kept else kept[0]
    kept.sort(key=lambda a: a != batch)
    x = x.permute([of_x.index(a) for a in kept + heads + summed]).reshape(*(size[a] for a in kept), S, I)
    weight = recorder.run(_Tensor.permute, weight, [of_w.index(a) for a in heads + free + summed])
    if heads:
        y = _by_heads(recorder, x, recorder.run(_Tensor.reshape, weight, (S, -1, I)))
    else:
        y = _apply_linear(recorder, x.squeeze(-2), recorder.run(_Tensor.reshape, weight, (-1, I)))
    y = y.reshape([size[a] for a in kept + heads + free])
    return y.permute([(kept + heads + free).index(a) for a in out])
