"""The command line, as a user meets it: what it writes, what it says to mistakes, and how it stops and goes on."""

import csv
import importlib.util
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bootgrad
from bootgrad.cli import main
from bootgrad.training import checkpoint, loop, run
from bootgrad.training.settings import ESTIMATOR, Settings

THREADS = str(torch.get_num_threads())
MODEL = """
from torch import nn
def make_model():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
def fails():
    raise LookupError("no weights here")
def number():
    return 7
def words():
    return nn.Sequential(nn.Embedding(5, 4).requires_grad_(False), nn.Flatten(), nn.Linear(12, 2))
def double():
    return make_model().double()
constant = 3
"""


@pytest.fixture
def data(tmp_path):
    """The path of an NPZ file with 17 + 9 images of 8×6 pixels in 3 classes."""
    rng = np.random.default_rng(5)
    np.savez(
        tmp_path / "images.npz",
        x_train=rng.integers(0, 256, (17, 8, 6), dtype=np.uint8),
        y_train=np.arange(17) % 3,
        x_test=rng.integers(0, 256, (9, 8, 6), dtype=np.uint8),
        y_test=np.arange(9) % 3,
    )
    return str(tmp_path / "images.npz")


def train(data, out, *options):
    return ["train", "--data", data, "--out", str(out), "--batch-size", "4", "--threads", THREADS, *options]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def timeless(rows):
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


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


def test_resume_goes_on_to_the_same_numbers(data, tmp_path, capsys):
    options = ("--reg1", "0.05", "--reg2", "0.02", "--center", "batch_mean,window")
    assert main(train(data, tmp_path / "whole", "--epochs", "3", *options)) == 0
    assert main(train(data, tmp_path / "parts", "--epochs", "1", *options)) == 0
    assert main(["train", "--resume", "--out", str(tmp_path / "parts"), "--epochs", "2"]) == 0
    assert main(["train", "--resume", str(tmp_path / "parts" / "checkpoint.pt"), "--epochs", "3"]) == 0
    whole, parts = (timeless(read_csv(tmp_path / name / "run.csv")) for name in ("whole", "parts"))
    assert whole == parts and len(whole) == 12
    models = [checkpoint.read(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "parts")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert "going on after step 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        "--method finite_difference --epsilon 0.001",
        "--method random_signs --probes 2 --derivative finite_difference --every 2",
        "--method auto --fraction 0.5",
    ],
)
def test_estimators_are_stored_and_gone_on_with(data, tmp_path, capsys, options):
    options = ("--reg1", "0.05", *options.split())
    given = {option[2:]: value for option, value in zip(options[::2], options[1::2], strict=True)}
    assert main(train(data, tmp_path / "whole", "--epochs", "2", *options)) == 0
    stored = json.loads((tmp_path / "whole" / "run.json").read_text())["settings"]
    assert {name: str(stored[name]) for name in given} == given
    line = capsys.readouterr().out.splitlines()[0]
    assert all(f", {name} {value}" in line for name, value in given.items() if name != "reg1")
    assert main(train(data, tmp_path / "parts", "--epochs", "1", *options)) == 0
    assert main(["train", "--resume", "--out", str(tmp_path / "parts"), "--epochs", "2"]) == 0
    whole, parts = (timeless(read_csv(tmp_path / name / "run.csv")) for name in ("whole", "parts"))
    assert whole == parts and len(whole) == 8
    assert main(["train", "--resume", "--out", str(tmp_path / "parts"), "--method", "exact"]) == 2
    assert f"--method exact differs from the checkpoint's {given['method']}" in capsys.readouterr().err


def test_a_checkpoint_of_before_there_were_estimators_goes_on(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(train(data, out, "--epochs", "1", "--reg1", "0.05")) == 0
    state = checkpoint.read(out / "checkpoint.pt")
    for name in ESTIMATOR:
        del state["settings"][name]
    checkpoint.save(out / "checkpoint.pt", state)
    assert main(["train", "--resume", "--out", str(out), "--fraction", "0.5"]) == 2
    assert "--fraction 0.5 differs from the checkpoint's 1.0" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(out), "--epochs", "2"]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["steps"] == 8 and record["settings"]["method"] == "exact"
    del state["settings"]["lr"]
    checkpoint.save(out / "checkpoint.pt", state)
    assert main(["train", "--resume", "--out", str(out)]) == 2
    assert "the checkpoint's settings are not those of bootgrad train" in capsys.readouterr().err


