"""How well Σ from a few images estimates the population's, and whether penalties on it still help where images are few."""

import math
import statistics
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from ..errors import DataError
from ..intervals import interval
from ..training.data import ImageData
from .conduct import markdown
from .covariances import STATISTICS, compared, gram
from .evidence import Claim, within
from .image_comparison import COLUMNS as OF_RUNS
from .image_comparison import FULL_GRID, QUICK_GRID, Problem, compare, compare_times, final, same_time
from .image_draws import Pair, is_small, shrunk
from .image_draws import draw as draw_images
from .image_reports import against_sgd, draw_intervals, intervals, measured
from .image_runs import MEASURES, REG1, REG2, SGD, Diverged, train
from .study import Study
from .table import Row, Table, Value

TITLE = "How well a covariance from few images estimates the population's, and penalties on it where images are few"
SECTION, IMAGES = "ours", True
ABOUT = """
A mini-batch stands for the population, and with few training images it is a poor stand-in. The CNN is trained by SGD on 1000,
500 and 200 images. At its start, after a tenth of the training and at the end, the covariance Σ̂ of a mini-batch's gradients is
compared with Σ, that of held-out images at the same parameters: ratio of the traces, overlap of the spaces of the five largest
eigenvalues, and ‖Σ̂ − Σ‖_F / ‖Σ‖_F without what is noise of the held-out set. Directions of that set are an estimate, too, so
that the overlap stays below 1. Mini-batches are of training images, and for comparison of fresh ones: what these miss is the
size of the sample, what only those of training images miss is overfitting. Then SGD is compared
with Reg1 about the batch mean and Reg2 about a moving average on as many images; λ₁ = s, λ₂ = B·s; in the full form also with
as many more epochs as fit into the time of each.
"""
COLUMNS = ("size", "moment", "source", "sample", *OF_RUNS, *STATISTICS)

BATCH, REPEATS = 32, 20
SIZES, QUICK_SIZES = (1000, 500, 200), (320, 128)
SAMPLES, SOURCES = (8, 32, 128, 500), ("training", "fresh")
START, TENTH, END = 0.0, 0.1, 1.0  # moments: shares of the training
WAYS = (SGD, REG1, REG2)
_NO_SAMPLE: dict[str, Value] = {"moment": END, "source": "run", "sample": 0}
_NO_STATISTICS = dict.fromkeys(STATISTICS, math.nan)
_FULL_SET, _QUICK_SET = 200, 45  # images that stand for the population, and fresh ones


