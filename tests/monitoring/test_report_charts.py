"""Charts: lines, dots and ticks are where the values are, and labels say so."""

import math
import re

import pytest

from bootgrad.monitoring.report.charts import Line, chart, labels, sparkline, thinned

from .pages import Page


def paths(text, kind):
    return [attrs["d"] for attrs in Page(text).all("path") if attrs.get("class", "").startswith(kind)]


def test_a_line_is_where_its_values_are():
    text = chart("c", "title", "unit", [Line("a", [(0, 1.0), (5, math.nan), (10, 3.0), (20, 2.0)])])
    (line, _swatch), (dot,) = paths(text, "line"), paths(text, "dots")
    # 5 % room above and below of 1 … 3, so that 1 is at 400 (1 − 0.1/2.2), and 2 in the middle
    assert line == "M500.0 18.2L1000.0 200.0" and dot == "M0.0 381.8h0"  # of one point a line shows nothing
    ticks = re.findall(r'<span style="top:([\d.]+)%">([^<]+)</span>', text)
    assert {label: float(at) for at, label in ticks}["2"] == 50.0


def test_wide_ranges_are_logarithmic():
    text = chart("c", "title", "unit", [Line("a", [(0, 1.0), (1, 10.0), (2, 100.0)])])
    line = paths(text, "line")[0]
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", line)]
    unitless = Page(chart("c", "title", "", [Line("a", [(0, 1.0), (1, 10.0)])])).texts
    assert (
        "unit, logarithmic" in text
        and "logarithmic" in unitless
        and heights[1] == 200.0
        and heights[0] + heights[2] == 400.0
    )
    assert chart("c", "title", "unit", [Line("a", [(0, math.nan)])]) is None
    assert chart("c", "title", "unit", [Line("a", [(3, 0.0)])]) is not None
    assert sparkline([(0, 1.0)], "label") == "" and "M0.0 " in sparkline([(0, 1.0), (1, 2.0)], "label")


def test_thinned_lines_keep_their_extremes():
    points = [(float(k), float(k % 7)) for k in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[5000] = (5000.0, math.nan)
    few = thinned(points)
    assert len(few) <= 600 and (4321.0, 99.0) in few and few == sorted(few)
    assert min(y for _, y in few) == 0 and thinned(points[:100]) == points[:100]


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.1, 0.2),
        (100.0, 112.5),
        (1.0, 1.0001),
        (1.0, 1.000003),
        (-5.0001, -5.0),
        (123456.0, 123460.0),
        (1e-9, 1.001e-9),
    ],
)
def test_labels_are_where_they_say(low, high):
    """So that no two are alike, either."""
    text = chart("c", "title", "unit", [Line("a", [(0, low), (1, high)])])
    found = re.findall(r'<span style="top:([\d.]+)%">([^<]+)</span>', text)
    superscripts = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-")
    plain = [label.translate(superscripts).replace(",", "").replace("·10", "e") for _, label in found]
    room = 0.05 * (high - low)
    for (at, _), value in zip(found, map(float, plain), strict=True):
        assert float(at) == pytest.approx(100 * (high + room - value) / (high - low + 2 * room), abs=0.5)
    assert len(found) >= 3 and len(set(plain)) == len(found)


def test_labels_of_late_steps_differ():
    steps = [1_000_000, 1_000_001, 1_000_002]
    assert labels(steps, 6) == ["1000000", "1000001", "1000002"] and labels([0, 50, 1000], 6) == ["0", "50", "1000"]
    assert labels([0.1, 0.2], 3) == ["0.1", "0.2"] and labels([0.0001, 1.0, 2 * 10.0**23], 3)[2] == "2·10²³"


def test_noise_of_rounding_is_flat():
    text = chart("c", "title", "unit", [Line("a", [(0, 1.0), (1, 1.0 + 1e-7), (2, 1.0)])])
    assert paths(text, "line")[0] == "M0.0 200.0L500.0 200.0L1000.0 200.0"
    assert "1.05" in text and "--ys:5ch" in text  # room for the longest label
