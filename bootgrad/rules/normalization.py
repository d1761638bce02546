"""The affine parameters of group, layer, RMS norm, and of batch norm with fixed statistics.

With x̂ the normalized input, sample i's gradients are Σ_t gy_{i,t} x̂_{i,t} for the scale and Σ_t gy_{i,t} for the shift,
summed over what the parameter is broadcast along.
"""

import functools
import inspect
import weakref
from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..errors import UnsupportedError
from ..ops import group_norm, piecewise
from .base import Operation, Phase, Recorder, RowsOperation, per_sample_sum, rule
from .checkpointed import saved_tensors_hooks
from .stand_ins import of_parameters
from .terms import DenseTerm

_CHANNELS = {F.group_norm, torch.group_norm, F.batch_norm, torch.batch_norm}
_OVER_POSITIONS = {F.instance_norm, torch.instance_norm}
_WITH_RUNNING = {F.batch_norm, torch.batch_norm, *_OVER_POSITIONS}
_SIGNATURES = {
    torch.group_norm: "input num_groups weight bias eps cudnn_enabled",
    torch.layer_norm: "input normalized_shape weight bias eps cudnn_enable",
    torch.rms_norm: "input normalized_shape weight eps",
    torch.batch_norm: "input weight bias running_mean running_var training momentum eps cudnn_enabled",
    torch.instance_norm: "input weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled",
}


@functools.cache
def _names(func) -> list[str]:
    return _SIGNATURES[func].split() if func in _SIGNATURES else list(inspect.signature(func).parameters)


def _arguments(func, args, kwargs) -> dict:
    return dict(zip(_names(func), args, strict=False)) | kwargs


@rule(
    F.group_norm,
    torch.group_norm,
    F.layer_norm,
    torch.layer_norm,
    F.rms_norm,
    torch.rms_norm,
    F.batch_norm,
    torch.batch_norm,
)
def _normalization(recorder: Recorder, func, args, kwargs):
    options = _arguments(func, args, kwargs)
    x: Tensor = options["input"]
    if recorder.is_tracked(x):
        return NotImplemented
    names = [n for n in ("weight", "bias") if recorder.is_tracked(options.get(n))]
    tracked = [options[n] for n in names]
    plain = {n: v for n, v in options.items() if n not in ("weight", "bias")} | {"weight": None}
    if "bias" in options:
        plain["bias"] = None
    if func in (F.group_norm, torch.group_norm) and x.dim() > 1 and x.numel():
        return _group_norm(recorder, options)
    aliases = {n: recorder.alias(t) for n, t in zip(names, tracked, strict=True)}
    y = _call(func, options | aliases)

    def rows_of(gy, batch_size, x):
        out = []
        for name, parameter in zip(names, tracked, strict=True):
            shape = parameter.shape
            if func in _CHANNELS:
                shape = torch.Size((*shape, *[1] * (gy.dim() - 2)))
            scaled = gy * _call(func, plain | {"input": x.to(gy.dtype)}) if name == "weight" else gy
            rows = per_sample_sum(scaled, batch_size, shape)
            out.append(rows.reshape(batch_size, *parameter.shape).to(parameter.dtype))
        return out

    most = 1 if func in _CHANNELS else x.dim() - len(options["normalized_shape"])
    return RowsOperation(recorder, func.__name__, tracked, rows_of, most)(y, x)


@of_parameters(F.layer_norm, torch.layer_norm, F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm)
def apart(func, *args, **kwargs) -> Tensor:
    """The norm first, scale and shift behind it: the scale's gradient of all in one has no derivative by x under ``vmap``."""
    options = _arguments(func, args, kwargs)
    affine = [options.get(name) for name in ("weight", "bias")]
    y = _call(func, options | {"weight": None, "bias": None})
    if func not in (F.layer_norm, torch.layer_norm):
        affine = [t if t is None else t.reshape(-1, *[1] * (y.dim() - 2)) for t in affine]
    scale, shift = affine
    y = y if scale is None else y * scale
    return y if shift is None else y + shift


