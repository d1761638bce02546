"""Rules that move a λ of their own by the gradient that the penalty adds: `Share` and `LookAhead`.

Letters: ``ḡ`` the gradient of a batch's mean loss, ``R`` a penalty without λ.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import ArgumentError
from ..methods.choice import is_number
from ..seen import Added, Seen, cosine_of
from ..wrappers import by_names_as_written
from .average import Average, finite_number
from .rule import HIGH, LOW, Rule, positive, whole

TRIAL = 100.0  # where nothing is known; what is too large for a step is not for its measurement


class Measuring(Rule):
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
        self.every, self.start = whole("every", every), None if start is None else float(start)
        self._share = share
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.value = self.start
        self._trial = None
        self._next, self.is_bounded = 0, False

    def strength(self, penalty: str, step: int) -> float:
        """The λ that was last set."""
        return self.value or 0.0

    def due(self, step: int) -> bool:
        """From ``every`` steps after the last measurement on, and where there is a trial."""
        return self._trial is not None or step >= self._next

    @property
    def trial(self) -> float | None:
        """Some λ, where there is none yet, or one at which the last measurement would not have been lost."""
        return TRIAL if self.value is None and self._trial is None else self._trial

    def found(self, added: Added) -> float:
        """λ, or the first one."""
        log_ratio = added.log_ratio()
        if self.value is None and log_ratio is not None:
            return self._clamped(self._of_share(log_ratio))
        return self.value or 0.0

    def state_dict(self) -> dict[str, Any]:
        """λ, when to measure, and with what."""
        return {"value": self.value, "next": self._next, "trial": self._trial}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, within the present bounds."""
        value, trial = (None if state[key] is None else finite_number(state[key]) for key in ("value", "trial"))
        self._next = int(state["next"])
        self.value, self._trial = None if value is None else self._within(value), trial
        self.is_bounded = self.value in (self.low, self.high) and self.value != self.start

    def _of_share(self, log_ratio: float) -> float:
        """λ of the share, with ‖∇R‖/‖ḡ‖, whatever the bounds."""
        return self._share * math.exp(min(-log_ratio, 700.0))

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


class Share(Measuring):
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
        low: the least λ, above zero.
        high: the greatest λ.
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
        self.share, self._log_ratio = positive("share", share), Average(decay, 1)
        super().__init__(self.share, every, start, low, high)

    def reset(self) -> None:
        """Begin anew."""
        super().reset()
        self._log_ratio.clear()

    def after(self, seen: Seen) -> None:
        """Measure, where it is due; a penalty without gradient leaves λ as it is."""
        log_ratio = self._measured(seen)
        if log_ratio is not None:
            self.value = self._within(self._of_share(*self._log_ratio.take(log_ratio)))

    def state_dict(self) -> dict[str, Any]:
        """λ, the average, and when to measure."""
        return super().state_dict() | {"log_ratio": self._log_ratio.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        average = self._log_ratio.read(state["log_ratio"])
        super().load_state_dict(state)
        self._log_ratio.values, self._log_ratio.weight = average


class LookAhead(Measuring):
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
        low: the least λ, above zero.
        high: the greatest λ.
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
        self.rate = positive("rate", rate)

    def reset(self) -> None:
        """Begin anew."""
        super().reset()
        self._held = {}

    @property
    def waits(self) -> bool:
        """For ḡ of the step after one that was measured."""
        return bool(self._held)

    def after(self, seen: Seen) -> None:
        """Compare ∇R of the step before with ḡ, and keep that of this step where it is due."""
        if not (seen.is_measured or self._held) or not seen.is_finite():
            return
        if self._held:
            held, self._held = self._held, {}
            cosine = cosine_of(held, seen.mean)
            if math.isfinite(cosine):
                self.value = self._within((self.value or 0.0) * math.exp(self.rate * cosine))
        log_ratio = self._measured(seen)
        if log_ratio is not None:
            self.value = self._within(self._of_share(log_ratio)) if self.value is None else self.value
            self._held = seen.added.gradient()

    def state_dict(self) -> dict[str, Any]:
        """λ, when to measure, and ∇R where it waits for the next step."""
        return super().state_dict() | {"held": {name: t.clone() for name, t in self._held.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        held = {name: t.clone() for name, t in by_names_as_written(state["held"]).items()}
        super().load_state_dict(state)
        self._held = held