def problem(data: ImageData, size: int, full: bool) -> Problem:
    """Training on ``size`` images, in as many steps whatever their number."""
    steps = (600 if is_small(data) else 400) if full else 30
    grid = FULL_GRID if full else QUICK_GRID
    draw = partial(draw_images, data, size)
    epochs = steps / (size // BATCH)
    return Problem({"size": size, **_NO_SAMPLE}, draw, BATCH, epochs, grid, others=_NO_STATISTICS)


def kinds(training: Pair, fresh: Pair) -> list[tuple[str, int]]:
    """The mini-batches that are looked at: their sources and sizes."""
    pairs = zip(SOURCES, (training, fresh), strict=True)
    return [(source, sample) for source, own in pairs for sample in SAMPLES if sample <= len(own[1])]


def estimates(model: nn.Module, training: Pair, fresh: Pair, population: Pair, seed: int) -> list[Row]:
    """How well mini-batches of training images, and of fresh ones, estimate the population's Σ: means over 20 of each size."""
    parts = (training, fresh, population)
    K = gram(model, torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
    generator = torch.Generator().manual_seed(seed)
    *places, others = torch.arange(len(K)).split([len(y) for _, y in parts])
    rows: list[Row] = []
    for source, sample in kinds(training, fresh):
        own = places[SOURCES.index(source)]
        found = []
        for _ in range(REPEATS):
            index = torch.cat([own[torch.randperm(len(own), generator=generator)[:sample]], others])
            found.append(compared(K[index][:, index], sample))
        means = {name: statistics.fmean(f[name] for f in found) for name in found[0]}
        means["error"] = math.sqrt(max(0.0, means.pop("sq_error")))
        rows.append({"source": source, "sample": sample, **means})
    return rows


def along(data: ImageData, p: Problem, lr: float, seed: int, half: int, moments: Sequence[float]) -> list[Row]:
    """`estimates` at the moments of a training run by SGD; nan where it diverged.

    Args:
        data: the images.
        p: what is trained.
        lr: the learning rate.
        seed: of the run.
        half: images that stand for the population, and fresh ones.
        moments: shares of the training after which it is stopped.
    """
    images = p.draw(seed)
    assert images.rest is not None
    x, y = (torch.cat(pair) for pair in zip(images.validation, images.rest, strict=True))
    fresh, population = (x[:half], y[:half]), (x[half : 2 * half], y[half : 2 * half])
    most = max(sample for sample in SAMPLES if sample <= 3 * half)  # the Gram matrix takes a time of rows²
    training = images.train[0][:most], images.train[1][:most]
    c, h, w = data.image_shape
    rows: list[Row] = []
    for moment in moments:
        torch.manual_seed(seed)
        model = p.network((c, h, w), data.classes)
        try:
            train(model, images.train, SGD, lr=lr, strength=0.0, batch=p.batch, epochs=moment * p.epochs, seed=seed)
            found = estimates(model, training, fresh, population, seed)
        except Diverged:
            found = [{"source": source, "sample": n, **_NO_STATISTICS} for source, n in kinds(training, fresh)]
        rows += [{"moment": moment, "lr": lr, "strength": 0.0, **dict.fromkeys(MEASURES, math.nan), **f} for f in found]
    return rows


def run(study: Study) -> None:
    """For each number of images: all ways, SGD of their times in the full form, and Σ along SGD's path.

    Raises:
        DataError: the data set is too small.
    """
    data = shrunk(study.images())
    sizes = SIZES if study.full else QUICK_SIZES
    count, least = len(data.y_train), max(sizes) * 4 // 3 + 1
    if count < least:
        raise DataError(f"small-data needs {least} training images; got {count}: give it more by --data")
    half = min(_FULL_SET if study.full else _QUICK_SET, (count - max(sizes)) // 2)
    moments = (START, TENTH, END) if study.full else (START, END)
    problems = [problem(data, size, study.full) for size in sizes]
    seeds = len(study.seeds)
    timed = WAYS[1:] if study.full else ()
    calls = (*WAYS, *map(same_time, timed))
    with study.progress(sum(p.calls(calls, seeds) + seeds for p in problems), "small-data"):
        for size, p in zip(sizes, problems, strict=True):
            for way in WAYS:
                compare(study, p, way)
            compare_times(study, p, timed)
            lr = float(final(study.table, way=SGD.name, size=size).rows[0]["lr"])
            for seed in study.seeds:
                settings: dict[str, Value] = {"stage": "covariance", "size": size, "way": SGD.name, "seed": seed}
                study.rows(settings, partial(along, data, p, lr, seed, half, moments))


def claims(table: Table) -> list[Claim]:
    """Where mini-batches estimate the population's Σ, and whether penalties help."""
    found = []
    for size in _sizes(table):
        for moment, when in ((START, "at the start"), (END, "at the end")):
            logs = interval(map(_log, _statistic(table, "trace_ratio", size, moment, "training", BATCH)))
            text = f"with {size} images, the trace of training images is within a tenth of the population's {when}"
            found.append(
                Claim(text, SECTION, "log 1.1 − size of the mean log ratio of traces", within(logs, math.log(1.1)))
            )
        logs = interval(-_log(r) for r in _statistic(table, "trace_ratio", size, END, "training", BATCH))
        text = f"with {size} images, the trace of training images underestimates the population's at the end"
        found.append(Claim(text, SECTION, "−log ratio of traces", logs))
        found += against_sgd(table, WAYS[1:], SECTION, {"size": size}, f"with {size} images, ")
    return found


def tables(table: Table) -> str:
    """Errors of the estimates, and the ways' losses."""
    rows = []
    for size in _sizes(table):
        for moment in table.where(stage="covariance").values("moment"):
            for source in SOURCES:
                kinds = table.where(stage="covariance", size=size, moment=moment, source=source)
                for sample in kinds.values("sample"):
                    found = [interval(_statistic(table, s, size, moment, source, sample)) for s in STATISTICS]
                    rows.append((size, moment, source, sample, *found))
    header = (
        "training images",
        "share of the training",
        "mini-batch of",
        "B",
        "ratio of traces",
        "overlap",
        "relative error",
    )
    return f"{markdown(header, rows)}\n\n{measured(table, ('size',))}"


def draw(table: Table):
    """Quality of the estimates over the size of the mini-batch, at the end; test losses by number of images."""
    from ..training.figures import COLOURS, STYLES, finish, panels

    sizes = _sizes(table)
    figure, axes = panels(2, 3, (15, 8), shared=False)
    titles = ("Trace: estimate / population", "Overlap of the 5 largest directions", "‖Σ̂ − Σ‖ / ‖Σ‖")
    for ax, name, title in zip(axes, STATISTICS, titles, strict=False):
        for size, colour in zip(sizes, COLOURS, strict=False):
            for source, style in zip(SOURCES, STYLES, strict=False):
                samples = table.where(stage="covariance", size=size, moment=END, source=source).values("sample")
                means = [interval(_statistic(table, name, size, END, source, s)).mean for s in samples]
                ax.plot(samples, means, style, color=colour, marker="o", label=f"{size} images, {source}")
        finish(ax, f"{title}, at the end", "")
        ax.set(xlabel="images in the mini-batch", xscale="log", xticks=SAMPLES, xticklabels=SAMPLES)
        ax.minorticks_off()
    axes[0].axhline(1, color="grey", linewidth=0.8)
    axes[2].legend(fontsize="small", loc="upper right")  # where no line is
    for ax, size in zip(axes[3:], sizes, strict=False):
        draw_intervals(ax, intervals(table, "test_loss", size=size), f"Test loss, {size} training images", "nats")
    for ax in axes[3 + len(sizes) :]:
        ax.set_axis_off()
    return figure


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio > 0 else math.nan


def _sizes(table: Table) -> list[Value]:
    return table.where(stage="final").values("size")


def _statistic(table: Table, name: str, size: Value, moment: Value, source: str, sample: Value) -> list[float]:
    return table.where(stage="covariance", size=size, moment=moment, source=source, sample=sample).column(name)
