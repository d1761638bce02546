import json
import math

import pytest

from bootgrad.errors import ArgumentError, DataError
from bootgrad.experiments.search import halve, runs_of_halving
from bootgrad.experiments.study import RECORD, RESULTS, Options, Study
from bootgrad.experiments.table import Table

COLUMNS = ("method", "seed", "loss")


def study(folder, overwrite=False, **options):
    return Study(Options("trial", **options), COLUMNS, folder, overwrite=overwrite)


def test_a_table_reads_back_what_was_written(tmp_path):
    rows = [
        {"method": "sgd", "seed": 0, "loss": 0.1 + 0.2},
        {"method": "a, \"b\"", "seed": -1, "loss": math.inf},
        {"method": "x", "seed": 2, "loss": math.nan},
    ]  # fmt: skip
    Table(COLUMNS, rows).write(tmp_path / "t.csv")
    found = Table.read(tmp_path / "t.csv", COLUMNS)
    assert found.rows[:2] == rows[:2]
    assert isinstance(found.rows[0]["seed"], int) and math.isnan(found.rows[2]["loss"])
    assert found.where(method="sgd").column("loss") == [0.1 + 0.2]
    assert found.values("method") == ["sgd", 'a, "b"', "x"]


@pytest.mark.parametrize("text", ["", "method,seed\n", "method,seed,loss\nsgd,1\n", "method,seed,loss\nsgd,1,2,3\n"])
def test_another_table_is_refused(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match="start anew by --overwrite"):
        Table.read(tmp_path / "t.csv", COLUMNS)


def test_rows_are_computed_once_and_kept(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return [{"seed": seed, "loss": seed / 3} for seed in range(2)]

    first = study(tmp_path).rows({"method": "sgd"}, compute)
    again = study(tmp_path)
    assert again.rows({"method": "sgd"}, compute).rows == first.rows
    assert len(calls) == 1 and again.seconds == pytest.approx(study(tmp_path).seconds)
    assert json.loads((tmp_path / RECORD).read_text())["experiment"]["name"] == "trial"


def test_an_interrupted_study_goes_on_to_the_same_table(tmp_path):
    def run(folder, stop_at=None):
        s = study(folder)
        for method in ("a", "b", "c"):

            def compute(method=method):
                if method == stop_at:
                    raise KeyboardInterrupt
                return [{"seed": k, "loss": ord(method) / (k + 1)} for k in range(3)]

            s.rows({"method": method}, compute)
        return (folder / RESULTS).read_bytes()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", "b")
    assert run(tmp_path / "stopped") == run(tmp_path / "whole")


def test_runs_of_other_options_are_not_mixed(tmp_path):
    study(tmp_path).rows({"method": "sgd"}, lambda: [{"seed": 0, "loss": 1.0}])
    with pytest.raises(ArgumentError, match="holds runs with seeds = 5, not 7: choose another --out"):
        study(tmp_path, seeds=7)
    assert len(study(tmp_path, seeds=7, overwrite=True).table) == 0
    assert len(study(tmp_path, threads=1).table) == 1


def test_a_damaged_record_is_refused(tmp_path):
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(DataError, match="start anew by --overwrite"):
        study(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"), [({"seeds": 1}, "--seeds must be at least 2"), ({"threads": 0}, "--threads")]
)
def test_options_are_checked(options, message):
    with pytest.raises(ArgumentError, match=message):
        Options("trial", **options)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be made"):
        study(tmp_path / "file" / "below")


def test_rows_must_have_the_tables_columns(tmp_path):
    with pytest.raises(ValueError, match="'loss'"):
        study(tmp_path).rows({"method": "sgd"}, lambda: [{"seed": 0}])


def test_halving_keeps_the_best_and_sends_the_diverged_to_the_end(tmp_path):
    columns = ("stage", "lr", "seed", "loss")
    s = Study(Options("trial"), columns, tmp_path)
    budgets = []

    def compute(candidate, budget):
        budgets.append((candidate["lr"], budget))
        loss = math.nan if candidate["lr"] > 5 else (candidate["lr"] - 3) ** 2 / budget
        return {"seed": 0, "loss": loss}

    candidates = [{"lr": lr} for lr in (9, 1, 2, 4, 8, 7)]
    assert halve(s, candidates, compute, score="loss", budgets=(0.5, 1.0)) == {"lr": 2}
    assert budgets == [(lr, 0.5) for lr in (9, 1, 2, 4, 8, 7)] + [(2, 1.0), (4, 1.0)]
    assert len(s.table) == len(budgets) == runs_of_halving(6, 2)
    assert halve(s, candidates, compute, score="loss", budgets=(0.5, 1.0)) == {"lr": 2} and len(budgets) == 8
