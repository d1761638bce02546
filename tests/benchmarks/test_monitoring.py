"""The benches of monitoring: ratios of times that are known, correlations that are, and runs at tiny sizes."""

import importlib
import math
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_ratios_are_those_of_sums_and_of_kinds_of_steps(bench):
    plain = [(1.0, 2.0)] * 8
    watched = [(3.0, 4.0), (1.0, 2.0), (3.0, 4.0), (1.0, 2.0), (1.5, 2.0), (1.0, 2.0), (2.5, 4.0), (1.0, 2.0)]
    found = bench("monitoring").figures(watched, plain, 2)  # steps 0, 2, 4, 6, of which all but the third check
    expected = {"run": "1.750", "run_clock": "1.375", "watched": "1.500", "checked": "3.000", "plain_ms": "1000.0"}
    assert found == expected
    unwatched = bench("monitoring").figures(plain, plain, None)
    assert unwatched == {"run": "1.000", "run_clock": "1.000", "watched": "", "checked": "", "plain_ms": "1000.0"}


def test_every_way_is_measured(bench, tmp_path):
    rows = bench("monitoring").rows("mixed", 4, 3, tmp_path)
    assert [row["step"] for row in rows] == ["plain", "plain again", "every=50", "every=1", "every=1, normalization"]
    assert rows[0]["run"] == "1.000" and all(float(row["run"]) > 0 for row in rows)
    assert [bool(row["watched"]) for row in rows] == [False, False, False, True, True]
    assert len((tmp_path / "every=1.jsonl").read_text().splitlines()) == 3


def test_correlations_of_known_series(bench):
    track = bench("normalization_track")
    steps = torch.arange(200, dtype=torch.float64)
    trend, noise = steps / 20, torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (trend + noise).exp().tolist()
    same, left_out = track.correlations([*zip(x, (2 * (trend + noise)).exp().tolist(), strict=True), (1.0, math.inf)])
    assert left_out == 1 and same == pytest.approx({"whole": 1.0, "about_trend": 1.0, "slope": 2.0})
    trend_alone, _ = track.correlations(list(zip(x, (trend - noise).exp().tolist(), strict=True)))
    assert trend_alone["whole"] > 0.5 and trend_alone["about_trend"] == pytest.approx(-1, abs=0.01)


def test_both_models_are_followed(bench):
    track = bench("normalization_track")
    for name in track.MODELS:
        seen = list(track.follow(name, 0, 5))
        assert len(seen) == 2
        for row in seen:
            of_norms, whole = row["trace"]
            assert 0 < of_norms < whole
