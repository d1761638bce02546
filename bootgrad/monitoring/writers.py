"""Writers of observations into files that a run adds to line by line, and their readers.

A process that dies leaves a last line without its end at worst: the next writer removes it, and readers leave it out. A run
that goes on from a checkpoint writes some steps again: for readers these replace the old ones, and all after them.
"""

import csv
import io
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import DataError
from .observation import PREFIX, Observation

_PARTS = {
    "layers": dict,
    "norms": dict,
    "strengths": dict,
    "counts": dict,
    "outliers": list,
    "flags": list,
    "watched": list,
}

_OF_OBJECTS = ("outliers", "flags")


class Writer(Protocol):
    """What a `Monitor` asks of a writer."""

    def write(self, observation: Observation) -> None:
        """Take in an observation, so that it is not lost where the process ends now."""

    def close(self) -> None:
        """There will be no more."""


class JSONLWriter:
    """Observations as lines of JSON, each a whole one.

    The file is opened for the first observation, and again for one that comes after `close`.

    Args:
        path: a file, made if need be, and gone on with where it is there.

    Raises:
        DataError: it is no file of observations; of `write`, too, and where it cannot be written.
    """

    def __init__(self, path: str | Path):
        """Look at what is there."""
        self.path = Path(path)
        self._lines = _Lines(self.path, begins_jsonl, "file of observations, lines that begin with their step")

    def write(self, observation: Observation) -> None:
        """Add a line."""
        self._lines.add(json.dumps(observation.as_dict(), allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class CSVWriter:
    """The step and the numbers of `Observation.scalars` as a row each.

    Columns are those of the first observation; one that has more has the file written again with these, empty before.

    Args:
        path: as of `JSONLWriter`.

    Raises:
        DataError: as `JSONLWriter`.
    """

    def __init__(self, path: str | Path):
        """Look at what is there."""
        self.path = Path(path)
        self._lines = _Lines(self.path, begins_csv, "table of observations, whose first column is step")
        self._columns: list[str] = []  # of the file that is open

    def write(self, observation: Observation) -> None:
        """Add a row."""
        row = {"step": str(observation.step)} | {name: repr(value) for name, value in observation.scalars().items()}
        if self._lines.open():
            self._columns = _header(self.path)
        new = [name for name in row if name not in self._columns]
        if new and self._columns:
            self._widen(new)
        elif new:
            self._lines.add(_text_of([new]))
        self._columns += new
        self._lines.add(_text_of([[row.get(name, "") for name in self._columns]]))

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _widen(self, new: list[str]) -> None:
        """Write the file again with more columns, beside it first."""
        beside = self.path.with_name(f".{self.path.name}.wider")
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                header, *rows = csv.reader(file)
            wider = [[*header, *new], *(row + [""] * len(new) for row in rows)]
            beside.write_text(_text_of(wider), encoding="utf-8", newline="")
            self._lines.close()
            os.replace(beside, self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise DataError(
                f"{self.path} could not be written with more columns ({error.strerror}): is the disk full?"
            ) from error


class _Lines:
    """A file that lines are added to, opened when one comes; what does not begin as ours do is left as it is.

    Args:
        path: of it.
        begins: whether a first line is of ours.
        kind: what ours are.
    """

    def __init__(self, path: Path, begins: Callable[[str], bool], kind: str):
        self._path, self._begins, self._kind = path, begins, kind
        self._file: Any = None
        self._check()

    def open(self) -> bool:
        """Be behind the last whole line; whether it was not there already."""
        if self._file is not None:
            return False
        self._check()
        self._file = _open_to_append(self._path)
        return True

    def add(self, text: str) -> None:
        """Write it, all of it or, for the next one that opens the file, none."""
        self.open()
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            with suppress(OSError):
                self.close()
            raise DataError(f"{self._path} could not be written ({error.strerror}): is the disk full?") from error

    def close(self) -> None:
        """Until there is more."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _check(self) -> None:
        first = first_line(self._path)
        if first and not self._begins(first):
            raise DataError(f"{self._path} is no {self._kind}: choose another file")


def begins_jsonl(line: str) -> bool:
    """Whether it is the first line of a file of observations, or what there is of one without its end."""
    try:
        row = json.loads(line)
    except ValueError:
        return not line.endswith("\n") and line.startswith('{"step": ')
    return isinstance(row, dict) and {"step", "batch_size"} <= row.keys()


def begins_csv(line: str) -> bool:
    """Whether it is the first line of a table of observations, or what there is of one without its end."""
    return line.startswith(f"step,{PREFIX}")


def first_line(path: Path, most: int = 1 << 24) -> str:
    """The first line of a file, with its end where it has one; nothing where there is no file."""
    try:
        with path.open("rb") as file:
            return file.readline(most).decode(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise DataError(f"{path} cannot be read or written ({error.strerror}): choose another file") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The observations of a file, as `Observation.as_dict` has them.

    Raises:
        DataError: it is no file of observations.
    """
    text = _text(path)
    rows = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row["step"], int):
                raise ValueError("no step")
            _check_parts(row)
        except (ValueError, KeyError) as error:
            raise DataError(f"line {number} of {path} is no observation ({error}): remove it") from None
        rows.append(row)
    return _last_written(rows)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a table of observations: numbers by their names, with those alone that are known.

    Raises:
        DataError: it is no such table.
    """
    text = _text(path)
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    if not lines:
        return []
    header, *rows = lines
    try:
        if header[0] != "step" or any(len(row) != len(header) for row in rows):
            raise ValueError("a row of another length, or no step")
        named = [dict(zip(header, row, strict=True)) for row in rows]
        found = [{"step": int(row.pop("step"))} | {n: float(v) for n, v in row.items() if v} for row in named]
    except (ValueError, IndexError) as error:
        raise DataError(
            f"{path} is no table of observations ({error}): give a folder that a Monitor has written to"
        ) from None
    return _last_written(found)


def _check_parts(row: dict[str, Any]) -> None:
    for name, kind in _PARTS.items():
        part = row.get(name, kind())
        entries = part.values() if isinstance(part, dict) and name == "layers" else part if name in _OF_OBJECTS else ()
        if not isinstance(part, kind) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{name} are {part!r}")


def _last_written(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without those that a run that went back to an earlier step has made anew."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="", errors="replace") as file:
        return next(csv.reader(file), [])


def _open_to_append(path: Path) -> Any:
    """The file, without what comes after its last whole line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            end = file.tell()
            whole = _end_of_lines(file, end)
            if whole < end:
                file.truncate(whole)
        return path.open("a", encoding="utf-8", newline="")
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): choose another file") from error


def _end_of_lines(file: BinaryIO, end: int, piece: int = 1 << 16) -> int:
    """Where the last line ends that has an end."""
    while end > 0:
        begin = max(0, end - piece)
        file.seek(begin)
        at = file.read(end - begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0


def _text_of(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
