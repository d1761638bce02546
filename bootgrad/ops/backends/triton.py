"""The ops by Triton kernels: arguments checked, brought to the kernels' form, and results brought back to the ops'.

Functions have the ops' names and arguments, as in `backends.eager`; `backends.gpu` chooses between them. They take CUDA
tensors of float32, bfloat16 and float16 (and tensors of the CPU in Triton's interpreter). Triton is imported by the first
call only. On the Gram path a center's part is added in the inputs' dtype: ‖G_i‖² − 2⟨G_i, c⟩ + ‖c‖².

Letters as in `ops.schema`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import planning
from .. import schema
from ..schema import accumulation_dtype
from . import eager_embedding

_NO_GRADS = (False, False, False)


class Call(NamedTuple):
    """A layer in the kernels' form: x and gy in three dimensions of space, the geometry, and shapes as the op has them."""

    x: Tensor
    gy: Tensor
    layer: Any
    weight_shape: tuple[int, ...]
    x_shape: torch.Size
    gy_shape: torch.Size

    def rows(self, weight: Tensor | None) -> Tensor | None:
        """A layer-shaped argument as a matrix."""
        return None if weight is None else self.layer.weight_rows(weight)


@torch.no_grad()
def linear_rank1_sq_norms(x: Tensor, gy: Tensor) -> Tensor:
    """‖x_i‖² ‖gy_i‖²."""
    from ...kernels.linear_rank1_sq_norms import linear_rank1_sq_norms as launch

    torch._check(
        x.dim() == 2 and gy.dim() == 2,
        lambda: f"x and gy must be (B, I) and (B, O); got {tuple(x.shape)} and {tuple(gy.shape)}",
    )
    schema.check_pair(x, gy)
    return launch(x, gy)


@torch.no_grad()
def linear_sq_norms(x: Tensor, gy: Tensor, path: str) -> Tensor:
    """‖G_i‖²."""
    return _sq_norms_with_grad(_linear(x, gy, path), None, path, _NO_GRADS)[0]


@torch.no_grad()
def linear_deviation_sq_norms(x: Tensor, gy: Tensor, center: Tensor, path: str) -> Tensor:
    """‖G_i − center‖²."""
    return _sq_norms_with_grad(_linear(x, gy, path, center=center), center, path, _NO_GRADS)[0]


@torch.no_grad()
def linear_jvp(x: Tensor, gy: Tensor, v: Tensor) -> Tensor:
    """⟨G_i, v⟩."""
    return _jvp(_linear(x, gy, v=v), v)


@torch.no_grad()
def linear_weighted_sum(x: Tensor, gy: Tensor, w: Tensor | None) -> Tensor:
    """Σ_i w_i G_i."""
    return _weighted_sum(_linear(x, gy, w=w), w)


@torch.no_grad()
def linear_statistics(x: Tensor, gy: Tensor, center: Tensor | None, path: str) -> tuple[Tensor, ...]:
    """Σ_i G_i, ‖G_i‖², ‖G_i − center‖² and the bias's rows."""
    return _statistics(_linear(x, gy, path, center=center), center, path)


