"""Rows of results: what they were measured on, a step's time and memory, and the tables that show and keep them."""

import csv
import datetime
import statistics
from collections.abc import Collection
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


def spread(name: str, ratios: Collection[float], digits: int = 2) -> dict[str, str]:
    """Median of some ratios, and the 10 and 90 % between which most are."""
    ordered = sorted(ratios)
    found = statistics.median(ordered), ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return {name + end: f"{value:.{digits}f}" for end, value in zip(("", "_low", "_high"), found, strict=True)}


def memory_figures(rise: float, plain: float) -> dict[str, str]:
    """A step's peak memory, and its ratio to the plain step's, from the bytes of both."""
    return {"memory_mib": f"{rise / 2**20:.0f}", "memory_ratio": f"{rise / plain:.2f}" if plain else ""}


def step_rows(place: dict, times: dict[str, list[float]], memory: dict[str, float]) -> list[dict]:
    """A row of each step, as ratios to the first one, the plain step.

    Args:
        place: columns that say what was measured.
        times: seconds of each step, by round.
        memory: bytes of each step.
    """
    plain = next(iter(times))
    rows = []
    for step, seconds in times.items():
        ratios = spread("ratio", [t / p for t, p in zip(seconds, times[plain], strict=True)])
        time = {"milliseconds": f"{1e3 * statistics.median(seconds):.1f}"} | ratios
        rows.append(setting() | place | {"step": step} | time | memory_figures(memory[step], memory[plain]))
    return rows


def tell(path: Path, title: str, rows: list[dict]) -> None:
    """Print rows as a table, from the column of the step on, and add them to a CSV file."""
    columns = list(rows[0])[list(rows[0]).index("step") :]
    shown = [[c for c in columns if not c.endswith(("_low", "_high"))]]
    for r in rows:
        bands = {c: f" ({r[f'{c}_low']}–{r[f'{c}_high']})" for c in columns if f"{c}_low" in columns}
        shown.append([r[c] + bands.get(c, "") for c in shown[0]])
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    print(f"\n{title}, {rows[0]['threads']} threads, {rows[0]['backend']}; in brackets 10–90 % of the rounds")
    for step, *figures in shown:
        print(f"{step:{widths[0]}}", *(f"{v:>{w}}" for v, w in zip(figures, widths[1:], strict=True)), sep="  ")
    append(path, rows)


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a CSV file, with a header where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def write(path: Path, rows: list[dict]) -> None:
    """Replace a CSV file by rows of the same columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
