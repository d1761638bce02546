"""Writers of observations into files that a run adds to line by line, and their readers.

A process that dies leaves a last line without its end at worst: the next writer removes it, and readers leave it out. A run
that goes on from a checkpoint writes some steps again: for readers these replace the old ones, and all after them.
"""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import DataError
from .observation import Observation


class Writer(Protocol):
    """What a `Monitor` asks of a writer."""

    def write(self, observation: Observation) -> None:
        """Take in an observation, so that it is not lost where the process ends now."""

    def close(self) -> None:
        """There will be no more."""


class JSONLWriter:
    """Observations as lines of JSON, each a whole one.

    Args:
        path: a file, made if need be, and gone on with where it is there.

    Raises:
        DataError: it cannot be written.
    """

    def __init__(self, path: str | Path):
        """Open it behind its last whole line."""
        self.path = Path(path)
        self._file = _open_to_append(self.path)

    def write(self, observation: Observation) -> None:
        """Add a line."""
        _add(self._file, json.dumps(observation.as_dict(), ensure_ascii=False, allow_nan=False) + "\n", self.path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class CSVWriter:
    """The step and the numbers of `Observation.scalars` as a row each.

    Columns are those of the first observation; one that has more has the file written again with these, empty before.

    Args:
        path: as of `JSONLWriter`.

    Raises:
        DataError: it cannot be written, or is another table.
    """

    def __init__(self, path: str | Path):
        """Open it behind its last whole row."""
        self.path = Path(path)
        self._file = _open_to_append(self.path)
        self._columns: list[str] = []
        if self.path.stat().st_size:
            self._columns = _header(self.path)
            if self._columns[:1] != ["step"]:
                self._file.close()
                raise DataError(
                    f"{self.path} is no table of observations, whose first column is step: choose another file"
                )

    def write(self, observation: Observation) -> None:
        """Add a row."""
        row = {"step": str(observation.step)} | {name: repr(value) for name, value in observation.scalars().items()}
        new = [name for name in row if name not in self._columns]
        if new and self._columns:
            self._widen(new)
        elif new:
            self._columns = new
            _add(self._file, _lines([new]), self.path)
        _add(self._file, _lines([[row.get(name, "") for name in self._columns]]), self.path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _widen(self, new: list[str]) -> None:
        """Write the file again with more columns, beside it first."""
        self._file.close()
        with self.path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        self._columns = [*header, *new]
        beside = self.path.with_name(f".{self.path.name}.wider")
        beside.write_text(
            _lines([self._columns, *(row + [""] * len(new) for row in rows)]), encoding="utf-8", newline=""
        )
        os.replace(beside, self.path)
        self._file = _open_to_append(self.path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The observations of a file, as `Observation.as_dict` has them.

    Raises:
        DataError: it is no file of observations.
    """
    text = _text(path)
    rows = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row["step"], int):
                raise ValueError("no step")
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


def _add(file: Any, text: str, path: Path) -> None:
    try:
        file.write(text)
        file.flush()
    except OSError as error:
        raise DataError(f"{path} could not be written ({error.strerror}): is the disk full?") from error


def _lines(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