@torch.no_grad()
def linear_sq_norms_with_grad(
    x: Tensor, gy: Tensor, center: Tensor | None, path: str, mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    """‖G_i − center‖², its derivatives by x and gy, and Σ_i G_i."""
    return _sq_norms_with_grad(_linear(x, gy, path, center=center), center, path, mask)


@torch.no_grad()
def conv_sq_norms(x: Tensor, gy: Tensor, kernel_size, stride, padding, dilation, groups: int, path: str) -> Tensor:
    """‖G_i‖²."""
    call = _conv(x, gy, kernel_size, stride, padding, dilation, groups, path)
    return _sq_norms_with_grad(call, None, path, _NO_GRADS)[0]


@torch.no_grad()
def conv_deviation_sq_norms(
    x: Tensor, gy: Tensor, center: Tensor, stride, padding, dilation, groups: int, path: str
) -> Tensor:
    """‖G_i − center‖²."""
    call = _conv(x, gy, center.shape[2:], stride, padding, dilation, groups, path, center=center)
    return _sq_norms_with_grad(call, center, path, _NO_GRADS)[0]


@torch.no_grad()
def conv_jvp(x: Tensor, gy: Tensor, v: Tensor, stride, padding, dilation, groups: int) -> Tensor:
    """⟨G_i, v⟩."""
    return _jvp(_conv(x, gy, v.shape[2:], stride, padding, dilation, groups, v=v), v)


@torch.no_grad()
def conv_weighted_sum(
    x: Tensor, gy: Tensor, w: Tensor | None, kernel_size, stride, padding, dilation, groups: int
) -> Tensor:
    """Σ_i w_i G_i."""
    return _weighted_sum(_conv(x, gy, kernel_size, stride, padding, dilation, groups, w=w), w)


@torch.no_grad()
def conv_statistics(
    x: Tensor, gy: Tensor, center: Tensor | None, kernel_size, stride, padding, dilation, groups: int, path: str
) -> tuple[Tensor, ...]:
    """Σ_i G_i, ‖G_i‖², ‖G_i − center‖² and the bias's rows."""
    call = _conv(x, gy, kernel_size, stride, padding, dilation, groups, path, center=center)
    return _statistics(call, center, path)


@torch.no_grad()
def conv_sq_norms_with_grad(
    x: Tensor,
    gy: Tensor,
    center: Tensor | None,
    kernel_size,
    stride,
    padding,
    dilation,
    groups: int,
    path: str,
    mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """‖G_i − center‖², its derivatives by x and gy, and Σ_i G_i."""
    call = _conv(x, gy, kernel_size, stride, padding, dilation, groups, path, center=center)
    return _sq_norms_with_grad(call, center, path, mask)


@torch.no_grad()
def group_norm_backward(
    gy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, input_grad: bool
) -> tuple[Tensor, ...]:
    """By the input, r P(γ gy), and by γ and β for each sample, Σ gy x̂ and Σ gy."""
    from ...kernels.group_norm import group_norm_backward as launch

    schema.check_group_norm(x, {"gy": gy}, weight, mean, rstd)
    return launch(gy, x, weight, mean, rstd, input_grad)


@torch.no_grad()
def group_norm_double_backward(
    u: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    gy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, ...]:
    """The adjoint of `group_norm_backward` for cotangents u, a and b: by gy, by x, and by γ for each sample."""
    from ...kernels.group_norm import group_norm_double_backward as launch

    schema.check_group_norm(x, {"gy": gy} | ({} if u is None else {"u": u}), weight, mean, rstd)
    for name, t in (("a", a), ("b", b)):
        schema.check_layer(name, t, x.shape[:2], x)
    return launch(u, a, b, gy, x, weight, mean, rstd)


@torch.no_grad()
def embedding_sq_norms(tokens: Tensor, bounds: Tensor, gy: Tensor, center: Tensor | None) -> Tensor:
    """‖E_i − center‖²; about a center by plain torch, without cancellation."""
    from ...kernels.embedding_sq_norms import embedding_sq_norms as launch

    if center is not None:
        return eager_embedding.embedding_sq_norms(tokens, bounds, gy, center)
    schema.check_embedding(tokens, bounds, gy)
    return launch(tokens, bounds, gy)


def _linear(x, gy, path="direct", *, w=None, **layer_shaped) -> Call:
    from ...kernels.layer import linear_layer

    schema.check_paths(path)
    schema.check_linear(x, gy)
    shape = (gy.size(2), x.size(2))
    _check_layers(x, shape, w, layer_shaped)
    views = linear_layer(x, gy)
    return Call(views[0], views[1], views[2], shape, x.shape, gy.shape)


def _conv(x, gy, kernel_size, stride, padding, dilation, groups, path="direct", *, w=None, **layer_shaped) -> Call:
    from ...kernels.layer import conv_layer

    schema.check_paths(path)
    schema.check_conv(x, gy, kernel_size, stride, padding, dilation, groups)
    shape = schema.weight_shape(x, gy, kernel_size, groups)
    _check_layers(x, shape, w, layer_shaped)
    views = conv_layer(x, gy, kernel_size, stride, padding, dilation, groups)
    return Call(views[0], views[1], views[2], shape, x.shape, gy.shape)


def _check_layers(x: Tensor, shape: tuple[int, ...], w: Tensor | None, layer_shaped: dict[str, Tensor | None]) -> None:
    torch._check(x.dtype != torch.float64, lambda: "Triton's kernels of layers take no float64: plain torch does")
    schema.check_layer("w", w, (x.size(0),), x)
    for name, tensor in layer_shaped.items():
        schema.check_layer(name, tensor, shape, x)


def _jvp(call: Call, v: Tensor) -> Tensor:
    from ...kernels.conv_grads import jvp

    return jvp(*call[:3], call.rows(v))


def _weighted_sum(call: Call, w: Tensor | None) -> Tensor:
    w = None if w is None else w.contiguous()  # an expanded one, or a matrix's column
    return call.layer.weight(_direct(call, w=w, total=True).total, call.weight_shape)


def _direct(call: Call, **wanted):
    from ...kernels.conv_direct import direct

    return direct(*call[:3], planning.GPU_WORKSPACE_BYTES, **wanted)


def _by_pixels(call: Call) -> bool:
    """Whether the pixel Gram is the cheaper way, as `planning` counts."""
    x, gy, layer = call[:3]
    return planning.ConvLayer(x.size(0), x.size(1), tuple(x.shape[2:]), gy.size(1), *layer[:5]).pixels_first


def _statistics(call: Call, center: Tensor | None, path: str) -> tuple[Tensor, ...]:
    x, gy, layer, shape = call[:4]
    c = call.rows(center)
    if path == "direct":
        total, s, deviation = _direct(call, center=c, norms=True, total=True)
    else:
        from ...kernels.conv_grads import subtract_center
        from ...kernels.gram import gram_sq_norms

        total = _direct(call, total=True).total
        s = gram_sq_norms(x, gy, layer, planning.GPU_WORKSPACE_BYTES, _by_pixels(call))[0]
        deviation = None if c is None else subtract_center(x, gy, layer, c, s, None, None)
    bias_rows = gy.sum((2, 3, 4), dtype=accumulation_dtype(gy.dtype)).contiguous()
    return layer.weight(total, shape), s, s.new_empty(0) if deviation is None else deviation, bias_rows


def _sq_norms_with_grad(call: Call, center: Tensor | None, path: str, mask: Sequence[bool]) -> tuple[Tensor, ...]:
    x, gy, layer, shape = call[:4]
    c = call.rows(center)
    if path == "gram":
        from ...kernels.conv_grads import subtract_center
        from ...kernels.gram import gram_sq_norms

        s, dx, dgy = gram_sq_norms(x, gy, layer, planning.GPU_WORKSPACE_BYTES, _by_pixels(call), (mask[0], mask[1]))
        s = s if c is None else subtract_center(x, gy, layer, c, s, dx, dgy)
        total = _direct(call, total=True).total if mask[2] else None
    elif mask[0] or mask[1]:
        from ...kernels.conv_grads import sq_norms_with_grad

        s, dx, dgy, total = sq_norms_with_grad(x, gy, layer, planning.GPU_WORKSPACE_BYTES, c, mask)
    else:
        total, s, deviation = _direct(call, center=c, norms=c is None, total=mask[2])
        s, dx, dgy = s if deviation is None else deviation, None, None
    return (
        s,
        x.new_empty(0) if dx is None else layer.as_op(dx, call.x_shape),
        gy.new_empty(0) if dgy is None else layer.as_op(dgy, call.gy_shape),
        s.new_empty(0) if total is None else layer.weight(total, shape),
    )
