"""Piecewise-linear operations without parameters: ReLU and max pooling.

Their derivative does not change with the input, except where pieces meet. Torch's second derivative by the input is therefore a
tensor of zeros, which it makes and adds: two passes over each activation of a double backward pass. Here it is not there.

Where a ReLU's output is pooled and then let go, gradients pass both at once: to the maxima's places where the maxima are
positive, and not by way of a gradient for every entry of that output, which has no other reader. A hook of the output or of its
node is a reader; an edge that was taken of it (`get_gradient_edge`) is not seen. Behind a recorded group norm the ReLU is one
with that instead: see `rules.normalization`.
"""

import weakref

import torch
from torch import Tensor
from torch.autograd import Function

_aten = torch.ops.aten


class Relu(Function):
    """y = max(x, 0), in place or not; and a stand-in for y, without content, whose gradient is x's as it is."""

    @staticmethod
    def forward(ctx, x, inplace):
        """Compute y."""
        if inplace:
            ctx.mark_dirty(x)
        y = x.relu_() if inplace else x.relu()
        ctx.save_for_backward(y)
        ctx.set_materialize_grads(False)
        return y, y.new_empty(()).expand(y.shape)

    @staticmethod
    def backward(ctx, gy, behind):
        """Differentiate by x."""
        gx = None if gy is None else relu_grad(gy, *ctx.saved_tensors)
        return gx if behind is None else behind if gx is None else gx + behind, None


def watch(function: type[Function]) -> None:
    """Have the nodes of ``function`` know, by ``is_watched``, whether they or an output have had a hook."""
    # The first is what torch calls on the node of a tensor that gets its first hook.
    for name in ("_register_hook_dict", "register_hook", "register_prehook"):
        setattr(function._backward_cls, name, _noting(getattr(torch._C._FunctionBase, name)))  # type: ignore[attr-defined]


def _noting(register):
    def note(ctx, hook):
        ctx.is_watched = True
        return register(ctx, hook)

    return note


def is_seen(tensor: weakref.ref | None, node) -> bool:
    """Whether anybody sees the gradient of an output of ``node``, which is ``watch``ed: by a hook, or as it is still alive.

    There is no such tensor, None, where it was changed in place.
    """
    return getattr(node, "is_watched", False) or (tensor is not None and tensor() is not None)


watch(Relu)


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
        return relu_grad(h, *ctx.saved_tensors), None


def relu_grad(gy: Tensor, y: Tensor) -> Tensor:
    """Gy where y > 0, else 0."""
    return ReluGrad.apply(gy, y) if torch.is_grad_enabled() else _aten.threshold_backward(gy, y, 0)


class MaxPool2d(Function):
    """Max pooling of x (B, C, H, W), the output of ``node`` if that is a ReLU's, for which ``behind`` stands."""

    @staticmethod
    def forward(ctx, x, behind, alive, node, window):
        """Compute y, and remember where each maximum was."""
        y, index = torch.ops.bootgrad.max_pool2d(x, *window)
        ctx.save_for_backward(index, None if behind is None else y.le(0))  # y itself may be changed in place
        ctx.size, ctx.alive, ctx.node = x.shape[2:], alive, node
        return y

    @staticmethod
    def backward(ctx, gy):
        """Differentiate by x, or by what the ReLU was given where nobody is left to see the gradient between."""
        index, blocked = ctx.saved_tensors
        unseen = blocked is not None and not is_seen(ctx.alive, ctx.node)
        gx = MaxPool2dGrad.apply(gy, index, blocked if unseen else None, ctx.size)
        return (None, gx, None, None, None) if unseen else (gx, None, None, None, None)


class MaxPool2dGrad(Function):
    """gy put back to where the maxima were, but for those that are ``blocked``: linear, with a gather as its adjoint."""

    @staticmethod
    def forward(ctx, gy, index, blocked, size):
        """Compute gx."""
        ctx.save_for_backward(index, blocked)
        ctx.size = size
        return torch.ops.bootgrad.max_pool2d_backward(gy, index, blocked, size)

    @staticmethod
    def backward(ctx, h):
        """Differentiate by gy."""
        return MaxPool2dGather.apply(h, *ctx.saved_tensors, ctx.size), None, None, None


class MaxPool2dGather(Function):
    """The adjoint of `MaxPool2dGrad`, of which that is the adjoint in turn."""

    @staticmethod
    def forward(ctx, h, index, blocked, size):
        """Take h from where the maxima were."""
        ctx.save_for_backward(index, blocked)
        ctx.size = size
        return torch.ops.bootgrad.max_pool2d_gather(h, index, blocked)

    @staticmethod
    def backward(ctx, gy):
        """Differentiate by h."""
        return MaxPool2dGrad.apply(gy, *ctx.saved_tensors, ctx.size), None, None, None


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu`."""
    y, behind = Relu.apply(x, inplace)
    y._bootgrad_behind = behind, y._version
    return y


def max_pool2d(x: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False) -> Tensor:
    """`torch.nn.functional.max_pool2d` of a (B, C, H, W)."""
    window = [
        [v, v] if isinstance(v, int) else list(v)
        for v in (kernel_size, kernel_size if stride is None or stride == () else stride, padding, dilation)
    ]
    # The stand-in is for x as the ReLU returned it, and not for what was made of it in place since.
    behind, version = getattr(x, "_bootgrad_behind", (None, 0))
    node = x.grad_fn
    if behind is None or node is None or behind.grad_fn is not node or version != x._version:
        return MaxPool2d.apply(x, None, None, None, (*window, ceil_mode))
    return MaxPool2d.apply(x, behind, weakref.ref(x), node, (*window, ceil_mode))
