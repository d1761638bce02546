"""Pictures of runs: loss, Γ and noise scale over steps.

Colours are Okabe and Ito's, told apart by people who see red and green alike; runs differ in line style too.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from .checkpoint import replacing
from .history import History

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
STYLES = ("-", "--", "-.", ":")
_GAMMA = ("Covariance trace Γ of the per-sample gradients", "loss² / parameter²")
_NOISE = ("Gradient noise scale, averaged over steps", "samples")


def draw_run(history: History, title: str, path: Path) -> None:
    """Draw one run's losses, Γ and noise scale, one below the other."""
    figure, axes = panels(3, 1, (8, 9))
    steps, epochs = history.steps, history.epochs
    for ax, column, colour in ((axes[0], "loss", COLOURS[0]), (axes[1], "covariance_trace", COLOURS[2])):
        at, values = _known(history, column)
        ax.plot(at, values, color=colour, alpha=0.3, linewidth=1, label="each batch")
        ax.plot(at, smooth(values), color=colour, label="smoothed")
    axes[0].plot(epochs["step"], epochs["test_loss"], color=COLOURS[1], marker="o", markersize=4, label="test images")
    axes[2].plot(steps["step"], _finite(steps["noise_scale"]), color=COLOURS[3], label="noise scale")
    labels = (("Mean loss", "nats"), _GAMMA, _NOISE)
    for ax, (name, unit) in zip(axes, labels, strict=True):
        finish(ax, name, unit)
        ax.legend()
    axes[2].set_xlabel("step")
    figure.suptitle(title, wrap=True)
    save(figure, path)


def draw_comparison(runs: Mapping[str, History], title: str, path: Path) -> None:
    """Draw several runs over each other: training loss, test loss, Γ, noise scale; one legend for all."""
    figure, axes = panels(2, 2, (11, 7.5))
    for (name, history), colour, style in zip(runs.items(), COLOURS, STYLES, strict=False):
        steps, epochs = history.steps, history.epochs
        line = {"color": colour, "linestyle": style, "linewidth": 1.8}
        axes[0].plot(steps["step"], smooth(steps["loss"]), label=name, **line)
        axes[1].plot(epochs["step"], epochs["test_loss"], **line)
        at, traces = _known(history, "covariance_trace")
        axes[2].plot(at, smooth(traces), **line)
        axes[3].plot(steps["step"], _finite(steps["noise_scale"]), **line)
    labels = (("Training loss, smoothed", "nats"), ("Test loss", "nats"), (_GAMMA[0] + ", smoothed", _GAMMA[1]), _NOISE)
    for ax, (name, unit) in zip(axes, labels, strict=True):
        finish(ax, name, unit)
    for ax in axes[2:]:
        ax.set_xlabel("step")
    figure.suptitle(title, wrap=True)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), frameon=False)
    save(figure, path)


def smooth(values: list[float], decay: float = 0.8) -> list[float]:
    """Bias-corrected exponential running mean; geometric where all are positive, as suits a logarithmic axis."""
    geometric = all(value > 0 for value in values)
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total = decay * total + (1 - decay) * (math.log(value) if geometric else value)
        weight = decay * weight + (1 - decay)
        out.append(math.exp(total / weight) if geometric else total / weight)
    return out


def panels(rows: int, columns: int, size: tuple[float, float], *, shared: bool = True):
    """A figure that needs no screen, and its axes row by row; ``shared``: those of a column have one x axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, sharex=shared, squeeze=False).flat)


def finish(ax, title: str, unit: str) -> None:
    """Title, unit and grid of an axis, logarithmic where its lines span more than a factor of five."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    values = [v for line in ax.get_lines() for v in line.get_ydata() if v > 0]
    decades = math.log10(max(values) / min(values)) if values else 0
    if decades > 0.7:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_title(title, fontsize="medium")
    ax.set_ylabel(unit)
    ax.grid(True, which="both", alpha=0.25)
    ax.margins(x=0.02)


def _known(history: History, column: str) -> tuple[list[float], list[float]]:
    """The steps at which a column is known, for by random signs Γ is not at each, and its values there."""
    pairs = [pair for pair in zip(history.steps["step"], history.steps[column], strict=True) if not math.isnan(pair[1])]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _finite(values: list[float]) -> list[float]:
    """The values, with gaps where they are not finite."""
    return [value if math.isfinite(value) else math.nan for value in values]


def save(figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.align_ylabels()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi="figure")
