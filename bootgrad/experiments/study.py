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
from ..training.checkpoint import replacing
from ..training.data import ImageData, load
from ..training.environment import device_info, versions
from .table import Row, Table, Value, is_kept

RESULTS, RECORD, SUMMARY = "results.csv", "run.json", "summary.md"
RUN = "run.csv"  # of a training run, whose record has the same name
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
        """Open the folder, and say in it what is to be run."""
        self.options, self.out = options, out
        self.table = Table(columns)
        self.seconds = 0.0
        self.places: list[dict[str, Any]] = []  # what rows were computed on, one after the other
        self._fingerprint: int | None = None
        self._bar: Any = None
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if (out / RUN).exists():
            raise DataError(
                f"{out} holds a run of bootgrad train, whose {RECORD} would be replaced: choose another --out"
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name in (RECORD, RESULTS, SUMMARY) if overwrite else ():
                (out / name).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(
                f"--out {out} cannot be made or cleared ({error.strerror}): choose another folder"
            ) from error
        if not (out / RESULTS).exists():
            self._write_record()
        elif (out / RECORD).exists():
            self._go_on()
        else:
            raise DataError(
                f"{out} has a {RESULTS} but no {RECORD}: choose another --out, or start anew by --overwrite"
            )

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

        Raises:
            ValueError: settings that would not be read back as they are, or rows of other columns.
        """
        lost = [name for name, value in settings.items() if not is_kept(value)]
        if lost:
            raise ValueError(
                f"settings must be numbers, or words that do not look like them; {lost[0]} is {settings[lost[0]]!r}"
            )
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

    def images(self) -> ImageData:
        """The images of ``--data``, digits without one; the same ones for all runs of the folder.

        Raises:
            DataError: there are none, or others than the folder's runs are of.
        """
        data = load(self.options.data or "digits")
        if self._fingerprint not in (None, data.fingerprint):
            raise DataError(
                f"{self.out} holds runs on other images than --data {self.options.data or 'digits'} has now: "
                "choose another --out, or start anew by --overwrite"
            )
        if self._fingerprint is None:
            self._fingerprint = data.fingerprint
            self._write_record()
        return data

    def _store(self) -> None:
        place = {
            "date": datetime.date.today().isoformat(),
            "device": device_info(torch.device("cpu")),
            "versions": versions(),
        }
        if place not in self.places:
            self.places.append(place)
        self.table.write(self.out / RESULTS)
        self._write_record()

    def _write_record(self) -> None:
        record = {
            "experiment": asdict(self.options),
            "fingerprint": self._fingerprint,
            "seconds": round(self.seconds, 1),
            "places": self.places,
        }
        with replacing(self.out / RECORD) as file:
            file.write((json.dumps(record, indent=2) + "\n").encode())

    def _go_on(self) -> None:
        try:
            record = json.loads((self.out / RECORD).read_text(encoding="utf-8"))
            stored, self.seconds = dict(record["experiment"]), float(record["seconds"])
            self._fingerprint, self.places = record["fingerprint"], list(record["places"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise DataError(f"{self.out / RECORD} cannot be read ({error}): start anew by --overwrite") from error
        wanted = asdict(self.options)
        for name in wanted:
            if name not in MAY_CHANGE and stored.get(name) != wanted[name]:
                raise ArgumentError(
                    f"{self.out} holds runs with {name} = {stored.get(name)}, not {wanted[name]}: "
                    "choose another --out, or start anew by --overwrite"
                )
        self.table = Table.read(self.out / RESULTS, self.table.columns)
