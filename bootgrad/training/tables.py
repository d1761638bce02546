"""Tables for the terminal: right-aligned columns of short numbers."""

import math
from collections.abc import Sequence

EPOCH_HEADER = (
    "epoch",
    "train loss",
    "test loss",
    "accuracy",
    "Γ",
    "noise scale",
    "s/step",
    "plain s/step",
    "ratio",
)


def epoch_cells(row: dict[str, float]) -> tuple[str, ...]:
    """The cells of one epoch of a history, in the order of `EPOCH_HEADER`."""
    ours, plain = row["seconds_per_step"], row["plain_seconds_per_step"]
    return (
        str(int(row["epoch"])),
        number(row["train_loss"]),
        number(row["test_loss"]),
        f"{100 * row['test_accuracy']:.2f} %",
        number(row["covariance_trace"]),
        number(row["noise_scale"]),
        number(ours, 3),
        number(plain, 3),
        "–" if math.isnan(ours / plain) else f"{ours / plain:.2f}",
    )


def number(value: float, digits: int = 4) -> str:
    """A number in ``digits`` significant digits; a dash for nan."""
    return "–" if math.isnan(value) else f"{value:.{digits}g}"


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One row: the first column to the left, the others to the right."""
    first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join([cells[0].ljust(len(first)), *rest]).rstrip()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A whole table, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join([line(header, widths), "  ".join("─" * w for w in widths), *(line(row, widths) for row in rows)])
