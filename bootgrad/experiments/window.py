"""Averages of the previous mini-batch gradients as the center of both penalties, in place of the full gradient ∇L.

    Reg1 = (1/B) Σ_i ‖g_i − c‖²        Reg2 = ‖ḡ − c‖²

Letters: ``k`` gradients in the average, ``c`` the center, ``ḡ`` the mini-batch gradient.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..centers import Center, FullBatchMean, WindowMean, as_center
from ..intervals import interval
from ..training.data import ImageData
from .conduct import markdown
from .evidence import Claim, difference
from .image_comparison import COLUMNS as OF_RUNS
from .image_comparison import FULL_GRID, QUICK_GRID, Grid, Problem, compare, compare_times, final, same_time
from .image_draws import Pair, is_small, shrunk
from .image_draws import draw as draw_images
from .image_reports import against_sgd, draw_intervals, intervals, lower, measured
from .image_runs import MEASURES, SGD, Diverged, Way, losses_of, train
from .study import Study
from .table import Row, Table, Value

TITLE = "The average of the previous mini-batch gradients in place of the full gradient as the penalties' center"
SECTION, IMAGES = "ours", True
ABOUT = """
Both penalties ask for the gradient of the whole training set, which takes a pass over it in each step. A CNN is trained by SGD
on few images, so that this can be paid, with both penalties about that gradient, renewed in each step and not differentiated;
about the average of the previous 1, 4, 16 and 64 mini-batch gradients; about their moving average of decay 0.9; and about zero.
λ₁ = s, λ₂ = B·s. The learning rate is the one with the lowest validation loss of plain SGD, and all ways have it; s is searched
for each of them. SGD also gets as many more epochs as fit into the time of the window of 16, of the moving average and of the
full gradient, and a learning rate of its own there; windows of all lengths take about the same time. The bias of a center is
‖c − ∇L‖ / ‖∇L‖ at the parameters of every eighth step, in a run that is taken again for it: medians over each third of the
training. It is 1 for zero, and 0 for the full gradient. An average does in place of the full gradient where its test loss is at
most a tenth higher; where SGD's and that about zero are no higher either, no average is needed. The quick form has windows
of 1 and 16 and the full gradient, and SGD of the time of the window of 16.
"""
THIRDS = ("early", "middle", "late")
QUANTITIES = ("error", "cosine")
BIAS = tuple(f"{quantity}_{third}" for quantity in QUANTITIES for third in THIRDS)
COLUMNS = (*OF_RUNS, *BIAS)

BATCH, WATCHED_EVERY = 16, 8  # steps 0, 8, …, while `train` times steps 4, 12, …
TOLERANCE = 1.1
_NO_BIAS: dict[str, Value] = dict.fromkeys(BIAS, math.nan)


def full_gradient(model: nn.Module, images: Pair) -> FullBatchMean:
    """The gradient of the mean loss of all training images at the present parameters."""
    return FullBatchMean([images], partial(losses_of, model))


def window(k: int) -> Way:
    """Both penalties about the average of the previous k mini-batch gradients."""
    return Way(f"window of {k}", reg1=1.0, reg2=1.0, center=lambda model, images: WindowMean(k))


ZERO = Way("zero", reg1=1.0, reg2=1.0, center="zero")
WINDOWS = {k: window(k) for k in (1, 4, 16, 64)}
MOVING = Way("moving average", reg1=1.0, reg2=1.0, center="ema")
EXACT = Way("full gradient", reg1=1.0, reg2=1.0, center=full_gradient)
AVERAGES = (*WINDOWS.values(), MOVING)
WAYS, QUICK_WAYS = (SGD, ZERO, *AVERAGES, EXACT), (SGD, WINDOWS[1], WINDOWS[16], EXACT)
TIMED = (WINDOWS[16], MOVING, EXACT)


class Watched(Center):
    """A center that is compared with another one, the truth, at some steps.

        error = ‖c − g‖/‖g‖        cosine = ⟨c, g⟩/(‖c‖ ‖g‖)

    Args:
        center: c, constant in the step; all is as with it alone.
        truth: gives g, and is not told of steps.
        every: steps from one comparison to the next; there is none where c is not known yet.

    Attributes:
        found: (step, error, cosine).
    """

    def __init__(self, center: Center, truth: Center, every: int = WATCHED_EVERY):
        """Start at step 0."""
        self.center, self.truth, self.every = center, truth, every
        self.steps = 0
        self.found: list[tuple[int, float, float]] = []

    def value(self, parameters):
        """What the center gives."""
        value = self.center.value(parameters)
        if value is not None and self.steps % self.every == 0:
            c, g = (
                torch.cat([known[name].detach().flatten().double() for name in parameters])
                for known in (value, self.truth.value(parameters))
            )
            self.found.append((self.steps, float((c - g).norm() / g.norm()), float(c @ g / (c.norm() * g.norm()))))
        return value

    def update(self, mean):
        """Tell the center, and count the step."""
        self.center.update(mean)
        self.steps += 1


def thirds(found: Sequence[tuple[int, float, float]], steps: int) -> dict[str, float]:
    """The columns `BIAS`: medians over what was found in each third of the steps, nan where nothing was."""
    row: dict[str, float] = {}
    for place, third in enumerate(THIRDS):
        parts = [values for step, *values in found if 3 * step // steps == place] or [[math.nan, math.nan]]
        medians = map(statistics.median, zip(*parts, strict=True))
        row |= {f"{quantity}_{third}": value for quantity, value in zip(QUANTITIES, medians, strict=True)}
    return row


def bias(p: Problem, way: Way, lr: float, strength: float, seed: int) -> list[Row]:
    """How far a way's center is from the full gradient, in the run that `compare` ends with; nan where it diverged."""
    images = p.draw(seed)
    torch.manual_seed(seed)
    c, h, w = images.train[0].shape[1:]
    model = p.network((c, h, w), images.classes)
    center = as_center(way.center) if isinstance(way.center, str) else way.center(model, images.train)
    watched = Watched(center, full_gradient(model, images.train))
    way = replace(way, center=lambda model, images: watched)
    try:
        taken = train(model, images.train, way, lr=lr, strength=strength, batch=p.batch, epochs=p.epochs, seed=seed)
        found: Row = {**thirds(watched.found, int(taken["steps"]))}
    except Diverged:
        found = _NO_BIAS
    return [{"lr": lr, "strength": strength, **dict.fromkeys(MEASURES, math.nan), **found}]


