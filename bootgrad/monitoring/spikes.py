"""Positive quantities that jump, against what they have been lately and how they came there.

    r_t = log v_t − median(log v_{t−5} … log v_{t−1}),    a spike: r_t > max(m, 0) + d · max(1.4826 median |r_s − m|, 0.1)

with m the median of the last 50 r_s. Logarithms, for Γ and losses change by orders of magnitude in a run; against the last few
values, for what falls or rises all the time is far from any longer median. What is not positive has no logarithm and is passed
over. A loss that is not finite is always told of.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from .observation import Flag

RECENT = 5  # observations that a new one is compared with
WINDOW = 50  # such comparisons that count
LEAST = 9  # of them before anything is called unusual
LEAST_SPREAD = 0.1  # of a logarithm

Key = tuple[str, str | None]  # quantity and layer


class Spikes:
    """The recent past of some quantities.

    Args:
        deviations: d, how many robust standard deviations are too many.
    """

    def __init__(self, deviations: float):
        """Nothing is known yet."""
        self.deviations = deviations
        self._past: dict[Key, _Past] = {}

    def take(self, quantities: Mapping[Key, float | None]) -> tuple[Flag, ...]:
        """Compare quantities with their past, which they become part of; those that are None or not positive are left out."""
        flags = []
        for (name, layer), value in quantities.items():
            past = self._past.get((name, layer))
            if name == "loss" and value is not None and not math.isfinite(value):
                flags.append(Flag(name, value, math.exp(past.usual) if past else None, layer))
                continue
            if value is None or not value > 0:
                continue
            past = self._past.setdefault((name, layer), _Past())
            log = math.log(value)
            if past.is_exceeded(log, self.deviations):
                flags.append(Flag(name, value, math.exp(past.usual), layer))
            if math.isfinite(value):
                past.take(log)
        return tuple(flags)

    def state_dict(self) -> list[list[Any]]:
        """The past, to go on from."""
        return [[*key, list(past.recent), list(past.changes)] for key, past in self._past.items()]

    def load_state_dict(self, state: Iterable[Iterable[Any]]) -> None:
        """Go on from a `state_dict`."""
        self._past = {(name, layer): _Past(recent, changes) for name, layer, recent, changes in state}


class _Past:
    """Of one quantity: the last logarithms, and how far each was from those before it."""

    def __init__(self, recent: Iterable[float] = (), changes: Iterable[float] = ()):
        self.recent, self.changes = deque(map(float, recent), RECENT), deque(map(float, changes), WINDOW)

    @property
    def usual(self) -> float:
        return statistics.median(self.recent)

    def is_exceeded(self, log: float, deviations: float) -> bool:
        if len(self.changes) < LEAST:
            return False
        middle = statistics.median(self.changes)
        spread = max(1.4826 * statistics.median(abs(change - middle) for change in self.changes), LEAST_SPREAD)
        return log - self.usual > max(middle, 0.0) + deviations * spread

    def take(self, log: float) -> None:
        if self.recent:
            self.changes.append(log - self.usual)
        self.recent.append(log)
