"""Run an experiment from its name: the study, then a summary and a figure of what it found.

An experiment is a module of this package with

    TITLE, SECTION, ABOUT      a line, the section of the paper, and a paragraph: what is run, and what the paper says
    COLUMNS                    of its table
    IMAGES                     whether it takes ``--data``, by `Study.images`
    run(study)                 fills the table by `Study.rows`
    claims(table)              what the numbers say, as `evidence.Claim`
    tables(table)              the measured numbers for people, as Markdown
    draw(table)                a figure of them
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol

from ..errors import ArgumentError
from ..training.checkpoint import replacing
from ..training.figures import save
from .evidence import Claim
from .study import SUMMARY, Options, Study
from .table import Table

EXPERIMENTS = (
    "idealized", "sparse-regression", "variability", "cnn", "small-data", "non-iid", "underparameterized", "alignment",
    "window", "strength",
)  # fmt: skip


class Experiment(Protocol):
    """The names that a module of an experiment has."""

    TITLE: str
    SECTION: str
    ABOUT: str
    COLUMNS: tuple[str, ...]
    IMAGES: bool

    def run(self, study: Study) -> None:
        """Fill the study's table."""

    def claims(self, table: Table) -> Sequence[Claim]:
        """What its numbers say."""

    def tables(self, table: Table) -> str:
        """Its numbers as Markdown."""

    def draw(self, table: Table):
        """A matplotlib figure of them."""


def find(name: str) -> Experiment:
    """The experiment of a name.

    Raises:
        ArgumentError: there is none.
    """
    if name not in EXPERIMENTS:
        raise ArgumentError(f"there is no experiment {name!r}: take one of {', '.join(EXPERIMENTS)}")
    return import_module(f".{name.replace('-', '_')}", __package__)  # type: ignore[return-value]


def conduct(options: Options, out: Path, *, overwrite: bool = False) -> Path:
    """Run an experiment, or what is missing of it, and write ``results.csv``, ``summary.md`` and ``figure.png``.

    Returns:
        The path of the summary.

    Raises:
        ArgumentError: there is no such experiment, it takes no images, or ``out`` holds runs of other options.
        DataError: data or stored results cannot be read.
    """
    experiment = find(options.name)
    if options.data is not None and not experiment.IMAGES:
        raise ArgumentError(f"{options.name} is not about images: leave --data {options.data} out")
    study = Study(options, experiment.COLUMNS, out, overwrite=overwrite)
    experiment.run(study)
    path = out / SUMMARY
    with replacing(path) as file:
        file.write(summary(experiment, study).encode())
    save(experiment.draw(study.table), out / "figure.png")
    return path


def summary(experiment: Experiment, study: Study) -> str:
    """The page of an experiment: what was claimed, what was measured, a verdict, and how it was run."""
    form = "full" if study.full else "quick"
    lines = [
        f"# {study.options.name}: {experiment.TITLE}",
        "",
        experiment.ABOUT.strip(),
        "",
        "## Verdicts",
        "",
        "| claim | from | measured, above zero where it is true | mean [95 % interval] | verdict |",
        "|---|---|---|---|---|",
        *(
            f"| {claim.text} | {claim.source} | {claim.quantity} | {claim.found} | **{claim.verdict}** |"
            for claim in experiment.claims(study.table)
        ),
        "",
        "## Measured",
        "",
        experiment.tables(study.table).strip(),
        "",
        "![figure](figure.png)",
        "",
        "## How it was run",
        "",
        f"The {form} form, {study.options.seeds} seeds, {_duration(study.seconds)} of computing: "
        f"`bootgrad experiment {study.options.name}{' --full' if study.full else ''}"
        f"{f' --data {study.options.data}' if study.options.data else ''} --seeds {study.options.seeds}`. "
        "Intervals are over seeds, by Student's t, each at 95 %: of many claims without any effect one in twenty would be "
        "decided by chance. Settings that were searched for are those of one search, whose luck is not in the intervals. "
        "A claim is unclear where runs diverged. Numbers of all runs: results.csv.",
        "",
        *(
            f"- {place['date']}: {place['device']['name']}, threads: {place['device']['threads']}, torch "
            f"{place['versions']['torch']}, bootgrad {place['versions']['bootgrad']}"
            for place in study.places
        ),
        "",
    ]
    return "\n".join(lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def listing() -> str:
    """One line for each experiment."""
    width = max(map(len, EXPERIMENTS))
    return "\n".join(f"{name:{width}}  {find(name).TITLE}" for name in EXPERIMENTS)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
