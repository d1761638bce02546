"""Plain numbers from the statistics or the report of a step, an accelerator being waited for a few times in all.

Letters: ``B`` samples, ``P`` parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import Report, Statistics
from ..errors import ArgumentError, ArgumentTypeError
from ..statistics import Moments
from .observation import QUANTILES, Outlier

ROOT = "(root)"  # the layer of parameters that the model itself has
LEAST_SPREAD = 0.05  # of log ‖g_i‖: norms of samples that are nearly alike are no outliers


@dataclass(frozen=True)
class Part:
    """What `bootgrad.NoiseScale` takes in."""

    batch_size: int
    covariance_trace: float
    sq_mean_norm: float


@dataclass(frozen=True)
class Measured:
    """What a step has told.

    Attributes:
        whole: of all parameters.
        layers: of those of each layer.
        totals: reg1 and reg2, where they are known, and the loss, nan too.
        strengths: λ by penalty.
        norms: ‖g_i‖, (B,), float64 on the CPU; empty where they are not known.
    """

    whole: Part
    layers: dict[str, Part] = field(default_factory=dict)
    totals: dict[str, float | None] = field(default_factory=dict)
    strengths: Mapping[str, float] = field(default_factory=dict)
    norms: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))


@torch.no_grad()
def measure(told: Statistics | Report, losses: Tensor | None) -> Measured:
    """The numbers of a step.

    Args:
        told: its statistics or its report.
        losses: (B,), where the loss is not in it.

    Raises:
        ArgumentTypeError: ``told`` is neither.
        ArgumentError: losses that were not finite, of which an accelerator tells only now.
    """
    if not isinstance(told, Statistics | Report):
        raise ArgumentTypeError(
            f"observe takes the bootgrad.Statistics or bootgrad.Report of a step; got {type(told).__name__}"
        )
    whole = Part(told.batch_size, float(told.covariance_trace), float(told.sq_mean_norm))
    loss = told.loss if isinstance(told, Report) else None if losses is None else losses.detach().double().mean()
    totals = {"loss": None if loss is None else float(loss), "reg1": known(told.reg1), "reg2": known(told.reg2)}
    if isinstance(told, Report):
        return Measured(whole, totals=totals, strengths=dict(told.strengths))
    norms = told.sq_norms.detach().double().sqrt().cpu()
    return Measured(whole, by_layer(told.per_parameter or {}), totals, norms=norms)


def known(value: Any) -> float | None:
    """A number, or None for one that is not there or nan."""
    if value is None or math.isnan(number := float(value)):
        return None
    return number


def layer_of(parameter: str) -> str:
    """The path of the module that has a parameter of this name."""
    return parameter.rpartition(".")[0] or ROOT


def by_layer(parameters: Mapping[str, Moments]) -> dict[str, Part]:
    """Γ and ‖ḡ‖² of each layer: sums over its parameters."""
    sums: dict[str, list[float]] = {}
    for name, (trace, sq_mean) in zip(parameters, _traces(list(parameters.values())), strict=True):
        of_layer = sums.setdefault(layer_of(name), [0.0, 0.0])
        of_layer[0] += trace
        of_layer[1] += sq_mean
    B = next((moments.batch_size for moments in parameters.values()), 0)
    return {name: Part(B, *of_layer) for name, of_layer in sums.items()}


def _traces(moments: Sequence[Moments]) -> list[list[float]]:
    """Γ and ‖ḡ‖² of each, by a few operations for all of them."""
    if not moments:
        return []
    device = moments[0].sq_mean_norm.device
    sq_means = torch.stack([m.sq_mean_norm.double().to(device) for m in moments])  # (P,)
    if all(m.deviation_sq_norms is None and m.everywhere is None for m in moments):
        means = torch.stack([m.sq_norms.double().to(device) for m in moments]).mean(1)  # (P, B) to (P,)
        traces = (means - sq_means).clamp(min=0)
    else:
        traces = torch.stack([m.covariance_trace.double().to(device) for m in moments])
    return torch.stack([traces, sq_means], 1).tolist()


def quantiles(norms: Tensor) -> dict[float, float]:
    """Quantiles of norms (B,) by their probability; none of no norms, or where one is not a number."""
    if not norms.numel() or bool(norms.isnan().any()):
        return {}
    way = "linear" if bool(norms.isfinite().all()) else "nearest"  # between two infinite ones there is no number
    values = norms.quantile(torch.tensor(QUANTILES, dtype=norms.dtype), interpolation=way).tolist()
    return dict(zip(QUANTILES, values, strict=True))


def outliers(norms: Tensor, ids: Sequence[Any] | None, most: int, deviations: float) -> tuple[Outlier, ...]:
    """The samples whose norm is beyond all but what chance does, the largest first.

        log ‖g_i‖ > m + d · max(1.4826 median |log ‖g_j‖ − m|, 0.05),    m = median log ‖g_j‖,

    over the samples that have a gradient. The median of deviations times 1.4826 is the standard deviation of normal values.

    Args:
        norms: ‖g_i‖, (B,).
        ids: what samples are called, B of them, or None.
        most: how many are told.
        deviations: d.
    """
    logs = norms.log()
    positive = logs[logs.isfinite()]
    if positive.numel() < 3:
        return ()
    middle = positive.median()
    spread = max(1.4826 * float((positive - middle).abs().median()), LEAST_SPREAD)
    (far,) = torch.where(logs > middle + deviations * spread)
    order = far[norms[far].argsort(descending=True)][:most].tolist()
    return tuple(Outlier(None if ids is None else ids[k], float(norms[k]), k) for k in order)


def listed(ids: Any, batch_size: int | None) -> list[Any] | None:
    """Names of samples as plain values in a list; None for none.

    Args:
        ids: a sequence, an array or a tensor, in the order of the samples.
        batch_size: how many there must be, where it is known.

    Raises:
        ArgumentTypeError: of another kind, or without an order.
        ArgumentError: of several dimensions, or not as many as samples.
    """
    if ids is None:
        return None
    is_array = hasattr(ids, "tolist") and hasattr(ids, "ndim")
    if not is_array and (not isinstance(ids, Sequence) or isinstance(ids, str | bytes)):
        raise ArgumentTypeError(
            f"ids must be a sequence, an array or a tensor, one for each loss and in their order; got {type(ids).__name__}: "
            "make a list of them"
        )
    if is_array and ids.ndim != 1:
        raise ArgumentError(f"ids must have one dimension, (B,); got {tuple(ids.shape)}: name each sample by one value")
    found = ids.tolist() if is_array else [_plain(name) for name in ids]
    if batch_size is not None and len(found) != batch_size:
        raise ArgumentError(f"ids must be {batch_size}, one for each loss; got {len(found)}")
    return found


def _plain(name: Any) -> Any:
    """The number that an array or a tensor of one number holds."""
    return name.item() if getattr(name, "ndim", None) == 0 and hasattr(name, "item") else name
