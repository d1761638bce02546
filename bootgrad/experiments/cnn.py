"""Section 4.2: a CNN trained by SGD, and with Reg1, Reg2 and both, at small and at large batches.

L(θ) + λ₁ (1/B) Σ_i ‖g_i − c‖² + λ₂ ‖ḡ − c‖²
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from ..intervals import Interval, interval
from ..training.data import ImageData
from .evidence import Claim
from .image_comparison import COLUMNS as OF_RUNS
from .image_comparison import FULL_GRID, QUICK_GRID, Problem, compare, compare_times, final, same_time
from .image_draws import draw as draw_images
from .image_draws import is_small, shrunk
from .image_reports import against_sgd, draw_intervals, intervals, lower, measured
from .image_runs import BOTH, REG1, REG2, SGD, UNCENTERED, Way
from .study import Study
from .table import Table, Value

TITLE = "Penalties on gradient noise for a CNN, at equal epochs and at equal time, for small and large batches"
SECTION, IMAGES = "4.2", True
ABOUT = """
A CNN of three convolutions and two linear layers on images, by SGD without momentum, in batches of 16: plainly; with Reg2 about
a moving average of the gradients; with Reg2 without its center, λ₂‖ḡ‖², as the paper took it, at 2.2 times the time of a step;
with Reg1 about the batch mean; with both about the moving average. A step with a penalty takes longer, so SGD also gets as many
epochs as fit into the time of each way. Batches of 128 take as many steps as those of 16, and so differ from them in their
noise alone; what they lose, penalties should give back. λ₁ = s and λ₂ = B·s, for Reg2 is about Γ/B. The time of a step is a
multiple of that of plain steps, which a copy of the model takes in between. Learning rate and s are those with the lowest
validation loss; images of more than 100 pixels are searched on a third of the training set, in as many epochs. Images of more
than 256 pixels are halved by averaging.
"""
COLUMNS = ("batch", *OF_RUNS)

SMALL, LARGE = 16, 128
WAYS, LARGE_WAYS = (SGD, UNCENTERED, REG2, REG1, BOTH), (SGD, REG2, REG1, BOTH)
PAPERS_RATIO = 2.2


def problems(data: ImageData, full: bool) -> tuple[Problem, Problem]:
    """What is trained in small batches, and in large ones."""
    if full:
        size, epochs, share = (1024, 10.0, 1.0) if is_small(data) else (1536, 4.0, 1 / 3)
    else:
        size, epochs, share = 256, 2.0, 1.0
    drawn = partial(draw_images, data, size)
    small = Problem({"batch": SMALL}, drawn, SMALL, epochs, FULL_GRID if full else QUICK_GRID, share=share)
    return small, replace(small, settings={"batch": LARGE}, batch=LARGE, epochs=epochs * LARGE / SMALL)


def run(study: Study) -> None:
    """All ways in small batches, then SGD with their times, then large batches; the quick form has Reg1 alone for these.

    Raises:
        DataError: the images cannot be read.
    """
    data = shrunk(study.images())
    small, large = problems(data, study.full)
    timed, in_large = (WAYS[1:], LARGE_WAYS) if study.full else ((REG1,), (SGD, REG1))
    seeds = len(study.seeds)
    total = small.calls(WAYS, seeds) + small.calls(map(same_time, timed), seeds) + large.calls(in_large, seeds)
    with study.progress(total, "cnn"):
        for way in WAYS:
            compare(study, small, way)
        compare_times(study, small, timed)
        for way in in_large:
            compare(study, large, way)


def claims(table: Table) -> list[Claim]:
    """Each way against SGD at equal epochs and at equal time; small batches against large ones; Reg2's center."""
    found = against_sgd(table, WAYS[1:], SECTION, {"batch": SMALL})
    found += _claim(table, (SGD, SMALL), (SGD, LARGE), f"SGD of batches of {LARGE} loses against batches of {SMALL}")
    for way in LARGE_WAYS[1:]:
        text = f"with {way.name}, batches of {LARGE} are better than without"
        found += _claim(table, (way, LARGE), (SGD, LARGE), text)
        text = f"with {way.name}, batches of {LARGE} are better than SGD's of {SMALL}"
        found += _claim(table, (way, LARGE), (SGD, SMALL), text)
    found += _claim(table, (REG2, SMALL), (UNCENTERED, SMALL), "Reg2 is better with its center than without")
    found += _claim(table, (REG1, SMALL), (SGD, SMALL), "Reg1 lowers Γ at the end", "gamma")
    ratio = interval(PAPERS_RATIO - r for r in final(table, way=UNCENTERED.name, batch=SMALL).column("ratio"))
    text = f"Reg2 without its center takes less than the paper's {PAPERS_RATIO} times the time of a plain step"
    return [*found, Claim(text, SECTION, f"{PAPERS_RATIO} − time of a step", ratio)]


def _claim(
    table: Table, first: tuple[Way, int], second: tuple[Way, int], text: str, column: str = "test_loss"
) -> list[Claim]:
    """`lower` of two ways and batch sizes; none where one was not run."""
    kinds: list[dict[str, Value]] = [{"way": way.name, "batch": batch} for way, batch in (first, second)]
    if not all(len(final(table, **kind)) for kind in kinds):
        return []
    return [lower(table, *kinds, text=text, source=SECTION, column=column)]


def tables(table: Table) -> str:
    """All ways at all batch sizes."""
    return measured(table, ("batch",))


def draw(table: Table):
    """Test losses at both batch sizes, Γ, and the price of a step."""
    from ..training.figures import panels

    figure, axes = panels(2, 2, (13, 8), shared=False)
    for ax, batch in zip(axes, (SMALL, LARGE), strict=False):
        draw_intervals(ax, intervals(table, "test_loss", batch=batch), f"Test loss, batches of {batch}", "nats")
    gamma = {
        f"{way}, {batch}": at
        for batch in (SMALL, LARGE)
        for way, at in _without(intervals(table, "gamma", batch=batch))
    }
    draw_intervals(axes[2], gamma, "Γ at the end, by way and batch", "loss² / parameter²")
    axes[2].set_xscale("log")
    ratios = {
        f"{way}, {batch}": at
        for batch in (SMALL, LARGE)
        for way, at in _without(intervals(table, "ratio", batch=batch))
    }
    draw_intervals(axes[3], ratios, "Time of a step, by way and batch", "times a plain step")
    return figure


def _without(found: dict[str, Interval]) -> Iterable[tuple[str, Interval]]:
    """All but SGD of equal time."""
    return [(way, at) for way, at in found.items() if not way.startswith("sgd,")]
