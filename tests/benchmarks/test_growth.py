"""The bench of growth: rows of known times and bytes, and a run at tiny sizes."""

import csv
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def growth(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    yield importlib.import_module("benchmarks.growth")
    torch.set_num_threads(threads)


def test_rows_of_known_times(growth):
    times = {(0, "plain"): [1.0, 2.0, 3.0], (4, "plain"): [5.0, 6.0, 11.0], (4, "reg1 ema"): [9.0, 14.0, 11.0]}
    each = {(2, "plain"): [2.0, 4.0, 1.0], (4, "plain"): [1.0, 1.0, 2.0], (4, "reg1 ema"): [2.0, 3.0, 2.0]}
    base, *rows = growth.time_rows("depth", times | {(2, "plain"): [5.0] * 3}, each)
    assert (base["size"], base["milliseconds"], base["relative"], base["ratio"]) == (0, "2000.00", "", "")
    found = {(r["size"], r["step"]): (r["microseconds_each"], r["relative"], r["ratio"]) for r in rows}
    assert found[2, "plain"] == ("2000000.0", "2.00", "1.00")
    assert found[4, "plain"] == ("1000000.0", "1.00", "1.00")
    assert found[4, "reg1 ema"] == ("2000000.0", "1.00", "2.00")


def test_rows_of_known_bytes(growth):
    def parameters(hidden):
        return (784 + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * 10

    def bytes_of(hidden, copies):
        return 2**20 + 4 * copies * parameters(hidden)

    rises = {h: {"plain": bytes_of(h, 1), "reg1 zero": 2**22 + bytes_of(h, 3.5)} for h in (64, 8)}
    rows = growth.memory_rows(rises)
    assert [(r["size"], r["step"], r["copies"]) for r in rows] == [
        (8, "plain", ""),
        (8, "reg1 zero", ""),
        (64, "plain", "0.00"),
        (64, "reg1 zero", "2.50"),
    ]
    assert [r["parameters"] for r in rows[::2]] == [parameters(8), parameters(64)]
    last = rows[-1]
    assert float(last["beyond_plain_mib"]) == pytest.approx(4 + 2.5 * parameters(64) / 2**18, abs=0.05)
    assert float(last["ratio"]) == pytest.approx(rises[64]["reg1 zero"] / rises[64]["plain"], abs=0.005)


def test_layers_between_are_all_alike(growth):
    def shapes(n):
        return [m.weight.shape for m in growth.stack(n)[0] if isinstance(m, nn.Conv2d)]

    assert shapes(0) == [(32, 32, 3, 3)] and shapes(3) == 4 * [(32, 32, 3, 3)]
    model, shape = growth.stack(1)
    assert model(torch.zeros(2, *shape)).shape == (2, 10)


def test_a_run_at_tiny_sizes(growth, tmp_path, monkeypatch, capsys):
    asked = []

    def measure_memory(module, step, options, processes):
        asked.append((module, step, tuple(options), processes))
        return 2.0**20 * len(asked)

    monkeypatch.setattr(growth, "measure_memory", measure_memory)
    sizes = ["--batches", "2", "4", "--depths", "1", "2", "--widths", "8", "4", "--batch", "2"]
    short = ["--threads", "1", "--rounds", "1", "--processes", "3", "--csv", str(tmp_path / "growth.csv")]
    growth.main([*sizes, *short])
    with (tmp_path / "growth.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = {"batch": [2, 4], "depth": [0, 1, 2], "width": [4, 8]}
    assert [(r["kind"], int(r["size"]), r["step"]) for r in rows] == [
        (kind, size, step) for kind, sizes in expected.items() for size in sizes for step in growth.STEPS
    ]
    same = ("--width", "8", "--batch", "2", "--threads", "1")
    assert asked[0] == ("benchmarks.growth", "plain", same, 3) and len(asked) == 8
    assert [r["batch"] for r in rows] == 4 * ["2"] + 4 * ["4"] + 12 * ["2"] + 8 * ["2"]
    timed = [r for r in rows if r["kind"] != "width"]
    assert all(float(r["milliseconds"]) > 0 for r in timed)
    assert all(r["relative"] == "1.00" for r in timed if r["size"] == {"batch": "4", "depth": "2"}[r["kind"]])
    printed = capsys.readouterr().out
    assert all(f"{kind}  step" in printed for kind in expected)


def test_memory_comes_from_a_fresh_process(growth, monkeypatch):
    monkeypatch.chdir(ROOT)
    rise = growth.measure_memory("benchmarks.growth", "plain", ["--width", "512", "--batch", "4", "--threads", "1"], 1)
    assert rise >= 4 * sum(p.numel() for p in growth.mlp(512)[0].parameters())  # the gradients
