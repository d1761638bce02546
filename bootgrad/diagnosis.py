"""What a run's own numbers say went wrong: signatures of failure, each with its meaning and what to try.

Folders of ``bootgrad train`` are read (``run.json`` and ``run.csv``, which ``compare`` leaves for each variant), and of
``bootgrad experiment`` (``run.json`` and ``results.csv``).
"""

import csv
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import DataError
from .experiments.conduct import find
from .experiments.outcomes import PLAIN, Outcomes, compare, outcomes
from .experiments.study import RECORD, RESULTS, RUN, SUMMARY
from .experiments.table import Table
from .training import checkpoint
from .training.run import CHECKPOINT

_FALLS, _NOTHING, _TOO_MUCH = 0.8, 0.01, 1.0
_LEARNS, _RISES, _JUMPS = 0.95, 1.1, 100.0  # of the loss at the beginning
_NOISE, _NOT_JUDGED = "noisy gd", "cannot be judged"

# signature → what it means, what to try; the last one says that others were not looked for
SIGNATURES = {
    "Γ does not fall": (
        "the samples' gradients disagree as much as at first: SGD's own pull towards small Γ, of the size η/(2B), is weak for "
        "a large batch; at a high learning rate steps are longer than the basins where Γ is small",
        "a smaller batch, a lower learning rate, or a larger --reg1",
    ),
    "the penalty has nothing left to do": (
        "its part of the bound on the solution's variability is small already, and hardly moves the parameters",
        "a larger strength; where Γ is small, too, the other penalty or none: the rest of the gap is not of this noise",
    ),
    "the penalty outweighs the loss": (
        "the smallest gradients are those of a model that does not learn, which such a penalty prefers",
        "a smaller strength, or a lower learning rate: penalties hurt first where steps are long",
    ),
    "ends worse than plain": (
        "the penalty is too strong for this learning rate or for so few steps; of one seed it can be chance",
        "a smaller strength or learning rate, and more seeds before it is believed",
    ),
    "diverges": (
        "steps along loss and penalty are longer than the landscape allows: a penalty adds a curvature of its own",
        "a lower learning rate, or a smaller strength at this one",
    ),
    "does not learn": (
        "the loss ends about where it began: steps are too short or too few, a penalty holds the parameters back, the first "
        "steps were so long that nothing gets through the network any more, or there was nothing left to learn",
        "plain steps first: a higher learning rate and more of them, a lower rate if the loss jumped early; where they learn, "
        "a smaller strength",
    ),
    "isotropic noise does as well as SGD": (
        "not the shape of SGD's noise helps here, but at most its power: where Γ is alike everywhere, there is nothing that "
        "SGD could avoid and that the penalties could add",
        "look at Γ along training: if it does not differ between solutions, Reg1 and Reg2 will not help",
    ),
    "makes no difference": (
        "its test loss is that without it, to a few percent: it is too weak, or it does not lower what costs test loss here",
        "a larger strength, if the search stopped at the largest; else another method",
    ),
    "seeds differ more than methods": (
        "so few seeds cannot tell these methods apart, compared seed by seed, neither by a difference nor by a ratio",
        "four times the seeds, which halves the interval",
    ),
    "hurts at the highest learning rate": (
        "SGD's own noise grows with the learning rate and penalizes Γ by itself; the explicit penalty comes on top",
        "a smaller strength where the learning rate is high, as λ = η/(2B) times a constant",
    ),
    _NOT_JUDGED: (
        "signatures that need this were not looked for: that they were not found says nothing",
        "an experiment goes on by the same command, or with more --seeds in another folder; a run with more --epochs, and with "
        "Reg1 where the method is random signs, which tell Γ there alone",
    ),
}


@dataclass(frozen=True)
class Finding:
    """A signature that was found, or what keeps them from being looked for.

    Attributes:
        where: the run, or the problem and the method, that has it; empty for all.
        signature: one of `SIGNATURES`.
        seen: the numbers that show it.
    """

    where: str
    signature: str
    seen: str

    def __str__(self) -> str:
        """The signature, what was seen, what it means, and what to try."""
        meaning, advice = SIGNATURES[self.signature]
        title = f"{self.where}: {self.signature}" if self.where else self.signature
        return f"{title}\n  seen:    {self.seen}\n  meaning: {meaning}\n  try:     {advice}"


