"""Pooling in plain torch."""

import torch
from torch import Tensor

from .. import schema


def max_pool2d(x: Tensor, kernel_size, stride, padding, dilation, ceil_mode) -> tuple[Tensor, Tensor]:
    """As the schema says."""
    return torch.ops.aten.max_pool2d_with_indices(x.contiguous(), kernel_size, stride, padding, dilation, ceil_mode)


def max_pool2d_backward(gy: Tensor, index: Tensor, blocked: Tensor | None, size) -> Tensor:
    """As the schema says; windows that overlap are added up in the accumulation dtype."""
    passed = _passed(gy, blocked).flatten(2).to(schema.accumulation_dtype(gy.dtype))
    planes = passed.new_zeros(*gy.shape[:2], size[0] * size[1])
    return planes.scatter_add_(2, index.flatten(2), passed).view(*gy.shape[:2], *size).to(gy.dtype)


def max_pool2d_gather(h: Tensor, index: Tensor, blocked: Tensor | None) -> Tensor:
    """As the schema says."""
    return _passed(h.flatten(2).gather(2, index.flatten(2)).view(index.shape), blocked)


def _passed(t: Tensor, blocked: Tensor | None) -> Tensor:
    return t if blocked is None else t.masked_fill(blocked, 0)


for _name in schema.POOLING_SCHEMAS:
    schema.library.impl(_name, globals()[_name], "CompositeExplicitAutograd")
