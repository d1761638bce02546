"""``bootgrad train``: what it writes, and how it ends."""

import importlib.util
import io
import json
import math
import os
import re
import sys

import pytest
import torch

import bootgrad
from bootgrad.cli import main
from bootgrad.training import loop
from bootgrad.training.settings import Settings

from .commands import THREADS, read_csv, train


def test_train_writes_a_table_a_csv_a_json_and_a_picture(data, tmp_path, capsys):
    out = tmp_path / "deep" / "run"
    assert main(train(data, out, "--epochs", "3", "--reg1", "0.05", "--center", "ema", "--seed", "4")) == 0
    assert sorted(os.listdir(out)) == ["checkpoint.pt", "run.csv", "run.json", "run.png"]

    rows = read_csv(out / "run.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert [int(row["epoch"]) for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished" and record["steps"] == 12 and record["seed"] == 4
    assert (
        record["settings"]
        == Settings(data=data, reg1=0.05, center="ema", epochs=3, batch_size=4, seed=4, threads=int(THREADS)).as_dict()
    )
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["bootgrad"] == bootgrad.__version__
    assert record["device"]["device"] == "cpu" and record["device"]["threads"] == int(THREADS)
    assert record["data"] | {"fingerprint": 0} == {
        "image_shape": [1, 8, 6], "classes": 3, "train": 17, "test": 9, "fingerprint": 0,
    }  # fmt: skip
    for k, epoch in enumerate(record["epochs"]):
        own = rows[4 * k : 4 * k + 4]
        assert epoch["train_loss"] == pytest.approx(sum(float(r["loss"]) for r in own) / 4, rel=1e-12)
        assert epoch["covariance_trace"] == pytest.approx(sum(float(r["covariance_trace"]) for r in own) / 4, rel=1e-12)
        assert epoch["test_loss"] == float(own[-1]["test_loss"])
        assert epoch["test_accuracy"] == float(own[-1]["test_accuracy"])
        assert [r["test_loss"] for r in own[:-1]] == [""] * 3
    times = record["seconds_per_step"]
    assert times["pairs"] == 3 and times["ratio"] == pytest.approx(times["this"] / times["plain"])

    lines = capsys.readouterr().out.splitlines()
    header = next(k for k, line in enumerate(lines) if line.startswith("epoch"))
    assert lines[header].split("  ")[0] == "epoch"
    for line, epoch in zip(lines[header + 1 : header + 4], record["epochs"], strict=True):
        number, train_loss, test_loss, accuracy, percent, gamma, *_ = line.split()
        assert int(number) == epoch["epoch"] and percent == "%"
        assert float(train_loss) == pytest.approx(epoch["train_loss"], rel=1e-3)
        assert float(test_loss) == pytest.approx(epoch["test_loss"], rel=1e-3)
        assert float(accuracy) == pytest.approx(100 * epoch["test_accuracy"], abs=0.01)
        assert float(gamma) == pytest.approx(epoch["covariance_trace"], rel=1e-3)
    assert "λ₁ = 0.05, λ₂ = 0, center ema" in lines[0] and "17 + 9 images 8×6×1, 3 classes" in lines[0]


def test_a_run_that_is_overwritten_leaves_nothing_behind(data, tmp_path, monkeypatch):
    assert main(train(data, tmp_path / "run", "--epochs", "1")) == 0

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "run_epoch", killed)
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--epochs", "2"]) == 130
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint.pt", "run.csv", "run.json", "run.png"]
    assert main(train(data, tmp_path / "run", "--overwrite")) == 130
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint.pt", "run.csv"]
    assert read_csv(tmp_path / "run" / "run.csv") == []


def test_too_little_memory_is_said_in_one_line(data, tmp_path, monkeypatch, capsys):
    def huge(shape, classes):
        return torch.nn.Linear(1 << 50, classes)

    def full(self, x, y):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for change in ((loop, "reference_cnn", huge), (loop.Trainer, "_take_step", full)):
        with monkeypatch.context() as context:
            context.setattr(*change)
            assert main(train(data, tmp_path / "run", "--overwrite")) == 2
        expected = "there is too little memory for this run: lower --batch-size, or give --data smaller images\n"
        assert capsys.readouterr().err.endswith(f"bootgrad: error: {expected}")


def test_a_diverging_run_ends_in_words_and_keeps_what_was_measured(data, tmp_path, capsys):
    assert main(train(data, tmp_path / "run", "--optimizer", "sgd", "--lr", "1e30")) == 2
    assert re.search(r"error: the loss became infinite or NaN at step [23] of epoch 1", capsys.readouterr().err)
    assert math.isfinite(float(read_csv(tmp_path / "run" / "run.csv")[0]["loss"]))


def test_missing_extras_are_named(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tqdm" else find(name))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "bootgrad: error: this command needs tqdm: pip install 'bootgrad[cli]'\n"


def test_check_compares_with_autograd_first(data, tmp_path, capsys):
    assert main(train(data, tmp_path / "run", "--epochs", "1", "--check")) == 0
    out = capsys.readouterr().out
    assert out.index("bootgrad agrees with plain autograd on 4 samples") < out.index("epoch  ")


def test_a_terminal_without_greek_gets_question_marks(tmp_path, data, monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "ascii"))
    assert main(train(data, tmp_path / "run", "--epochs", "1")) == 0
    assert b"accuracy           ?  noise scale" in content.getvalue() and b"images 8?6?1" in content.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [{}, {"reg1": "0.01"}, {"reg1": "0.01", "reg2": "0.03"}])
def test_the_digits_are_learned(tmp_path, penalty):
    options = [word for name, value in penalty.items() for word in (f"--{name}", value)]
    assert main(["train", "--center", "ema", "--epochs", "12", "--out", str(tmp_path / "run"), *options]) == 0
    final = json.loads((tmp_path / "run" / "run.json").read_text())["epochs"][-1]
    assert final["test_accuracy"] > 0.95 and final["train_loss"] < 0.2


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_the_folder_of_an_experiment_is_left_alone(data, tmp_path, capsys, options):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("results.csv", "run.json"):
        (out / name).write_text("kept")
    assert main(train(data, out, "--epochs", "1", *options)) == 2
    assert "holds a bootgrad experiment, whose run.json would be replaced" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in out.iterdir()} == {"results.csv": "kept", "run.json": "kept"}
