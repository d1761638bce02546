"""Files that survive the end of their process, and readers that see what counts."""

import csv
import errno
import json
import math
from pathlib import Path

import pytest

from bootgrad.errors import DataError
from bootgrad.monitoring import CSVWriter, JSONLWriter, Outlier, writers
from bootgrad.monitoring.writers import read_csv, read_jsonl

from .runs import observation

KINDS = {"jsonl": (JSONLWriter, read_jsonl), "csv": (CSVWriter, read_csv)}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def write(kind, path, *observations):
    writer = kind[0](path)
    for seen in observations:
        writer.write(seen)
    writer.close()


def steps(kind, path):
    return [row["step"] for row in kind[1](path)]


def test_jsonl_has_all_of_an_observation(tmp_path):
    path = tmp_path / "new" / "monitor.jsonl"
    write(KINDS["jsonl"], path, observation(3))
    (row,) = read_jsonl(path)
    assert row == json.loads(path.read_text()) == observation(3).as_dict()
    assert row["step"] == 3 and row["batch_size"] == 4 and row["strengths"] == {"reg1": 0.1} and "reg2" not in row
    assert row["layers"]["head.out"] == {"covariance_trace": 1.0, "sq_mean_norm": 0.25, "noise_scale": "inf"}
    assert row["outliers"] == [{"id": "image 7", "norm": 9.0, "index": 2}] and row["norms"] == {
        "0": 0.5,
        "0.5": 1.0,
        "1": 9.0,
    }
    assert row["flags"] == [{"quantity": "covariance_trace", "value": 2.5, "usual": 0.1, "layer": "conv"}]


def test_csv_has_the_scalars(tmp_path):
    path = tmp_path / "monitor.csv"
    write(KINDS["csv"], path, observation(3), observation(5, 1 / 3))
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", *observation().scalars()] and len(rows) == 2
    assert read_csv(path) == [{"step": 3, **observation(3).scalars()}, {"step": 5, **observation(5, 1 / 3).scalars()}]
    assert read_csv(path)[0]["bootgrad/layer/head.out/noise_scale"] == math.inf


def test_every_observation_is_there_at_once(kind, tmp_path):
    writer = kind[0](tmp_path / "file")
    for step in range(3):
        writer.write(observation(step))
        assert steps(kind, tmp_path / "file") == list(range(step + 1))
    writer.close()


