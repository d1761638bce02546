"""Checkpoints: what is read is what was written, an interrupted write changes nothing, and damage is noticed."""

import os
import pickle
import resource
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bootgrad.errors import DataError
from bootgrad.training import checkpoint


def state():
    """A state with every kind of value that a run saves."""
    generator = torch.Generator().manual_seed(3)
    out = dict.fromkeys(checkpoint.KEYS)
    out |= {
        "model": {"w": torch.randn(5, 4, generator=generator)},
        "rng": {"order": generator.get_state(), "cuda": None},
    }
    out |= {"settings": {"data": "digits", "lr": 0.1}, "fingerprint": 2**32 - 1, "progress": {"epoch": 2}}
    return out


def assert_same(read):
    expected = state()
    assert read.pop("format") == checkpoint.FORMAT and read.pop("version") == checkpoint.VERSION
    assert torch.equal(read["model"].pop("w"), expected["model"].pop("w"))
    assert torch.equal(read["rng"].pop("order"), expected["rng"].pop("order"))
    assert read == expected


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "c.pt", state())
    assert_same(checkpoint.read(tmp_path / "c.pt"))
    assert os.listdir(tmp_path) == ["c.pt"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    checkpoint.save(tmp_path / "c.pt", state())
    (tmp_path / "other").touch()
    assert (tmp_path / "c.pt").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    checkpoint.save(tmp_path / "c.pt", state())
    with pytest.raises(error), checkpoint.replacing(tmp_path / "c.pt") as file:
        file.write(b"half")
        raise error
    assert_same(checkpoint.read(tmp_path / "c.pt"))
    assert os.listdir(tmp_path) == ["c.pt"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    for name in ("c.pt", ".c.pt.abcd_12x", ".c.pt.kept", ".other.pt.abcd_12x"):
        (tmp_path / name).touch()
    checkpoint.remove_unfinished(tmp_path / "c.pt")
    assert sorted(os.listdir(tmp_path)) == [".c.pt.kept", ".other.pt.abcd_12x", "c.pt"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none/c.pt cannot be written \(No such file or directory\): choose another"):
        checkpoint.save(tmp_path / "none" / "c.pt", state())


def test_a_full_disk_is_reported_and_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c.pt", state())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="could not be written .No space left on device"):
        checkpoint.save(tmp_path / "c.pt", {**state(), "fingerprint": 0})
    assert_same(checkpoint.read(tmp_path / "c.pt"))
    assert os.listdir(tmp_path) == ["c.pt"]


@pytest.mark.parametrize("size", [100, 100_000])  # within the file's buffer, and beyond it
def test_a_disk_that_fills_up_while_writing_is_reported(tmp_path, size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "f").write_bytes(b"old")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
        with pytest.raises(DataError, match="f could not be written .File too large.: is the disk full?"):
            with checkpoint.replacing(tmp_path / "f") as file:
                file.write(bytes(size))
        with pytest.raises(DataError, match="c.pt could not be written .File too large"):
            checkpoint.save(tmp_path / "c.pt", state() | {"model": {"w": torch.zeros(size)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "f").read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "c.pt"
    with pytest.raises(DataError, match="there is no checkpoint .*c.pt: give --resume its path"):
        checkpoint.read(path)
    for content, message in (
        ([1, 2], "is not a checkpoint of bootgrad train"),
        ({"model": {}}, "is not a checkpoint of bootgrad train"),
        ({"format": checkpoint.FORMAT, "version": 7}, "has format version 7; this program reads version 1"),
        ({"format": checkpoint.FORMAT, "version": 1, **dict.fromkeys(checkpoint.KEYS[1:])}, "lacks settings"),
    ):
        torch.save(content, path)
        with pytest.raises(DataError, match=message):
            checkpoint.read(path)
    for content in (b"", b"PK", b"text", pickle.dumps({"format": checkpoint.FORMAT})):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is no checkpoint that can be read"):
            checkpoint.read(path)
    with pytest.raises(DataError, match="is no checkpoint that can be read"):
        checkpoint.read(tmp_path)


class Malicious:
    """An object whose unpickling would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    torch.save({"format": checkpoint.FORMAT, "version": 1, "model": Malicious(tmp_path / "trap")}, tmp_path / "c.pt")
    with pytest.raises(DataError, match="is no checkpoint that can be read"):
        checkpoint.read(tmp_path / "c.pt")
    assert not (tmp_path / "trap").exists()


def test_one_changed_bit_in_a_tensor_is_noticed(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, state())
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = max((i for i in archive.infolist() if "/data/" in i.filename), key=lambda i: i.file_size)
    content[info.header_offset + 200] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["format"] == checkpoint.FORMAT  # torch itself does not notice
    with pytest.raises(DataError, match="is damaged .checksum of .*data.*: use an older copy"):
        checkpoint.read(path)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kept=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    cut=st.booleans(),
)
def test_a_damaged_checkpoint_is_read_or_refused(tmp_path, kept, flips, cut):
    path = tmp_path / "c.pt"
    checkpoint.save(path, state())
    content = bytearray(path.read_bytes())
    for where, value in flips:
        content[int(where * len(content))] = value
    path.write_bytes(content[: int(kept * len(content))] if cut else content)
    try:
        read = checkpoint.read(path)
    except DataError:
        return
    assert_same(read)
