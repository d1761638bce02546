"""The ops of 3×3 convolutions in plain torch."""

import torch
from torch import Tensor

from .. import schema


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, padding, transposed: bool) -> Tensor:
    """As the schema says."""
    schema.check_conv3x3(x, weight, bias, padding, transposed)
    kernel = weight.flip(2, 3).transpose(0, 1) if transposed else weight
    return torch.nn.functional.conv2d(x, kernel, bias, 1, padding).contiguous()


def conv3x3_weighted_sum(x: Tensor, gy: Tensor, w: Tensor | None, padding) -> Tensor:
    """As the schema says."""
    return torch.ops.bootgrad.conv_weighted_sum(x, gy, w, (3, 3), (1, 1), padding, (1, 1), 1)


for _name in schema.CONVOLUTION_SCHEMAS:
    schema.library.impl(_name, globals()[_name], "CompositeExplicitAutograd")