def diagnose(folder: str | Path) -> list[Finding]:
    """The signatures of failure in a folder of a run, of several runs or of an experiment.

    Args:
        folder: as ``bootgrad train``, ``compare`` or ``experiment`` has left it.

    Raises:
        DataError: it holds none of them, or one that cannot be read.
    """
    folder = Path(folder)
    if (folder / RESULTS).is_file():
        return _of_experiment(folder)
    runs = [path.parent for path in (folder / RUN, *sorted(folder.glob(f"*/{RUN}"))) if path.is_file()]
    if not runs:
        raise DataError(
            f"{folder} must hold {RECORD} and {RUN} of bootgrad train, folders of them as of bootgrad compare, or "
            f"{RESULTS} of bootgrad experiment; none is there: give the folder that was their --out; what a "
            "Monitor has written is told of by bootgrad report"
        )
    found = [finding for run in runs for finding in _of_run(run, run.name if len(runs) > 1 else "")]
    return [*found, *_of_variants({run.name: _steps_of(run)[0]["test_loss"] for run in runs})]


def _of_run(folder: Path, name: str) -> Iterator[Finding]:
    steps, settings = _steps_of(folder)
    loss, traces = _ends(steps["loss"]), _ends(steps["covariance_trace"])
    of_loss = list(_of_loss(name, steps["loss"], settings["lr"]))
    yield from of_loss
    if loss and not traces:
        yield Finding(name, _NOT_JUDGED, "Γ is known in fewer than ten steps: whether it falls cannot be seen")
    if traces and not of_loss and traces[1] > _FALLS * traces[0]:
        where = f"batch {settings['batch_size']}, lr {settings['lr']}"
        yield Finding(
            name, "Γ does not fall", f"Γ {traces[0]:.3g} at the beginning, {traces[1]:.3g} at the end; {where}"
        )
    for penalty in ("reg1", "reg2"):
        strength, ends = float(settings[penalty]), _ends(steps[penalty])
        if strength and ends and loss:
            value = strength * ends[1]
            seen = f"λ · {penalty} is {value:.3g} at the end, the loss {loss[1]:.3g}"
            if value < _NOTHING * loss[1]:
                yield Finding(name, "the penalty has nothing left to do", seen)
            elif value > _TOO_MUCH * loss[1]:
                yield Finding(name, "the penalty outweighs the loss", seen)


def _of_loss(name: str, losses: Sequence[float], lr: float) -> Iterator[Finding]:
    """Whether a run's loss is lost; rises by more than a tenth and than its noise; jumps and stays above; or does not fall."""
    ends = _ends(losses)
    if lost := _lost(losses):
        yield Finding(name, "diverges", f"{lost} of {len(losses)} steps have no finite loss")
    elif ends is None:
        yield Finding(name, _NOT_JUDGED, f"{len(losses)} steps: ten are needed to tell a beginning and an end")
    else:
        first, last, highest = losses[0], ends[1], max(losses)
        if last > max(_RISES * ends[0], ends[0] + _noise(losses)):
            yield Finding(name, "diverges", f"loss {ends[0]:.3g} at the beginning, {last:.3g} at the end; lr {lr}")
        elif last > _RISES * first and highest > _JUMPS * first:
            seen = f"loss {first:.3g} at the first step, {highest:.3g} at the highest, {last:.3g} at the end; lr {lr}"
            yield Finding(name, "diverges", seen)
        elif last > _LEARNS * ends[0]:
            yield Finding(
                name, "does not learn", f"loss {ends[0]:.3g} at the beginning, {last:.3g} at the end; lr {lr}"
            )


def _of_variants(test_losses: dict[str, list[float]]) -> Iterator[Finding]:
    """Runs of a comparison against the one called plain, by their last test loss."""
    last = {name: [v for v in values if not math.isnan(v)][-1:] for name, values in test_losses.items()}
    plain = last.pop("plain", [])
    for name, loss in last.items():
        if plain and loss and loss[0] > 1.01 * plain[0]:
            yield Finding(name, "ends worse than plain", f"test loss {loss[0]:.3g}, plain {plain[0]:.3g}")


def _of_experiment(folder: Path) -> list[Finding]:
    try:
        name = _json(folder / RECORD)["experiment"]["name"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / RECORD} is not that of an experiment: run it anew by --overwrite") from error
    table = Table.read(folder / RESULTS, find(name).COLUMNS)
    try:
        problems = outcomes(table)
    except ValueError as error:
        return [Finding("", _NOT_JUDGED, str(error))]
    if not problems:
        raise DataError(f"{folder} has no final runs yet: go on with the experiment by the same command")
    found = [
        replace(finding, where=", ".join(filter(None, (problem.where, finding.where))))
        for problem in problems
        for check in (_diverged, _compared, _high_learning_rates)
        for finding in check(problem)
    ]
    if not (folder / SUMMARY).is_file():
        found.append(Finding("", _NOT_JUDGED, f"the experiment has not come to its end, which writes {SUMMARY}"))
    return found


