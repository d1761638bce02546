"""What an experiment is given to work with: its options, a table that remembers what has been run, and a progress bar.

A run that was stopped goes on: `Study.rows` computes only what the table does not hold yet. So an experiment is written as
if it ran from beginning to end, and takes the same path again over stored numbers.
"""

import datetime
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import ArgumentError, DataError
from ..training.environment import device_info, versions
from .table import Row, Table, Value, has

RESULTS, RECORD = "results.csv", "run.json"
MAY_CHANGE = ("threads",)


@dataclass(frozen=True)
class Options:
    """How an experiment is run.

    Attributes:
        name: of the experiment.
        full: the long form, of hours, in place of the quick one, of a minute or two.
        seeds: how many; at least two, for there is no interval of one.
        data: source of the images, as ``bootgrad train`` takes it; None for the experiment's own.
        threads: of torch's CPU kernels; torch's own choice when None.
    """

    name: str
    full: bool = False
    seeds: int = 5
    data: str | None = None
    threads: int | None = None

    def __post_init__(self):
        """Check the numbers."""
        if self.seeds < 2:
            raise ArgumentError(f"--seeds must be at least 2, for there is no interval of one; got {self.seeds}")
        if self.threads is not None and self.threads < 1:
            raise ArgumentError(f"--threads must be at least 1; got {self.threads}")


class Study:
    """The runs of one experiment in one folder.

    Args:
        options: how it is run.
        columns: of the table.
        out: the folder; what it holds of the same options is gone on with.
        overwrite: start anew whatever the folder holds.

    Raises:
        ArgumentError: the folder holds runs of other options.
        DataError: it cannot be made, or its files cannot be read.
    """

    def __init__(self, options: Options, columns: Iterable[str], out: Path, *, overwrite: bool = False):
        """Open the folder."""
        self.options, self.out = options, out
        self.table = Table(columns)
        self.seconds = 0.0
        self._bar: Any = None
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--out {out} cannot be made ({error.strerror}): choose another folder") from error
        if not overwrite and (out / RECORD).exists():
            self._go_on()
        if options.threads is not None:
            torch.set_num_threads(options.threads)

    @property
    def seeds(self) -> range:
        """The seeds of the runs."""
        return range(self.options.seeds)

    @property
    def full(self) -> bool:
        """Whether this is the long form."""
        return self.options.full

    def rows(self, settings: Mapping[str, Value], compute: Callable[[], Iterable[Mapping[str, Value]]]) -> Table:
        """The rows that have ``settings``: from the table, or else computed, added to it and stored.

        Args:
            settings: some of the columns, by which these rows are known again.
            compute: gives their other columns.
        """
        found = self.table.where(**settings)
        if not len(found):
            start = time.perf_counter()
            rows: list[Row] = [{**settings, **row} for row in compute()]
            self.seconds += time.perf_counter() - start
            wrong = next(
                (set(row) ^ set(self.table.columns) for row in rows if set(row) != set(self.table.columns)), None
            )
            if wrong:
                raise ValueError(f"a row must have the columns {self.table.columns}; not agreed on: {sorted(wrong)}")
            found = Table(self.table.columns, rows)
            self.table.rows += rows
            self._store()
        if self._bar is not None:
            self._bar.update()
        return found

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[None]:
        """A bar over the next ``total`` calls of `rows`."""
        with tqdm(total=total, desc=what, dynamic_ncols=True) as self._bar:
            try:
                yield
            finally:
                self._bar = None

    def record(self) -> dict[str, Any]:
        """What is stored beside the table."""
        return {
            "experiment": asdict(self.options),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 1),
            "device": device_info(torch.device("cpu")),
            "versions": versions(),
        }

    def _store(self) -> None:
        from ..training.checkpoint import replacing

        self.table.write(self.out / RESULTS)
        with replacing(self.out / RECORD) as file:
            file.write((json.dumps(self.record(), indent=2) + "\n").encode())

    def _go_on(self) -> None:
        try:
            record = json.loads((self.out / RECORD).read_text(encoding="utf-8"))
            stored, self.seconds = dict(record["experiment"]), float(record["seconds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.out / RECORD} cannot be read ({error}): start anew by --overwrite") from error
        wanted = asdict(self.options)
        for name in wanted:
            if name not in MAY_CHANGE and stored.get(name) != wanted[name]:
                raise ArgumentError(
                    f"{self.out} holds runs with {name} = {stored.get(name)}, not {wanted[name]}: "
                    "choose another --out, or start anew by --overwrite"
                )
        self.table = Table.read(self.out / RESULTS, self.table.columns)


def missing(table: Table, settings: Iterable[Mapping[str, Value]]) -> list[Mapping[str, Value]]:
    """Those of some settings that a table has no row of."""
    return [wanted for wanted in settings if not any(has(row, wanted) for row in table)]
