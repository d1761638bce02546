"""Registers, shared memory and stack of every GPU kernel on each architecture: the most that a configuration takes.

``make kernels`` writes it, from notes of the tests that compile them all.
"""

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

from .results import FOLDER

NUMBERS = ("registers", "shared_bytes", "stack_bytes")
COLUMNS = ("kernel", "dtype", "architecture", *NUMBERS)


def summarize(lines: list[str]) -> list[dict]:
    """Rows of the table from lines of [kernel, dtype, architecture, registers, shared, stack]."""
    taken = defaultdict(list)
    for kernel, dtype, architecture, *numbers in map(json.loads, lines):
        taken[kernel, dtype, architecture].append(numbers)
    return [
        dict(zip(COLUMNS, (*key, *map(max, zip(*numbers, strict=True))), strict=True))
        for key, numbers in sorted(taken.items())
    ]


def main() -> None:
    """Write the table anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notes", type=Path, help="the file that KERNEL_RESOURCES named")
    parser.add_argument("--csv", type=Path, default=FOLDER / "kernel_resources.csv")
    options = parser.parse_args()
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(summarize(options.notes.read_text().splitlines()))


if __name__ == "__main__":
    main()
