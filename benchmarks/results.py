"""Rows of results: what they were measured on, and the CSV files that keep them."""

import csv
import datetime
from pathlib import Path

import torch

import bootgrad
from bootgrad.ops.library import build_info
from bootgrad.training.environment import processor_name

FOLDER = Path(__file__).parent / "results"


def backend() -> str:
    """What the ops run on: the compiled CPU kernels with their instruction set, or plain torch."""
    cpu = build_info()[0]
    return f"C++ {cpu.isa}" if cpu.loaded else "eager"


def setting() -> dict[str, str]:
    """The columns that every stored row begins with."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": processor_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "bootgrad": bootgrad.__version__,
        "backend": backend(),
    }


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a CSV file, with a header where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