@pytest.mark.parametrize("lost", [1, 7, 60])
def test_a_run_goes_on_behind_the_last_whole_line(kind, tmp_path, lost):
    path = tmp_path / "file"
    write(kind, path, observation(0), observation(1), observation(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    assert steps(kind, path) == [0, 1]
    write(kind, path, observation(2), observation(3))
    assert steps(kind, path) == [0, 1, 2, 3] and path.read_bytes().startswith(whole)


def test_a_file_of_which_no_line_is_whole_begins_anew(kind, tmp_path):
    path = tmp_path / "file"
    begin = b'{"step": 0, "batch_size": 4, "layers": {"' if kind[1] is read_jsonl else b"step,bootgrad/loss,bootgrad/"
    path.write_bytes(begin + b"layer" * 40_000)
    assert steps(kind, path) == []
    write(kind, path, observation(0))
    assert steps(kind, path) == [0]


def test_steps_that_are_taken_again_replace_the_old_ones(kind, tmp_path):
    path = tmp_path / "file"
    write(kind, path, *(observation(step, 1.0) for step in (0, 5, 10, 15)))
    write(kind, path, observation(5, 2.0), observation(10, 2.0))
    name = "covariance_trace" if kind[1] is read_jsonl else "bootgrad/covariance_trace"
    assert [(row["step"], row[name]) for row in kind[1](path)] == [(0, 1.0), (5, 2.0), (10, 2.0)]


def test_columns_that_come_later_are_empty_before(tmp_path):
    path = tmp_path / "monitor.csv"
    write(KINDS["csv"], path, observation(0), observation(1, reg2=7.0, layers={}), observation(2))
    rows = read_csv(path)
    assert [row.get("bootgrad/reg2") for row in rows] == [None, 7.0, None]
    assert [row.get("bootgrad/layer/conv/noise_scale") for row in rows] == [6.0, None, 6.0]
    assert [path.name for path in tmp_path.iterdir()] == ["monitor.csv"]


@pytest.mark.parametrize(
    "content",
    [
        '{"learning_rate": 0.1}',
        '{"learning_rate": 0.1}\n{"step": 3',
        '{"step": 5}',
        '{"step": 5, "loss": 1.0}\n{"step": 6',
        "[1, 2]",
        "a,b\n1,2\n3,4",
        "step,loss\n1,2\n3,4",
        "step",
        "a" * 100_000,
    ],
)
def test_a_file_of_somebody_elses_stays_as_it_is(kind, tmp_path, content):
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(DataError, match="is no (file|table) of observations"):
        kind[0](path)
    path.unlink()
    writer = kind[0](path)
    path.write_text(content)  # since then
    with pytest.raises(DataError, match="is no (file|table) of observations"):
        writer.write(observation())
    writer.close()
    assert path.read_text() == content


def test_files_are_opened_by_what_is_written(kind, tmp_path):
    path = tmp_path / "new" / "file"
    first, second = kind[0](path), kind[0](path)
    second.close()
    assert not path.parent.exists()
    first.write(observation(0))
    first.close()
    first.close()
    first.write(observation(1, reg2=7.0))
    first.close()
    assert steps(kind, path) == [0, 1]


def test_ids_that_have_ends_of_lines(tmp_path):
    names = ("a\u2028b\u2029c\x85d\ne\r\x1ef", "\ud800", "é")
    path = tmp_path / "monitor.jsonl"
    write(KINDS["jsonl"], path, observation(0, outliers=tuple(Outlier(name, 1.0, 0) for name in names)), observation(1))
    rows = read_jsonl(path)
    assert [row["id"] for row in rows[0]["outliers"]] == list(names) and len(rows) == 2
    path.write_text('{"step": 0, "batch_size": 4, "id": "\u2028"}\n', encoding="utf-8")  # as older ones have them
    assert read_jsonl(path)[0]["id"] == "\u2028"


def test_a_full_disk_leaves_whole_lines_and_a_writer_that_goes_on(kind, tmp_path):
    path = tmp_path / "file"
    writer = kind[0](path)
    writer.write(observation(0))
    full = Full(writer._lines._file)
    writer._lines._file = full
    with pytest.raises(DataError, match="could not be written .No space left.: is the disk full"):
        writer.write(observation(1))
    assert full.file.closed
    writer.write(observation(2))
    writer.close()
    assert steps(kind, path) == [0, 2]


class Full:
    """A file on a disk that has room for half of what comes."""

    def __init__(self, file):
        self.file = file

    def write(self, text):
        self.file.write(text[: len(text) // 2])
        self.file.flush()

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left")

    def close(self):
        self.file.close()


def test_a_table_that_could_not_be_widened_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "monitor.csv"
    writer = CSVWriter(path)
    writer.write(observation(0))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left")

    for owner, name in ((Path, "write_text"), (writers.os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(DataError, match="with more columns .No space left."):
                writer.write(observation(1, reg2=7.0))
        assert [path.name for path in tmp_path.iterdir()] == ["monitor.csv"]
    writer.write(observation(2))
    writer.write(observation(3, reg2=7.0))
    writer.close()
    assert [(row["step"], row.get("bootgrad/reg2")) for row in read_csv(path)] == [(0, None), (2, None), (3, 7.0)]


def test_a_file_that_is_none_of_ours_is_refused(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("name,value\na,1\n")
    with pytest.raises(DataError, match="no table of observations, whose first column is step"):
        CSVWriter(path)
    with pytest.raises(DataError, match="no table of observations"):
        read_csv(path)
    with pytest.raises(DataError, match="line 1 of .*run.csv is no observation"):
        read_jsonl(path)
    assert path.read_text() == "name,value\na,1\n"
    for write_to in (JSONLWriter, CSVWriter):
        with pytest.raises(DataError, match="cannot be read or written"):
            write_to(tmp_path)
        with pytest.raises(DataError, match="cannot be (read or )?written"):
            write_to(path / "inside").write(observation())
    for read in (read_jsonl, read_csv):
        with pytest.raises(DataError, match="cannot be read"):
            read(tmp_path / "nothing")
