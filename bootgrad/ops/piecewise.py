"""Piecewise-linear operations without parameters: ReLU and max pooling.

Their derivative does not change with the input, except where pieces meet. Torch's second derivative by the input is therefore a
tensor of zeros, which it makes and adds: two passes over each activation of a double backward pass. Here it is not there.
"""

import torch
from torch import Tensor
from torch.autograd import Function

_aten = torch.ops.aten


class Relu(Function):
    """y = max(x, 0), in place or not."""

    @staticmethod
    def forward(ctx, x, inplace):
        """Compute y."""
        if inplace:
            ctx.mark_dirty(x)
        y = x.relu_() if inplace else x.relu()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gy):
        """Differentiate by x."""
        return ReluGrad.apply(gy, *ctx.saved_tensors), None


class ReluGrad(Function):
    """gy where y > 0, else 0: linear in gy, constant in y."""

    @staticmethod
    def forward(ctx, gy, y):
        """Compute gx."""
        ctx.save_for_backward(y)
        return _aten.threshold_backward(gy, y, 0)

    @staticmethod
    def backward(ctx, h):
        """Differentiate by gy."""
        return ReluGrad.apply(h, *ctx.saved_tensors), None


class MaxPool2d(Function):
    """Max pooling of (B, C, H, W)."""

    @staticmethod
    def forward(ctx, x, window):
        """Compute y, and remember where each maximum was."""
        y, index = torch.ops.bootgrad.max_pool2d(x, *window)
        ctx.save_for_backward(x, index)
        ctx.window = window
        return y

    @staticmethod
    def backward(ctx, gy):
        """Differentiate by x."""
        x, index = ctx.saved_tensors
        return MaxPool2dGrad.apply(gy, x.detach(), index, ctx.window), None


class MaxPool2dGrad(Function):
    """gy put back to where the maxima were: linear in gy, with a gather as its adjoint."""

    @staticmethod
    def forward(ctx, gy, x, index, window):
        """Compute gx; of x only the shape is read."""
        ctx.save_for_backward(index)
        return _aten.max_pool2d_with_indices_backward(gy, x, *window, index)

    @staticmethod
    def backward(ctx, h):
        """Differentiate by gy."""
        (index,) = ctx.saved_tensors
        return h.flatten(2).gather(2, index.flatten(2)).view(index.shape), None, None, None


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu`."""
    return Relu.apply(x, inplace)


def max_pool2d(x: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False) -> Tensor:
    """`torch.nn.functional.max_pool2d` of a (B, C, H, W)."""
    window = [
        [v, v] if isinstance(v, int) else list(v)
        for v in (kernel_size, kernel_size if stride is None or stride == () else stride, padding, dilation)
    ]
    return MaxPool2d.apply(x, (*window, ceil_mode))
