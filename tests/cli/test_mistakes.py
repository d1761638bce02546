"""What is no command: one line and exit code 2, whatever was typed."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bootgrad.cli import main
from bootgrad.training import run
from bootgrad.training.settings import Settings

from .commands import MODEL

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
    assert captured.out == "" and set(os.listdir()) - {"__pycache__"} == {"model.py"}


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
