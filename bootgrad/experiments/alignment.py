"""Whether the noise of SGD lies along the large directions of the Hessian: Tr(HΣ), and Σ's share in the top eigenvectors.

    ratio = P Tr(HΣ) / (Tr H Tr Σ)        share = Σ_{j≤k} v_jᵀ Σ v_j / Tr Σ

of H = ∇²L and the covariance Σ of the per-sample gradients; noise without direction has the ratio 1 and the share k/P.

Letters: ``P`` parameter entries, ``k`` eigenvectors.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bootgrad

from ..errors import ArgumentError
from ..training.data import ImageData
from ..training.model import reference_cnn
from .conduct import markdown
from .evidence import Claim, Interval, difference, interval
from .search import halve, runs_of_halving
from .study import Study
from .table import Table, Value

TITLE = "SGD's noise lies along the large directions of the Hessian"
IMAGES = True
SECTION = "ours"
ABOUT = """
The expansion of the generalization gap weighs the variability of the solution, and with it the covariance Σ of the gradients,
by the Hessian H. Along the training of a small CNN on images, by SGD and by SGD with Reg1 about the batch mean, Tr(HΣ) is
compared with Tr H Tr Σ / P, which it would be if Σ had no direction, and Σ's part in the top eigenvectors of H with k/P. The
learning rate is the one with the lowest validation loss of SGD, the strength that of Reg1 at this learning rate, both from runs
of a seed of their own. H and Σ are of the training images, or of the first 512 of them.
"""
COLUMNS = (
    "stage", "method", "lr", "strength", "seed", "progress",
    "ratio", "probe_error", "share", "uniform_share", "hessian_noise_trace", "hessian_trace", "covariance_trace",
    "largest_eigenvalue", "train_loss", "validation_loss", "test_loss",
)  # fmt: skip
METHODS = ("sgd", "sgd + reg1")
LRS, STRENGTHS = (0.03, 0.1, 0.3, 1.0), (0.001, 0.003, 0.01, 0.03)
BATCH, MEASURED = 32, 512


def split(data: ImageData, full: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Training, validation and test images; fewer training images in the quick form."""
    held = min(len(data.x_train) // 6, 1000)
    train = len(data.x_train) - held
    train = train if full else min(train, 256)
    if train < BATCH:
        raise ArgumentError(
            f"--data must have {BATCH} training images or more, beside a sixth for validation; got {train}"
        )
    return {
        "train": (data.x_train[:train], data.y_train[:train]),
        "validation": (data.x_train[-held:], data.y_train[-held:]),
        "test": (data.x_test, data.y_test),
    }


def make_model(data: ImageData, full: bool) -> nn.Sequential:
    """The reference CNN, or in the quick form one of two convolutions of 8 and 16 channels."""
    if full:
        return reference_cnn(data.image_shape, data.classes)
    c, h, w = data.image_shape
    layers = [nn.Conv2d(c, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * (h // 4) * (w // 4), data.classes))


def measure(model: nn.Module, x: Tensor, y: Tensor, k: int, probes: int) -> dict[str, float]:
    """The columns of `theory.noise_alignment` on images (N, C, H, W) and labels."""
    found = bootgrad.theory.noise_alignment(
        model, lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y, k=k, probes=probes, steps=60
    )
    ratio = found.ratio_interval
    return {
        "ratio": ratio.mean,
        "probe_error": (ratio.high - ratio.mean) / abs(ratio.mean) if ratio.mean else math.nan,
        "share": found.share,
        "uniform_share": found.uniform_share,
        "hessian_noise_trace": found.hessian_noise_trace.mean,
        "hessian_trace": found.hessian_trace.mean,
        "covariance_trace": found.covariance_trace,
        "largest_eigenvalue": found.eigenvalues[0],
    }


def train(
    data: ImageData, setting: Mapping[str, Value], seed: int, steps: int, points: list[int], full: bool
) -> Iterator[tuple[int, nn.Module | None]]:
    """Yield (step, model) at some steps of a run; None in the place of a model that has diverged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(data, full)
    x, y = split(data, full)["train"]
    optimizer = torch.optim.SGD(model.parameters(), lr=float(setting["lr"]))
    strength = float(setting["strength"])
    penalty = bootgrad.GradientRegularizer(model, reg1=strength, statistics=False) if strength else None
    generator, order, diverged = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long), False
    for step in range(steps + 1):
        if step in points:
            yield step, None if diverged else model
        if diverged or step == steps:
            continue
        if len(order) < BATCH:
            order = torch.randperm(len(x), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        with nullcontext() if penalty is None else penalty.record():
            losses = F.cross_entropy(model(x[chosen]), y[chosen], reduction="none")
        diverged = not bool(torch.isfinite(losses).all())
        if not diverged:
            losses.mean().backward() if penalty is None else penalty.backward(losses)
            optimizer.step()


def mean_loss(model: nn.Module, images: tuple[Tensor, Tensor]) -> float:
    """Mean cross entropy."""
    with torch.no_grad():
        return float(F.cross_entropy(model(images[0]), images[1]))


def follow(
    data: ImageData, setting: Mapping[str, Value], seed: int, steps: int, points: list[int], full: bool, detail: bool
) -> list[dict[str, Value]]:
    """A row of each point of a run; without ``detail`` of its losses alone."""
    parts, rows = split(data, full), []
    k, probes = (10, 128) if full else (5, 16)
    x, y = (t[:MEASURED] for t in parts["train"])
    nothing = dict.fromkeys(COLUMNS[6:], math.nan)  # measured ones
    for step, model in train(data, setting, seed, steps, points, full):
        row: dict[str, Value] = {"progress": step / steps, **nothing}
        if model is not None:
            row |= {f"{name}_loss": mean_loss(model, images) for name, images in parts.items()}
            if detail and math.isfinite(float(row["train_loss"])):
                row |= measure(model, x, y, k, probes)
        rows.append(row)
    return rows


def run(study: Study) -> None:
    """Search for learning rate and strength, then follow both methods on the seeds."""
    data, full = study.images(), study.full
    steps = 2000 if full else 160
    shares = (0, 1 / 32, 1 / 8, 1 / 4, 1 / 2, 1) if full else (0, 1 / 8, 1 / 2, 1)
    points = [round(share * steps) for share in shares]

    def score(setting: Mapping[str, Value], budget: float) -> Mapping[str, Value]:
        last = int(steps * budget)
        return {**follow(data, setting, 1000, last, [last], full, False)[0], "seed": 1000}

    sgd: list[dict[str, Value]] = [{"method": METHODS[0], "lr": lr, "strength": 0.0} for lr in LRS]
    searches = runs_of_halving(len(LRS), 2) + runs_of_halving(len(STRENGTHS), 2)
    with study.progress(searches + 2 * len(study.seeds), "alignment"):
        best = halve(study, sgd, score, score="validation_loss", budgets=(1 / 3, 1.0))
        reg1 = [{"method": METHODS[1], "lr": best["lr"], "strength": f} for f in STRENGTHS]
        settings = (best, halve(study, reg1, score, score="validation_loss", budgets=(1 / 3, 1.0)))
        for seed in study.seeds:
            for setting in settings:
                final = partial(follow, data, setting, seed, steps, points, full, True)
                study.rows({**setting, "stage": "final", "seed": seed}, final)


def _at(table: Table, method: str, column: str, progress: Value = 1.0) -> list[float]:
    return table.where(stage="final", method=method, progress=progress).column(column)


def _lowest(values: tuple[float, ...]) -> float:
    """The lowest, or nan where one is not finite: which it is cannot be known."""
    return min(values) if all(map(math.isfinite, values)) else math.nan


def _relative(first: list[float], second: list[float]) -> list[float]:
    """(a − b)/(|a| + |b|), which as a difference of logarithms is of no unit, and has a value for either sign, too."""
    pairs = zip(first, second, strict=True)
    return [(a - b) / (abs(a) + abs(b)) if a or b else 0.0 for a, b in pairs]


def claims(table: Table) -> list[Claim]:
    """Alignment at the end and along the way, and what Reg1 does to it."""
    sgd, reg1 = METHODS
    started = [p for p in table.where(stage="final").values("progress") if p]
    lowest = [_lowest(values) for values in zip(*(_at(table, sgd, "ratio", p) for p in started), strict=True)]
    shares = _at(table, sgd, "share"), _at(table, sgd, "uniform_share")
    ratios, products = ([_at(table, m, c) for m in METHODS] for c in ("ratio", "hessian_noise_trace"))
    rows: tuple[tuple[str, str, Interval], ...] = (
        ("Tr(HΣ) is above Tr H Tr Σ / P after training by SGD", "ratio − 1", interval(r - 1 for r in ratios[0])),
        ("and at all times after the start", "lowest ratio of the run − 1", interval(r - 1 for r in lowest)),
        ("Σ's share in the top k eigenvectors is above k/P", "share − k/P", difference(*shares)),
        ("Reg1 lowers the alignment", f"ratio of {sgd} − {reg1}, by their sum", interval(_relative(*ratios))),
        ("Reg1 lowers Tr(HΣ) itself", f"Tr(HΣ) of {sgd} − {reg1}, by their sum", interval(_relative(*products))),
    )
    return [Claim(text, SECTION, quantity, found) for text, quantity, found in rows]


def tables(table: Table) -> str:
    """All quantities by method and progress, and the losses at the end."""
    final, rows = table.where(stage="final"), []
    columns = ("ratio", "share", "hessian_noise_trace", "hessian_trace", "covariance_trace", "test_loss")
    for method in final.values("method"):
        for progress in final.values("progress"):
            cells = [interval(_at(table, str(method), column, progress)) for column in columns]
            rows.append((f"{method}, {100 * float(progress):.0f} %", *cells))
    first = {m: final.where(method=m).rows[0] for m in METHODS}
    header = ("method, progress", "P Tr(HΣ) / (Tr H Tr Σ)", "share of the top k", "Tr(HΣ)", "Tr H", "Tr Σ", "test loss")
    errors = [v for v in final.column("probe_error") if not math.isnan(v)]
    error = f"{interval(errors).mean:.0%} on average and {max(errors):.0%} at most" if errors else "not known"
    note = (
        f"k/P is {float(first[METHODS[0]]['uniform_share']):.2g}; learning rate {first[METHODS[0]]['lr']}, λ₁ "
        f"{first[METHODS[1]]['strength']}. The probes' own error in the ratio, half the 95 % interval, is {error}."
    )
    return "\n\n".join([markdown(header, rows), note])


def draw(table: Table):
    """Ratio, share and the traces over the run."""
    from ..training.figures import COLOURS, STYLES, finish, panels

    figure, axes = panels(1, 3, (14, 4.2), shared=False)
    final = table.where(stage="final")
    progress = final.values("progress")
    without = {"ratio": 1.0, "share": float(final.rows[0]["uniform_share"])}  # of noise without direction
    titles = {"ratio": "P Tr(HΣ) / (Tr H Tr Σ)", "share": "Share of Σ in the top k", "covariance_trace": "Tr Σ"}
    for ax, (column, title) in zip(axes, titles.items(), strict=True):
        for method, colour, style in zip(METHODS, COLOURS, STYLES, strict=False):
            found = [interval(_at(table, method, column, p)) for p in progress]
            line = {"color": colour, "linestyle": style, "marker": "o", "markersize": 4, "label": method}
            ax.plot(progress, [f.mean for f in found], **line)
            ax.fill_between(progress, [f.low for f in found], [f.high for f in found], color=colour, alpha=0.2)
        if column in without:
            ax.axhline(without[column], color="black", linewidth=0.8, label="noise without direction")
        finish(ax, title, "")
        ax.set_xlabel("share of the run")
    axes[0].legend()
    return figure
