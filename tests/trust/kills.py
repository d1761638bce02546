"""Runs that are killed, by SIGKILL, at random moments, and go on: to the numbers of a run that nobody killed.

``bootgrad train`` is started, killed, and started again with ``--resume`` until the run has come to its end. After each kill
the checkpoint is read: it holds whole epochs, as many as before or more, and their losses are those of the uninterrupted run.
Each run is a process of its own, forked where all is imported and nothing has run. It is killed within the time of an epoch
after its checkpoint has been written a number of times that is drawn, however quick the machine is just then.

    python -m tests.trust.kills --kills 200 [--json benchmarks/results/trust/kills.json]
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from bootgrad.cli import main as command
from bootgrad.training import checkpoint
from bootgrad.training.environment import processor_name, versions

from ..cli.commands import read_csv, timeless

EPOCHS, STEPS_PER_EPOCH = 25, 4
MOST_WRITES = 8  # before a kill; the first one is at the start of a run
OPTIONS = [
    *("--data", "digits", "--train-size", "64", "--batch-size", "16", "--epochs", str(EPOCHS), "--threads", "1"),
    *("--reg1", "0.01", "--reg2", "0.01", "--center", "ema", "--fraction", "0.5"),
]
PATIENCE = 600  # seconds for a run that is not killed
PRELOADED = [__name__, "matplotlib.pyplot", "sklearn.datasets", "tqdm", "bootgrad.training.run"]


class Killer:
    """Kills one run after the other, and counts what it saw.

    Args:
        folder: for the runs.
        seed: of the moments.

    Attributes:
        kills: so far; ``before`` those before there was a checkpoint.
        unfinished: names of files in whose writing there was a kill.
        runs: that came to their end after kills.
        epochs: that were found done by kills, one number for each.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.kills = self.before = self.runs = 0
        self.unfinished: set[str] = set()
        self.epochs: list[int] = []
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(PRELOADED)
        self.whole, self.out = folder / "whole", folder / "killed"
        self._end(self.whole)  # with it the server is there
        self.rows = timeless(read_csv(self.whole / "run.csv"))
        assert len(self.rows) == EPOCHS * STEPS_PER_EPOCH
        began = time.perf_counter()
        self._end(folder / "again")
        self.seconds = time.perf_counter() - began

    def run(self, most: int) -> None:
        """Kill one run until it has come to its end, or until there were ``most`` kills, and compare it."""
        epochs = 0
        while self.kills < most and self._killed():
            self.kills += 1
            epochs = self._check(epochs)
            self.epochs.append(epochs)
        self._end(self.out)
        self._compare()
        self.runs += 1
        for path in self.out.iterdir():
            path.unlink()
        self.out.rmdir()

    def _start(self, out: Path):
        resumed = ["--resume", "--out", str(out)]
        arguments = resumed if (out / "checkpoint.pt").exists() else [*OPTIONS, "--out", str(out)]
        process = self.processes.Process(target=train, args=(arguments, str(self.folder / "told")))
        process.start()
        return process

    def _end(self, out: Path) -> None:
        process = self._start(out)
        process.join(PATIENCE)
        process.kill()
        told = (self.folder / "told").read_text()
        assert process.exitcode == 0, told
        assert "written: " in told and "rror" not in told and "Traceback" not in told, told

    def _killed(self) -> bool:
        """Start the run and kill it; False where it had come to its end."""
        process, writes, before = self._start(self.out), self.random.randrange(MOST_WRITES), self._written()
        while writes and process.is_alive():
            time.sleep(0.0005)
            now = self._written()
            writes, before = writes - (now != before), now
        process.join(self.random.uniform(0, 1.5 * self.seconds / EPOCHS))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (self.folder / "told").read_text()
        return process.exitcode != 0

    def _written(self) -> int:
        """When the checkpoint was written; 0 where there is none."""
        try:
            return (self.out / "checkpoint.pt").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _check(self, epochs: int) -> int:
        """Read what a kill left; the epochs that are done."""
        self.unfinished |= {path.name for path in self.out.glob(".*")}
        if not (self.out / "checkpoint.pt").exists():
            assert epochs == 0, "a checkpoint has vanished"
            self.before += 1
            return 0
        state = checkpoint.read(self.out / "checkpoint.pt")
        done = state["progress"]["epoch"]
        assert done >= epochs and state["progress"]["position"] == 0, (done, epochs, state["progress"])
        losses = state["history"]["steps"]["loss"].tolist()
        assert losses == [float(row["loss"]) for row in self.rows[: done * STEPS_PER_EPOCH]]
        for path in self.out.glob("run.csv"):
            rows = timeless(read_csv(path))
            assert rows == self.rows[: len(rows)]
        return done

    def _compare(self) -> None:
        """With the uninterrupted run: files, rows, epochs, and all of the state to the bit."""
        files = [sorted(path.name for path in out.iterdir()) for out in (self.whole, self.out)]
        assert files[0] == files[1]
        assert timeless(read_csv(self.out / "run.csv")) == self.rows
        records = [json.loads((path / "run.json").read_text()) for path in (self.whole, self.out)]
        assert records[1]["status"] == "finished"
        assert timeless(records[0]["epochs"]) == timeless(records[1]["epochs"])
        assert records[0]["noise_scale"] == records[1]["noise_scale"]
        a, b = (checkpoint.read(path / "checkpoint.pt") for path in (self.whole, self.out))
        for name in ("model", "optimizer", "regularizer", "rng", "progress", "noise_scale"):
            assert same(a[name], b[name]), name


def train(arguments: list[str], told: str) -> None:
    """The command in a process of its own, whose output goes to the file ``told``."""
    file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(command(["train", *arguments]))


def same(a: object, b: object) -> bool:
    """Whether two states are, to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def result(killer: Killer) -> dict:
    """What is stored."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor_name(),
        "versions": {name: v for name, v in versions().items() if name in ("bootgrad", "python", "torch")},
        "command": " ".join(["bootgrad train", *OPTIONS]),
        "kills": killer.kills,
        "kills_before_a_checkpoint": killer.before,
        "kills_in_a_write": len(killer.unfinished),
        "epochs_found_done": killer.epochs,
        "runs_that_ended_alike": killer.runs,
    }


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.trust.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the result, of as far as it has come")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        killer = Killer(Path(folder), options.seed)
        while killer.kills < options.kills:
            killer.run(options.kills)
            print(f"{killer.kills} kills, {killer.runs} runs ended alike", flush=True)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(result(killer), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
