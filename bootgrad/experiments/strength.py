"""Rules that set λ during training against the best fixed λ: each tuned by a search of the same length, and not tuned.

In sparse regression the penalty is λ (Reg2 + ½ Reg1) about the full gradient, on images Reg1 about the batch mean or Reg2 about
a moving average.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from ..intervals import interval
from ..strengths import Bound, LookAhead, Rule, Share
from . import cnn
from . import sparse_regression as sparse
from .conduct import markdown
from .ensemble_rules import evaluate
from .evidence import Claim, difference
from .image_comparison import COLUMNS as OF_RUNS
from .image_comparison import Grid, Problem, compare, compare_times, final, same_time
from .image_draws import shrunk
from .image_reports import draw_intervals, edges, lower
from .image_runs import REG1, REG2, SGD, Way
from .search import lowest
from .study import Study
from .table import Table, Value

TITLE = "Rules that set λ during training, tuned by as many runs and untuned, against the best fixed λ"
SECTION, IMAGES = "ours", True
ABOUT = f"""
Two problems: sparse regression by a diagonal linear network (experiment sparse-regression), with λ (Reg2 + ½ Reg1) about the
full gradient, and the CNN in batches of {cnn.SMALL} (experiment cnn), with λ Reg1 about the batch mean or λ Reg2 about a moving
average of the gradients. λ is fixed, or set from training data alone by a rule of bootgrad.strengths: Share, Bound or
LookAhead. Each has one number, λ, the share, the scale, or the λ at the start, which is searched over as many values, with as
many runs; the setting with the lowest validation loss is taken, on data sets of seeds that serve nothing else. Untuned rules
have their default, without a search for it. In sparse regression the learning rate is searched for each way, untuned rules too;
on images it is SGD's best for all, so that untuned rules need no search. Only final runs, on the study's seeds, are compared.
In sparse regression both penalties share one λ, and Bound's scale is that of the whole: at 1, λ R is the gap that the bound
predicts. All other options of the rules are their defaults. SGD on images is also given as many more epochs as fit into the
time of the fixed λ, with a learning rate of its own. All grids were settled before any of these ways had been run. The time of
a step is a median, and so that of a step on which rules measure nothing: one on which they do, in ten of Share's and two in
five of LookAhead's, takes up to half as long again.
"""
COLUMNS = ("problem", *OF_RUNS)

SPARSE, PICTURES = "sparse regression", "images"
PENALTIES = {SPARSE: ("reg1 + reg2",), PICTURES: ("reg1", "reg2")}
FIXED = "fixed λ"
Rate = float | torch.optim.Optimizer
Kind = tuple[str, str, Sequence[float]]  # a way's name, its rule, and the values of its number that are searched
FOUND = -1.0  # the λ at the start, where the rule finds it itself
MAKE: dict[str, Callable[[float, Rate], Rule]] = {
    "share": lambda value, rate: Share(value),
    "bound": lambda value, rate: Bound(rate, value),
    "look-ahead": lambda value, rate: LookAhead(start=None if value == FOUND else value),
}
UNTUNED = {"share": Share().share, "bound": Bound(0.0).scale, "look-ahead": FOUND}
SHARES: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0)
SCALES: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0)
LRS = {True: (0.001, *sparse.LRS[False]), False: sparse.LRS[False][1:3]}
SEARCH, SETTING = "search 1", ("lr", "strength")


def named(penalty: str, rule: str, tuned: bool = True) -> str:
    """The name of a way."""
    return f"{penalty}, {rule}" if tuned else f"{penalty}, {rule} untuned"


def kinds(penalty: str, lambdas: Sequence[float], shares: Sequence[float], scales: Sequence[float]) -> list[Kind]:
    """The ways with a penalty: those that are tuned, then untuned rules."""
    grids = zip((FIXED, *MAKE), (lambdas, shares, scales, lambdas), strict=True)
    tuned = [(named(penalty, rule), rule, values) for rule, values in grids]
    return tuned + [(named(penalty, rule, False), rule, (value,)) for rule, value in UNTUNED.items()]


def in_sparse_regression(study: Study) -> None:
    """The whole grid of each way on the search's data sets, then its best setting on the seeds."""
    steps, searched = (10_000, range(1000, 1010)) if study.full else (600, range(1000, 1004))
    for way, rule, values in _sparse_ways():
        make = partial(_by_setting, rule) if rule in MAKE else None
        grid = [{"lr": lr, "strength": value} for lr in LRS[study.full] for value in values]
        settings = {"problem": SPARSE, "way": way}
        found = study.rows({**settings, "stage": SEARCH}, partial(evaluate, make, searched, grid, steps))
        best = lowest(found, SETTING, "validation_loss")
        study.rows({**settings, "stage": "final"}, partial(evaluate, make, study.seeds, [best], steps))


