"""Quantiles and intervals."""

import math

import pytest
from scipy import stats

from bootgrad.intervals import interval, student


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30, 199, 200, 201, 1000, 10**6])
def test_quantiles_are_scipy_s(freedom):
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-6)


def test_means_and_intervals():
    found = interval([1.0, 2.0, 4.0, math.nan, math.inf])
    half = stats.t.ppf(0.975, 2) * (7 / 3) ** 0.5 / 3**0.5
    assert (found.n, found.diverged) == (3, 2)
    assert (found.low, found.mean, found.high) == pytest.approx((7 / 3 - half, 7 / 3, 7 / 3 + half))
    assert "(2 of 5 diverged)" in str(found)
    assert interval([3.0]).high == math.inf and math.isnan(interval([]).mean)


def test_numbers_near_the_largest_do_not_overflow():
    found = interval([1e308, 1e308])
    assert (found.low, found.mean, found.high) == (1e308, 1e308, 1e308)
    found = interval([1.5e308, -1.5e308, 0.0])
    assert (found.low, found.mean, found.high, found.n) == (-math.inf, 0.0, math.inf, 3)
    small, large = interval([1.0, 2.0, 4.0]), interval([2.0**600, 2.0**601, 2.0**602])
    assert (large.low, large.mean, large.high) == tuple(2.0**600 * v for v in (small.low, small.mean, small.high))
    assert interval([1e-300, 3e-300]).mean == pytest.approx(2e-300)
