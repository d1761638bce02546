"""Rows of the two tables, and the CSV files that keep them: of every network, and of every layer case, the latest run's."""

import csv
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import bootgrad.errors

from ..results import memory_figures, setting, spread
from .oracle import Outcome
from .ways import PACKAGES

Row = dict[str, str]


def peer_version(peer: str) -> str:
    """The library's version: torch's for what torch does, empty where the library is not installed."""
    if peer == "bootgrad":
        return bootgrad.__version__
    if peer not in PACKAGES:
        return torch.__version__
    try:
        return version(PACKAGES[peer])
    except PackageNotFoundError:
        return ""


def timed(
    place: dict[str, str],
    peer: str,
    quantity: str,
    outcome: Outcome,
    times: dict[str, float] | None = None,
    plain: dict[str, float] | None = None,
    memory: tuple[int, int] | None = None,
) -> Row:
    """One peer's quantity on one network.

    Args:
        place: columns that say where and on what.
        peer: the library.
        quantity: of `ways.QUANTITIES`; "plain" for the plain step.
        outcome: right, wrong or refuses.
        times: {round: milliseconds}.
        plain: the plain step's, of these rounds and perhaps others.
        memory: bytes of the step and of the plain step.
    """
    row = setting() | place | _columns(peer, quantity, outcome)
    figures = dict.fromkeys(
        ("rounds", "milliseconds", "ratio", "ratio_low", "ratio_high", "memory_mib", "memory_ratio"), ""
    )
    if times and plain:
        ratios = spread("ratio", [t / plain[k] for k, t in times.items()])
        figures |= {"rounds": str(len(times)), "milliseconds": f"{statistics.median(times.values()):.1f}"} | ratios
    if memory:
        figures |= memory_figures(*memory)
    return row | figures


def judged(case: str, peer: str, quantity: str, outcome: Outcome) -> Row:
    """One peer's quantity on one layer case."""
    return setting() | {"case": case} | _columns(peer, quantity, outcome)


def is_fault(row: Row) -> bool:
    """Whether a row is a fault of this library: a wrong number, or a failure that is no error of its own."""
    own = row["why"].partition(":")[0] in vars(bootgrad.errors)
    return row["peer"] == "bootgrad" and row["status"] != "right" and not (row["status"] == "refuses" and own)


def is_provisional(rows: list[Row]) -> bool:
    """Whether figures of these networks are of fewer than nine rounds, which say little on a busy machine."""
    return any(row["peer"] == "plain" and int(row["rounds"] or 0) < 9 for row in rows)


def merged(earlier: list[Row], measured: list[Row], networks: list[str]) -> list[Row]:
    """What was just measured in the place of earlier rows of the same networks, in the networks' order."""
    new = {row["network"] for row in measured}
    rows = [*(row for row in earlier if row["network"] not in new), *measured]
    return sorted(rows, key=lambda row: networks.index(row["network"]))


def read(path: Path) -> list[Row]:
    """Rows of an earlier run; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[Row]) -> None:
    """The file anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _columns(peer: str, quantity: str, outcome: Outcome) -> dict[str, Any]:
    return {
        "peer": peer,
        "version": peer_version(peer),
        "quantity": quantity,
        "status": outcome.status,
        "error": "" if outcome.error is None else f"{outcome.error:.1e}",
        "why": outcome.why,
    }
