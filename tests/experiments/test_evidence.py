import math

import pytest
from scipy import stats

from bootgrad.experiments.evidence import Claim, correlation, difference, interval, mean_correlation, within
from bootgrad.intervals import Interval


def test_interval_is_students():
    values = [1.0, 2.0, 4.0, 8.0]
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, loc=3.75, scale=stats.sem(values))
    assert (found.mean, found.n, found.diverged) == (3.75, 4, 0)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_diverged_runs_are_counted_and_shown():
    found = interval([1.0, math.nan, 3.0, math.inf])
    assert (found.mean, found.n, found.diverged) == (2.0, 2, 2)
    assert str(found).endswith("(2 of 4 diverged)")
    nothing = interval([math.nan, math.inf])
    assert nothing.n == 0 and math.isnan(nothing.mean) and str(nothing) == "– (2 of 2 diverged)"


def test_one_value_has_no_interval():
    assert interval([2.0]).low == -math.inf and str(interval([2.0])) == "2"


def test_differences_are_taken_seed_by_seed():
    found = difference([11.0, 21.0, 31.5], [10.0, 20.0, 30.0])
    assert found.mean == pytest.approx(3.5 / 3) and found.low > 0
    assert difference([1.0, math.inf], [0.0, 0.0]).diverged == 1
    with pytest.raises(ValueError, match="longer"):
        difference([1.0], [1.0, 2.0])


def test_correlation_and_its_interval():
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.5, 2.0, 4.5, 4.0]
    reference = stats.pearsonr(x, y)
    found = correlation([*x, math.nan], [*y, 1.0])
    assert found.mean == pytest.approx(reference.statistic) and found.diverged == 1
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert correlation(x, x).low == 1
    with pytest.raises(ValueError, match="at least 4 pairs; got 3"):
        correlation(x[:3], y[:3])


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([1.0, 1.1, 0.9], "holds"), ([-1.0, -1.1, -0.9], "does not"), ([-1.0, 1.0], "unclear"), ([], "unclear")],
)
def test_a_verdict_is_the_side_of_zero(values, verdict):
    assert Claim("it rises", "ours", "rise", interval(values)).verdict == verdict


def test_runs_that_diverged_leave_a_claim_unclear():
    found = difference([2.0] * 5, [1.0, 1.01, *[math.inf] * 3])
    assert found.low > 0 and Claim("it is lower", "ours", "difference", found).verdict == "unclear"


def test_a_mean_of_correlations_stays_below_one():
    x = [1.0, 2.0, 3.0, 4.0, 5.0]
    ys = ([1.0, 2.5, 2.0, 4.5, 4.0], [1.0, 2.0, 3.0, 4.0, 5.5], [2.0, 1.0, 3.0, 4.0, 5.0])
    z = [math.atanh(stats.pearsonr(x, y).statistic) for y in ys]
    low, high = stats.t.interval(0.95, 2, loc=sum(z) / 3, scale=stats.sem(z))
    flat = ([1.0] * 5, x, [1.0, math.nan, math.inf, 1.0, 2.0])  # no variation, r = 1, too few numbers
    found = mean_correlation((x, y) for y in (*ys, *flat))
    assert (found.mean, found.low, found.high) == pytest.approx(tuple(map(math.tanh, (sum(z) / 3, low, high))))
    assert found.high < 1 and (found.n, found.diverged) == (3, 3)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.05, 0.02, "holds"),
        (-0.05, 0.2, "unclear"),
        (0.02, 0.08, "holds"),
        (0.2, 0.3, "does not"),
        (-0.3, -0.2, "does not"),
    ],
)
def test_within_a_margin(low, high, verdict):
    found = within(Interval((low + high) / 2, low, high, 5, 0), 0.1)
    assert Claim("", "", "", found).verdict == verdict and found.low <= found.mean <= found.high
