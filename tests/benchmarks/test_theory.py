"""The benches of the theory: solutions that are known, and runs at tiny sizes."""

import importlib
from pathlib import Path

import pytest
import torch

from bootgrad.intervals import interval

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_diagonal_networks_find_the_least_squares_and_the_neighbours_theirs(bench):
    degenerate = bench("degenerate")
    x, y, fresh_x, fresh_y, truth = degenerate.draw(0, 32)
    theta = degenerate.solutions([(x, y, fresh_x, fresh_y, truth)], 1.0, 2500)[0]
    assert theta.shape == (33, 32)
    for i in (None, 0, 17):
        own_x, own_y = x.clone(), y.clone()
        if i is not None:
            own_x[i], own_y[i] = fresh_x[i], fresh_y[i]
        least = torch.linalg.lstsq(own_x, own_y[:, None]).solution[:, 0]
        w = degenerate.weights(theta[0 if i is None else i + 1])
        torch.testing.assert_close(w, least, rtol=1e-3, atol=1e-4)
    model = degenerate.Diagonal(theta[0])
    torch.testing.assert_close(model(x), x @ degenerate.weights(theta[0]))
    found, gap, smallest = degenerate.decompose(theta, x, y, truth)
    samples, targets, *_ = degenerate.draw(1, 100_000)
    losses = (model(samples) - targets).square() / 2
    assert gap == pytest.approx(float((losses.mean() - (model(x) - y).square().mean() / 2).detach()), abs=0.01)
    assert found.share < 0.01 and abs(found.gradient.mean) < 1e-6 and smallest > -1e-6
    cut = degenerate.pruned(theta)
    w = degenerate.weights(cut)
    assert ((w == 0) == (degenerate.weights(theta).abs() < degenerate.THRESHOLD)).all() and (w == 0).any()


def test_rows_of_diagonal_networks(bench, monkeypatch):
    degenerate = bench("degenerate")
    monkeypatch.setattr(degenerate, "ALPHAS", (0.5,))
    rows = degenerate.rows(2, 50)
    assert [(r["samples"], r["case"]) for r in rows] == [(n, c) for n in (32, 12) for c in ("trained", "pruned")]
    assert all(r["seeds"] == 2 and float(r["share"]) > 0 for r in rows)
    parts, gaps = [], []
    for x, y, fresh_x, fresh_y, truth in (degenerate.draw(seed, 32) for seed in range(2)):
        theta = degenerate.solutions([(x, y, fresh_x, fresh_y, truth)], 0.5, 50)[0]
        found, gap, _ = degenerate.decompose(theta, x, y, truth)
        parts.append(found)
        gaps.append(gap)
    for term in ("loss_rise", "replace_one"):
        expected = interval(getattr(part, term).mean - gap for part, gap in zip(parts, gaps, strict=True))
        assert rows[0][f"{term}_less_gap"] == str(expected)


def test_bounds_on_a_short_convex_run(bench, monkeypatch):
    variability = bench("variability")
    monkeypatch.setattr(variability, "REPLACEMENTS", 12)
    found = list(variability.follow("convex", "shuffled", 0, 6, (1, 6)))
    assert [row["step"] for row in found] == [1, 6]
    first, last = found
    assert first["any_order_rho"] == pytest.approx(first["truth"], rel=0.1)  # of 12 z' for each sample
    assert last["any_order_rho"] > last["fresh_batches_rho"] > last["truth"]
    assert 0.9 < last["rho"] < 1
    network = list(variability.follow("network", "fresh", 0, 2, (2,)))
    assert network[0]["truth"] > 0 and network[0]["rho"] > 0.9
