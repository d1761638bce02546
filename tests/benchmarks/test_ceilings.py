"""The bench of the CPU's ceilings on tiny layers: its rows are consistent, and a wrong result is not timed."""

import csv
import importlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from bootgrad.ops.linear import LinearProduct
from bootgrad.planning import ConvLayer, LinearLayer

LAYERS = (
    LinearLayer(5, 1, 6, 4),
    LinearLayer(5, 3, 6, 4),
    ConvLayer(5, 3, (7, 7), 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    ConvLayer(5, 4, (7, 7), 6, (3, 3), (2, 2), (1, 1), (1, 1), 2),
)
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")


@pytest.fixture
def ceilings(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    module = importlib.import_module("benchmarks.ceilings")
    monkeypatch.setattr(module, "LAYERS", LAYERS)
    monkeypatch.setattr(module, "MULTIPLY_ADDS", 10_000)
    monkeypatch.setattr(module, "SMALL", 2**12)
    monkeypatch.setattr(module, "LARGE", 2**16)
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)  # which would be for the tests after these, too
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@needs_compiler
def test_rows_of_ceilings_and_of_every_op(ceilings, tmp_path, capsys):
    ceilings.main(["--threads", "1", "2", "--rounds", "1", "--csv", str(tmp_path / "ceilings.csv")])
    with (tmp_path / "ceilings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    printed = capsys.readouterr().out
    for threads in ("1", "2"):
        own = [row for row in rows if row["threads"] == threads]
        rate, *copies = own[:3]
        assert [r["op"] for r in own[:3]] == ["multiply-adds", "copy of 0.00391 MiB", "copy of 0.0625 MiB"]
        assert float(rate["gigaflops"]) > 0 and all(float(c["gigabytes_per_second"]) > 0 for c in copies)
        assert [(r["layer"], r["op"]) for r in own[3:]] == [(str(layer), op) for layer in LAYERS for op in ceilings.OPS]
        assert all(float(r["percent_of_bound"]) >= float(r["percent_of_rate"]) for r in own[3:])
        assert f"{threads} threads" in printed
    assert all(row["path"] in ("", "rank1", "direct", "gram") for row in rows)
    assert {row["path"] for row in rows if row["op"] == "forward, torch"} == {""}
    assert "" not in {row["path"] for row in rows if row["op"] == "the same about a center"}


def test_work_of_known_layers(ceilings):
    linear, _, conv, _ = LAYERS
    unit, entries = 2 * 5 * 49 * 4 * 27, 5 * 3 * 49 + 5 * 4 * 49
    path, work = ceilings.work_of(conv, "input gradient, torch")
    assert (path, work.operations, work.bytes) == ("", unit, 4 * (entries + 4 * 27))
    path, work = ceilings.work_of(conv, "the same about a center")
    assert (path, work.operations, work.bytes) == ("direct", 3 * unit, 4 * (2 * entries + 2 * 4 * 27))
    path, work = ceilings.work_of(linear, "statistics")
    assert (path, work.operations, work.bytes) == ("rank1", 2 * 5 * (6 * 4 + 6 + 4), 4 * (5 * 6 + 5 * 4 + 6 * 4))


def test_percentages_are_of_the_larger_bound(ceilings, monkeypatch):
    layer = LAYERS[2]
    _, work = ceilings.work_of(layer, "forward, torch")

    def forward(rate, cached):
        row = ceilings.op_rows(layer, [1e-3] * len(ceilings.OPS), ceilings.Ceilings(rate, cached, 1.0))[0]
        return float(row["milliseconds"]), float(row["percent_of_rate"]), float(row["percent_of_bound"])

    rate, bandwidth = 1e3 * work.operations, 1e3 * work.bytes
    assert forward(2 * rate, 4 * bandwidth) == (1.0, 50, 50)
    assert forward(4 * rate, 2 * bandwidth) == (1.0, 25, 50)
    monkeypatch.setattr(ceilings, "CACHED", 0)
    assert ceilings.Ceilings(rate, 1.0, bandwidth / 3).seconds(work) == pytest.approx(3e-3)


@needs_compiler
def test_every_chain_is_multiplied_and_added_to(ceilings):
    library = ceilings.compiled()
    entries = ceilings.ctypes.c_int.in_dll(library, "entries").value
    assert entries >= 48
    assert library.multiply_adds(40, 0.25, 3.0) == 4.0 * entries
    first, second = (library.multiply_adds(k, 2.0, 1.0) for k in (0, 1))
    assert second == 2 * first + entries


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_ops_agree_with_plain_torch(ceilings, layer):
    ceilings.check(layer, ceilings.case(layer))


def test_a_wrong_result_is_not_timed(ceilings, monkeypatch):
    right = LinearProduct.jvp
    monkeypatch.setattr(LinearProduct, "jvp", lambda *arguments: 1.01 * right(*arguments))
    layer = LAYERS[1]
    with pytest.raises(SystemExit, match=r"linear 6→4, T = 3: inner products is wrong by 1\.0e-02: not timed"):
        ceilings.check(layer, ceilings.case(layer))
