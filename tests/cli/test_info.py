"""``bootgrad info`` and ``--version``."""

import pytest
import torch

import bootgrad
from bootgrad.cli import main

from .commands import start


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


def test_a_reader_that_goes_away_is_no_error():
    process = start("info")
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and errors == ""
