"""What a run has measured so far: one row per step, one per epoch, and their files.

Columns of a step: loss (mean over the batch, without penalty), Γ (``covariance_trace``), ‖ḡ‖² (``sq_mean_norm``), the
averaged noise scale, Reg1 and Reg2 without their factors, seconds. Unknown numbers are nan, an empty field in CSV and
null in JSON. Beside them stand the pairs of seconds that a step and a plain one took side by side.
"""

import csv
import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import replacing

STEP_COLUMNS = ("step", "epoch", "loss", "covariance_trace", "sq_mean_norm", "noise_scale", "reg1", "reg2", "seconds")
EPOCH_COLUMNS = (
    "epoch",
    "step",
    "train_loss",
    "test_loss",
    "test_accuracy",
    "covariance_trace",
    "noise_scale",
    "seconds_per_step",
    "plain_seconds_per_step",
)
PAIR_COLUMNS = ("seconds", "plain_seconds")


class Table:
    """Columns of float64 by name, grown row by row."""

    def __init__(self, columns: tuple[str, ...]):
        """Start without rows."""
        self.columns: dict[str, list[float]] = {name: [] for name in columns}

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> list[float]:
        """One column."""
        return self.columns[name]

    def add(self, **row: float) -> None:
        """Append a row; every column must be named."""
        for name, column in self.columns.items():
            column.append(float(row[name]))

    def row(self, index: int) -> dict[str, float]:
        """One row by column name."""
        return {name: column[index] for name, column in self.columns.items()}

    def fields(self, index: int) -> list[str]:
        """One row as text that reads back to the same numbers; nothing for nan."""
        return [
            "" if math.isnan(v) else str(int(v)) if n in ("step", "epoch") else repr(v)
            for n, v in self.row(index).items()
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Columns as tensors."""
        return {name: torch.tensor(column, dtype=torch.float64) for name, column in self.columns.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the columns of a `state_dict`, all of one length."""
        if any(state[name].dim() != 1 or state[name].dtype != torch.float64 for name in self.columns):
            raise ValueError("columns are of float64 in one dimension")
        columns = {name: state[name].tolist() for name in self.columns}
        if len({len(column) for column in columns.values()}) > 1:
            raise ValueError("columns of different lengths")
        self.columns = columns


class History:
    """The steps and epochs of a run, and the pairs from which its price is known."""

    def __init__(self):
        """Start empty."""
        self.steps, self.epochs, self.pairs = Table(STEP_COLUMNS), Table(EPOCH_COLUMNS), Table(PAIR_COLUMNS)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """All tables."""
        return {name: table.state_dict() for name, table in vars(self).items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take all tables of a `state_dict`."""
        for name, table in vars(self).items():
            table.load_state_dict(state[name])

    def write_csv(self, path: Path) -> None:
        """Write one row per step; the last step of an epoch also has its test loss and accuracy."""
        tests = {step: i for i, step in enumerate(self.epochs["step"])}
        rows = []
        for k, step in enumerate(self.steps["step"]):
            epoch = tests.get(step)
            measured = ["", ""]
            if epoch is not None:
                measured = [repr(self.epochs[name][epoch]) for name in ("test_loss", "test_accuracy")]
            rows.append([*self.steps.fields(k), *measured])
        write_csv(path, [*STEP_COLUMNS, "test_loss", "test_accuracy"], rows)

    def epoch_rows(self) -> list[dict[str, Any]]:
        """The epochs for JSON: numbers, or None where unknown or infinite."""
        return [
            {n: int(v) if n in ("epoch", "step") else finite(v) for n, v in self.epochs.row(k).items()}
            for k in range(len(self.epochs))
        ]


def finite(value: float) -> float | None:
    """``value``, or None when it is infinite or nan, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    """Write a whole CSV file at once."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    with replacing(path) as file:
        file.write(text.getvalue().encode())
