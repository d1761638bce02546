"""Quantities that jump, against the median of their own recent past.

    log v > m + d · max(1.4826 median |log v_t − m|, 0.1),    m = median log v_t over the last observations

Logarithms, for Γ and losses fall by orders of magnitude in a run: a slow change is none, whatever its size.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping

from .observation import Flag

WINDOW = 50  # observations that count
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
        """Compare quantities with their past, which they become part of; those that are None or zero are left out."""
        flags = []
        for (name, layer), value in quantities.items():
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
        """The median of the past, where a value is far above it."""
        past = list(past)
        if len(past) < LEAST:
            return None
        middle = statistics.median(past)
        spread = 1.4826 * statistics.median(abs(value - middle) for value in past)
        return middle if log > middle + self.deviations * max(spread, LEAST_SPREAD) else None

    def state_dict(self) -> list:
        """The past, to go on from."""
        return [[name, layer, list(past)] for (name, layer), past in self._past.items()]

    def load_state_dict(self, state: list) -> None:
        """Go on from a `state_dict`."""
        self._past = {(name, layer): deque(map(float, past), WINDOW) for name, layer, past in state}
