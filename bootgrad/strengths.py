"""Strengths λ of the penalties that are set during training, from training data alone: rules, to be given in place of a number.

    reg = bootgrad.GradientRegularizer(model, reg1=bootgrad.strengths.Share(0.1), reg2="auto", center="ema")

A rule is asked for λ before each step, and shown the step after it. What rules measure is the gradient that a penalty adds,

    ∇R = (∇(L + λ R) − ḡ)/λ

from the two gradients that a step has anyway: no pass is made for it. It is that of the whole batch, of all micro-batches and
ranks, before a scaler's factor; by random signs and on fractions it is the estimate that the step takes. In float32 what is
shorter than about 1e-6 ‖ḡ‖ is rounding, in half precision 1e-2: λ = 0 cannot be measured, and these rules keep λ > 0.

**Two penalties take turns to be measured**: one is taken alone, with 2λ, and on the next step with penalties the other is, with
2λ, too, so that both steps together have what they would have had.

Letters: ``ḡ`` the gradient of a batch's mean loss, ``R`` a penalty without λ, ``B`` samples, ``η`` the learning rate.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError
from .methods.choice import is_number
from .seen import Seen, cosine_of
from .wrappers import by_names_as_written

__all__ = ["AUTO", "Bound", "LookAhead", "Rule", "Seen", "Share"]

LOW, START, HIGH = 1e-8, 1e-3, 10.0


class Rule(ABC):
    """How λ of one penalty is set; an object for each penalty.

    Args:
        low, high: the bounds of λ.
    """

    def __init__(self, low: float, high: float):
        """Check the bounds."""
        if not (is_number(low) and is_number(high) and 0 <= low <= high < math.inf):
            raise ArgumentError(f"low and high must be numbers, 0 ≤ low ≤ high; got {low!r} and {high!r}")
        self.low, self.high = float(low), float(high)

    @abstractmethod
    def strength(self, penalty: str, step: int) -> float:
        """λ for the step that comes; it may fail and be asked for again."""

    def due(self, step: int) -> bool:
        """Whether the gradient of the penalty is to be measured as soon as it is taken."""
        return False

    @property
    def waits(self) -> bool:
        """Whether ḡ of the step that comes is asked for, whatever it takes."""
        return False

    @abstractmethod
    def after(self, seen: Seen) -> None:
        """Take in a step, of whatever kind; one that is not finite is to be left out."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, but for the options."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; where it cannot be read, with any error, all is as before."""

    def _within(self, value: float) -> float:
        return min(max(value, self.low), self.high)


class _Measuring(Rule):
    """A rule with a λ of its own, moved by measurements at least ``every`` steps apart."""

    def __init__(self, every: int, start: float, low: float, high: float):
        """Check the options."""
        super().__init__(low, high)
        if not low > 0:
            raise ArgumentError(
                f"low must be above zero, for a penalty that is not taken cannot be measured; got {low}"
            )
        if not is_number(start) or not low <= start <= high:
            raise ArgumentError(f"start must be a number from low = {low} to high = {high}; got {start!r}")
        self.every = _whole("every", every)
        self.value = float(start)
        self._next = 0

    def strength(self, penalty, step):
        """The λ that was last set."""
        return self.value

    def due(self, step):
        """From ``every`` steps after the last measurement on."""
        return step >= self._next

    def state_dict(self):
        """λ, and when to measure."""
        return {"value": self.value, "next": self._next}

    def load_state_dict(self, state):
        """Go on from a `state_dict`, within the present bounds."""
        value, following = _finite(state["value"]), int(state["next"])
        self.value, self._next = self._within(value), following


class Share(_Measuring):
    """λ by which the penalty's gradient is a fixed share of the loss's.

        λ = share · exp(−⟨log ‖∇R‖/‖ḡ‖⟩)

    ⟨ ⟩ is a moving average over the steps that are measured; λ is held between them, and is ``start`` up to the first. No unit
    of the loss or the penalty changes what is trained: of a times the loss, λ is 1/a of what it was.

    Price: a sweep over the parameters on steps that are measured; for exact Reg1 about a constant center without
    statistics, which makes no ḡ, one forward-sized product there, of 6. An accelerator is waited for.

    Args:
        share: ‖λ ∇R‖/‖ḡ‖.
        every: steps from one measurement to the next, at least.
        decay: weight of the past in the average, bias-corrected.
        start, low, high: λ at first, above zero, and its bounds.
    """

    def __init__(
        self,
        share: float = 0.1,
        every: int = 10,
        *,
        decay: float = 0.8,
        start: float = START,
        low: float = LOW,
        high: float = HIGH,
    ):
        """Start with nothing measured."""
        super().__init__(every, start, low, high)
        self.share = _positive("share", share)
        self._log_ratio = _Average(decay, 1)

    def after(self, seen):
        """Measure, where it is due; a penalty without gradient leaves λ as it is."""
        if not seen.is_measured or not seen.is_finite():
            return
        loss, penalty = seen.norms()
        self._next = seen.step + self.every
        if 0 < loss < math.inf and 0 < penalty < math.inf:
            (log_ratio,) = self._log_ratio.take(math.log(penalty) - math.log(loss))
            self.value = self._within(self.share * math.exp(min(-log_ratio, 700.0)))

    def state_dict(self):
        """λ, the average, and when to measure."""
        return super().state_dict() | {"log_ratio": self._log_ratio.state()}

    def load_state_dict(self, state):
        """Go on from a `state_dict`."""
        average = self._log_ratio.read(state["log_ratio"])
        super().load_state_dict(state)
        self._log_ratio.values, self._log_ratio.weight = average


class LookAhead(_Measuring):
    """λ that follows what it does to the loss of the next mini-batch.

    After a step along ḡ + λ ∇R that loss L' has changed by −η ⟨ḡ', ∇R⟩ per unit of λ, ḡ' its gradient at the new parameters. So

        log λ ← log λ + rate · cos(ḡ', ∇R)

    one pair of consecutive steps at a time: where they point the same way, more of the penalty would have lowered L' further.

    It sees one step ahead, so that what a penalty does to the loss of later steps is no part of it; and only as long as batches
    are new to the model, in the first epoch, does L' tell of data that it has not been trained on.

    Price: a few sweeps over the parameters and a tensor of each parameter's size on one step of ``every``, held until the next
    step; where ḡ would not be made, see `Share`, on both. An accelerator is waited for.

    Args:
        rate: how far log λ moves where the two are parallel.
        every: steps from one pair to the next, at least.
        start, low, high: λ at first, above zero, and its bounds.
    """

    def __init__(
        self, rate: float = 0.2, every: int = 5, *, start: float = START, low: float = LOW, high: float = HIGH
    ):
        """Start with nothing measured."""
        super().__init__(every, start, low, high)
        self.rate = _positive("rate", rate)
        self._held: dict[str, Tensor] = {}  # ∇R of the step before

    @property
    def waits(self):
        """For ḡ of the step after one that was measured."""
        return bool(self._held)

    def after(self, seen):
        """Compare ∇R of the step before with ḡ, and keep that of this step where it is due."""
        if not (seen.is_measured or self._held) or not seen.is_finite():
            return
        if self._held:
            held, self._held = self._held, {}
            cosine = cosine_of(held, seen.mean)
            if math.isfinite(cosine):
                self.value = self._within(self.value * math.exp(self.rate * cosine))
        if seen.is_measured:
            self._held = seen.gradient()
            self._next = seen.step + self.every

    def state_dict(self):
        """λ, when to measure, and ∇R where it waits for the next step."""
        return super().state_dict() | {"held": {name: t.clone() for name, t in self._held.items()}}

    def load_state_dict(self, state):
        """Go on from a `state_dict`."""
        held = {name: t.clone() for name, t in by_names_as_written(state["held"]).items()}
        super().load_state_dict(state)
        self._held = held


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
    it was. Of an SGD with momentum μ, η is lr/(1 − μ). Optimizers that rescale gradients, as Adam does, have no such bound:
    give a rate, and search for the scale.

    Price: none; ``measured``, an accelerator is waited for on one step of ``every``.

    Args:
        rate: the optimizer, whose first group's lr is read at every step, or η, a number or a function of the step.
        scale: what λ is multiplied by.
        batch_size: B; None for the moving average of those of the steps before. On the first step, which has none before, λ₁ is
            then ``start``.
        measured: whether S and D are taken from reports, where these tell Γ.
        every: steps from one such report to the next, at least.
        decay: weight of the past in averages, bias-corrected.
        start, low, high: λ₁ before B is known, and bounds.
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
        if not is_number(rate) and not callable(rate) and not hasattr(rate, "param_groups"):
            raise ArgumentTypeError(
                f"rate must be an optimizer, a number or a function of the step; got {type(rate).__name__}"
            )
        self.rate, self.scale, self.start = rate, _positive("scale", scale), float(start)
        self.batch_size = None if batch_size is None else _whole("batch_size", batch_size)
        self.measured, self.every = bool(measured), _whole("every", every)
        self._size, self._parts = _Average(decay, 1), _Average(decay, 3)  # B; S, D and Reg1
        self._next = 0
        if is_number(rate):
            self._learning_rate(0)

    def strength(self, penalty, step):
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

    def after(self, seen):
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

    def state_dict(self):
        """The averages, and when a report is read."""
        return {"size": self._size.state(), "parts": self._parts.state(), "next": self._next}

    def load_state_dict(self, state):
        """Go on from a `state_dict`."""
        size, parts, following = self._size.read(state["size"]), self._parts.read(state["parts"]), int(state["next"])
        (self._size.values, self._size.weight), (self._parts.values, self._parts.weight) = size, parts
        self._next = following

    def _learning_rate(self, step: int) -> float:
        """η of the step."""
        if hasattr(self.rate, "param_groups"):
            group = self.rate.param_groups[0]
            momentum = group.get("momentum") or 0.0
            share = 1 - group.get("dampening", 0.0) if momentum else 1.0
            value = float(group["lr"]) * share / (1 - momentum) if momentum < 1 else math.inf
        else:
            value = float(self.rate(step) if callable(self.rate) else self.rate)
        if not 0 <= value < math.inf:
            raise ArgumentError(f"the learning rate must be finite and not negative; got {value}")
        return value


AUTO: Callable[[], Rule] = Share  # what "auto" stands for


class _Average:
    """Moving averages of numbers, bias-corrected; of equal ones, that number itself."""

    def __init__(self, decay: float, count: int):
        """Start with none."""
        if not is_number(decay) or not 0 <= decay < 1:
            raise ArgumentError(f"decay must be in [0, 1); got {decay!r}")
        self.decay, self.weight, self.values = decay, 0.0, [0.0] * count

    def take(self, *new: float) -> list[float]:
        """The averages with ``new`` among them."""
        self.weight = self.decay * self.weight + (1 - self.decay)
        share = (1 - self.decay) / self.weight
        self.values = [old + share * (x - old) for old, x in zip(self.values, new, strict=True)]
        return self.values

    def state(self) -> list[float]:
        """The weight and the averages."""
        return [self.weight, *self.values]

    def read(self, state: Any) -> tuple[list[float], float]:
        """Averages and weight of a `state`, of as many numbers."""
        weight, *values = map(_finite, state)
        if len(values) != len(self.values) or not 0 <= weight <= 1:
            raise ValueError(f"an average has a weight and {len(self.values)} numbers; got {state!r}")
        return values, weight


def _positive(name: str, value: Any) -> float:
    if not is_number(value) or not 0 < value < math.inf:
        raise ArgumentError(f"{name} must be a finite number above zero; got {value!r}")
    return float(value)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} must be a whole number of at least 1; got {value!r}")
    return value


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} in the place of a finite number")
    return number
