"""Pooling in plain torch."""

import torch
from torch import Tensor

from .. import schema


def max_pool2d(x: Tensor, kernel_size, stride, padding, dilation, ceil_mode) -> tuple[Tensor, Tensor]:
    """As the schema says."""
    return torch.ops.aten.max_pool2d_with_indices(x.contiguous(), kernel_size, stride, padding, dilation, ceil_mode)


def max_pool2d_backward(gy: Tensor, index: Tensor, y: Tensor | None, size) -> Tensor:
    """As the schema says."""
    planes = gy.new_zeros(*gy.shape[:2], size[0] * size[1])
    return planes.scatter_add_(2, index.flatten(2), _passed(gy, y).flatten(2)).view(*gy.shape[:2], *size)


def max_pool2d_gather(h: Tensor, index: Tensor, y: Tensor | None) -> Tensor:
    """As the schema says."""
    taken = h.flatten(2).gather(2, index.flatten(2)).view(index.shape)
    return _passed(taken, y)


def _passed(t: Tensor, y: Tensor | None) -> Tensor:
    return t if y is None else torch.ops.aten.threshold_backward(t, y, 0)


for _name in schema.POOLING_SCHEMAS:
    schema.library.impl(_name, globals()[_name], "CompositeExplicitAutograd")