@rule(F.instance_norm)
def _instance_norm(recorder: Recorder, func, args, kwargs):
    """Group norm with a group for each channel, where nothing runs along."""
    options = _arguments(func, args, kwargs)
    x: Tensor = options["input"]
    if recorder.is_tracked(x) or not options.get("use_input_stats", True) or x.dim() < 3 or not x.numel():
        return NotImplemented
    return _group_norm(recorder, options | {"num_groups": x.size(1)})


def _group_norm(recorder: Recorder, options: dict) -> Tensor:
    affine = options.get("weight"), options.get("bias")
    return GroupNormOperation(recorder, *affine, options["num_groups"], options.get("eps", 1e-5))(options["input"])


class GroupNormOperation(Operation):
    """Group norm, or a group norm and the ReLU behind it; tracked are its weight, its bias, or both."""

    reads_samples = True

    def __init__(self, recorder, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float):
        """Describe the call."""
        affine = {"weight": weight, "bias": bias}
        tracked = {name: t for name, t in affine.items() if t is not None and recorder.is_tracked(t)}
        super().__init__(recorder, "group_norm", list(tracked.values()))
        self.names, self.affine, self.geometry = list(tracked), (weight, bias), (groups, eps)
        self.versions = self._versions()

    def __call__(self, x: Tensor) -> Tensor:
        """The output, in the record."""
        if x.is_cuda and torch.is_autocast_enabled("cuda"):  # there torch's autocast runs group norm in float32
            x = x.float()
        return self.attach(RecordedGroupNorm.apply(self, self.new_probe(x.size(0), x), x, *self._aliases(x)))

    def joined(self, y: Tensor, saved: tuple[Tensor, ...], inplace: bool) -> Tensor:
        """The ReLU of ``y``, this operation's output, as one operation with the norm, whose node saved ``saved``."""
        x, _, mean, rstd, _ = saved
        both = GroupNormOperation(self.recorder, *self.affine, *self.geometry)
        both.covers, both.between = self, None if inplace else weakref.ref(y)
        probe = both.new_probe(x.size(0), x)
        return both.attach(RecordedGroupNormRelu.apply(both, probe, x, *both._aliases(x), y, mean, rstd, inplace))

    @property
    def is_as_it_was(self) -> bool:
        """Whether an operation can be made again of what this one was made of."""
        return self.versions is not None and self.versions == self._versions() and self._recorder() is not None

    def _versions(self) -> tuple | None:
        """Of weight and bias; None where nodes hand what they save to somebody else, who need not expect to be asked twice."""
        if saved_tensors_hooks():
            return None
        return tuple((t._version, t.requires_grad) for t in self.affine if t is not None)

    def _aliases(self, x: Tensor) -> list[Tensor | None]:
        recorder, cast = self.recorder, x.is_cuda and torch.is_autocast_enabled("cuda")
        out = [t if t is None or not recorder.is_tracked(t) else recorder.alias(t) for t in self.affine]
        return [recorder.alias_cast(t, torch.float32) if cast and t is not None else t for t in out]

    def terms(self, gy, batch_size):  # noqa: D102
        rows = self.recorder.by_product(self, gy)
        if rows is None:
            rows = group_norm.GroupNormBackward.apply(gy, *self.saved(), *self.geometry, False)[1:]
        return [DenseTerm(r) for r in self.rows(rows, batch_size)]

    def rows(self, rows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
        """Per-sample gradients of the tracked tensors from those of the output's rows, (N, C) each."""
        by_name = dict(zip(("weight", "bias"), rows, strict=True))
        return [
            per_sample_sum(self.gradient_by_sample(by_name[n]), batch_size, t.shape).to(t.dtype)
            for n, t in zip(self.names, self.tracked, strict=True)
        ]


class RecordedGroupNorm(Function):
    """Group norm with a probe, whose backward pass yields the per-sample gradients along with the input's."""

    @staticmethod
    def forward(ctx, operation, probe, x, weight, bias):
        """Compute y."""
        ctx.operation = operation
        ctx.set_materialize_grads(False)
        y, mean, rstd = group_norm.forward(x, weight, bias, *operation.geometry)
        ctx.save_for_backward(x, weight, mean, rstd, None)
        return y

    @staticmethod
    def backward(ctx, gy):
        """Differentiate by what the phase asks for."""
        if gy is None:  # it went to what covers this
            return None, None, None, None, None
        operation, phase, mask = ctx.operation, ctx.operation.phase, list(ctx.needs_input_grad[2:5])
        saved = operation.hold(ctx.saved_tensors)
        statistics = phase is Phase.STATISTICS and operation.recorder.takes_statistics(operation)
        if phase is not Phase.OUTPUTS and not statistics:
            probe = operation.row_norms(gy) if phase is Phase.ROW_NORMS else None
            return None, probe, *group_norm.backward(gy, *saved, *operation.geometry, mask)
        gx, *rows = group_norm.GroupNormBackward.apply(gy, *saved, *operation.geometry, mask[0])
        if phase is Phase.OUTPUTS:
            operation.recorder.keep_by_product(operation, gy, rows)
            return None, None, gx, None, None
        sums = (r.sum(0).to(gy.dtype) if wanted else None for r, wanted in zip(rows, mask[1:], strict=True))
        return None, operation.read(operation.rows(rows, operation.recorder.batch_size)), gx, *sums


piecewise.watch(RecordedGroupNorm)


class RecordedGroupNormRelu(Function):
    """The ReLU of y, the output of a recorded group norm: gradients go to that, or, where nobody sees them there, past it.

    The pass is that of `RecordedGroupNorm`, which takes what both save, z last, and both are given, from x to the bias.
    """

    @staticmethod
    def forward(ctx, operation, probe, x, weight, bias, y, mean, rstd, inplace):
        """Compute z."""
        ctx.operation = operation
        if inplace:
            ctx.mark_dirty(y)
        z = y.relu_() if inplace else y.relu()
        ctx.save_for_backward(x, weight, mean, rstd, z)
        ctx.set_materialize_grads(False)
        return z

    @staticmethod
    def backward(ctx, gz):
        """Differentiate by y, or by all that y was made of."""
        if gz is None:
            return (None,) * 9
        if ctx.operation.covers_all:
            return *RecordedGroupNorm.backward(ctx, gz), None, None, None, None
        return None, None, None, None, None, piecewise.relu_grad(gz, ctx.saved_tensors[-1]), None, None, None


def joined_relu(y: Tensor, inplace: bool) -> Tensor | None:
    """The ReLU of ``y``, recorded as one with the group norm that y comes from as it is; None where it does not."""
    node = y.grad_fn
    if not isinstance(node, RecordedGroupNorm._backward_cls) or y._version or y._is_view():
        return None
    if not torch.is_grad_enabled() or not node.operation.is_as_it_was:
        return None
    try:
        saved = node.saved_tensors
    except RuntimeError:  # the graph was freed: the values are all that is left of it
        return None
    return node.operation.joined(y, saved, inplace)


def _call(func, options: dict) -> Tensor:
    return func(*[options[n] for n in _names(func) if n in options]) if func in _SIGNATURES else func(**options)


def is_over_batch(func, args, kwargs) -> bool:
    """Whether the call normalizes with the statistics of the batch, under which a sample has no gradient of its own."""
    if func not in _WITH_RUNNING or func in _OVER_POSITIONS:
        return False
    options = _arguments(func, args, kwargs)
    return bool(options.get("training")) or options.get("running_mean") is None


def is_apart(func, args, kwargs) -> bool:
    """Whether the call is to be run by `apart`: it uses statistics of all samples, or moves some."""
    if func not in _WITH_RUNNING:
        return False
    options = _arguments(func, args, kwargs)
    if options.get("weight") is None and options.get("bias") is None:
        return False
    return is_over_batch(func, args, kwargs) or (func in _OVER_POSITIONS and options.get("running_mean") is not None)


def refuse_batch_statistics() -> NoReturn:
    """Raise for a call that is `is_over_batch`."""
    raise UnsupportedError(
        "batch_norm in training mode makes every output depend on every sample, so per-sample gradients do not "
        "exist: put the BatchNorm modules into eval() to use their running statistics, replace them by GroupNorm with "
        'bootgrad.replace_batchnorm(model), or take what each sample contributes to the gradient, by batchnorm="contribution"'
    )