def start(*arguments):
    """The command line in a process of its own, which SIGINT reaches whatever started the tests."""
    code = "import sys; from bootgrad.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(Path(bootgrad.__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on(data, tmp_path):
    epochs, out = "60", tmp_path / "run"
    process = start(*train(data, out, "--epochs", epochs, "--reg1", "0.05", "--center", "ema"))
    try:
        for line in process.stdout:
            if re.match(r"[36] ", line):
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "interrupted" and 12 <= record["steps"] < 240
    message = (
        f"interrupted after step {record['steps']}; the checkpoint is {out}/checkpoint.pt: go on with bootgrad train"
    )
    assert message in errors and "Traceback" not in errors

    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert main(train(data, tmp_path / "whole", "--epochs", epochs, "--reg1", "0.05", "--center", "ema")) == 0
    whole, parts = (timeless(read_csv(path / "run.csv")) for path in (tmp_path / "whole", out))
    assert len(whole) == 240 and whole == parts


def test_the_first_ctrl_c_is_noted_and_the_second_acts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with run.Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert interruption.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
        with run.Interruption():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_hasty_ctrl_c_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "bootgrad: interrupted\n"


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


def test_resuming_elsewhere_spares_the_run_that_is_there(data, tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    assert main(train(data, a, "--epochs", "1", "--seed", "1")) == 0
    assert main(train(data, b, "--epochs", "2", "--seed", "2")) == 0
    before = {path: path.read_bytes() for path in b.iterdir()}
    resume = ["train", "--resume", str(a / "checkpoint.pt"), "--epochs", "2", "--out", str(b)]
    assert main(resume) == 2
    assert f"--out {b} holds a run already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in b.iterdir()} == before
    assert main([*resume, "--overwrite"]) == 0
    record = json.loads((b / "run.json").read_text())
    assert record["seed"] == 1 and len(record["epochs"]) == 2
    assert main(["train", "--resume", "--overwrite", "--out", str(b)]) == 2
    assert "--overwrite would replace the run in" in capsys.readouterr().err
    assert main(["train", "--resume", str(b / ".." / "b" / "checkpoint.pt"), "--out", str(b)]) == 0


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


def test_resuming_keeps_what_the_steps_cost(data, tmp_path):
    def cost():
        return json.loads((tmp_path / "run" / "run.json").read_text())["seconds_per_step"]

    assert main(train(data, tmp_path / "run", "--epochs", "2")) == 0
    before = cost()
    assert before["pairs"] == 2
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0  # nothing is left to do
    assert cost() == before
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--epochs", "3"]) == 0
    assert cost()["pairs"] == 3


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


MISTAKES = {
    "": "the following arguments are required: COMMAND",
    "trian": "invalid choice: 'trian'",
    "train --bogus": "unrecognized arguments: --bogus",
    "train --epoch 3": "unrecognized arguments: --epoch 3",
    "train extra": "unrecognized arguments: extra",
    "train --epochs many": "argument --epochs: invalid int value: 'many'",
    "train --epochs": "argument --epochs: expected one argument",
    "train --epochs 0": "--epochs must be a whole number of at least 1; got 0",
    "train --reg1 -0.1": "--reg1 must be a finite number of at least 0; got -0.1",
    "train --reg1 nan": "--reg1 must be a finite number of at least 0; got nan",
    "train --reg2 inf": "--reg2 must be a finite number of at least 0; got inf",
    "train --reg2 0.1": "--reg2 about the batch mean is identically zero",
    "train --center mean": "--center must be one of batch_mean, zero, ema, window",
    "train --method lion": "--method must be one of exact, finite_difference, random_signs, auto; got 'lion'",
    "train --reg1 0.1 --fraction 0": "--fraction must be a number in (0, 1], a share of the batch; got 0.0",
    "train --reg1 0.1 --every 0": "--every must be a whole number of at least 1",
    "train --reg1 0.1 --probes 2": "--probes and derivative are options of method",
    "train --every half": "argument --every: invalid int value: 'half'",
    "train --optimizer lion": "--optimizer must be one of adam, sgd; got lion",
    "train --device tpu": "--device must be cpu, cuda or cuda:N; got 'tpu'",
    "train --device cuda:77": "--device cuda:77: torch sees",
    "train --data nowhere.npz": "there is no data set 'nowhere.npz'",
    "train --data torchvision:ImageNet": "torchvision:NAME takes MNIST",
    "train --batch-size 100000": "--batch-size 100000 is larger than the training set of 1437 images",
    "train --resume nowhere.pt": "there is no checkpoint nowhere.pt",
    "train --lr 1e39": "--lr must be so small that float32 holds lr / (1 − momentum); got 1e+39",
    "train --out /dev/null/x --train-size 128": "--out /dev/null/x cannot be made or entered",
    "compare --reg1 0.1": "a comparison needs --reg1 and --reg2 above 0, for the variants that have them; got 0.1 and 0",
    "compare --reg1 0.1 --reg2 0.1": "--reg2 about the batch mean is identically zero",
    "compare --reg1 0.1 --reg2 0.1 --center ema --method lion": "--method must be one of",
    "compare --resume --overwrite": "not allowed with argument",
    "compare --resume here": "unrecognized arguments: here",
    "plan": "the following arguments are required: FILE.py:FUNCTION, --input",
    "plan nowhere.py:f --input 3": "there is no Python file 'nowhere.py'",
    "plan model.py --input 3": "must be given as FILE.py:FUNCTION; got 'model.py'",
    "plan model.py:nothing --input 3": "model.py has no function 'nothing'",
    "plan model.py:constant --input 3": "must return a torch.nn.Module",
    "plan model.py:number --input 3": "must return a torch.nn.Module; got int",
    "plan model.py:fails --input 3": "could not be run (LookupError: no weights here)",
    "plan model.py:make_model --input 1x0": "--input must be sizes with x between, such as 1x28x28; got '1x0'",
    "plan model.py:make_model --input 3x6x6": "fails on an input (128, 3, 6, 6) of float32 (RuntimeError: ",
    "plan model.py:words --input 3": "give --input the shape of one sample, and --dtype its type",
    "plan model.py:double --input 1x6x6": "give --input the shape of one sample, and --dtype its type",
    "plan model.py:make_model --input 3 --dtype complex": "argument --dtype: invalid choice: 'complex'",
    "plan model.py:make_model --input 1x6x6 --batch 0": "--batch must be a whole number",
    "plan model.py:make_model --input 1x6x6 --device tpu": "argument --device: invalid choice: 'tpu'",
    "plan model.py:make_model --input 1x6x6 --precision int64": "argument --precision: invalid choice: 'int64'",
    "info --x": "unrecognized arguments: --x",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_get_one_line_and_exit_code_2(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("model.py").write_text(MODEL)
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("bootgrad: error: ") and captured.err.count("\n") == 1
    assert MISTAKES[command] in captured.err
    assert captured.out == "" and os.listdir() == ["model.py"]


def test_mistakes_about_an_existing_run(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(train(data, out, "--epochs", "1")) == 0
    before = (out / "run.csv").read_bytes()
    other = tmp_path / "other.npz"
    np.savez(other, **changed(data))
    for arguments, message in (
        (train(data, out), f"--out {out} holds a run already: go on with it by --resume"),
        (["train", "--resume", "--out", str(out), "--lr", "0.5"], "--lr 0.5 differs from the checkpoint's 0.001"),
        (["train", "--resume", "--out", str(out), "--data", "digits"], "the checkpoint is of another model: 9.weight"),
        (["train", "--resume", "--out", str(out), "--data", str(other)], "was trained on other data than"),
        (["train", "--resume", data], "is not a checkpoint|no checkpoint that can be read"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        assert re.search(message if "|" in message else re.escape(message), capsys.readouterr().err)
        assert (out / "run.csv").read_bytes() == before
    content = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    assert main(["train", "--resume", "--out", str(out)]) == 2
    assert "no checkpoint that can be read" in capsys.readouterr().err
    assert main(train(data, out, "--epochs", "1", "--overwrite")) == 0
    assert timeless(read_csv(out / "run.csv"))[0]["loss"] == before.decode().splitlines()[1].split(",")[2]


def changed(data):
    """The arrays of a data file with one pixel changed."""
    with np.load(data) as file:
        arrays = dict(file)
    arrays["x_train"][0, 0, 0] ^= 1
    return arrays


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


def test_plan_shows_each_layer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("model.py").write_text(MODEL)
    assert main(["plan", "model.py:make_model", "--batch", "16", "--input", "1x6x6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "batch 16, input 1×6×6" in lines[0]
    end = lines.index("", 2)
    layers = {line.split()[0]: line for line in lines[2:end]}
    assert "conv 3×3, 1→8, 6×6, T = 16" in layers["0.weight"] and "linear 128→5, T = 1" in layers["3.weight"]
    assert "rank1" in layers["3.weight"] and " 773 " in layers["3.weight"]  # I + O, and I O for the weight gradient
    assert "reg1 batch_mean" in "\n".join(lines[end:]) and "measured" not in "\n".join(lines)


@pytest.mark.parametrize(("function", "shape", "dtype"), [("words", "3", "int64"), ("double", "1x6x6", "float64")])
def test_plan_feeds_the_type_that_is_asked_for(tmp_path, monkeypatch, capsys, function, shape, dtype):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "model.py").write_text(MODEL)
    assert main(["plan", f"{tmp_path}/model.py:{function}", "--input", shape, "--dtype", dtype]) == 0
    assert "linear" in capsys.readouterr().out


def test_plan_loads_a_file_as_python_does(tmp_path, monkeypatch, capsys):
    """With modules beside it, also within the function, and dataclasses with annotations that are not evaluated."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "layers_beside_it.py").write_text("from torch import nn\nlayer = nn.Linear(3, 2)\n")
    (tmp_path / "width_beside_it.py").write_text("width = 3\n")
    (tmp_path / "model.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from layers_beside_it import layer\n"
        "@dataclass\nclass Config:\n    width: int = 3\n"
        "def make_model():\n    from width_beside_it import width\n    assert Config().width == width\n    return layer\n"
    )
    assert main(["plan", f"{tmp_path}/model.py:make_model", "--input", "3"]) == 0
    assert "linear 3→2" in capsys.readouterr().out


def test_info_says_what_a_gpu_runs(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    by_dtype = {"float32": "triton", "float64": "cuda"}
    monkeypatch.setattr("bootgrad.ops.backends.gpu.describe", lambda: {"conv_jvp": by_dtype})
    assert main(["info"]) == 0
    *_, title, row = capsys.readouterr().out.splitlines()
    assert title == "what A card runs"
    assert row.split() == ["conv_jvp", "float32", "triton", "float64", "cuda"]


def test_info_and_version(capsys):
    assert main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["bootgrad"] == bootgrad.__version__ and lines["torch"] == torch.__version__
    assert "used" in lines["_C"] and "built" in lines["_C_cuda"]
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"bootgrad {bootgrad.__version__}\n"


def test_a_terminal_without_greek_gets_question_marks(tmp_path, data, monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "ascii"))
    assert main(train(data, tmp_path / "run", "--epochs", "1")) == 0
    assert b"accuracy           ?  noise scale" in content.getvalue() and b"images 8?6?1" in content.getvalue()


def test_a_reader_that_goes_away_is_no_error():
    process = start("info")
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and errors == ""


WORDS = [
    "",
    "0",
    "-1",
    "nan",
    "inf",
    "1e400",
    "0.5",
    "x",
    "ema",
    "batch_mean,ema",
    "cuda",
    "é\n",
    "9" * 5000,
    "--",
    "-5e-3",
]
OPTIONS = ["--" + name.replace("_", "-") for name in Settings().as_dict()] + [
    "--out",
    "--resume",
    "--check",
    "--nope",
    "-x",
]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(OPTIONS + WORDS) | st.text(max_size=8), max_size=8))
def test_any_options_are_taken_or_refused_in_one_line(monkeypatch, capsys, words):
    """Options go through the parser and the settings; the training itself is left out."""

    def only_settings(options, out, **kwargs):
        Settings(**options)
        return None, True

    monkeypatch.setattr(run, "train", only_settings)
    try:
        code = main(["train", *words])
    except SystemExit as ended:  # --help
        assert ended.code == 0
        return
    err = capsys.readouterr().err
    assert code == 0 or (code == 2 and err.startswith("bootgrad: error: ") and err.count("\n") == 1)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [{}, {"reg1": "0.01"}, {"reg1": "0.01", "reg2": "0.03"}])
def test_the_digits_are_learned(tmp_path, penalty):
    options = [word for name, value in penalty.items() for word in (f"--{name}", value)]
    assert main(["train", "--center", "ema", "--epochs", "12", "--out", str(tmp_path / "run"), *options]) == 0
    final = json.loads((tmp_path / "run" / "run.json").read_text())["epochs"][-1]
    assert final["test_accuracy"] > 0.95 and final["train_loss"] < 0.2


@pytest.mark.parametrize(
    ("options", "dtype"), [("", "float32"), ("--precision bfloat16", "bfloat16"), ("--dtype float32", "float32")]
)
def test_plan_says_what_a_gpu_would_run(tmp_path, monkeypatch, capsys, options, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("BOOTGRAD_BACKEND", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "model.py").write_text(MODEL)
    command = ["plan", f"{tmp_path}/model.py:make_model", "--input", "1x6x6", "--device", "cuda", *options.split()]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r"0\.weight .* (direct|gram) +triton ", out) and re.search(r"3\.weight .* rank1 +cuda ", out)
    assert f"backends of a machine with every one of them, {dtype}: torch sees no GPU here" in out


def test_plan_takes_the_type_of_the_samples_for_that_of_the_layers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("BOOTGRAD_BACKEND", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "model.py").write_text(MODEL)
    command = ["plan", f"{tmp_path}/model.py:double", "--input", "1x6x6", "--device", "cuda", "--dtype", "float64"]
    assert main(command) == 0
    assert "every one of them, float64:" in capsys.readouterr().out


def test_plan_measures_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bootgrad.plan_timing.ROUNDS", 1)
    monkeypatch.setattr("bootgrad.plan_timing.WARMUP", 0)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "model.py").write_text(MODEL)
    command = ["plan", f"{tmp_path}/model.py:make_model", "--input", "1x6x6", "--batch", "8", "--measure"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r"^plain +[\d.]+ +1\.00 +1\.00 +1\.00$", out, re.MULTILINE)
    assert re.search(r"^reg1 batch_mean +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+$", out, re.MULTILINE)
    assert "measured: median of 1 rounds in turns, on cpu" in out
