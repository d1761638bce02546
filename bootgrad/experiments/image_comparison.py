"""Ways of training compared on images: learning rate and strength searched for each, and final runs.

The search is on validation images. Penalized candidates that are best after a third of the training go on to all of it; plain
ones, which are few and quick, are all trained to the end.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ..intervals import interval
from ..training.model import reference_cnn
from .image_draws import Draw
from .image_runs import MEASURES, SGD, Network, Way, run
from .search import halve, runs_of_halving
from .study import Study
from .table import Row, Table, Value

SETTINGS = ("stage", "way", "lr", "strength", "seed")
COLUMNS = (*SETTINGS, *MEASURES)
SEARCH_SEED = 1000


@dataclass(frozen=True)
class Grid:
    """What is searched through: learning rates, and strengths s."""

    lrs: Sequence[float]
    strengths: Sequence[float]


FULL_GRID, QUICK_GRID = Grid((0.03, 0.1, 0.3), (0.0003, 0.001, 0.003, 0.01)), Grid((0.2,), (0.001, 0.01))


@dataclass(frozen=True)
class Problem:
    """What is trained in several ways.

    Attributes:
        settings: the columns by which its rows are known.
        draw: seed → the images of a run.
        batch: B.
        epochs: of a whole run.
        grid: what is searched through.
        network: (image shape, classes) → the model.
        share: of the training images that a run of the search is given.
        search_seeds: of the search; a candidate's numbers are means over them.
        others: columns of the experiment that are the same in all rows.
    """

    settings: Mapping[str, Value]
    draw: Callable[[int], Draw]
    batch: int
    epochs: float
    grid: Grid
    network: Network = reference_cnn
    share: float = 1.0
    search_seeds: Sequence[int] = (SEARCH_SEED,)
    others: Mapping[str, Value] = field(default_factory=dict)

    def candidates(self, way: Way) -> list[dict[str, Value]]:
        """The grid that is searched for a way."""
        strengths = (0.0,) if way.is_plain else self.grid.strengths
        return [
            {**self.settings, "way": way.name, "lr": lr, "strength": strength}
            for lr in self.grid.lrs
            for strength in strengths
        ]

    def calls(self, ways: Iterable[Way], seeds: int) -> int:
        """How many rows `compare` asks for."""
        return sum(runs_of_halving(len(self.candidates(way)), len(_rounds(way))) + seeds for way in ways)


def compare(study: Study, problem: Problem, way: Way, epochs: float | None = None) -> None:
    """Search a way's learning rate and strength, and run it with them on the seeds of the study.

    Args:
        study: keeps the rows.
        problem: what to train.
        way: how.
        epochs: of a whole run; the problem's when None.
    """
    epochs = problem.epochs if epochs is None else epochs

    def one(candidate: Mapping[str, Value], seed: int, share: float, final: bool, budget: float = 1.0) -> Row:
        images = problem.draw(seed)
        count = max(2, round(share * len(images.train[1])))
        images = replace(images, train=(images.train[0][:count], images.train[1][:count]))
        lr, strength = float(candidate["lr"]), float(candidate["strength"])
        options = {"lr": lr, "strength": strength, "batch": problem.batch, "epochs": budget * epochs}
        return {**problem.others, **run(way, images, problem.network, final=final, seed=seed, **options)}

    def score(candidate: Mapping[str, Value], budget: float) -> Row:
        rows = [one(candidate, seed, problem.share, False, budget) for seed in problem.search_seeds]
        means = {name: statistics.fmean(float(row[name]) for row in rows) for name in MEASURES}
        return {**problem.others, "seed": problem.search_seeds[0], **means}

    best = halve(study, problem.candidates(way), score, score="validation_loss", budgets=_rounds(way))

    def whole(seed: int) -> list[Row]:
        return [one(best, seed, 1.0, True)]

    for seed in study.seeds:
        study.rows({**best, "stage": "final", "seed": seed}, partial(whole, seed))


def same_time(way: Way) -> Way:
    """SGD for as long as a way takes."""
    return replace(SGD, name=f"sgd, time of {way.name}")


def compare_times(study: Study, problem: Problem, ways: Iterable[Way]) -> None:
    """SGD with as many more epochs as fit into the time of each way, which has been run; as many as its where all diverged."""
    for way in ways:
        ratio = interval(final(study.table, **problem.settings, way=way.name).column("ratio")).mean
        compare(study, problem, same_time(way), problem.epochs * ratio if math.isfinite(ratio) else None)


def compare_all(study: Study, problems: Sequence[Problem], ways: Sequence[Way], timed: Sequence[Way]) -> None:
    """`compare` all ways on all problems, and SGD of the time of some, under a progress bar."""
    total = sum(p.calls((*ways, *map(same_time, timed)), len(study.seeds)) for p in problems)
    with study.progress(total, study.options.name):
        for problem in problems:
            for way in ways:
                compare(study, problem, way)
            compare_times(study, problem, timed)


def final(table: Table, **settings: Value) -> Table:
    """The final rows that have some settings, seed by seed."""
    found = table.where(stage="final", **settings)
    return Table(found.columns, sorted(found.rows, key=lambda row: row["seed"]))


def _rounds(way: Way) -> tuple[float, ...]:
    """Shares of a whole run in the rounds of a search."""
    return (1.0,) if way.is_plain else (1 / 3, 1.0)
