"""λ from the learning rate, by which the penalty is the gap that the noise of SGD's steps predicts."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import ArgumentError, ArgumentTypeError
from ..methods.choice import is_number
from ..seen import Seen
from .average import Average
from .rule import HIGH, Rule, positive, whole


class Bound(Rule):
    """λ that makes the penalty the part of the generalization gap that the noise of SGD's steps predicts.

    Of two runs on N samples that differ in one of them, the parameters differ by δ. Along a curvature h a step shrinks δ by
    1 − ηh, and adds (η/B)(g' − g_i) where the sample is in the batch, in B of N cases:

        E‖δ‖² ← (1 − ηh)² E‖δ‖² + η²/(BN) E‖g' − g_i‖²,    E‖g' − g_i‖² = S + D ≈ 2Γ

    S = E‖g' − g‖² is the population's part, D = ‖g_i − g‖² that of the samples at hand, g the full gradient. At rest
    Tr V = E‖δ‖² = η (S + D)/(2 B N h), and the predicted gap (N/2) h Tr V, in which N and h are gone, is

        η (S + D)/(4B) ≈ η Γ/(2B)

    Reg1 has the value Γ, Reg2 about the full gradient the mean Γ/B, and λ R is to be that:

        λ₁ = scale · η/(2B)        λ₂ = scale · η/2

    ``measured``, they are multiplied by (S + D)/(2 Reg1) and (S + D)/(2S), with S = Γ B/(B − 1), and D = Reg1 where that is
    about a center, else S, each averaged over steps: about the batch mean these factors are B/(B − 1) and one.

    It assumes SGD near a minimum with η h ≪ 1, samples drawn with equal chances, and a penalty that leaves the noise about as
    it was. Of an SGD with momentum μ, η is lr/(1 − μ). Optimizers that rescale gradients, as Adam does, have no such bound, and
    are refused, as are groups of parameters with unlike η: give a rate, and search for the scale.

    Price: none; ``measured``, an accelerator is waited for on one step of ``every``.

    Args:
        rate: a `torch.optim.SGD`, of which η is read at every step, or η, a number or a function of the step.
        scale: what λ is multiplied by.
        batch_size: B; None for the moving average of those of the steps before. On the first step, which has none before, λ₁ is
            then ``start``.
        measured: whether S and D are taken from reports, where these tell Γ.
        every: steps from one such report to the next, at least.
        decay: weight of the past in averages, bias-corrected.
        start: λ₁ before B is known.
        low: the least λ.
        high: the greatest λ.

    Raises:
        ArgumentError: an optimizer of another kind, or with unlike η; then, too, when it is read.
    """

    def __init__(
        self,
        rate: torch.optim.Optimizer | float | Callable[[int], float],
        scale: float = 1.0,
        *,
        batch_size: int | None = None,
        measured: bool = False,
        every: int = 10,
        decay: float = 0.9,
        start: float = 0.0,
        low: float = 0.0,
        high: float = HIGH,
    ):
        """Start with nothing seen."""
        super().__init__(low, high)
        if not is_number(start) or not low <= start <= high:
            raise ArgumentError(f"start must be a number from low = {low} to high = {high}; got {start!r}")
        is_given = is_number(rate) or callable(rate) or hasattr(rate, "param_groups")
        if not is_given or isinstance(rate, type | torch.nn.Module):
            shown = f"the class {rate.__name__}" if isinstance(rate, type) else type(rate).__name__
            raise ArgumentTypeError(f"rate must be an optimizer, a number or a function of the step; got {shown}")
        if hasattr(rate, "param_groups"):
            _check_sgd(rate)
        self.rate, self.scale, self.start = rate, positive("scale", scale), float(start)
        self.batch_size = None if batch_size is None else whole("batch_size", batch_size)
        self.measured, self.every = bool(measured), whole("every", every)
        self._size, self._parts = Average(decay, 1), Average(decay, 3)  # B; S, D and Reg1
        self._next = 0
        if not callable(rate):
            self._learning_rate(0)

    def reset(self) -> None:
        """Begin anew."""
        self._size.clear()
        self._parts.clear()
        self._next, self.is_bounded = 0, False

    def strength(self, penalty: str, step: int) -> float:
        """λ by the formula."""
        value = self.scale * self._learning_rate(step) / 2
        if self._parts.weight:
            population, sample, reg1 = self._parts.values
            below = population if penalty == "reg2" else reg1
            value *= (population + sample) / (2 * below) if below > 0 else 1.0
        if penalty == "reg2":
            return self._within(value)
        B = self.batch_size or (self._size.values[0] if self._size.weight else None)
        return self.start if B is None else self._within(value / B)

    def after(self, seen: Seen) -> None:
        """Take in B, and what the report tells where it is due."""
        B = seen.batch_size
        self._size.take(float(B))
        if not self.measured or seen.step < self._next or B < 2 or not seen.is_finite():
            return
        covariance, reg1 = seen.spreads()
        if math.isfinite(covariance) and math.isfinite(reg1):
            population = covariance * B / (B - 1)
            self._parts.take(population, reg1 if seen.has_center else population, reg1)
            self._next = seen.step + self.every

    def state_dict(self) -> dict[str, Any]:
        """The averages, and when a report is read."""
        return {"size": self._size.state(), "parts": self._parts.state(), "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        size, parts, following = self._size.read(state["size"]), self._parts.read(state["parts"]), int(state["next"])
        (self._size.values, self._size.weight), (self._parts.values, self._parts.weight) = size, parts
        self._next = following

    def _learning_rate(self, step: int) -> float:
        """η of the step."""
        if hasattr(self.rate, "param_groups"):
            rates = [_rate_of(group) for group in self.rate.param_groups]
            value = rates[0]
            if not all(math.isclose(value, other, rel_tol=1e-9) for other in rates):
                shown = ", ".join(f"{other:.4g}" for other in rates)
                raise ArgumentError(
                    f"the optimizer's groups of parameters have unlike rates lr/(1 − momentum), {shown}, where the bound knows "
                    "one: give it as rate=…, a number or a function of the step"
                )
        else:
            given = self.rate(step) if callable(self.rate) else self.rate
            try:
                value = float(given)
            except (TypeError, ValueError):
                raise ArgumentTypeError(
                    f"rate must give a number, the learning rate of the step; got {given!r}"
                ) from None
        if not 0 <= value < math.inf:
            raise ArgumentError(f"the learning rate must be finite and not negative; got {value}")
        return value


def _check_sgd(optimizer: Any) -> None:
    """Raise unless its steps are those of `torch.optim.SGD`, which a subclass with a step of its own does not tell."""
    kind = type(optimizer)
    if not issubclass(kind, torch.optim.SGD) or inspect.unwrap(kind.step) is not inspect.unwrap(torch.optim.SGD.step):
        raise ArgumentError(
            f"the bound is of the steps of torch.optim.SGD; got {kind.__name__}, whose steps are its own: of a wrapper give "
            "the SGD in it, else rate=…, the learning rate as a number or a function of the step, and search for scale"
        )


def _rate_of(group: Mapping[str, Any]) -> float:
    """η of a group of SGD's parameters, lr (1 − dampening)/(1 − momentum)."""
    momentum = float(group["momentum"])
    if not momentum:
        return float(group["lr"])
    if not momentum < 1:
        raise ArgumentError(
            f"momentum must be below 1, for the bound has the rate lr/(1 − momentum) of the optimizer; got {momentum}"
        )
    return float(group["lr"]) * (1 - float(group["dampening"])) / (1 - momentum)
