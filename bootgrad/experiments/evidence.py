"""What measured numbers say of a claim: means over seeds with their uncertainty, and a verdict.

    mean ± t · s / √n,  t the 97.5 % quantile of Student's t with n − 1 degrees of freedom

Runs that diverged have no finite number. They are left out of the mean, for it would not exist, and counted beside it.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..intervals import Interval, interval


def difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Mean of ``first − second``, seed by seed, with its 95 % interval.

    Args:
        first: one value per seed.
        second: likewise, of the same seeds in the same order.
    """
    return interval(a - b for a, b in zip(first, second, strict=True))


def correlation(x: Sequence[float], y: Sequence[float]) -> Interval:
    """Pearson's correlation of two series, with its 95 % interval by Fisher's transformation.

    Pairs without a finite number are left out, and counted as diverged.

    Raises:
        ValueError: fewer than four pairs, or a series without variation.
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(pairs) < 4:
        raise ValueError(f"a correlation with an interval needs at least 4 pairs; got {len(pairs)}")
    r = max(-1.0, min(1.0, statistics.correlation(*zip(*pairs, strict=True))))
    if abs(r) == 1:
        return Interval(r, r, r, len(pairs), len(x) - len(pairs))
    half = 1.959964 / math.sqrt(len(pairs) - 3)
    z = math.atanh(r)
    return Interval(r, math.tanh(z - half), math.tanh(z + half), len(pairs), len(x) - len(pairs))


def mean_correlation(pairs: Iterable[tuple[Sequence[float], Sequence[float]]]) -> Interval:
    """Mean of correlations, one of each seed, with its 95 % interval: of atanh r, taken back.

    Args:
        pairs: two series for each seed; those that have no correlation between −1 and 1 count as diverged.
    """
    found = []
    for x, y in pairs:
        try:
            found.append(math.atanh(correlation(x, y).mean))
        except ValueError:
            found.append(math.nan)
    z = interval(found)
    return Interval(math.tanh(z.mean), math.tanh(z.low), math.tanh(z.high), z.n, z.diverged)


def within(found: Interval, margin: float) -> Interval:
    """``margin − |x|`` for an interval of x: above zero as a whole where all of it lies between −margin and margin."""
    sizes = sorted((abs(found.low), abs(found.high)))
    nearest = 0.0 if found.low <= 0 <= found.high else sizes[0]
    return Interval(margin - abs(found.mean), margin - sizes[1], margin - nearest, found.n, found.diverged)


@dataclass(frozen=True)
class Claim:
    """A statement that numbers can contradict.

    Attributes:
        text: the statement.
        source: the section of the paper that it is from, or "ours".
        quantity: what was measured, so stated that it is above zero where the statement is true.
        found: its mean and interval over seeds.
    """

    text: str
    source: str
    quantity: str
    found: Interval

    @property
    def verdict(self) -> str:
        """``holds`` or ``does not`` where the whole interval is on one side of zero, else ``unclear``.

        It is unclear, too, where runs diverged: the interval is that of the others, which are chosen by it.
        """
        if self.found.diverged:
            return "unclear"
        if self.found.low > 0:
            return "holds"
        return "does not" if self.found.high < 0 else "unclear"