def cases(problem: Problem, lr: float, full: bool) -> Iterator[tuple[Problem, Way]]:
    """The ways with a penalty on images, each with what is searched; λ itself is the strength s, of Reg2, too."""
    part = slice(None) if full else slice(1, None, 2)
    for base, factor in ((REG1, 1), (REG2, problem.batch)):
        lambdas = [factor * s for s in problem.grid.strengths]
        for name, rule, values in kinds(base.name, lambdas, SHARES[1:][part], SCALES[:4][part]):
            made = partial(_by_optimizer, rule) if rule in MAKE else None
            way = replace(base, name=name, reg2=base.reg2 / problem.batch, rule=made)
            yield replace(problem, grid=Grid((lr,), values)), way


def run(study: Study) -> None:
    """Sparse regression, then images: SGD, whose learning rate is that of all, and the ways with a penalty.

    Raises:
        DataError: the images cannot be read.
    """
    small, _ = cnn.problems(shrunk(study.images()), study.full)
    problem = replace(small, settings={"problem": PICTURES}, epochs=small.epochs if study.full else 1.0)
    planned, seeds = list(cases(problem, problem.grid.lrs[0], study.full)), len(study.seeds)
    timed = [way for _, way in planned if way.rule is None]
    total = 2 * len(_sparse_ways()) + problem.calls([SGD, *map(same_time, timed)], seeds)
    with study.progress(total + sum(part.calls([way], seeds) for part, way in planned), "strength"):
        in_sparse_regression(study)
        compare(study, problem, SGD)
        lr = float(final(study.table, **problem.settings, way=SGD.name).rows[0]["lr"])
        for part, way in cases(problem, lr, study.full):
            compare(study, part, way)
        compare_times(study, problem, timed)


def claims(table: Table) -> list[Claim]:
    """Of each problem and penalty: the rules against the best fixed λ and the tuned Share, and that λ against SGD."""
    return [claim for kind in _penalties() for claim in _claims_of(table, *kind)]


def _claims_of(table: Table, problem: str, penalty: str) -> list[Claim]:
    def less(mine: str, theirs: str, text: str) -> Claim:
        pair: list[dict[str, Value]] = [{"problem": problem, "way": way} for way in (mine, theirs)]
        return lower(table, *pair, text=f"{problem}, {penalty}: {text}", source=SECTION)

    found = []
    fixed, share = named(penalty, FIXED), named(penalty, "share")
    for rule in MAKE:
        tuned, untuned = named(penalty, rule), named(penalty, rule, False)
        found.append(less(tuned, fixed, f"{rule}, tuned, ends at a lower test loss than the best fixed λ"))
        found.append(less(untuned, fixed, f"{rule}, untuned, ends at a lower test loss than the best fixed λ"))
        at_fixed, at_untuned = (final(table, problem=problem, way=way).column("test_loss") for way in (fixed, untuned))
        worse = difference([1.1 * loss for loss in at_fixed], at_untuned)
        text = f"{problem}, {penalty}: {rule}, untuned, is at most a tenth worse than the best fixed λ"
        found.append(Claim(text, SECTION, f"1.1 · test loss of {fixed} − that of {untuned}", worse))
        if rule != "share":
            found.append(less(tuned, share, f"{rule}, tuned, ends at a lower test loss than share, tuned"))
    for plain, when in ((SGD.name, "equal steps"), (same_time(Way(fixed)).name, "equal time")):
        if len(final(table, problem=problem, way=plain)):
            found.append(less(fixed, plain, f"the best fixed λ ends at a lower test loss than SGD of {when}"))
    return found


