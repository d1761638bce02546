"""Ways of training compared on images: learning rate and strength searched for each, final runs, and what they say.

The search is on validation images. Penalized candidates that are best after a third of the training go on to all of it; plain
ones, which are few and quick, are all trained to the end.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ..intervals import Interval, interval
from ..training.model import reference_cnn
from .conduct import markdown
from .evidence import Claim, difference
from .image_draws import Draw
from .image_runs import MEASURES, SGD, Network, Way, run
from .search import halve, runs_of_halving
from .study import Study
from .table import Row, Table, Value

SETTINGS = ("stage", "way", "lr", "strength", "seed")
COLUMNS = (*SETTINGS, *MEASURES)
SEARCH_SEED = 1000
_HEADER = ("way", "learning rate", "s", "test loss", "accuracy", "gap", "test loss, stopped early", "training accuracy",
           "Γ", "time of a step")  # fmt: skip


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


def compare_all(study: Study, problems: Sequence[Problem], ways: Sequence[Way]) -> None:
    """`compare` all ways on all problems, under a progress bar."""
    with study.progress(sum(p.calls(ways, len(study.seeds)) for p in problems), study.options.name):
        for problem in problems:
            for way in ways:
                compare(study, problem, way)


def final(table: Table, **settings: Value) -> Table:
    """The final rows that have some settings, seed by seed."""
    found = table.where(stage="final", **settings)
    return Table(found.columns, sorted(found.rows, key=lambda row: row["seed"]))


def lower(table: Table, first: Mapping[str, Value], second: Mapping[str, Value], *, text: str, source: str,
          column: str = "test_loss") -> Claim:  # fmt: skip
    """A claim that a column is lower, or an accuracy higher, in the final rows of ``first`` than in those of ``second``.

    Γ, which spans decades, is compared by its logarithm.
    """
    columns = [final(table, **settings).column(column) for settings in (first, second)]
    differing = [name for name in first if name != "way" and first[name] != second[name]]
    names = [", ".join([str(kind["way"]), *(f"{n} {kind[n]}" for n in differing)]) for kind in (first, second)]
    name = column.replace("_", " ")
    if column == "gamma":
        columns = [[math.log10(value) if value > 0 else math.nan for value in values] for values in columns]
        name = "log₁₀ Γ"
    if column.endswith("accuracy"):
        columns, names = columns[::-1], names[::-1]
    return Claim(text, source, f"{name} of {names[1]} − {names[0]}", difference(columns[1], columns[0]))


def against_sgd(table: Table, ways: Iterable[Way], source: str) -> list[Claim]:
    """Claims that each way has a lower test loss than SGD, and a higher accuracy, for each of the problems of a table."""
    found = []
    for problem in final(table).values("problem"):
        for way in ways:
            mine, theirs = ({"problem": problem, "way": name} for name in (way.name, SGD.name))
            for column, words in (("test_loss", "a lower test loss"), ("test_accuracy", "a higher accuracy")):
                text = f"{problem}: {way.name} ends at {words} than SGD"
                found.append(lower(table, mine, theirs, text=text, source=source, column=column))
    return found


def measured(table: Table, by: Sequence[str] = ()) -> str:
    """The final rows as Markdown: means over seeds of each way, for each value of the columns ``by``.

    Says of which ways the values lie at an edge of what was searched.
    """
    rows, edges = [], []
    for settings in _kinds(table, (*by, "way")):
        mine, searched = final(table, **settings), table.where(stage="search 1", **settings)
        chosen = mine.rows[0]
        found = [interval(mine.column(name)) for name in ("test_loss", "test_accuracy", "gap", "stopped_loss")]
        found += [interval(mine.column(name)) for name in ("train_accuracy", "gamma", "ratio")]
        rows.append((*settings.values(), f"{chosen['lr']:g}", f"{chosen['strength']:g}", *found))
        for name, symbol in (("lr", "learning rate"), ("strength", "s")):
            values = searched.column(name)
            if len(set(values)) > 1 and chosen[name] in (min(values), max(values)):
                edges.append(f"{symbol} of {' '.join(str(value) for value in settings.values())}")
    said = f"At an edge of what was searched: {', '.join(edges) or 'nothing'}."
    return f"{markdown((*by, *_HEADER), rows)}\n\n{said}"


def draw_intervals(ax, found: Mapping[str, Interval], title: str, unit: str) -> None:
    """Means and intervals, one below the other; each its own marker and colour, in turn."""
    from ..training.figures import COLOURS

    markers = "osD^v<>P"
    for place, (name, at) in enumerate(found.items()):
        if math.isfinite(at.mean):
            error = [[at.mean - at.low], [at.high - at.mean]] if math.isfinite(at.low) else None
            style = {"color": COLOURS[place % len(COLOURS)], "marker": markers[place % len(markers)]}
            ax.errorbar([at.mean], [place], xerr=error, capsize=3, linestyle="", label=name, **style)
    ax.set(title=title, xlabel=unit, yticks=range(len(found)), yticklabels=list(found))
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.grid(True, axis="x", alpha=0.25)


def draw_problems(table: Table):
    """A figure of test losses and accuracies of all ways, a column for each problem of a table."""
    from ..training.figures import panels

    problems = final(table).values("problem")
    figure, axes = panels(2, len(problems), (5 * len(problems), 7), shared=False)
    for row, (column, title, unit) in enumerate(
        (("test_loss", "Test loss", "nats"), ("test_accuracy", "Accuracy", "share"))
    ):
        for ax, problem in zip(axes[row * len(problems) :], problems, strict=False):
            draw_intervals(ax, intervals(table, column, problem=problem), f"{title}: {problem}", unit)
    return figure


def intervals(table: Table, column: str, **settings: Value) -> dict[str, Interval]:
    """Mean and interval of a column of each way's final rows."""
    ways = final(table, **settings).values("way")
    return {str(way): interval(final(table, way=way, **settings).column(column)) for way in ways}


def _rounds(way: Way) -> tuple[float, ...]:
    """Shares of a whole run in the rounds of a search."""
    return (1.0,) if way.is_plain else (1 / 3, 1.0)


def _kinds(table: Table, columns: Sequence[str]) -> list[dict[str, Value]]:
    rows = table.where(stage="final")
    return [
        dict(zip(columns, key, strict=True)) for key in dict.fromkeys(tuple(row[c] for c in columns) for row in rows)
    ]
