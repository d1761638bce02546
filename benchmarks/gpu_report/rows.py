"""The rows of a report and the files that hold them: written anew after every row, so that a cut run leaves all it had."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Statuses of a row: what counts as a wrong library, and what only as a number that is missing.
WRONG = ("failed", "crashed", "hung")
MISSING = ("error", "out of memory", "skipped", "cut", "to look at")
COLUMNS = (
    *("date", "time", "device", "torch", "triton", "bootgrad"),
    *("section", "subject", "case", "backend", "dtype", "status"),
    *("error", "bound", "microseconds", "low", "high", "bytes", "operations", "percent"),
    *("ratio", "ratio_low", "ratio_high", "memory_mib", "memory_ratio", "detail"),
)
Row = dict[str, str]


class Store:
    """Rows in memory and in ``<stem>.csv``, ``<stem>.json`` and ``<stem>.md`` of one or several folders."""

    def __init__(self, folders: list[Path], stem: str, setting: Row, machine: dict[str, Any], page: Callable):
        """Take over the rows that a report of the same name has of other sections; see `begin`."""
        self.folders, self.stem, self.setting, self.machine, self.page = folders, stem, setting, machine, page
        self.rows: list[Row] = []
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        earlier = folders[0] / f"{stem}.json"
        if earlier.exists():
            self.rows = json.loads(earlier.read_text(encoding="utf-8"))["rows"]

    def begin(self, section: str) -> None:
        """Forget what an earlier run said of a section."""
        self.rows = [row for row in self.rows if row["section"] != section]

    def add(self, section: str, **values: Any) -> Row:
        """Store one row."""
        unknown = values.keys() - set(COLUMNS)
        if unknown:
            raise ValueError(f"no such columns: {', '.join(sorted(unknown))}")
        given = {name: _text(value) for name, value in values.items()}
        row = dict.fromkeys(COLUMNS, "") | self.setting | {"section": section} | given
        self.rows.append(row)
        self.write()
        return row

    def write(self) -> None:
        """All files in all folders, each in one move."""
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        texts = {
            "csv": table.getvalue(),
            "json": json.dumps({"machine": self.machine, "rows": self.rows}, indent=1, ensure_ascii=False) + "\n",
            "md": self.page(self.machine, self.rows),
        }
        for folder in self.folders:
            for suffix, text in texts.items():
                part = folder / f".{self.stem}.{suffix}.part"
                part.write_text(text, encoding="utf-8")
                os.replace(part, folder / f"{self.stem}.{suffix}")

    def wrong(self) -> list[Row]:
        """The rows that say that the library is wrong."""
        return [row for row in self.rows if row["status"] in WRONG or _incorrect(row)]


def _incorrect(row: Row) -> bool:
    """What raises where it should compute is as wrong as what computes nonsense; a step may be short of memory, though."""
    if row["section"] == "correctness":
        return row["status"] in ("error", "out of memory")
    return row["section"] in ("ops", "steps") and row["status"] == "error" and row["backend"] != "peer"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
