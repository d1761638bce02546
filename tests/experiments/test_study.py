import json
import math
import time

import numpy as np
import pytest
import torch

from bootgrad.errors import ArgumentError, DataError
from bootgrad.experiments import study as module
from bootgrad.experiments.search import halve, lowest, means, runs_of_halving
from bootgrad.experiments.study import RECORD, RESULTS, SUMMARY, Options, Study
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
    assert len(calls) == 1
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["experiment"]["name"] == "trial" and record["places"] == again.places and len(again.places) == 1
    assert again.places[0]["versions"]["torch"] == torch.__version__


def test_seconds_are_of_all_runs(tmp_path):
    for method in ("a", "b"):
        study(tmp_path).rows({"method": method}, lambda: time.sleep(0.2) or [{"seed": 0, "loss": 1.0}])
    assert 0.4 <= study(tmp_path).seconds < 2


def test_another_machine_is_listed_beside_the_first(tmp_path, monkeypatch):
    study(tmp_path).rows({"method": "a"}, lambda: [{"seed": 0, "loss": 1.0}])
    monkeypatch.setattr(module, "versions", lambda: {"torch": "9.0", "bootgrad": "9.0"})
    assert len(study(tmp_path).places) == 1  # nothing was computed there
    study(tmp_path).rows({"method": "b"}, lambda: [{"seed": 0, "loss": 1.0}])
    assert [place["versions"]["torch"] for place in study(tmp_path).places] == [torch.__version__, "9.0"]


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
    assert len(study(tmp_path, threads=1).table) == 1
    assert len(study(tmp_path, seeds=7, overwrite=True).table) == 0


def test_what_is_overwritten_is_gone_at_once_and_what_replaces_it_is_gone_on_with(tmp_path):
    study(tmp_path).rows({"method": "old"}, lambda: [{"seed": 0, "loss": 1.0}])
    study(tmp_path, overwrite=True, seeds=3)  # interrupted before its first row
    assert not (tmp_path / RESULTS).exists() and len(study(tmp_path, seeds=3).table) == 0
    study(tmp_path, seeds=3).rows({"method": "new"}, lambda: [{"seed": 0, "loss": 1.0}])
    assert study(tmp_path, seeds=3).table.values("method") == ["new"]


def test_a_folder_without_runs_is_anyones(tmp_path):
    with pytest.raises(DataError, match="there is no data set"):
        study(tmp_path, data="mistyped").images()
    assert len(study(tmp_path, data="digits").table) == 0


def test_a_table_that_nobody_knows_is_left_alone(tmp_path):
    (tmp_path / RESULTS).write_text("mine")
    with pytest.raises(DataError, match="no run.json: choose another --out"):
        study(tmp_path)
    assert (tmp_path / RESULTS).read_text() == "mine"


def test_images_are_those_of_the_runs_before(tmp_path):
    def write(seed):
        draw = np.random.default_rng(seed)
        arrays = {f"x_{part}": draw.integers(0, 255, (20, 8, 8), dtype=np.uint8) for part in ("train", "test")}
        np.savez(tmp_path / "a.npz", **arrays, y_train=np.arange(20) % 2, y_test=np.arange(20) % 2)

    write(0)
    first = study(tmp_path / "out", data=str(tmp_path / "a.npz"))
    images = first.images()
    first.rows({"method": "sgd"}, lambda: [{"seed": 0, "loss": 1.0}])
    again = study(tmp_path / "out", data=str(tmp_path / "a.npz")).images()
    assert torch.equal(images.x_train, again.x_train)
    write(1)
    with pytest.raises(DataError, match="holds runs on other images than --data"):
        study(tmp_path / "out", data=str(tmp_path / "a.npz")).images()
    with pytest.raises(DataError, match="there is no data set"):
        study(tmp_path / "other", data=str(tmp_path / "b.npz")).images()


@pytest.mark.parametrize("value", ["1e3", "nan", "inf", "", "1_000", "07", True, math.nan])
def test_settings_that_would_not_be_known_again_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="words that do not look like them; method is"):
        study(tmp_path).rows({"method": value}, lambda: [{"seed": 0, "loss": 1.0}])


def test_a_damaged_record_is_refused(tmp_path):
    study(tmp_path).rows({"method": "sgd"}, lambda: [{"seed": 0, "loss": 1.0}])
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
    assert halve(s, [{"lr": 9}], compute, score="loss") == {"lr": 9} and len(budgets) == 8  # nothing to choose from
    assert runs_of_halving(1) == 0


def test_the_lowest_of_a_grid_has_no_run_that_diverged():
    losses = {(0.1, 1): [3.0, 5.0], (0.2, 1): [1.0, math.nan], (0.1, 2): [4.5, 3.0], (0.2, 2): [0.0, math.inf]}
    rows = [{"lr": lr, "k": k, "loss": loss} for (lr, k), found in losses.items() for loss in found]
    table = Table(("lr", "k", "loss"), rows)
    assert lowest(table, ("lr", "k"), "loss") == {"lr": 0.1, "k": 2}
    assert means(table, ("k",), "loss") == {(1,): math.inf, (2,): math.inf}
    assert means(table.where(lr=0.1), ("k",), "loss") == {(1,): 4.0, (2,): 3.75}


def test_the_folder_of_a_training_run_is_left_alone(tmp_path):
    (tmp_path / "run.csv").write_text("step,loss\n")
    (tmp_path / RECORD).write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="holds a run of bootgrad train, whose run.json would be replaced"):
            study(tmp_path, overwrite=overwrite)
    assert (tmp_path / RECORD).read_text() == "{}"


def test_starting_anew_removes_the_page_of_what_was_there(tmp_path):
    study(tmp_path)
    (tmp_path / SUMMARY).write_text("old")
    study(tmp_path)
    assert (tmp_path / SUMMARY).exists()
    study(tmp_path, overwrite=True)
    assert not (tmp_path / SUMMARY).exists()
