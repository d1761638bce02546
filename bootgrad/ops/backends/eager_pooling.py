"""Pooling in plain torch."""

import torch
from torch import Tensor

from .. import schema


def max_pool2d(x: Tensor, kernel_size, stride, padding, dilation, ceil_mode) -> tuple[Tensor, Tensor]:
    """As the schema says."""
    return torch.ops.aten.max_pool2d_with_indices(x.contiguous(), kernel_size, stride, padding, dilation, ceil_mode)


schema.library.impl("max_pool2d", max_pool2d, "CompositeExplicitAutograd")
