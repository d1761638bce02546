"""What every op puts out where there is nothing to compute with: shapes, dtypes and errors, for compilers and fake tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .schema import (
    NAMESPACE,
    accumulation_dtype,
    check_applied,
    check_attention,
    check_bias_center,
    check_conv,
    check_conv3x3,
    check_displaced,
    check_embedding,
    check_group_norm,
    check_layer,
    check_linear,
    check_pair,
    check_pairs,
    check_paths,
    check_product,
    check_table,
    library,
    output_size,
    weight_shape,
)


def _per_sample(x: Tensor) -> Tensor:
    return x.new_empty(x.size(0), dtype=accumulation_dtype(x.dtype))


def _layer(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


def _statistics(x: Tensor, shape: Sequence[int], center: Tensor | None) -> tuple[Tensor, ...]:
    deviation = _per_sample(x) if center is not None else _layer(x, (0,))
    return _layer(x, shape), _per_sample(x), deviation, _layer(x, (x.size(0), shape[0]))


def _with_grad(x: Tensor, gy: Tensor, shape: Sequence[int], mask: Sequence[bool]) -> tuple[Tensor, ...]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if mask[0] else x.new_empty(0)
    dgy = torch.empty(gy.shape, dtype=gy.dtype, device=gy.device) if mask[1] else gy.new_empty(0)
    return _per_sample(x), dx, dgy, _layer(x, shape if mask[2] else (0,))


def _fake(name):
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=library)


@_fake("linear_rank1_sq_norms")
def _(x, gy):
    torch._check(x.dim() == 2 and gy.dim() == 2, lambda: "x and gy must be (B, I) and (B, O)")
    check_pair(x, gy)
    return _per_sample(x)


@_fake("linear_sq_norms")
def _(x, gy, path):
    check_paths(path)
    check_linear(x, gy)
    return _per_sample(x)


@_fake("linear_deviation_sq_norms")
def _(x, gy, center, path):
    check_paths(path)
    check_linear(x, gy)
    check_layer("center", center, (gy.size(2), x.size(2)), x)
    return _per_sample(x)


@_fake("linear_jvp")
def _(x, gy, v):
    check_linear(x, gy)
    check_layer("v", v, (gy.size(2), x.size(2)), x)
    return _per_sample(x)


@_fake("linear_weighted_sum")
def _(x, gy, w):
    check_linear(x, gy)
    check_layer("w", w, (x.size(0),), x)
    return _layer(x, (gy.size(2), x.size(2)))


@_fake("linear_statistics")
def _(x, gy, center, path):
    check_paths(path)
    check_linear(x, gy)
    shape = (gy.size(2), x.size(2))
    check_layer("center", center, shape, x)
    return _statistics(x, shape, center)


@_fake("linear_sq_norms_with_grad")
def _(x, gy, center, path, mask):
    check_paths(path)
    check_linear(x, gy)
    shape = (gy.size(2), x.size(2))
    check_layer("center", center, shape, x)
    return _with_grad(x, gy, shape, mask)


@_fake("conv_sq_norms")
def _(x, gy, kernel_size, stride, padding, dilation, groups, path):
    check_paths(path)
    check_conv(x, gy, kernel_size, stride, padding, dilation, groups)
    return _per_sample(x)


@_fake("conv_deviation_sq_norms")
def _(x, gy, center, stride, padding, dilation, groups, path):
    check_paths(path)
    check_conv(x, gy, center.shape[2:], stride, padding, dilation, groups)
    check_layer("center", center, weight_shape(x, gy, center.shape[2:], groups), x)
    return _per_sample(x)


@_fake("conv_jvp")
def _(x, gy, v, stride, padding, dilation, groups):
    check_conv(x, gy, v.shape[2:], stride, padding, dilation, groups)
    check_layer("v", v, weight_shape(x, gy, v.shape[2:], groups), x)
    return _per_sample(x)


@_fake("conv_weighted_sum")
def _(x, gy, w, kernel_size, stride, padding, dilation, groups):
    check_conv(x, gy, kernel_size, stride, padding, dilation, groups)
    check_layer("w", w, (x.size(0),), x)
    return _layer(x, weight_shape(x, gy, kernel_size, groups))


@_fake("conv_statistics")
def _(x, gy, center, kernel_size, stride, padding, dilation, groups, path):
    check_paths(path)
    check_conv(x, gy, kernel_size, stride, padding, dilation, groups)
    shape = weight_shape(x, gy, kernel_size, groups)
    check_layer("center", center, shape, x)
    return _statistics(x, shape, center)


@_fake("conv_sq_norms_with_grad")
def _(x, gy, center, kernel_size, stride, padding, dilation, groups, path, mask):
    check_paths(path)
    check_conv(x, gy, kernel_size, stride, padding, dilation, groups)
    shape = weight_shape(x, gy, kernel_size, groups)
    check_layer("center", center, shape, x)
    return _with_grad(x, gy, shape, mask)


@_fake("conv_applied")
def _(x, gy, h, kernel_size, stride, padding, dilation, groups, path):
    check_paths(path)
    check_conv(x, gy, kernel_size, stride, padding, dilation, groups)
    check_applied("h", h, x)
    return h.new_empty(gy.shape)


@_fake("conv_applied_transposed")
def _(x, gy, g, kernel_size, stride, padding, dilation, groups, path):
    check_paths(path)
    check_conv(x, gy, kernel_size, stride, padding, dilation, groups)
    check_applied("g", g, gy)
    return g.new_empty(x.shape)


@_fake("conv_displaced")
def _(x, gy, h, weight, shift, factor, stride, padding, dilation, groups):
    check_displaced(x, gy, weight, stride, padding, dilation, groups)
    check_applied("h", h, x)
    check_layer("shift", shift, gy.shape[:2], x)
    return h.new_empty(gy.shape)


@_fake("conv_displaced_transposed")
def _(x, gy, g, weight, factor, stride, padding, dilation, groups):
    check_displaced(x, gy, weight, stride, padding, dilation, groups)
    check_applied("g", g, gy)
    return g.new_empty(x.shape)


def _channel_rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))


@_fake("group_norm_backward")
def _(gy, x, weight, mean, rstd, input_grad):
    check_group_norm(x, {"gy": gy}, weight, mean, rstd)
    return x.new_empty(x.shape if input_grad else 0), _channel_rows(x), _channel_rows(x)


@_fake("group_norm_double_backward")
def _(u, a, b, gy, x, weight, mean, rstd):
    check_group_norm(x, {"gy": gy} | ({} if u is None else {"u": u}), weight, mean, rstd)
    check_layer("a", a, x.shape[:2], x)
    check_layer("b", b, x.shape[:2], x)
    return x.new_empty(x.shape), x.new_empty(x.shape), _channel_rows(x)


@_fake("group_norm_relu_backward")
def _(gz, z, x, weight, mean, rstd, input_grad):
    check_group_norm(x, {"z": z}, weight, mean, rstd)
    return torch.ops.bootgrad.group_norm_backward(gz, x, weight, mean, rstd, input_grad)


@_fake("group_norm_relu_double_backward")
def _(u, a, b, gz, z, x, weight, mean, rstd):
    check_group_norm(x, {"z": z}, weight, mean, rstd)
    return torch.ops.bootgrad.group_norm_double_backward(u, a, b, gz, x, weight, mean, rstd)


def _samples(bounds: Tensor, gy: Tensor) -> Tensor:
    return gy.new_empty(bounds.size(0) - 1, dtype=accumulation_dtype(gy.dtype))


@_fake("embedding_sq_norms")
def _(tokens, bounds, gy, center):
    check_embedding(tokens, bounds, gy)
    check_table("center", center, gy)
    return _samples(bounds, gy)


@_fake("embedding_rows")
def _(tokens, bounds, gy, center):
    check_embedding(tokens, bounds, gy)
    check_table("center", center, gy)
    return _samples(bounds, gy), gy.new_empty(gy.shape)


@_fake("embedding_jvp")
def _(tokens, bounds, gy, v):
    check_embedding(tokens, bounds, gy)
    check_table("v", v, gy)
    return _samples(bounds, gy)


@_fake("embedding_weighted_sum")
def _(tokens, bounds, gy, w, size):
    check_embedding(tokens, bounds, gy)
    check_layer("w", w, (bounds.size(0) - 1,), gy)
    return gy.new_empty((size, gy.size(1)), dtype=accumulation_dtype(gy.dtype))


@_fake("conv_visit")
def _(x, gy, center, biased, bias_center, kernel_size, stride, padding, dilation, groups, path, mask, scale):
    check_bias_center(x, gy, biased, bias_center)
    return *torch.ops.bootgrad.conv_sq_norms_with_grad(
        x, gy, center, kernel_size, stride, padding, dilation, groups, path, mask
    ), _layer(x, (x.size(0) if biased else 0, gy.size(1)))


@_fake("conv_output")
def _(x, weight, bias, stride, padding, dilation, groups):
    torch._check(
        weight.dim() == x.dim() > 2,
        lambda: f"weight must have {x.dim()} dimensions, as x; got shape {tuple(weight.shape)}",
    )
    for value in (stride, padding, dilation):
        torch._check(len(value) == x.dim() - 2, lambda: "stride, padding and dilation must have a number per dimension")
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    torch._check(
        min(size) > 0,
        lambda: (
            f"x with its padding must be as large as the kernel; got shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        ),
    )
    y = x.new_empty(x.size(0), weight.size(0), *size)
    check_product(x, y, weight, stride, padding, dilation, groups)
    check_layer("bias", bias, y.shape[1:2], x)
    return y


@_fake("conv_input_grad")
def _(gy, weight, size, stride, padding, dilation, groups):
    torch._check(len(size) == gy.dim() - 2, lambda: f"size must have a number per dimension; got {list(size)}")
    gx = gy.new_empty(gy.size(0), weight.size(1) * groups, *size)
    check_product(gx, gy, weight, stride, padding, dilation, groups)
    return gx


@_fake("conv3x3")
def _(x, weight, bias, padding, transposed):
    check_conv3x3(x, weight, bias, padding, transposed)
    size = (s + 2 * p - 2 for s, p in zip(x.shape[2:], padding, strict=True))
    return x.new_empty(x.size(0), weight.size(1 if transposed else 0), *size)


@_fake("conv3x3_weighted_sum")
def _(x, gy, w, padding):
    check_conv(x, gy, (3, 3), (1, 1), padding, (1, 1), 1)
    check_layer("w", w, x.shape[:1], x)
    return x.new_empty(gy.size(1), x.size(1), 3, 3, dtype=accumulation_dtype(x.dtype))


@_fake("sq_distances")
def _(a, b, scale):
    check_pairs(a, b)
    return a[0].new_empty(len(a), dtype=torch.float64)


@_fake("max_pool2d")
def _(x, kernel_size, stride, padding, dilation, ceil_mode):
    return torch.ops.aten.max_pool2d_with_indices(x, kernel_size, stride, padding, dilation, ceil_mode)


@_fake("max_pool2d_backward")
def _(gy, index, blocked, size):
    return gy.new_empty((*gy.shape[:2], *size))


@_fake("max_pool2d_gather")
def _(h, index, blocked):
    return h.new_empty(index.shape)


@_fake("attention_double_backward")
def _(uq, uk, uv, g, q, k, v, mask, is_causal, scale):
    check_attention(uq, uk, uv, g, q, k, v, mask)
    return tuple(t.new_empty((t.size(0), t.size(2), t.size(1), t.size(3))) for t in (g, q, k, v))
