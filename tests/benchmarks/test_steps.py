"""The benches of whole steps: rows of known times and bytes, and wrong steps of ranks, which stop before they are timed."""

import csv
import importlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark_of(monkeypatch):
    """A module of benchmarks by name."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_rows_of_known_times_and_bytes(benchmark_of, tmp_path, capsys):
    results = benchmark_of("results")
    times = {"plain": [0.1 * k for k in range(1, 12)], "norms": [0.1 * k * k for k in range(1, 12)]}
    memory = {"plain": 2**21, "norms": 3 * 2**20}
    rows = results.step_rows({"model": "m"}, times, memory)
    for _ in range(2):
        results.tell(tmp_path / "rows.csv", "m, batch 3", rows)
    with (tmp_path / "rows.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert found == [*rows, *rows]
    names = ("step", "milliseconds", "ratio", "ratio_low", "ratio_high", "memory_mib", "memory_ratio")
    assert [[row[name] for name in names] for row in rows] == [
        ["plain", "600.0", "1.00", "1.00", "1.00", "2", "1.00"],
        ["norms", "3600.0", "6.00", "2.00", "10.00", "3", "1.50"],
    ]
    assert all(row["torch"] == torch.__version__ and row["model"] == "m" for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].split() == ["norms", "3600.0", "6.00", "(2.00–10.00)", "3", "1.50"]
    assert lines[1].startswith("m, batch 3, ") and len({len(line) for line in lines[2:5]}) == 1


@pytest.mark.parametrize("fault", ["", "gradient", "norms", "trace", "rows"])
def test_steps_of_ranks_that_differ_are_not_timed(benchmark_of, fault):
    distributed = benchmark_of("distributed")
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(4, 5), torch.randint(3, (4,))
    together, whole = (distributed.make_variants(model, x, y) for _ in range(2))
    right = together["rec.backward"]

    def wrong():
        told = right()
        model.weight.grad[0, 0] *= 1.01 if fault == "gradient" else 1
        norms = told.sq_norms * (1.01 if fault == "norms" else 1)
        trace = told.covariance_trace * (float("nan") if fault == "trace" else 1)
        return SimpleNamespace(sq_norms=norms.flip(0) if fault == "rows" else norms, covariance_trace=trace)

    together["rec.backward"] = wrong
    with pytest.raises(SystemExit, match="not timed") if fault else nullcontext():
        distributed.check(model, together, whole, slice(None))
