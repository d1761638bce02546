"""Elementwise operations with a parameter that is broadcast over the samples: scales, shifts, gates, slopes, positions.

Each sample is handed a row of its own, p_i = p, which takes no memory, and torch's own operation runs on the rows: its
derivative by p_i is sample i's gradient, summed over what p was broadcast along.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .base import Recorder, as_autocast, is_in_place, rule

_T = torch.Tensor
_NAMES = (
    "add sub subtract mul multiply div divide true_divide pow float_power maximum minimum fmax fmin clamp clip where lerp "
    "addcmul addcdiv atan2 arctan2 hypot logaddexp logaddexp2 xlogy fmod remainder copysign rsub"
)
_OPERATORS = "add sub mul truediv pow mod"


def _functions() -> list[Callable]:
    """The elementwise functions of torch, the tensor's methods of these names, operators, and all that work in place."""
    names = [form for name in _NAMES.split() for form in (name, f"{name}_")]
    operators = [f"__{side}{name}__" for name in _OPERATORS.split() for side in ("", "r", "i")]
    found = [getattr(owner, name, None) for owner in (torch, torch.special) for name in names]
    found += [getattr(_T, name, None) for name in (*names, *operators)]
    return list({f: None for f in found if f is not None})


@rule(*_functions())
def _elementwise(recorder: Recorder, func, args, kwargs):
    in_place = is_in_place(func)
    if in_place and recorder.is_tracked(args[0]):
        return NotImplemented
    expanded = expand_operands(recorder, func.__name__.strip("_"), args, kwargs, may_be_mask=not in_place)
    if expanded is None:
        return NotImplemented
    args, kwargs = expanded
    return func(*args, **kwargs)


def expand_operands(
    recorder: Recorder, name: str, args: tuple, kwargs: dict, may_be_mask: bool = True
) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments with a row for each sample in the place of each tracked tensor; None where one is not shared by all.

    Tensors that leave a tracked one's shape as it is, and that nothing is differentiated by, are masks and no data, unless they
    are what the result is written to.
    """
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    tracked = {id(t): t for t in tensors if recorder.is_tracked(t)}
    data = [t for t in tensors if id(t) not in tracked]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    dims = recorder.leading(shape)
    if not shape or (dims == 1 and any(t.dim() == len(shape) and t.size(0) != 1 for t in tracked.values())):
        return None
    if may_be_mask and any(t.shape == shape for t in tracked.values()) and not any(t.requires_grad for t in data):
        return None
    rows = {key: recorder.expand(t, shape[:dims], len(shape), name) for key, t in tracked.items()}
    return pytree.tree_map(lambda t: rows.get(id(t), t), (args, kwargs))


@rule(torch.prelu, _T.prelu)
def _prelu(recorder: Recorder, func, args, kwargs):
    return _apply_prelu(recorder, *args, **kwargs)


def _apply_prelu(recorder: Recorder, input: Tensor, weight: Tensor):
    """Y = x where x > 0, else w x, with a slope for each channel or one for all."""
    if recorder.is_tracked(input) or not input.dim():
        return NotImplemented
    channels = [weight.numel(), *[1] * (input.dim() - 2)][: input.dim() - 1]
    row = recorder.run(_T.reshape, weight, (1, *channels))
    slopes = recorder.expand(row, input.shape[:1], input.dim(), "prelu")
    return torch.ops.aten._prelu_kernel(*as_autocast(input, slopes))


@rule(_T.expand_as)
def _expand_as(recorder: Recorder, func, args, kwargs):
    tracked, other = args
    return recorder.run(_T.expand, tracked, other.shape) if recorder.is_tracked(tracked) else NotImplemented


@rule(torch.broadcast_tensors)
def _broadcast_tensors(recorder: Recorder, func, args, kwargs):
    shape = torch.broadcast_shapes(*(t.shape for t in args))
    return tuple(recorder.run(_T.expand, t, shape) for t in args)
