"""A table of results: rows of settings and measured numbers, kept as CSV.

A row is a dictionary whose values are numbers and words. As text a number reads back to the same one; nan is an empty
field.
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import DataError
from ..training.checkpoint import replacing

Value = float | int | str
Row = dict[str, Value]


class Table:
    """Rows of the same columns.

        table = Table(("method", "seed", "test_loss"))
        table.where(method="sgd").column("test_loss")

    Args:
        columns: their names.
        rows: each with all of the columns.
    """

    def __init__(self, columns: Iterable[str], rows: Iterable[Row] = ()):
        """Take the rows as they are."""
        self.columns, self.rows = tuple(columns), list(rows)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        """Row by row."""
        return iter(self.rows)

    def where(self, **settings: Value) -> "Table":
        """The rows that have these values."""
        return Table(self.columns, [row for row in self.rows if has(row, settings)])

    def column(self, name: str) -> list[float]:
        """A column of numbers."""
        return [float(row[name]) for row in self.rows]

    def values(self, name: str) -> list[Value]:
        """The different values of a column, in the order in which they come first."""
        return list(dict.fromkeys(row[name] for row in self.rows))

    def write(self, path: Path) -> None:
        """Replace the CSV file at ``path``."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_text(row[name]) for name in self.columns] for row in self.rows)
        with replacing(path) as file:
            file.write(text.getvalue().encode())

    @classmethod
    def read(cls, path: Path, columns: Iterable[str]) -> "Table":
        """Read what `write` wrote.

        Raises:
            DataError: the file has other columns, or rows of another length.
        """
        columns = tuple(columns)
        try:
            with path.open(encoding="utf-8", newline="") as file:
                header, *lines = csv.reader(file)
        except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
            raise DataError(f"{path} is no table that can be read ({error}): start anew by --overwrite") from error
        if tuple(header) != columns or any(len(line) != len(columns) for line in lines):
            raise DataError(
                f"{path} must have the columns {', '.join(columns)}; it has others: start anew by --overwrite"
            )
        return cls(columns, [dict(zip(columns, map(_value, line), strict=True)) for line in lines])


def has(row: Mapping[str, Value], settings: Mapping[str, Value]) -> bool:
    """Whether a row has these values."""
    return all(row[name] == value for name, value in settings.items())


def is_kept(value: Value) -> bool:
    """Whether a value reads back as it is: numbers do, but nan, which is no name for anything, and words unlike numbers."""
    return (
        type(value) in (int, float, str) and type(_value(_text(value))) is type(value) and _value(_text(value)) == value
    )


def _text(value: Value) -> str:
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else repr(value)


def _value(text: str) -> Value:
    if not text:
        return math.nan
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
