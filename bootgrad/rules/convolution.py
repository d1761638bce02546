"""Convolutions of one, two and three dimensions, and transposed ones."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.convolution import ConvProduct, expand
from ..ops.product import Output
from ..ops.transposed import TransposedConvProduct
from .base import ProductOperation, Recorder, rule
from .stand_ins import plain_rule


@rule(torch.conv1d, torch.conv2d, torch.conv3d)
def _conv(recorder: Recorder, func, args, kwargs):
    return _apply(recorder, func, *args, **kwargs)


def _apply(
    recorder: Recorder,
    func,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
):
    if recorder.is_tracked(input):
        return NotImplemented
    n = weight.dim() - 2
    if input.dim() == n + 1:  # one image, without a batch
        return _apply(recorder, func, input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    kernel, stride, dilation = tuple(weight.shape[2:]), expand(stride, n), expand(dilation, n)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        # As torch does: where the total is odd, the extra zero goes behind.
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [t // 2 for t in totals]
        input = F.pad(input, [p for t in reversed(totals) for p in (0, t % 2)])
    product = ConvProduct(kernel, stride, expand(padding, n), dilation, groups)
    tracked = (t if recorder.is_tracked(t) else None for t in (weight, bias))
    return ProductOperation(recorder, func.__name__, product, *tracked)(input, weight, bias)


@rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def _conv_transpose(recorder: Recorder, func, args, kwargs):
    return _apply_transpose(recorder, func, *args, **kwargs)


def _apply_transpose(
    recorder: Recorder,
    func,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    output_padding=0,
    groups=1,
    dilation=1,
):
    if recorder.is_tracked(input):
        return NotImplemented
    n = weight.dim() - 2
    if input.dim() == n + 1:
        image = input.unsqueeze(0)
        y = _apply_transpose(recorder, func, image, weight, bias, stride, padding, output_padding, groups, dilation)
        return y if y is NotImplemented else y.squeeze(0)
    stride, padding, dilation, added = (expand(o, n) for o in (stride, padding, dilation, output_padding))
    if any(a >= s for a, s in zip(added, stride, strict=True)):  # a convolution would have more outputs than x entries
        return NotImplemented
    product = TransposedConvProduct(ConvProduct(tuple(weight.shape[2:]), stride, padding, dilation, groups), added)
    tracked = (t if recorder.is_tracked(t) else None for t in (weight, bias))
    return ProductOperation(recorder, func.__name__, product, *tracked)(input, weight, bias)


@plain_rule(torch.conv1d, torch.conv2d, torch.conv3d)
def _unrecorded(func, args, kwargs):
    return _apply_unrecorded(*args, **kwargs)


def _apply_unrecorded(input: Tensor, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Torch's own but for what the compiled library makes in less time: the weight's gradient, and 3×3 products."""
    n = weight.dim() - 2
    if (
        not (weight.requires_grad and _sums_on_this_cpu(input))
        or groups != 1
        or isinstance(padding, str)
        or input.dim() != n + 2
        or torch.is_autocast_enabled("cpu")
        or weight.dtype != input.dtype
        or not input.numel()
    ):
        return NotImplemented
    product = ConvProduct(tuple(weight.shape[2:]), expand(stride, n), expand(padding, n), expand(dilation, n), groups)
    return Output.apply(product, input, weight, bias)


def _sums_on_this_cpu(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and torch._C._dispatch_has_kernel_for_dispatch_key("bootgrad::conv_weighted_sum", "CPU")
    )
