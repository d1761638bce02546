"""Final runs of any experiment, whatever its columns: test losses by problem, method, setting and seed.

The columns of a table are, in this order, those by which a problem is known; ``stage``, ``method`` or ``way`` and those of
a setting; ``seed``; and what was measured. Of several rows of a run the last is that of its end.
"""

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..intervals import Interval, interval
from .evidence import difference
from .image_runs import SGD
from .search import means
from .table import Table, Value

Setting = tuple[Value, ...]
PLAIN = SGD.name  # the steps without a penalty
ALIKE, NEGLIGIBLE = 0.05, 0.01  # shares of a test loss


@dataclass(frozen=True)
class Outcomes:
    """Final test losses on one problem.

    Attributes:
        where: the problem, as in ``batch 16``; empty where there is one only.
        names: the columns of a setting, such as learning rate and strength.
        losses: method → setting → seed → test loss.
        scores: method → setting → mean validation loss in the last round of the search.
    """

    where: str
    names: tuple[str, ...]
    losses: dict[str, dict[Setting, dict[Value, float]]]
    scores: dict[str, dict[Setting, float]]

    def settings(self, method: str, **fixed: Value) -> list[dict[str, Value]]:
        """A method's settings that have some values."""
        settings = [dict(zip(self.names, setting, strict=True)) for setting in self.losses[method]]
        return [setting for setting in settings if fixed.items() <= setting.items()]

    def chosen(self, method: str, **fixed: Value) -> dict[str, Value]:
        """The one of these settings with the lowest score; unsearched ones are last."""
        scores = self.scores[method]
        return min(self.settings(method, **fixed), key=lambda setting: scores.get(tuple(setting.values()), math.inf))

    def of(self, method: str, **fixed: Value) -> dict[Value, float]:
        """Test loss by seed at the chosen setting."""
        return self.losses[method][tuple(self.chosen(method, **fixed).values())]

    def without(self, method: str) -> str | None:
        """The method that lacks the penalty of another; None of one that has none, or where it was not run."""
        strength = {name: self.chosen(name).get("strength") for name in self.losses}
        base = method.partition(" + ")[0]
        if base != method and base in self.losses and not strength[base]:
            return base
        return PLAIN if strength[method] and method != PLAIN and PLAIN in self.losses else None

    def best(self, methods: Iterable[str]) -> str | None:
        """The method with the lowest score of those without diverged runs; with the lowest mean test loss if one has no score.

        The lowest of several test losses is low by chance, too: what it is compared with would seem worse, or not apart.
        """
        held = [method for method in methods if all(map(math.isfinite, self.of(method).values()))]
        values = {method: self.scores[method].get(tuple(self.chosen(method).values()), math.nan) for method in held}
        if not all(map(math.isfinite, values.values())):
            values = {method: statistics.fmean(self.of(method).values()) for method in held}
        return min(held, key=values.__getitem__, default=None)


@dataclass(frozen=True)
class Comparison:
    """Test losses of a method against those of another, seed by seed, by difference and by ratio.

    Those of like data sets differ by an amount, those of unlike ones by a factor: either may tell two methods apart.

    Attributes:
        methods: both.
        difference: of the losses.
        log_ratio: of the losses; of no pairs where they are not positive.
        scale: mean loss of the other method.
    """

    methods: tuple[str, str]
    difference: Interval
    log_ratio: Interval
    scale: float

    def __str__(self) -> str:
        """Both intervals."""
        text = f"test loss of {self.methods[0]} less that of {self.methods[1]}: {self.difference}"
        return f"{text}; log of their ratio: {self.log_ratio}" if self.log_ratio.n else text

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """Both intervals as shares of the other's loss."""
        found = [(self.difference.low / self.scale, self.difference.high / self.scale)]
        return [*found, (self.log_ratio.low, self.log_ratio.high)] if self.log_ratio.n else found

    @property
    def is_apart(self) -> bool:
        """Whether the first loss is higher or lower."""
        return any(low > 0 or high < 0 for low, high in self.bounds)

    @property
    def is_worse(self) -> bool:
        """Whether it is higher."""
        return self.is_apart and all(high >= 0 for _, high in self.bounds)

    @property
    def is_no_worse(self) -> bool:
        """Whether it is higher by a few percent at most."""
        return any(high <= ALIKE for _, high in self.bounds)

    @property
    def is_alike(self) -> bool:
        """Whether it is the same but for a few percent, or differs for certain, but by less than one percent."""
        return any(max(-low, high) <= (ALIKE if low <= 0 <= high else NEGLIGIBLE) for low, high in self.bounds)


def compare(problem: Outcomes, method: str, other: str, **fixed: Value) -> Comparison | None:
    """On the seeds that both have; None of fewer than two, or where runs diverged."""
    mine, theirs = problem.of(method, **fixed), problem.of(other, **fixed)
    pairs = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
    if len(pairs) < 2 or not all(math.isfinite(loss) for pair in pairs for loss in pair):
        return None
    first, second = zip(*pairs, strict=True)
    logs = [math.log(a / b) for a, b in pairs] if min(first + second) > 0 else []
    scale = abs(statistics.fmean(second)) or 1.0
    return Comparison((method, other), difference(first, second), interval(logs), scale)


def outcomes(table: Table) -> list[Outcomes]:
    """Those on each problem; none before the first final run.

    Raises:
        ValueError: the table has no columns of methods, seeds, and validation and test losses.
    """
    method = next((name for name in ("method", "way") if name in table.columns), "method")
    needed = ("stage", method, "seed", "validation_loss", "test_loss")
    if missing := [name for name in needed if name not in table.columns]:
        raise ValueError(f"a table of runs must have the columns {', '.join(needed)}; it lacks {', '.join(missing)}")
    first, last = table.columns.index("stage"), table.columns.index("seed")
    problem, names = table.columns[:first], tuple(n for n in table.columns[first + 1 : last] if n != method)
    stages = set(_final_stages(table))
    final = Table(table.columns, [row for row in table if row["stage"] in stages])
    searches = Table(table.columns, [row for row in table if str(row["stage"]).startswith("search")])
    found = []
    for key in dict.fromkeys(tuple(row[name] for name in problem) for row in final):
        settings = dict(zip(problem, key, strict=True))
        where = ", ".join(f"{name} {value}" for name, value in settings.items() if len(final.values(name)) > 1)
        losses: dict[str, dict[Setting, dict[Value, float]]] = {}
        for row in final.where(**settings):
            by_seed = losses.setdefault(str(row[method]), {}).setdefault(tuple(row[name] for name in names), {})
            by_seed[row["seed"]] = float(row["test_loss"])
        scores = {kind: _scores(searches.where(**settings, **{method: kind}), names) for kind in losses}
        found.append(Outcomes(where, names, losses, scores))
    return found


def _final_stages(table: Table) -> Iterator[Value]:
    """Stages of whole runs: not of a search, nor of measurements that have no test loss."""
    for stage in table.values("stage"):
        is_measured = not all(map(math.isnan, table.where(stage=stage).column("test_loss")))
        if stage == "final" or is_measured and not str(stage).startswith("search"):
            yield stage


def _scores(searches: Table, names: tuple[str, ...]) -> dict[Setting, float]:
    if not len(searches):
        return {}
    return means(searches.where(stage=searches.values("stage")[-1]), names, "validation_loss")
