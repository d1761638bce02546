"""Moving averages of numbers that rules measure."""

import math
from typing import Any

from ..errors import ArgumentError
from ..methods.choice import is_number


class Average:
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
        weight, *values = map(finite_number, state)
        if len(values) != len(self.values) or not 0 <= weight <= 1:
            raise ValueError(f"an average has a weight and {len(self.values)} numbers; got {state!r}")
        return values, weight


def finite_number(value: Any) -> float:
    """A stored number; raises ValueError where it is not finite."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} in the place of a finite number")
    return number
