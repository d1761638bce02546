"""Checkpoints whose checksums are right and whose contents are not: refused in one line, or gone on with; none of it is run."""

import copy
import io
import os
import pickle
import struct
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bootgrad.cli import main
from bootgrad.errors import BootgradError, DataError
from bootgrad.training import checkpoint
from bootgrad.training import run as runs
from bootgrad.training.data import load
from bootgrad.training.loop import Trainer

from ..cli.commands import train
from ..cli.conftest import data  # noqa: F401 — the fixture
from .drawing import drawn

OPTIONS = ("--reg1", "0.05", "--reg2", "0.02", "--center", "ema,window", "--fraction", "0.5")
SPECIAL = [
    *(None, True, 0, -1, 2**31, 2**63, 2**70, 1e400, float("nan"), "", "x", b"", [], {}, (), {"a": 1}, [None]),
    *(torch.zeros(()), torch.zeros(0), torch.zeros(3, 2), torch.tensor([2**62]), torch.ones(5, dtype=torch.uint8)),
    *(torch.tensor(float("nan")), torch.ones(3, dtype=torch.complex64), torch.zeros(2, dtype=torch.bool)),
]


@pytest.fixture
def run(data, tmp_path, capsys):  # noqa: F811
    """The folder of a run of one epoch, its checkpoint's contents, and the file's bytes."""
    out = tmp_path / "run"
    assert main(train(data, out, "--epochs", "1", *OPTIONS)) == 0
    capsys.readouterr()
    return out, checkpoint.read(out / "checkpoint.pt"), (out / "checkpoint.pt").read_bytes()


def resumed(out, capsys):
    """The exit code of going on, of which a failure is told in one line."""
    code = main(["train", "--resume", "--out", str(out), "--epochs", "2"])
    errors = capsys.readouterr().err
    assert code == 0 or (code == 2 and errors.startswith("bootgrad: error: ") and errors.count("\n") == 1), errors
    return code


def paths(value, at=()):
    """Where all values of a nested state are."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


def changed(state, at, value):
    """The state with another value in one place."""
    if not at:
        return value
    inner = changed(state[at[0]], at[1:], value)
    if isinstance(state, dict):
        return {**state, at[0]: inner}
    return type(state)([*state[: at[0]], inner, *state[at[0] + 1 :]])


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # torch's, once in a process, of a list as an index
@drawn(80)
@given(where=st.floats(0, 1, exclude_max=True), value=st.sampled_from(range(len(SPECIAL))))
def test_any_value_in_any_place_is_refused_or_gone_on_with(run, where, value):
    """What ``train --resume`` does, without its files and pictures."""
    out, state, _ = run
    places = [at for at in paths(state) if at and at[0] not in ("format", "version")]
    at = places[int(where * len(places))]
    path = out / "other.pt"
    checkpoint.save(path, changed(copy.deepcopy(state), at, SPECIAL[value]))
    try:
        read = checkpoint.read(path)
        chosen = runs._resumed_settings(read["settings"], {"epochs": 2, "threads": 1})
        trainer = Trainer(chosen, load(chosen.data, root=chosen.data_root))
        trainer.load_state_dict(read)
        while not trainer.is_finished:
            trainer.run_epoch()
    except BootgradError as error:
        assert "\n" not in str(error)


def with_pickle(content, payload):
    """A checkpoint's file with another pickle in it, and its right checksum."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            new.writestr(info, payload if info.filename.endswith("/data.pkl") else old.read(info))
    return out.getvalue()


@drawn(150)
@given(where=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_pickle_with_other_bytes_is_refused_or_read(run, where):
    out, state, content = run
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        payload = bytearray(next(archive.read(i) for i in archive.infolist() if i.filename.endswith("/data.pkl")))
    for place, value in where:
        payload[int(place * len(payload))] = value
    (out / "checkpoint.pt").write_bytes(with_pickle(content, bytes(payload)))
    try:
        read = checkpoint.read(out / "checkpoint.pt")
    except DataError:
        return
    finally:
        (out / "checkpoint.pt").write_bytes(content)
    assert set(read) >= set(checkpoint.KEYS)


class Trap:
    """What makes a folder when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def traps(path):
    """Pickles that would leave something at ``path`` if they were loaded by Python's own unpickler."""
    yield "os.mkdir", pickle.dumps(Trap(os.mkdir, path), 2)
    yield "builtins.exec", pickle.dumps(Trap(exec, f"import os; os.mkdir({path!r})"), 2)
    yield "os.system", pickle.dumps(Trap(os.system, f"touch {path}"), 2)
    yield "written out", b"\x80\x02cos\nmkdir\nX" + struct.pack("<I", len(path)) + path.encode() + b"\x85R."


def test_nothing_in_a_checkpoint_is_run(run, tmp_path, capsys):
    """Whatever way it comes: in the archive, instead of it, for --resume, and for a comparison."""
    out, _, content = run
    trap = str(tmp_path / "trap")
    for name, payload in traps(trap):
        pickle.loads(payload)  # it works
        assert os.path.exists(trap), name
        (os.rmdir if os.path.isdir(trap) else os.remove)(trap)
        for file in (with_pickle(content, payload), payload):
            (out / "checkpoint.pt").write_bytes(file)
            assert resumed(out, capsys) == 2, name
            compared = out.parent / "compared"
            (compared / "plain").mkdir(parents=True, exist_ok=True)
            (compared / "plain/checkpoint.pt").write_bytes(file)
            options = ["--resume", "--out", str(compared), "--reg1", "0.1", "--reg2", "0.1", "--center", "ema"]
            assert main(["compare", *options]) == 2, name
            capsys.readouterr()
            assert not os.path.exists(trap), name
