"""What a folder holds of runs: tables of steps, records, observations, the results of an experiment.

A file of observations is read as a folder that has nothing else.
"""

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ArgumentError, DataError
from ...training import checkpoint
from ...training.run import CHECKPOINT
from ..observation import PREFIX
from ..writers import begins_csv, begins_jsonl, first_line, read_csv, read_jsonl

RESULTS, RECORD, SUMMARY, RUN, FIGURE = "results.csv", "run.json", "summary.md", "run.csv", "figure.png"
COUNTED = ("outliers", "flags")  # in a table, which has no lists
MOST_ROWS = 200  # of an experiment's table that a page has


@dataclass(frozen=True)
class Run:
    """A run of ``bootgrad train``.

    Attributes:
        name: of its folder.
        columns: of its steps, nan where nothing is known.
        settings: by name.
        record: all of its record; empty of a run that has not come to an end.
    """

    name: str
    columns: dict[str, list[float]]
    settings: dict[str, Any]
    record: dict[str, Any]

    def points(self, name: str, places: str = "step") -> list[tuple[float, float]]:
        """Steps and values of a column, where it has a value."""
        return [(step, value) for step, value in self.all_points(name, places) if not math.isnan(value)]

    def all_points(self, name: str, places: str = "step") -> list[tuple[float, float]]:
        """Steps and values of a column, nan where it has none."""
        return list(zip(self.columns[places], self.columns.get(name, []), strict=False))


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Attributes:
        name: of it.
        summary: its page, in Markdown; empty where it has not come to an end.
        header: columns of its results.
        rows: the first of its results.
        count: how many there are.
        record: its options and where it was run.
    """

    name: str
    summary: str
    header: list[str]
    rows: list[list[str]]
    count: int
    record: dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """What a folder holds, or a file of observations alone.

    Attributes:
        path: of it, or of the file.
        runs: of ``train``, or the variants of ``compare``.
        experiment: of ``experiment``, or None.
        observations: of each file that a `Monitor` has written, by its name, as `Observation.as_dict` has them; those of a
            table have ``counts`` of outliers and flags in place of these.
    """

    path: Path
    runs: list[Run] = field(default_factory=list)
    experiment: Experiment | None = None
    observations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def read(path: Path) -> Folder:
    """All that there is in a folder, or in a file of observations.

    Raises:
        DataError: nothing is, or what is there cannot be read.
    """
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise DataError(
            f"there is no folder or file {path}: give the --out of a run, or a JSONL or CSV file of a Monitor or its folder"
        )
    experiment = _experiment(path) if (path / RESULTS).is_file() else None
    places = [] if experiment else [p.parent for p in (path / RUN, *sorted(path.glob(f"*/{RUN}"))) if p.is_file()]
    found = Folder(path, [_run(place) for place in places], experiment, _observations(path))
    if not (found.runs or found.experiment or found.observations):
        below = next(filter(_has_observations, sorted(path.iterdir())), None)
        raise DataError(
            f"{path} must hold {RECORD} and {RUN} of bootgrad train, folders of them as of bootgrad compare, {RESULTS} of "
            "bootgrad experiment, or a JSONL or CSV file of a Monitor; none is there"
            + ("" if below is None else f": give {below}, which has one")
        )
    return found


def _file(path: Path) -> Folder:
    first = first_line(path)
    rows = read_jsonl(path) if begins_jsonl(first) else list(map(_nested, read_csv(path))) if begins_csv(first) else []
    if not rows:
        raise DataError(
            f"{path} has no observations of a Monitor: give a JSONL or CSV file that one has written, or a folder; of a run of "
            "bootgrad train, compare or experiment that is its --out"
        )
    return Folder(path, observations={path.name: rows})


def _run(folder: Path) -> Run:
    try:
        header, *lines = _table(folder / RUN)
        columns = {name: [float(line[k] or "nan") for line in lines] for k, name in enumerate(header)}
        has_record = (folder / RECORD).is_file()
        record = _json(folder / RECORD) if has_record else {}
        settings = record["settings"] if has_record else checkpoint.read(folder / CHECKPOINT)["settings"]
        if "step" not in columns:
            raise ValueError("no steps")
    except DataError:
        raise
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{folder} is no whole run of bootgrad train ({type(error).__name__}: {error})") from error
    return Run(folder.resolve().name, columns, dict(settings), record)


def _experiment(folder: Path) -> Experiment:
    header, *rows = _table(folder / RESULTS)
    record = _json(folder / RECORD) if (folder / RECORD).is_file() else {}
    options = record.get("experiment")
    name = options.get("name") if isinstance(options, dict) else None
    summary = (folder / SUMMARY).read_text(encoding="utf-8") if (folder / SUMMARY).is_file() else ""
    return Experiment(str(name or folder.resolve().name), summary, header, rows[:MOST_ROWS], len(rows), record)


def _observations(folder: Path) -> dict[str, list[dict[str, Any]]]:
    ours = (path for path in sorted(folder.glob("*.jsonl")) if begins_jsonl(first_line(path)))
    found = {path.name: read_jsonl(path) for path in ours}
    for path in sorted(folder.glob("*.csv")):
        if not begins_csv(first_line(path)):
            continue
        rows, twin = read_csv(path), found.get(f"{path.stem}.jsonl")
        if not twin or (rows and twin[-1]["step"] < rows[-1]["step"]):  # else that has all of it, and more
            found[path.name] = list(map(_nested, rows))
    return {name: rows for name, rows in found.items() if rows}


def _has_observations(folder: Path) -> bool:
    """Whether a folder seems to have some, by first lines."""
    kinds = ((begins_jsonl, "*.jsonl"), (begins_csv, "*.csv"))
    files = ((begins, path) for begins, pattern in kinds for path in folder.glob(pattern) if path.is_file())
    return any(begins(first_line(path)) for begins, path in files)


def _nested(row: dict[str, Any]) -> dict[str, Any]:
    """A row of scalars as an observation."""
    out: dict[str, Any] = {"layers": {}, "norms": {}, "strengths": {}, "counts": {}}
    for name, value in row.items():
        kind, _, rest = name.removeprefix(PREFIX).partition("/")
        if kind == "layer":
            layer, _, quantity = rest.rpartition("/")
            out["layers"].setdefault(layer, {})[quantity] = value
        elif kind in ("norm", "strength"):
            out[f"{kind}s"][rest] = value
        elif kind in COUNTED:
            out["counts"][kind] = value
        else:
            out[kind] = value
    return out


def count_of(row: dict[str, Any], kind: str) -> int | None:
    """How many outliers or flags an observation has; None where it was not looked for them."""
    if "counts" not in row:
        return None if kind == "outliers" and not row.get("norms") else len(row.get(kind, ()))
    count = number_of(row["counts"].get(kind))
    return int(count) if math.isfinite(count) else None


def _table(path: Path) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    if not lines or any(len(line) != len(lines[0]) for line in lines):
        raise DataError(f"{path} is no whole table: it is empty, or has rows of unlike length")
    return lines


def _json(path: Path) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    return found


def number_of(value: Any) -> float:
    """A number of an observation: of text as ``inf`` too; nan for what is not there.

    Raises:
        ArgumentError: it is no number.
    """
    if value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"an observation has {value!r} where a number must be") from None
