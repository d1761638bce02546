"""Successive halving: many settings with little training, the best of them with more, few with all of it.

Source: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from .study import Study
from .table import Table, Value


def halve(
    study: Study,
    candidates: Iterable[Mapping[str, Value]],
    compute: Callable[[Mapping[str, Value], float], Mapping[str, Value]],
    *,
    score: str,
    stage: str = "stage",
    budgets: Sequence[float] = (1 / 9, 1 / 3, 1.0),
    keep: float = 1 / 3,
) -> Mapping[str, Value]:
    """The candidate with the lowest score after the last round; each round's rows are stored in the study.

    A single candidate is not run: there is nothing to choose.

    Args:
        study: where rows are kept.
        candidates: settings to choose from.
        compute: (candidate, budget) → the other columns of its row; the budget is a share of a whole run.
        score: the column that is to be low; a run that diverged, with nan or infinity there, is last.
        stage: the column that the round's name, ``search 1``, ``search 2``, …, goes into.
        budgets: of the rounds.
        keep: the share of the candidates that goes on to the next round, at least one.
    """
    left = list(candidates)
    for number, budget in enumerate(budgets if len(left) > 1 else (), 1):
        scores = []
        for candidate in left:
            settings = {**candidate, stage: f"search {number}"}
            row = next(iter(study.rows(settings, partial(_one_row, compute, candidate, budget))))
            value = float(row[score])
            scores.append(value if math.isfinite(value) else math.inf)
        order = sorted(range(len(left)), key=scores.__getitem__)
        left = [left[k] for k in order[: max(1, math.ceil(keep * len(left))) if number < len(budgets) else 1]]
    return left[0]


def _one_row(compute, candidate: Mapping[str, Value], budget: float) -> list[Mapping[str, Value]]:
    return [compute(candidate, budget)]


def lowest(table: Table, names: Sequence[str], score: str) -> dict[str, Value]:
    """The setting with the lowest mean score, where a whole grid was run: by `means`."""
    setting, _ = min(means(table, names, score).items(), key=lambda found: found[1])
    return dict(zip(names, setting, strict=True))


def means(table: Table, names: Sequence[str], score: str) -> dict[tuple[Value, ...], float]:
    """The mean of a column for each setting, the values of the columns ``names``; infinite where one run diverged."""
    found: dict[tuple[Value, ...], list[float]] = {}
    for row in table:
        value = float(row[score])
        found.setdefault(tuple(row[name] for name in names), []).append(value if math.isfinite(value) else math.inf)
    return {setting: statistics.fmean(values) for setting, values in found.items()}


def runs_of_halving(candidates: int, rounds: int = 3, keep: float = 1 / 3) -> int:
    """How many runs `halve` takes, for a progress bar."""
    total = 0
    for _ in range(rounds if candidates > 1 else 0):
        total += candidates
        candidates = max(1, math.ceil(keep * candidates))
    return total