def needed(table: Table, **settings: Value) -> float:
    """Whole runs that it takes to train once in a way, the search on one data set included."""
    rows = table.where(**settings)
    lengths = {}
    for stage in rows.values("stage"):
        known = [steps for steps in rows.where(stage=stage).column("steps") if math.isfinite(steps)]
        lengths[stage] = max(known, default=math.nan)
    searches = [rows.where(stage=stage) for stage in lengths if stage != "final"]
    total = sum(len(s) / len(s.values("seed")) * lengths[s.rows[0]["stage"]] for s in searches)
    return 1 + total / lengths["final"]


def tables(table: Table) -> str:
    """All ways of both problems, with what was chosen, what λ became, and what that took."""
    rows = []
    for problem in PENALTIES:
        for way in final(table, problem=problem).values("way"):
            mine = final(table, problem=problem, way=way)
            at = (_digits(float(mine.rows[0][name])) for name in ("strength", "lr"))
            ends = (_digits(_median(mine.column(name))) for name in ("reg1", "reg2"))
            measured = (_measured(mine.column(name)) for name in ("test_loss", "test_accuracy"))
            took = (f"{_median(mine.column('steps')):g}", _digits(needed(table, problem=problem, way=way)))
            rows.append((f"{problem}: {way}", *at, *ends, *measured, *took, _measured(mine.column("ratio"))))
    header = ("way", "number", "learning rate", "λ₁ at the end", "λ₂ at the end", "test loss", "accuracy", "steps",
              "runs, search included", "time of a step")  # fmt: skip
    text = (
        "The number is the fixed λ, the share, the scale, or the λ at the start; λ at the end is the median over seeds. "
        "Runs are whole ones of as many steps, to train once, the search included, but for SGD's search of the learning rate "
        "on images. –: not measured, found by the rule itself, or all runs diverged."
    )
    return "\n\n".join([markdown(header, rows), text, edges(table, ("problem",), "number")])


def draw(table: Table):
    """Test losses by penalty and way, and seed by seed against the best fixed λ."""
    from ..training.figures import panels

    figure, axes = panels(2, len(_penalties()), (17, 8.5), shared=False)
    for (problem, penalty), ax, below in zip(_penalties(), axes[:3], axes[3:], strict=True):
        fixed = named(penalty, FIXED)
        labels = {SGD.name: SGD.name, same_time(Way(fixed)).name: "sgd, equal time"}
        for way in map(str, final(table, problem=problem).values("way")):
            if way.startswith(f"{penalty}, "):
                labels[way] = way.removeprefix(f"{penalty}, ")
        losses = {way: final(table, problem=problem, way=way).column("test_loss") for way in labels}
        known = {labels[way]: found for way, found in losses.items() if found}
        unit = "½ squared error" if problem == SPARSE else "nats"
        shown = {label: interval(found) for label, found in known.items()}
        draw_intervals(ax, shown, f"Test loss: {problem}, {penalty}", unit)
        apart = {label: difference(found, losses[fixed]) for label, found in known.items() if label != FIXED}
        draw_intervals(below, apart, "Test loss − that of the best fixed λ", unit)
        below.axvline(0, color="grey", linewidth=0.8)
    return figure


def _sparse_ways() -> list[Kind]:
    lambdas = sparse.STRENGTHS[sparse.PENALTY]
    return [(SGD.name, "none", (0.0,)), *kinds(PENALTIES[SPARSE][0], lambdas, SHARES, SCALES)]


def _penalties() -> list[tuple[str, str]]:
    return [(problem, penalty) for problem, penalties in PENALTIES.items() for penalty in penalties]


def _by_setting(rule: str, value: float, lr: float) -> Rule:
    """λ R with λ₂ = η/2 is 1 + ratio · B times the gap that `Bound` predicts; its scale is that of the whole."""
    return MAKE[rule](value / (1 + sparse.RATIO * sparse.BATCH) if rule == "bound" else value, lr)


def _by_optimizer(rule: str, name: str, value: float, optimizer: torch.optim.Optimizer) -> Rule:
    return MAKE[rule](value, optimizer)


def _median(values: Sequence[float]) -> float:
    return statistics.median([value for value in values if math.isfinite(value)] or [math.nan])


def _digits(value: float) -> str:
    return "–" if math.isnan(value) or value == FOUND else f"{value + 0.0:.3g}"  # of −0, too


def _measured(values: Sequence[float]) -> str:
    return "–" if all(map(math.isnan, values)) else str(interval(values))
