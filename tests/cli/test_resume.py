"""Runs that stop and go on: to the same numbers, and not over another run."""

import json
import re
import signal

import numpy as np
import pytest
import torch

from bootgrad.cli import main
from bootgrad.training import checkpoint, run
from bootgrad.training.settings import ESTIMATOR

from .commands import read_csv, start, timeless, train


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
