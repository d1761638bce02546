"""What was seen of one step, in plain numbers: of the whole model, by layer, and of single samples.

A number that is not known is None, and is left out where an observation is written.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

PREFIX = "bootgrad/"
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
TOTALS = ("loss", "covariance_trace", "sq_mean_norm", "noise_scale", "reg1", "reg2")


@dataclass(frozen=True)
class LayerObservation:
    """What a layer's own parameters have of it.

    Attributes:
        covariance_trace: Γ of their gradients, None where it is not known.
        sq_mean_norm: ‖ḡ‖² of theirs, as well.
        noise_scale: as `Observation.noise_scale`, of these alone.
    """

    covariance_trace: float | None
    sq_mean_norm: float | None
    noise_scale: float | None = None


@dataclass(frozen=True)
class Outlier:
    """A sample whose gradient is far longer than those of the others in its batch.

    Attributes:
        id: what ``ids`` call it; None without them.
        norm: ‖g_i‖.
        index: its number in the batch.
    """

    id: Any
    norm: float
    index: int


@dataclass(frozen=True)
class Flag:
    """A quantity far above what it has been, or a loss that is not finite.

    Attributes:
        quantity: its name: loss, covariance_trace, sq_mean_norm or largest_norm.
        value: what it is now.
        usual: the median of the last five observations before; None where there are none.
        layer: whose it is; None for the whole model.
    """

    quantity: str
    value: float
    usual: float | None
    layer: str | None = None

    def __str__(self) -> str:
        """Name, place, value, and what is usual."""
        place = "" if self.layer is None else f" of layer {self.layer}"
        usually = "" if self.usual is None else f", usually {self.usual:.3g}"
        return f"{self.quantity}{place} is {self.value:.3g}{usually}"


@dataclass(frozen=True)
class Observation:
    """What was seen of one step; of all ranks, but for the loss and what single samples have, which are of this one.

    Attributes:
        step: its number, from 0.
        batch_size: B.
        loss: mean loss.
        covariance_trace: Γ.
        sq_mean_norm: ‖ḡ‖².
        noise_scale: Γ/‖ḡ‖² by its unbiased parts, averaged over observations; inf where the gradient is lost in the noise.
        reg1: Reg1 without λ₁, where it was taken.
        reg2: Reg2 without λ₂, where it was taken.
        strengths: λ by penalty, where there are any.
        layers: by the path of the module that has the parameters; those of the model itself are ``(root)``.
        norms: quantiles of the ‖g_i‖, by their probability.
        outliers: samples beyond all others, the largest first.
        flags: what is far above what it has been lately.
        watched: the ``layers`` of a monitor of a part of the model, which all but the loss is about then.
        sample_norms: ‖g_i‖ of the batch in its order, for histograms; files do not have them.
    """

    step: int
    batch_size: int
    loss: float | None = None
    covariance_trace: float | None = None
    sq_mean_norm: float | None = None
    noise_scale: float | None = None
    reg1: float | None = None
    reg2: float | None = None
    strengths: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, LayerObservation] = field(default_factory=dict, repr=False)
    norms: Mapping[float, float] = field(default_factory=dict)
    outliers: tuple[Outlier, ...] = ()
    flags: tuple[Flag, ...] = ()
    watched: tuple[str, ...] = ()
    sample_norms: tuple[float, ...] = field(default=(), repr=False)

    def scalars(self) -> dict[str, float]:
        """All numbers in one mapping.

        ``bootgrad/covariance_trace``, ``bootgrad/layer/NAME/covariance_trace``, ``bootgrad/norm/0.95``,
        ``bootgrad/strength/reg1``, …; ``bootgrad/outliers`` and ``bootgrad/flags`` are how many there are.
        """
        found: dict[str, float | None] = {name: getattr(self, name) for name in TOTALS}
        found |= {f"norm/{probability:g}": norm for probability, norm in self.norms.items()}
        found |= {f"strength/{name}": strength for name, strength in self.strengths.items()}
        for name, layer in self.layers.items():
            found |= {f"layer/{name}/{f.name}": getattr(layer, f.name) for f in fields(layer)}
        if self.norms:
            found["outliers"] = float(len(self.outliers))
        found["flags"] = float(len(self.flags))
        return {PREFIX + name: float(value) for name, value in found.items() if value is not None}

    def as_dict(self) -> dict[str, Any]:
        """All but the norms of single samples, as JSON has it: what is not finite is a word."""
        totals = {name: getattr(self, name) for name in ("step", "batch_size", *TOTALS)}
        found: dict[str, Any] = {name: plain(value) for name, value in totals.items() if value is not None}
        if self.strengths:
            found["strengths"] = {name: plain(value) for name, value in self.strengths.items()}
        found["layers"] = {
            name: {f.name: plain(value) for f in fields(layer) if (value := getattr(layer, f.name)) is not None}
            for name, layer in self.layers.items()
        }
        found["norms"] = {f"{probability:g}": plain(norm) for probability, norm in self.norms.items()}
        found["outliers"] = [{"id": plain(o.id), "norm": plain(o.norm), "index": o.index} for o in self.outliers]
        if self.watched:
            found["watched"] = list(self.watched)
        found["flags"] = [{f.name: plain(getattr(flag, f.name)) for f in fields(flag)} for flag in self.flags]
        return found


def plain(value: Any) -> Any:
    """A value that JSON can hold: numbers that are not finite, and objects, as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)
