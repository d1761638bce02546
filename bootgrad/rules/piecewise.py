"""ReLU and max pooling: no parameters, but a second derivative that is worth having without torch's zeros."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.piecewise import max_pool2d, relu
from .normalization import joined_relu
from .stand_ins import plain_rule

_T = torch.Tensor


@plain_rule(F.relu, torch.relu, _T.relu)
def _relu(func, args, kwargs):
    return _apply_relu(*args, **kwargs)


@plain_rule(F.relu_, torch.relu_, _T.relu_)
def _relu_(func, args, kwargs):
    return _apply_relu(*args, **kwargs, inplace=True)


def _apply_relu(input: Tensor, inplace: bool = False):
    if inplace and (input.is_leaf or input._is_view()):
        return NotImplemented
    out = joined_relu(input, inplace)
    return relu(input, inplace) if out is None else out


@plain_rule(torch.max_pool2d, F.max_pool2d)
def _max_pool2d(func, args, kwargs):
    return _apply_max_pool2d(*args, **kwargs)


def _apply_max_pool2d(
    input: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    if return_indices or input.dim() != 4 or not input.is_contiguous():
        return NotImplemented
    return max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
