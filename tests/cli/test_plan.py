"""``bootgrad plan``: the user's model, loaded and fed."""

import re
import sys
from pathlib import Path

import pytest
import torch

from bootgrad.cli import main

from .commands import MODEL


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
