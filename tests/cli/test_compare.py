"""``bootgrad compare``: variants from one seed, side by side."""

import json

import pytest

from bootgrad.cli import main

from .commands import THREADS, read_csv, timeless, train


def test_compare_trains_the_variants_from_one_seed(data, tmp_path, capsys):
    out = tmp_path / "c"
    options = ["--data", data, "--batch-size", "4", "--epochs", "2", "--threads", THREADS, "--reg1", "0.05"]
    options += ["--reg2", "0.02", "--center", "ema", "--out", str(out)]
    assert main(["compare", *options]) == 0
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    rows = read_csv(out / "comparison.csv")
    assert [(row["variant"], row["epoch"]) for row in rows] == [
        (variant, epoch) for variant in ("plain", "Reg1", "Reg1 + Reg2") for epoch in "12"
    ]
    records = {name: json.loads((out / name / "run.json").read_text()) for name in ("plain", "reg1", "reg1_reg2")}
    assert [(r["settings"]["reg1"], r["settings"]["reg2"]) for r in records.values()] == [
        (0, 0),
        (0.05, 0),
        (0.05, 0.02),
    ]
    for row, epoch in zip(rows, [e for r in records.values() for e in r["epochs"]], strict=True):
        assert float(row["test_loss"]) == epoch["test_loss"]
    steps = {name: read_csv(out / name / "run.csv") for name in records}
    losses = [[row["loss"] for row in steps[name]] for name in records]
    assert losses[0][0] == pytest.approx(losses[1][0]) and losses[0][0] == losses[2][0]  # one seed
    assert losses[0][1] != losses[1][1] and losses[1][2] != losses[2][2]  # penalties act
    table = capsys.readouterr().out.partition("\nvariant")[2].splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["plain", "Reg1", "Reg1"]

    before = timeless(read_csv(out / "reg1" / "run.csv"))
    (out / "plain" / "checkpoint.pt").unlink()
    assert main(["compare", *options]) == 2
    captured = capsys.readouterr()
    assert "holds a run already" in captured.err and captured.out == ""  # nothing is trained before all is well
    assert main(["compare", *options, "--resume"]) == 0
    assert timeless(read_csv(out / "reg1" / "run.csv")) == before


def test_compare_goes_on_with_the_settings_of_the_runs_that_are_there(data, tmp_path, capsys):
    penalties = ["--reg1", "0.05", "--reg2", "0.02"]
    options = ["--data", data, "--batch-size", "4", "--threads", THREADS, "--lr", "0.01", "--center", "ema", *penalties]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["compare", *options, "--epochs", "2", "--out", str(whole)]) == 0
    assert main(train(data, parts / "plain", "--epochs", "1", "--lr", "0.01", "--center", "ema")) == 0
    assert main(["compare", "--resume", *penalties, "--epochs", "2", "--out", str(parts)]) == 0
    for name in ("plain", "reg1", "reg1_reg2"):
        expected, got = (json.loads((out / name / "run.json").read_text())["settings"] for out in (whole, parts))
        assert got == expected and got["lr"] == 0.01
    rows, expected = (timeless(read_csv(out / "comparison.csv")) for out in (parts, whole))
    assert rows == expected

    options = ("--reg1", "0.05", "--center", "ema")
    for change, remedy in ((("--lr", "0.5"), "start anew by --overwrite"), (("--epochs", "3"), "give --epochs")):
        lr = () if "--lr" in change else ("--lr", "0.01")
        assert main(train(data, parts / "reg1", "--epochs", "2", *options, *lr, *change, "--overwrite")) == 0
        before = {path: path.read_bytes() for path in parts.rglob("*.*")}
        capsys.readouterr()
        assert main(["compare", "--resume", *penalties, "--out", str(parts)]) == 2
        captured = capsys.readouterr()
        assert f"{parts}/reg1 was trained with {' '.join(change)}, {parts}/plain with" in captured.err
        assert remedy in captured.err and captured.out == ""
        assert {path: path.read_bytes() for path in parts.rglob("*.*")} == before
    assert main(["compare", "--resume", *penalties, "--epochs", "3", "--out", str(parts)]) == 0
