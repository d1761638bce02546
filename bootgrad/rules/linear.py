"""Linear layers, however they are written: ``F.linear``, ``matmul``, ``@``, ``mm``, ``addmm`` and ``einsum``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.linear import LinearProduct
from .base import ProductOperation, Recorder, rule

_Tensor = torch.Tensor


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
        if left.dim() != 2 or right.dim() < 2:
            return NotImplemented
        return _apply_linear(recorder, right.mT, left).mT
    if right.dim() == 1:
        row = recorder.run(_Tensor.unsqueeze, right, 0)
        return _apply_linear(recorder, left, row).squeeze(-1)
    return _apply_linear(recorder, left, right, transposed=True) if right.dim() == 2 else NotImplemented


@rule(torch.addmm, _Tensor.addmm)
def _addmm(recorder: Recorder, func, args, kwargs):
    options = dict(kwargs)
    beta, alpha = options.pop("beta", 1), options.pop("alpha", 1)
    if options or len(args) != 3:
        return NotImplemented
    bias, left, right = args
    out = recorder.run(torch.matmul, left, right)
    out = out if alpha == 1 else out * alpha
    return recorder.run(torch.add, out, bias, alpha=beta)


@rule(torch.einsum)
def _einsum(recorder: Recorder, func, args, kwargs):
    """A two-operand equation that is a linear layer: every letter of W is either summed with x or in the output only."""
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
    free = [a for a in of_w if a in out and a not in of_x]
    kept = [a for a in of_x if a in out]
    if len(summed) + len(free) != len(of_w) or len(summed) + len(kept) != len(of_x) or not kept or not summed:
        return NotImplemented
    size = dict(zip(of_x, x.shape, strict=True)) | dict(zip(of_w, weight.shape, strict=True))
    if [size[a] for a in of_x] != list(x.shape):  # a letter that is broadcast
        return NotImplemented
    batch = out[0] if out[0] in kept else kept[0]
    kept.sort(key=lambda a: a != batch)
    x = x.permute([of_x.index(a) for a in kept + summed]).flatten(len(kept))
    weight = recorder.run(_Tensor.permute, weight, [of_w.index(a) for a in free + summed])
    weight = recorder.run(_Tensor.reshape, weight, (-1, x.size(-1)))
    y = _apply_linear(recorder, x, weight)
    y = y.reshape([size[a] for a in kept + free])
    return y.permute([(kept + free).index(a) for a in out])
