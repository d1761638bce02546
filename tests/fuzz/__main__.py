"""Draw programs for some minutes, other ones in every run; print each that fails once, shrunk, and go on.

python -m tests.fuzz --minutes 30 [--seed N]
"""

import argparse
import re
import sys
import time
import traceback
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import UnsatisfiedAssumption

from .architectures import programs
from .comparison import compare
from .programs import Program

EXAMPLES = 200  # from one seed


@dataclass
class Failure:
    """A program and the error that came of it."""

    program: Program
    error: Exception

    @property
    def kind(self) -> str:
        """The error, without what differs from program to program."""
        return re.sub(
            r"modules_of[\w.]*|tensor\(.*?\)|\d[\d.e-]*", "", f"{type(self.error).__name__} {self.error}"[:60]
        )

    def explains(self, other: "Failure") -> bool:
        """Whether the other one fails alike and has all that this one is made of."""
        return self.kind == other.kind and _parts(self.program) <= _parts(other.program)


def _parts(program: Program) -> set[str]:
    """What a program is made of, without numbers."""
    names = {v for node in program.nodes for v in node.options.values() if isinstance(v, str)}
    return names.union(*({node.op} | node.weights() for node in program.nodes))


class Hunt:
    """A search that ends at a given time, and knows what it has found."""

    def __init__(self, end: float):
        self.end, self.drawn = end, 0
        self.found: list[Failure] = []

    def run(self, number: int) -> Failure | None:
        """The first failure from one seed that is new, shrunk."""
        last: Failure | None = None

        def check(program: Program) -> None:
            nonlocal last
            if time.monotonic() > self.end and last is None:
                return
            self.drawn += 1
            try:
                compare(program)
            except UnsatisfiedAssumption:
                raise
            except Exception as error:
                failure = Failure(program, error)
                if any(known.explains(failure) for known in self.found):
                    return
                last = failure
                raise

        health = list(HealthCheck)
        options = settings(
            max_examples=EXAMPLES,
            database=None,
            deadline=None,
            suppress_health_check=health,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
        )
        try:
            seed(number)(options(given(programs())(check)))()
        except Exception:
            if last is None:
                raise
        if last is not None:
            self.found.append(last)
        return last


def main() -> int:
    """Run from the command line; 1 where anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % 2**32, help="the first one; the next are those after it"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    hunt, number = Hunt(time.monotonic() + 60 * options.minutes), options.seed
    print(f"seed {number}", flush=True)
    while time.monotonic() < hunt.end:
        failure = hunt.run(number)
        if failure is not None:
            print(f"\nseed {number}: {failure.program!r}", flush=True)
            traceback.print_tb(failure.error.__traceback__, limit=-3, file=sys.stdout)
            print(f"{type(failure.error).__name__}: {failure.error}", flush=True)
        number += 1
    print(f"\n{hunt.drawn} programs, {len(hunt.found)} failures")
    return bool(hunt.found)


if __name__ == "__main__":
    sys.exit(main())
