"""The bench of the cost model on rows whose figures are known."""

import importlib
import math
from pathlib import Path

import pytest

from bootgrad.planning import ConvLayer, LinearLayer


@pytest.fixture
def cost_model(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    return importlib.import_module("benchmarks.cost_model")


def test_forty_shapes_of_every_family(cost_model):
    shapes = cost_model.shapes()
    assert len(shapes) == 40 == len({(family, str(layer)) for family, layer in shapes})
    families = {"linear T = 1", "linear", "1×1", "3×3", "5×5", "strided", "grouped", "depthwise", "dilated"}
    assert {family for family, _ in shapes} == families
    assert all(4 <= layer.B <= 128 for _, layer in shapes)
    convolutions = [layer for _, layer in shapes if isinstance(layer, ConvLayer)]
    assert {min(c.S) for c in convolutions} >= {4, 56} and {c.C for c in convolutions} >= {3, 512}
    assert any(c.dilation != (1, 1) for c in convolutions) and any(c.groups == c.C > 1 for c in convolutions)


@pytest.mark.parametrize(
    ("b", "expected"), [([1, 2, 3, 4], 1.0), ([40, 3, 2, 0.1], -1.0), ([1, 2, 4, 3], 0.8), ([2, 1, 4, 3], 0.6)]
)
def test_rank_correlation(cost_model, b, expected):
    assert cost_model.rank_correlation([10, 20, 30, 40], b) == pytest.approx(expected)


@pytest.mark.parametrize(
    "layer",
    [
        LinearLayer(4, 1, 6, 5),
        LinearLayer(4, 6, 5, 4),
        ConvLayer(4, 4, (7, 7), 6, (3, 3), (2, 2), (1, 1), (1, 1), 2),
    ],
)
def test_paths_are_timed_once_they_agree(cost_model, layer, monkeypatch):
    monkeypatch.setattr(cost_model, "HOPELESS", math.inf)
    times = cost_model.measure(layer, 1)
    assert set(times) == {(purpose, path) for purpose in cost_model.PURPOSES for path in layer.paths}
    assert min(times.values()) > 0
    monkeypatch.setattr(cost_model, "HOPELESS", 1.0)
    assert len(cost_model.measure(layer, 1)) == 2


def test_paths_that_disagree_stop_the_bench(cost_model, monkeypatch):
    layer = LinearLayer(4, 6, 5, 4)
    right = cost_model.calls(layer)
    wrong = right | {("grad", "gram"): lambda: (2 * right["grad", "gram"]()[0],)}
    monkeypatch.setattr(cost_model, "HOPELESS", math.inf)
    monkeypatch.setattr(cost_model, "calls", lambda layer: wrong)
    with pytest.raises(SystemExit, match=r"linear 5→4, T = 6: \('grad', 'gram'\) gives other norms"):
        cost_model.measure(layer, 1)


def row(layer, purpose, path, chosen, predicted, microseconds):
    keys = ("family", "layer", "purpose", "path", "chosen", "predicted", "microseconds")
    return dict(zip(keys, ("f", layer, purpose, path, chosen, predicted, microseconds), strict=True))


def test_the_summary_of_known_rows(cost_model):
    rows = [
        row("a", "statistics", "direct", "yes", "10", "1"),
        row("a", "statistics", "gram", "no", "40", "4"),
        row("b", "statistics", "gram", "yes", "100", "40"),
        row("b", "statistics", "direct", "no", "110", "20"),
        row("a", "grad", "direct", "yes", "1000", "90"),
    ]
    chosen, every, statistics, grad, *families = cost_model.summary(rows)
    # Ratios 0.1, 0.4 and 0.09 over their geometric mean.
    worst = 0.4 / (0.1 * 0.4 * 0.09) ** (1 / 3)
    assert f"rank correlation 1.000 over 3, worst ratio {worst:.2f} (b, statistics, gram)" in chosen
    assert "rank correlation 0.900 over 5" in every  # b's two are the other way round
    assert "the quicker one of 1 of 2 pairs that were timed (2 shapes); wrong ones cost 1.414 over all" in statistics
    assert "2.00 at worst" in statistics and "0 of 0 pairs that were timed (1 shapes)" in grad
    assert [line.split()[:3] for line in families[:2]] == [["f", "statistics", "direct"], ["f", "statistics", "gram"]]