def _diverged(problem: Outcomes) -> Iterator[Finding]:
    for method in problem.losses:
        losses = problem.of(method).values()
        if lost := _lost(losses):
            at = ", ".join(f"{name} {value}" for name, value in problem.chosen(method).items())
            yield Finding(method, "diverges", f"{lost} of {len(losses)} runs have no finite test loss; {at}")


def _compared(problem: Outcomes) -> Iterator[Finding]:
    """Penalties against plain steps, isotropic noise against as many of SGD; where there are neither, all against the best."""
    if len(problem.losses) == 1:
        yield Finding(next(iter(problem.losses)), _NOT_JUDGED, "no other method has final runs to compare it with")
    penalized = {method: other for method in problem.losses if (other := problem.without(method))}
    sgd = problem.best([m for m in problem.losses if m.startswith(PLAIN) and " + " not in m and ", " not in m])
    pairs = penalized | ({_NOISE: sgd} if _NOISE in problem.losses and sgd else {})
    if not pairs and (best := problem.best(problem.losses)):
        pairs = {method: best for method in problem.losses if method != best}
    for method, other in pairs.items():
        if len(problem.of(method).keys() & problem.of(other).keys()) < 2:
            yield Finding(method, _NOT_JUDGED, f"it has fewer than two seeds in common with {other}")
        elif found := compare(problem, method, other):
            if method == _NOISE and found.is_no_worse:
                yield Finding("", "isotropic noise does as well as SGD", str(found))
            elif found.is_alike and method in penalized:
                yield Finding(method, "makes no difference", str(found))
            elif found.is_worse and method in penalized:
                yield Finding(method, "ends worse than plain", str(found))
            elif not found.is_apart and not found.is_alike:
                yield Finding(method, "seeds differ more than methods", str(found))


def _high_learning_rates(problem: Outcomes) -> Iterator[Finding]:
    """Penalties at the highest of several learning rates at which plain steps did not diverge."""
    for method in problem.losses if "lr" in problem.names else ():
        if other := problem.without(method):
            lrs = [{float(setting["lr"]) for setting in problem.settings(name)} for name in (method, other)]
            held = [lr for lr in lrs[0] & lrs[1] if all(map(math.isfinite, problem.of(other, lr=lr).values()))]
            if len(held) < 2:
                continue
            losses = problem.of(method, lr=max(held)).values()
            found = compare(problem, method, other, lr=max(held))
            if lost := _lost(losses):
                seen = f"at lr {max(held):g}, {lost} of {len(losses)} runs diverged, none of {other}"
                yield Finding(method, "hurts at the highest learning rate", seen)
            elif found and found.is_worse and not found.is_alike:
                yield Finding(method, "hurts at the highest learning rate", f"at lr {max(held):g}, {found}")


def _lost(losses: Iterable[float]) -> int:
    return sum(not math.isfinite(loss) for loss in losses)


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    """A series at its beginning and its end, by its finite values; None of fewer than ten.

    Medians of the first and last tenth; at the beginning the first value where it is higher than that by more than chance, as
    of a series that is at its floor at once. More of the first values would be of the jump where the first step is too long.
    """
    known = [value for value in values if math.isfinite(value)]
    if not (tenth := len(known) // 10):
        return None
    first, last = statistics.median(known[:tenth]), statistics.median(known[-tenth:])
    return (known[0] if known[0] > first + 4 * _deviation(known) else first), last


def _noise(values: Sequence[float]) -> float:
    """What the medians of two tenths do not differ by from chance: four deviations, each median of m having 1.25 σ/√m."""
    return 4 * math.sqrt(2 / (len(values) // 10)) * 1.25 * _deviation(values)


def _deviation(values: Sequence[float]) -> float:
    """σ of normal values by the successive ones, which no trend adds to: median |Δ| = 0.954 σ."""
    return statistics.median(abs(b - a) for a, b in itertools.pairwise(values)) / 0.954


def _steps_of(folder: Path) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Columns of a run's steps, and its settings; these from the checkpoint of a run that ended before it wrote a record."""
    try:
        source = folder / RECORD
        settings = (_json(source) if source.exists() else checkpoint.read(folder / CHECKPOINT))["settings"]
        with (folder / RUN).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        names = ("loss", "covariance_trace", "reg1", "reg2", "test_loss")
        numbers = {name: float(settings[name]) for name in ("lr", "reg1", "reg2")}
        columns = {name: [float(row[name] or "nan") for row in rows] for name in names}
        return columns, {**numbers, "batch_size": int(settings["batch_size"])}
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
        raise DataError(
            f"{folder} is no whole run of bootgrad train ({type(error).__name__}: {error}): run it again"
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}): run it again") from error
