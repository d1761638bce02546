"""Strengths λ of the penalties that are set during training, from training data alone: rules, to be given in place of a number.

    reg = bootgrad.GradientRegularizer(model, reg1=bootgrad.strengths.Share(0.1), reg2="auto", center="ema")

A rule is asked for λ before each step, and shown the step after it. What rules measure is the gradient that a penalty adds,

    ∇R = (∇(L + λ R) − ḡ)/λ

from the two gradients that a step has anyway: no pass is made for it. It is that of the whole batch, of all micro-batches and
ranks, before a scaler's factor; by random signs and on fractions it is the estimate that the step takes. λ = 0 cannot be
measured, and these rules keep λ > 0.

**The first λ is that of the step it is measured on**, whatever the unit of the loss: the pass takes some λ', a trial, and what
is written to ``.grad`` is

    ḡ + (λ/λ') (∇(L + λ' R) − ḡ)

So it is, too, where λ ∇R was lost in the rounding of ḡ, that is shorter than 8e-6 ‖ḡ‖ in float32 and 0.06 ‖ḡ‖ in bfloat16: the
next step is a trial with a larger λ', and what was lost is left out of averages.

**Two penalties take turns to be measured**: one is taken alone, with 2λ, and on the next step with penalties the other is, with
2λ, too, so that both steps together have what they would have had.

Letters: ``ḡ`` the gradient of a batch's mean loss, ``R`` a penalty without λ, ``B`` samples, ``η`` the learning rate.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError
from .methods.choice import is_number
from .seen import Added, Seen, cosine_of
from .wrappers import by_names_as_written

__all__ = ["AUTO", "Bound", "LookAhead", "Rule", "Seen", "Share"]

LOW, HIGH = 1e-20, 1e20
TRIAL = 100.0  # where nothing is known; what is too large for a step is not for its measurement


class Rule(ABC):
    """How λ of one penalty is set; an object for each penalty.

    Args:
        low, high: the bounds of λ.

    Attributes:
        is_bounded: whether the last λ is one of them, and would have been beyond it; the report then says so.
    """

    is_bounded = False

    def __init__(self, low: float, high: float):
        """Check the bounds."""
        if not (is_number(low) and is_number(high) and 0 <= low <= high < math.inf):
            raise ArgumentError(f"low and high must be numbers, 0 ≤ low ≤ high; got {low!r} and {high!r}")
        self.low, self.high = float(low), float(high)

    @abstractmethod
    def strength(self, penalty: str, step: int) -> float:
        """λ for the step that comes, zero for none; it may fail and be asked for again."""

    def due(self, step: int) -> bool:
        """Whether the gradient of the penalty is to be measured as soon as it is taken."""
        return False

    @property
    def trial(self) -> float | None:
        """What the step that comes takes in place of λ where it is `due`, to be scaled to `found` afterwards; None for λ."""
        return None

    def found(self, added: Added) -> float:
        """λ for a step with a `trial`, from what that has added; nothing is to change yet. Zero for none."""
        raise NotImplementedError

    @property
    def waits(self) -> bool:
        """Whether ḡ of the step that comes is asked for, whatever it takes."""
        return False

    @abstractmethod
    def after(self, seen: Seen) -> None:
        """Take in a step, of whatever kind, before its gradient is written; one that is not finite is to be left out."""

    @abstractmethod
    def reset(self) -> None:
        """Begin anew."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, but for the options."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; where it cannot be read, with any error, all is as before."""

    def _within(self, value: float) -> float:
        self.is_bounded = not self.low <= value <= self.high
        return min(max(value, self.low), self.high)


class _Measuring(Rule):
    """A rule with a λ of its own, moved by measurements at least ``every`` steps apart.

    Args:
        share: ‖λ ∇R‖/‖ḡ‖ that it begins with, where no ``start`` is given.

    Attributes:
        value: λ; None as long as there is none.
    """

    value: float | None
    _trial: float | None
    _next: int

    def __init__(self, share: float, every: int, start: float | None, low: float, high: float):
        """Check the options."""
        super().__init__(low, high)
        if not low > 0:
            raise ArgumentError(
                f"low must be above zero, for a penalty that is not taken cannot be measured; got {low}"
            )
        if start is not None and (not is_number(start) or not low <= start <= high):
            raise ArgumentError(f"start must be a number from low = {low} to high = {high}, or None; got {start!r}")
        self.every, self.start = _whole("every", every), None if start is None else float(start)
        self._share = share
        self.reset()

    def reset(self):
        """Begin anew."""
        self.value = self.start
        self._trial = None
        self._next, self.is_bounded = 0, False

    def strength(self, penalty, step):
        """The λ that was last set."""
        return self.value or 0.0

    def due(self, step):
        """From ``every`` steps after the last measurement on, and where there is a trial."""
        return self._trial is not None or step >= self._next

    @property
    def trial(self):
        """Some λ, where there is none yet, or one at which the last measurement would not have been lost."""
        return TRIAL if self.value is None and self._trial is None else self._trial

    def found(self, added):
        """λ, or the first one."""
        log_ratio = added.log_ratio()
        if self.value is None and log_ratio is not None:
            return self._of_share(log_ratio)
        return self.value or 0.0

    def state_dict(self):
        """λ, when to measure, and with what."""
        return {"value": self.value, "next": self._next, "trial": self._trial}

    def load_state_dict(self, state):
        """Go on from a `state_dict`, within the present bounds."""
        value, trial = (None if state[key] is None else _finite(state[key]) for key in ("value", "trial"))
        self._next = int(state["next"])
        self.value, self._trial = None if value is None else self._within(value), trial
        self.is_bounded = self.value in (self.low, self.high) and self.value != self.start

    def _of_share(self, log_ratio: float) -> float:
        """λ of the share, with ‖∇R‖/‖ḡ‖."""
        return self._within(self._share * math.exp(min(-log_ratio, 700.0)))

    def _measured(self, seen: Seen) -> float | None:
        """Log ‖∇R‖/‖ḡ‖ of a step that tells it; of one that should, None, and the next step tries it with another λ."""
        if not seen.is_measured or not seen.is_finite():
            return None
        tried, log_ratio = self.trial or self.value or 0.0, seen.added.log_ratio()
        trial = tried * seen.added.remedy()
        if log_ratio is None and trial != tried and LOW <= trial <= HIGH:
            self._trial = trial
        else:
            self._trial, self._next = None, seen.step + self.every
        return log_ratio


class Share(_Measuring):
    """λ by which the penalty's gradient is a fixed share of the loss's.

        λ = share · exp(−⟨log ‖∇R‖/‖ḡ‖⟩)

    ⟨ ⟩ is a moving average over the steps that are measured; λ is held between them. No unit of the loss or the penalty changes
    what is trained, from the first step on: of a times the loss, λ is 1/a of what it was. As long as nothing is measured, as
    on a first step whose center knows nothing, the penalty is left out.

    Price: a sweep over the parameters on steps that are measured, and a few more on the first; for exact Reg1 about a constant
    center without statistics, which makes no ḡ, one forward-sized product there, of 6. An accelerator is waited for.

    Args:
        share: ‖λ ∇R‖/‖ḡ‖.
        every: steps from one measurement to the next, at least.
        decay: weight of the past in the average, bias-corrected.
        start: λ up to the first measurement, which has a unit; None for that of the share, from the first measurement on.
        low, high: bounds of λ, above zero.
    """

    def __init__(
        self,
        share: float = 0.1,
        every: int = 10,
        *,
        decay: float = 0.8,
        start: float | None = None,
        low: float = LOW,
        high: float = HIGH,
    ):
        """Start with nothing measured."""
        self.share, self._log_ratio = _positive("share", share), _Average(decay, 1)
        super().__init__(self.share, every, start, low, high)

    def reset(self):
        """Begin anew."""
        super().reset()
        self._log_ratio.clear()

    def after(self, seen):
        """Measure, where it is due; a penalty without gradient leaves λ as it is."""
        log_ratio = self._measured(seen)
        if log_ratio is not None:
            self.value = self._of_share(*self._log_ratio.take(log_ratio))

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
    are new to the model, in the first epoch, does L' tell of data that it has not been trained on. Optimizers that rescale
    gradients, as Adam does, or add momentum to them, step along something else than ḡ + λ ∇R, of which the cosine does not
    tell. There is to be one step of the optimizer between two backward calls: of several, outside of a block of `accumulate`,
    ḡ' is at the parameters that ∇R is of.

    Price: a few sweeps over the parameters and a tensor of each parameter's size on one step of ``every``, held until the next
    step; where ḡ would not be made, see `Share`, on both. An accelerator is waited for.

    Args:
        rate: how far log λ moves where the two are parallel.
        every: steps from one pair to the next, at least.
        start: λ at first; None for that at which ‖λ ∇R‖ is 0.01 ‖ḡ‖ on the first step that is measured, as `Share` finds it.
        low, high: bounds of λ, above zero.
    """

    _held: dict[str, Tensor]  # ∇R of the step before

    def __init__(
        self,
        rate: float = 0.2,
        every: int = 5,
        *,
        start: float | None = None,
        low: float = LOW,
        high: float = HIGH,
    ):
        """Start with nothing measured."""
        super().__init__(0.01, every, start, low, high)
        self.rate = _positive("rate", rate)

    def reset(self):
        """Begin anew."""
        super().reset()
        self._held = {}

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
        log_ratio = self._measured(seen)
        if log_ratio is not None:
            self.value = self._of_share(log_ratio) if self.value is None else self.value
            self._held = seen.added.gradient()

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
        start, low, high: λ₁ before B is known, and bounds.

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
        if not is_number(rate) and not callable(rate) and not hasattr(rate, "param_groups"):
            raise ArgumentTypeError(
                f"rate must be an optimizer, a number or a function of the step; got {type(rate).__name__}"
            )
        if hasattr(rate, "param_groups"):
            _check_sgd(rate)
        self.rate, self.scale, self.start = rate, _positive("scale", scale), float(start)
        self.batch_size = None if batch_size is None else _whole("batch_size", batch_size)
        self.measured, self.every = bool(measured), _whole("every", every)
        self._size, self._parts = _Average(decay, 1), _Average(decay, 3)  # B; S, D and Reg1
        self._next = 0
        if not callable(rate):
            self._learning_rate(0)

    def reset(self):
        """Begin anew."""
        self._size.clear()
        self._parts.clear()
        self._next, self.is_bounded = 0, False

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
    return float(group["lr"]) * (1 - group["dampening"]) / (1 - momentum)


AUTO: Callable[[], Rule] = Share  # what "auto" stands for


class _Average:
    """Moving averages of numbers, bias-corrected; of equal ones, that number itself."""

    def __init__(self, decay: float, count: int):
        """Start with none."""
        if not is_number(decay) or not 0 <= decay < 1:
            raise ArgumentError(f"decay must be in [0, 1); got {decay!r}")
        self.decay, self._count = decay, count
        self.clear()

    def clear(self) -> None:
        """Back to none."""
        self.weight, self.values = 0.0, [0.0] * self._count

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
