"""Means of measured numbers with their uncertainty.

    mean ± t · s / √n,  t the 97.5 % quantile of Student's t with n − 1 degrees of freedom

Numbers that are not finite are left out of the mean, for it would not exist, and counted beside it.
"""

import functools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

_LEVEL = 0.95
_MANY = 200  # degrees of freedom, from which on the expansion about the normal quantile is right to 1e-7


@dataclass(frozen=True)
class Interval:
    """The mean of ``n`` finite values with its 95 % interval, and how many others there were.

    Of one value the interval is unbounded; of none everything is nan.
    """

    mean: float
    low: float
    high: float
    n: int
    diverged: int = 0

    def __str__(self) -> str:
        """The mean and its interval in three significant digits."""
        if self.n == 0:
            return f"– ({self.diverged} of {self.diverged} diverged)"
        text = f"{self.mean:.3g}"
        if math.isfinite(self.low):
            text += f" [{self.low:.3g}, {self.high:.3g}]"
        return text + (f" ({self.diverged} of {self.n + self.diverged} diverged)" if self.diverged else "")


def interval(values: Iterable[float]) -> Interval:
    """Mean of values, as over seeds, with its 95 % interval.

    Args:
        values: independent ones; nan and infinite ones count as diverged.
    """
    values = list(values)
    finite = [value for value in values if math.isfinite(value)]
    n, diverged = len(finite), len(values) - len(finite)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, diverged)
    _, exponent = math.frexp(max(map(abs, finite)))
    unit = 2.0 ** max(0, exponent - 100)  # exact, and 1 but for numbers whose sum or squares would overflow
    finite = [value / unit for value in finite]
    mean = statistics.fmean(finite) * unit
    half = student(n - 1) * statistics.stdev(finite) / math.sqrt(n) * unit if n > 1 else math.inf
    return Interval(mean, mean - half, mean + half, n, diverged)


@functools.cache
def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t.

        P(|T| ≤ √ν tan φ) = ∫₀^φ cos^{ν−1} / ∫₀^{π/2} cos^{ν−1}

    Args:
        freedom: ν, degrees of freedom, at least 1.
    """
    if freedom > _MANY:
        z = statistics.NormalDist().inv_cdf(0.5 + _LEVEL / 2)
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    low, high = 0.0, math.pi / 2
    whole = _power_of_cosine(high, freedom - 1)
    for _ in range(60):
        middle = (low + high) / 2
        if _power_of_cosine(middle, freedom - 1) < _LEVEL * whole:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _power_of_cosine(phi: float, n: int) -> float:
    """∫₀^φ cosⁿ, from n = 0 or 1 upwards: I_n = cos^{n−1} φ sin φ / n + (n − 1)/n I_{n−2}."""
    value = math.sin(phi) if n % 2 else phi
    for k in range(2 + n % 2, n + 1, 2):
        value = math.cos(phi) ** (k - 1) * math.sin(phi) / k + (k - 1) / k * value
    return value
