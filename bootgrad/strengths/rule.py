"""What a rule for λ is: asked before each step, shown the step after it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError
from ..methods.choice import is_number
from ..seen import Added, Seen

LOW, HIGH = 1e-20, 1e20


class Rule(ABC):
    """How λ of one penalty is set; an object for each penalty.

    Args:
        low: the least λ.
        high: the greatest λ.

    Attributes:
        is_taken: whether a regularizer has it, whose λ it is for.
        is_bounded: whether the last λ is one of them, and would have been beyond it; the report then says so.
    """

    is_taken = False
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
        """λ for a step with a `trial`, from what that has added; the rule is to stay as it is. Zero for none.

        Raises:
            NotImplementedError: a rule that tries, and does not say what it finds.
        """
        raise NotImplementedError(f"{type(self).__name__} has a trial: it must define what it has found by it")

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
        return self._clamped(value)

    def _clamped(self, value: float) -> float:
        return min(max(value, self.low), self.high)


def positive(name: str, value: Any) -> float:
    """An option that is to be a finite number above zero."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ArgumentError(f"{name} must be a finite number above zero; got {value!r}")
    return float(value)


def whole(name: str, value: Any) -> int:
    """An option that is to be a whole number above zero."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} must be a whole number of at least 1; got {value!r}")
    return value
