"""What a run's own numbers say went wrong: signatures of failure, each with its meaning and what to try.

Folders of ``bootgrad train`` are read (``run.json`` and ``run.csv``, which ``compare`` leaves for each variant), and of
``bootgrad experiment`` (``run.json`` and ``results.csv``).
"""

import csv
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataError
from .experiments.conduct import find
from .experiments.evidence import difference
from .experiments.study import RECORD, RESULTS
from .experiments.table import Table
from .intervals import Interval, interval
from .training import checkpoint
from .training.run import CHECKPOINT

_STEPS = "run.csv"
_FALLS, _NOTHING, _TOO_MUCH = 0.8, 0.01, 1.0

# signature → what it means, what to try
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
    "isotropic noise does as well as SGD": (
        "not the shape of SGD's noise helps here, but at most its power: where Γ is alike everywhere, there is nothing that "
        "SGD could avoid and that the penalties could add",
        "look at Γ along training: if it does not differ between solutions, Reg1 and Reg2 will not help",
    ),
    "seeds differ more than methods": (
        "so few seeds cannot tell these methods apart",
        "four times the seeds, which halves the intervals; and compare methods seed by seed, which helps more",
    ),
    "hurts at the highest learning rate": (
        "SGD's own noise grows with the learning rate and penalizes Γ by itself; the explicit penalty comes on top",
        "a smaller strength where the learning rate is high, as λ = η/(2B) times a constant",
    ),
}


@dataclass(frozen=True)
class Finding:
    """A signature that was found.

    Attributes:
        where: the run or method that has it; empty for all.
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
    runs = [path.parent for path in (folder / _STEPS, *sorted(folder.glob(f"*/{_STEPS}"))) if path.is_file()]
    if not runs:
        raise DataError(
            f"{folder} must hold {RECORD} and {_STEPS} of bootgrad train, folders of them as of bootgrad compare, or "
            f"{RESULTS} of bootgrad experiment; none is there: give the folder that was their --out"
        )
    found = [finding for run in runs for finding in _of_run(run, run.name if len(runs) > 1 else "")]
    return [*found, *_of_variants({run.name: _steps_of(run)[0]["test_loss"] for run in runs})]


def _of_run(folder: Path, name: str) -> Iterator[Finding]:
    steps, settings = _steps_of(folder)
    if lost := sum(not math.isfinite(value) for value in steps["loss"]):
        yield Finding(name, "diverges", f"{lost} of {len(steps['loss'])} steps have no finite loss")
    loss, traces = _ends(steps["loss"]), _ends(steps["covariance_trace"])
    if loss and loss[1] > loss[0]:
        yield Finding(
            name, "diverges", f"loss {loss[0]:.3g} at the beginning, {loss[1]:.3g} at the end; lr {settings['lr']}"
        )
    if traces and traces[1] > _FALLS * traces[0]:
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
    if "stage" in table.columns:
        table = table.where(stage="final")
    if "progress" in table.columns and len(table):
        table = table.where(progress=max(table.column("progress")))  # test losses are those at the end
    if not len(table):
        raise DataError(f"{folder} has no final runs yet: go on with the experiment by the same command")
    if not {"method", "seed", "test_loss"} <= set(table.columns):
        return []
    checks = (_diverged, _isotropic, _spread_of_seeds, _high_learning_rates)
    return [finding for check in checks for finding in check(table)]


def _diverged(table: Table) -> Iterator[Finding]:
    for method in table.values("method"):
        losses = table.where(method=method).column("test_loss")
        lost = sum(not math.isfinite(loss) for loss in losses)
        if lost:
            yield Finding(str(method), "diverges", f"{lost} of {len(losses)} rows have no finite test loss")


def _isotropic(table: Table) -> Iterator[Finding]:
    plain = [str(m) for m in table.values("method") if str(m).startswith("sgd") and " + " not in str(m)]
    if "noisy gd" in table.values("method") and plain:
        best = min(plain, key=lambda m: interval(_by_seed(table, m)).mean)
        found = _compared(table, "noisy gd", best)
        if found and found.mean <= 0:
            yield Finding(
                "", "isotropic noise does as well as SGD", f"test loss of noisy gd less that of {best}: {found}"
            )


def _spread_of_seeds(table: Table) -> Iterator[Finding]:
    known = [f for m in table.values("method") if (f := interval(_by_seed(table, str(m)))).n > 1]
    if len(known) > 1:
        effect = max(f.mean for f in known) - min(f.mean for f in known)
        spread = statistics.median(f.high - f.mean for f in known)
        if spread > effect:
            seen = f"the methods' mean test losses lie within {effect:.3g}, each is known to ± {spread:.3g}"
            yield Finding("", "seeds differ more than methods", seen)


def _high_learning_rates(table: Table) -> Iterator[Finding]:
    if "lr" not in table.columns:
        return
    highest = max(table.column("lr"))
    here = table.where(lr=highest)
    for method in map(str, here.values("method")):
        without = method.partition(" + ")[0]
        found = _compared(here, method, without) if "reg" in method and without in here.values("method") else None
        if found and found.low > 0:
            seen = f"at lr {highest:g} its test loss less that of {without}: {found}"
            yield Finding(method, "hurts at the highest learning rate", seen)


def _compared(table: Table, first: str, second: str) -> Interval | None:
    """The difference of two methods' test losses, seed by seed; None where runs are missing or diverged."""
    losses = _by_seed(table, first), _by_seed(table, second)
    if len(losses[0]) != len(losses[1]):
        return None
    found = difference(*losses)
    return None if found.diverged else found


def _by_seed(table: Table, method: str) -> list[float]:
    """Test loss of a method by seed: the mean of what the table has of one."""
    mine = table.where(method=method)
    return [statistics.fmean(mine.where(seed=seed).column("test_loss")) for seed in sorted(mine.values("seed"))]


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    """Medians of the first and last tenth of a series, of what is known of it; None of fewer than ten."""
    known = [value for value in values if not math.isnan(value)]
    tenth = len(known) // 10
    return (statistics.median(known[:tenth]), statistics.median(known[-tenth:])) if tenth else None


def _steps_of(folder: Path) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Columns of a run's steps, and its settings; these from the checkpoint of a run that ended before it wrote a record."""
    try:
        source = folder / RECORD
        settings = (_json(source) if source.exists() else checkpoint.read(folder / CHECKPOINT))["settings"]
        with (folder / _STEPS).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        names = ("loss", "covariance_trace", "reg1", "reg2", "test_loss")
        return {name: [float(row[name] or "nan") for row in rows] for name in names}, settings
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is no whole run of bootgrad train ({type(error).__name__}: {error}): run it again"
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): run it again") from error