def problem(data: ImageData, full: bool) -> Problem:
    """Training on few images."""
    size, steps = (512, 600 if is_small(data) else 300) if full else (256, 30)
    drawn = partial(draw_images, data, size)
    epochs = steps / max(1, len(drawn(0).train[1]) // BATCH)
    return Problem({}, drawn, BATCH, epochs, FULL_GRID if full else QUICK_GRID, others=_NO_BIAS)


def run(study: Study) -> None:
    """SGD, all ways at its learning rate, SGD of the time of some, and the averages' bias.

    Raises:
        DataError: the images cannot be read, or are too few.
    """
    p = problem(shrunk(study.images()), study.full)
    ways, timed = (WAYS, TIMED) if study.full else (QUICK_WAYS, TIMED[:1])
    averages = [way for way in ways if way in AVERAGES]
    seeds = len(study.seeds)
    searched = replace(p, grid=Grid(p.grid.lrs[:1], p.grid.strengths))
    total = p.calls((SGD, *map(same_time, timed)), seeds) + searched.calls(ways[1:], seeds) + len(averages) * seeds
    with study.progress(total, "window"):
        compare(study, p, SGD)
        lr = float(final(study.table, way=SGD.name).rows[0]["lr"])
        for way in ways[1:]:
            compare(study, replace(p, grid=Grid((lr,), p.grid.strengths)), way)
        compare_times(study, p, timed)
        for way in averages:
            strength = float(final(study.table, way=way.name).rows[0]["strength"])
            for seed in study.seeds:
                settings: dict[str, Value] = {"stage": "bias", "way": way.name, "seed": seed}
                study.rows(settings, partial(bias, p, way, lr, strength, seed))


def claims(table: Table) -> list[Claim]:
    """Averages against the full gradient, their bias, and both against SGD."""
    exact, found = final(table, way=EXACT.name).column("test_loss"), []
    for way in _run(table, (SGD, ZERO, *AVERAGES)):
        mine = final(table, way=way.name).column("test_loss")
        text = f"{way.name} ends at a test loss at most a tenth above the full gradient's"
        quantity = f"{TOLERANCE} × test loss of {EXACT.name} − that of {way.name}"
        found.append(Claim(text, SECTION, quantity, difference([TOLERANCE * loss for loss in exact], mine)))
    for way in _run(table, (ZERO, *AVERAGES)):
        text = f"{way.name} ends at a lower test loss than the full gradient"
        found.append(lower(table, {"way": way.name}, {"way": EXACT.name}, text=text, source=SECTION))
    for way in _run(table, AVERAGES):
        for third in (THIRDS[0], THIRDS[-1]):
            margins = [1 - error for error in _biases(table, way, f"error_{third}")]
            text = f"{way.name} is nearer to the full gradient than zero is in the {third} third"
            found.append(Claim(text, SECTION, "1 − error", interval(margins)))
    return found + against_sgd(table, _run(table, TIMED), SECTION, {})


def tables(table: Table) -> str:
    """All ways, and how far the averages were from the full gradient."""
    header = ("center", *(f"{quantity}, {third}" for quantity in QUANTITIES for third in THIRDS))
    rows = [(way.name, *(interval(_biases(table, way, name)) for name in BIAS)) for way in _run(table, AVERAGES)]
    return f"{measured(table)}\n\nAgainst the full gradient, in each third of the training:\n\n{markdown(header, rows)}"


def draw(table: Table):
    """Test loss, accuracy and price of each way, and the averages' error over the training."""
    from ..training.figures import COLOURS, STYLES, finish, panels

    figure, axes = panels(2, 2, (14, 9), shared=False)
    draw_intervals(axes[0], intervals(table, "test_loss"), "Test loss", "nats")
    draw_intervals(axes[1], intervals(table, "test_accuracy"), "Accuracy", "share")
    draw_intervals(axes[3], intervals(table, "ratio"), "Time of a step", "times a plain step")
    for number, way in enumerate(_run(table, AVERAGES)):
        found = [interval(_biases(table, way, f"error_{third}")) for third in THIRDS]
        places = [place + 0.05 * number for place in range(len(THIRDS))]
        halves = [f.mean - f.low if math.isfinite(f.low) else math.nan for f in found]
        style = {"color": COLOURS[number % 4], "linestyle": STYLES[number * 5 // 4 % 4], "marker": "osD^v"[number]}
        axes[2].errorbar(places, [f.mean for f in found], yerr=halves, capsize=3, label=way.name, **style)
    axes[2].axhline(1, color="grey", linewidth=0.8, label="zero")
    finish(axes[2], "Bias of the center: ‖c − ∇L‖ / ‖∇L‖", "")
    axes[2].set(xlabel="third of the training", xticks=range(len(THIRDS)), xticklabels=THIRDS)
    axes[2].legend(fontsize="small")
    return figure


def _run(table: Table, ways: Sequence[Way]) -> list[Way]:
    """Those that the table has final rows of."""
    return [way for way in ways if len(final(table, way=way.name))]


def _biases(table: Table, way: Way, column: str) -> list[float]:
    return table.where(stage="bias", way=way.name).column(column)
