"""Sums and products with a parameter that is broadcast over the samples: scales, shifts, gates, embeddings of position.

y = x ± α p :  g_i = ± α Σ gy_i          y = x p :  g_i = Σ gy_i x_i          Σ over what p was broadcast along
"""

import torch
from torch import Tensor

from .base import Recorder, RowsOperation, per_sample_sum, rule

_T = torch.Tensor


def _applies(recorder: Recorder, a, b) -> bool:
    """Whether one operand is data with a batch and the other a tracked tensor broadcast over it."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or recorder.is_tracked(a) == recorder.is_tracked(b):
        return False
    parameter, x = (a, b) if recorder.is_tracked(a) else (b, a)
    if parameter.dim() > x.dim() or x.dim() == 0:
        return False
    aligned = (1,) * (x.dim() - parameter.dim()) + tuple(parameter.shape)
    return aligned[0] == 1 and (x.shape != parameter.shape or x.requires_grad)


def _operands(args: tuple, kwargs: dict) -> tuple:
    """The two operands, by position or by name."""
    named = [kwargs[n] for n in ("input", "other") if n in kwargs]
    return (*args, *named, None, None)[:2]


def _record(recorder: Recorder, name: str, a: Tensor, b: Tensor, call, scale_a=1, scale_b=1, multiply=False):
    first = recorder.is_tracked(a)
    parameter, x, scale = (a, b, scale_a) if first else (b, a, scale_b)
    alias = recorder.alias(parameter)
    y = call(alias, b) if first else call(a, alias)

    def rows_of(gy, batch_size, x=None):
        rows = per_sample_sum(gy * x if multiply else gy, batch_size, parameter.shape)
        return [(rows if scale == 1 else rows * scale).to(parameter.dtype)]

    return RowsOperation(recorder, name, [parameter], rows_of)(y, *([x] if multiply else []))


@rule(torch.add, _T.add, _T.__add__, _T.__radd__)
def _add(recorder: Recorder, func, args, kwargs):
    a, b = _operands(args, kwargs)
    if not _applies(recorder, a, b):
        return NotImplemented
    alpha = kwargs.get("alpha", 1)
    return _record(recorder, "add", a, b, lambda a, b: torch.add(a, b, alpha=alpha), scale_b=alpha)


@rule(torch.sub, _T.sub, _T.__sub__)
def _sub(recorder: Recorder, func, args, kwargs):
    a, b = _operands(args, kwargs)
    if not _applies(recorder, a, b):
        return NotImplemented
    alpha = kwargs.get("alpha", 1)
    return _record(recorder, "sub", a, b, lambda a, b: torch.sub(a, b, alpha=alpha), scale_b=-alpha)


@rule(_T.__rsub__)
def _rsub(recorder: Recorder, func, args, kwargs):
    return _sub(recorder, torch.sub, args[::-1], kwargs)


@rule(torch.mul, torch.multiply, _T.mul, _T.multiply, _T.__mul__, _T.__rmul__)
def _mul(recorder: Recorder, func, args, kwargs):
    a, b = _operands(args, kwargs)
    return _record(recorder, "mul", a, b, torch.mul, multiply=True) if _applies(recorder, a, b) else NotImplemented


@rule(_T.add_, _T.__iadd__)
def _add_(recorder: Recorder, func, args, kwargs):
    return _in_place(_add(recorder, torch.add, args, kwargs), args[0])


@rule(_T.sub_, _T.__isub__)
def _sub_(recorder: Recorder, func, args, kwargs):
    return _in_place(_sub(recorder, torch.sub, args, kwargs), args[0])


@rule(_T.mul_, _T.__imul__)
def _mul_(recorder: Recorder, func, args, kwargs):
    a, b = _operands(args, kwargs)
    if not _applies(recorder, a, b):
        return NotImplemented
    return _in_place(_mul(recorder, torch.mul, (a.clone(), b), {}), a)


def _in_place(out, target: Tensor):
    return out if out is NotImplemented or out.shape != target.shape else target.copy_(out)


def expand_row(recorder: Recorder, row: Tensor, rows: int) -> Tensor:
    """A tracked ``row`` (1, *shape) for each of ``rows`` samples, as an operation of its own: g_i = gy_i."""

    def rows_of(gy, batch_size):
        return [per_sample_sum(gy, batch_size, row.shape).to(row.dtype)]

    y = recorder.alias(row).expand(rows, *row.shape[1:]).clone()
    return RowsOperation(recorder, "expand", [row], rows_of)(y)
