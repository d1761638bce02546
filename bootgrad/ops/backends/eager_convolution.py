"""The ops of convolutions themselves in plain torch."""

import torch
from torch import Tensor

from .. import schema


def conv_output(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int) -> Tensor:
    """As the schema says."""
    y = torch.convolution(x, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)
    return y.contiguous()


def conv_input_grad(gy: Tensor, weight: Tensor, size, stride, padding, dilation, groups: int) -> Tensor:
    """As the schema says."""
    x = gy.new_empty(gy.size(0), weight.size(1) * groups, *size)
    schema.check_product(x, gy, weight, stride, padding, dilation, groups)
    zeros, mask = (0,) * len(stride), (True, False, False)
    grads = torch.ops.aten.convolution_backward(
        gy, x, weight, None, stride, padding, dilation, False, zeros, groups, mask
    )
    return grads[0].contiguous()


def conv_visit(
    x: Tensor, gy: Tensor, center: Tensor | None, biased: bool, bias_center: Tensor | None, *rest
) -> tuple[Tensor, ...]:
    """As the schema says."""
    schema.check_bias_center(x, gy, biased, bias_center)
    *geometry, scale = rest
    s, dx, dgy, total = torch.ops.bootgrad.conv_sq_norms_with_grad(x, gy, center, *geometry)
    if scale != 1:
        dx.mul_(scale), dgy.mul_(scale)
    if not biased:
        return s, dx, dgy, total, s.new_empty(0, gy.size(1))
    rows = gy.flatten(2).sum(2, dtype=s.dtype)
    apart = rows if bias_center is None else rows - bias_center
    if dgy.numel():
        dgy.add_(apart.to(gy.dtype).reshape(*rows.shape, *[1] * (gy.dim() - 2)), alpha=2 * scale)
    return s + apart.square().sum(1), dx, dgy, total, rows


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
