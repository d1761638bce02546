"""Commands with any words behind them, and folders with any bytes in them: exit code 0 or 2, and one line of what is wrong."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootgrad.cli import main
from bootgrad.errors import ArgumentError
from bootgrad.experiments import conduct
from bootgrad.experiments.study import Options
from bootgrad.training import run
from bootgrad.training.settings import Settings

from ..cli.commands import MODEL, train
from ..cli.conftest import data  # noqa: F401 — the fixture
from .drawing import drawn

COMMANDS = ["train", "compare", "experiment", "diagnose", "plan", "info", "", "--version", "--help", "-h"]
OPTIONS = ["--" + name.replace("_", "-") for name in Settings().as_dict()]
OPTIONS += (
    "--out --resume --overwrite --check --quick --full --seeds --batch --input --dtype --precision --nope -x".split()
)
WORDS = [
    "",
    "0",
    "1",
    "-1",
    "nan",
    "inf",
    "1e400",
    "0.5",
    "x",
    "ema",
    "cuda",
    "cpu",
    "meta",
    "é\n",
    "9" * 5000,
    "--",
    "-5e-3",
]
WORDS += [
    "list",
    "idealized",
    "nowhere",
    "/dev/null",
    "\0",
    "..",
    "a" * 300,
    "model.py:make_model",
    "model.py:fails",
    "model.py:",
]
WORDS += [
    "model.py:words",
    "1x6x6",
    "3",
    "1x0",
    "1x6x6x6x6",
    "x",
    "99999999x1",
    "float32",
    "int64",
    "bfloat16",
    "float64",
    "8",
]


def ended(words, capsys):
    """The exit code; of a refusal one line is told, and of the rest nothing that Python says of errors."""
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as end:  # --help, --version
        assert end.code == 0
        code = 0
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    errors = [line for line in told.err.splitlines() if not line.startswith("bootgrad: warning: ")]
    assert code == 0 or (code == 2 and len(errors) == 1 and errors[0].startswith("bootgrad: error: ")), (code, told.err)
    return code


@pytest.fixture
def nothing_runs(monkeypatch, tmp_path):
    """A folder with a model in it, and in the place of what takes long the checks that come before."""

    def trained(options, out, **kwargs):
        Settings(**options)
        raise ArgumentError("not run here")

    def conducted(options, out, **kwargs):
        conduct.find(options.name)
        raise ArgumentError("not run here")

    monkeypatch.setattr(run, "train", trained)
    monkeypatch.setattr(run, "compare", trained)
    monkeypatch.setattr(conduct, "conduct", conducted)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)


@drawn(120)
@given(st.sampled_from(COMMANDS), st.lists(st.sampled_from(OPTIONS + WORDS) | st.text(max_size=8), max_size=7))
def test_any_words(nothing_runs, capsys, command, words):
    ended([command, *(word for word in words if word != "--measure")], capsys)


@drawn(60)
@given(
    st.sampled_from(["model.py:make_model", "model.py:words", "model.py:double", "model.py:constant"]),
    st.lists(st.integers(0, 40), max_size=4),
    st.sampled_from(["float32", "float64", "float16", "bfloat16", "int64", "int32"]),
    st.sampled_from([1, 2, 3, 7, 128]),
    st.sampled_from(
        [(), ("--device", "cuda"), ("--precision", "bfloat16"), ("--device", "cpu", "--precision", "float16")]
    ),
)
def test_any_plan(nothing_runs, capsys, model, sizes, dtype, batch, others):
    shape = "x".join(map(str, sizes))
    ended(["plan", model, "--input", shape, "--dtype", dtype, "--batch", str(batch), *others], capsys)


def test_the_options_of_an_experiment_are_checked_before_anything_else(capsys):
    with pytest.raises(ArgumentError):
        Options("idealized", seeds=1)


@pytest.fixture
def folder(data, tmp_path, capsys):  # noqa: F811
    """A run that ``diagnose`` reads."""
    out = tmp_path / "run"
    assert main(train(data, out, "--epochs", "3", "--reg1", "0.05")) == 0
    assert ended(["diagnose", str(out)], capsys) == 0
    return out


@drawn(100)
@given(
    st.sampled_from(["run.json", "run.csv", "checkpoint.pt"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=5),
    st.floats(0, 1) | st.none(),
)
def test_damaged_files_of_a_run_are_diagnosed_or_refused(folder, capsys, name, changes, kept):
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    try:
        content = bytearray((copy / name).read_bytes())
        for where, value in changes:
            content[int(where * len(content))] = value
        (copy / name).write_bytes(content if kept is None else content[: int(kept * len(content))])
        ended(["diagnose", str(copy)], capsys)
    finally:
        shutil.rmtree(copy)


def test_a_record_without_end_is_refused(folder, capsys):
    (folder / "run.json").write_text("[" * 100_000)
    assert ended(["diagnose", str(folder)], capsys) == 2


SPECIAL = [None, True, -1, 0, 1e308, "", "x", [], {}, [None], {"a": 1}, [[1]], 10**400]


@drawn(100)
@given(data=st.data())
def test_records_with_other_values_are_diagnosed_or_refused(folder, capsys, data):  # noqa: F811
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    try:
        record = json.loads((copy / "run.json").read_text())
        at, inner = [], record
        while isinstance(inner, dict | list) and inner and (not at or data.draw(st.booleans())):
            at.append(data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner)))))
            owner, inner = inner, inner[at[-1]]
        owner[at[-1]] = SPECIAL[data.draw(st.integers(0, len(SPECIAL) - 1))]
        (copy / "run.json").write_text(json.dumps(record))
        ended(["diagnose", str(copy)], capsys)
    finally:
        shutil.rmtree(copy)
