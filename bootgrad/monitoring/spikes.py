"""Positive quantities that jump, against the median of their own past.

    log v > max(m, m₅) + d · max(1.4826 median |log v_t − m|, 0.1)

with m the median of log v_t over the last 50 observations and m₅ that of the last 5. Logarithms, for Γ and losses change by
orders of magnitude in a run; the last few, for what rises slowly is above its long median all the time. What is not positive
has no logarithm and is passed over. A loss that is not finite is always told of.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from .observation import Flag

WINDOW = 50  # observations that count
RECENT = 5  # of these
LEAST = 10  # of them before anything is called unusual
LEAST_SPREAD = 0.1  # of a logarithm

Key = tuple[str, str | None]  # quantity and layer


class Spikes:
    """The recent past of some quantities.

    Args:
        deviations: d, how many robust standard deviations above the median are too many.
    """

    def __init__(self, deviations: float):
        """Nothing is known yet."""
        self.deviations = deviations
        self._past: dict[Key, deque[float]] = {}

    def take(self, quantities: Mapping[Key, float | None]) -> tuple[Flag, ...]:
        """Compare quantities with their past, which they become part of; those that are None or not positive are left out."""
        flags = []
        for (name, layer), value in quantities.items():
            if name == "loss" and value is not None and not math.isfinite(value):
                past = self._past.get((name, layer))
                flags.append(Flag(name, value, math.exp(_usual(past)) if past else None, layer))
                continue
            if value is None or not value > 0:
                continue
            past = self._past.setdefault((name, layer), deque(maxlen=WINDOW))
            usual = self._exceeded(past, math.log(value))
            if usual is not None:
                flags.append(Flag(name, value, math.exp(usual), layer))
            if math.isfinite(value):
                past.append(math.log(value))
        return tuple(flags)

    def _exceeded(self, past: Iterable[float], log: float) -> float | None:
        """What is usual, where a value is far above it."""
        past = list(past)
        if len(past) < LEAST:
            return None
        middle = statistics.median(past)
        spread = max(1.4826 * statistics.median(abs(value - middle) for value in past), LEAST_SPREAD)
        usual = _usual(past)
        return usual if log > usual + self.deviations * spread else None

    def state_dict(self) -> list[list[Any]]:
        """The past, to go on from."""
        return [[name, layer, list(past)] for (name, layer), past in self._past.items()]

    def load_state_dict(self, state: Iterable[Iterable[Any]]) -> None:
        """Go on from a `state_dict`."""
        self._past = {(name, layer): deque(map(float, past), WINDOW) for name, layer, past in state}


def _usual(past: Iterable[float]) -> float:
    """The logarithm of what is usual: the median, or that of the last few, where it is higher."""
    past = list(past)
    return max(statistics.median(past), statistics.median(past[-RECENT:]))
