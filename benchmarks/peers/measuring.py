"""Time and memory of each way on a whole network, in processes that nothing else shares.

    python -m benchmarks.peers.measuring TASK memory WAY     bytes by which up to three steps raise VmHWM
    python -m benchmarks.peers.measuring TASK time WAY …     what each way is, right or wrong; milliseconds by round

One process times all ways, which take turns with the plain step; another each tells a way's memory. They print JSON, and are
bounded in memory and time, so that one library's hunger is its own entry's.
"""

import argparse
import copy
import json
import math
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bootgrad.errors import DataError
from bootgrad.training.data import load

from ..models import PEER_TASKS
from ..training_step import high_water_mark
from .oracle import Outcome, examine, expect, first_line
from .ways import WAYS, Way, plain

PLAIN = Way("plain", (), plain)
BY_NAME = {way.name: way for way in (PLAIN, *WAYS)}
IMAGES = (3, 32, 32)  # that --data gives
SAMPLES = 3  # that a way is checked on
SHARE = 0.7  # of the memory that is free
PATIENCE = 3600  # seconds that a process may take


def prepare(task: str, data: str | None) -> tuple[nn.Module, Tensor, Tensor]:
    """The network and its batch: the first images of ``data`` where it takes such, else normal numbers."""
    torch.manual_seed(0)
    chosen = PEER_TASKS[task]
    model = chosen.build()
    if data is None or chosen.shape != IMAGES:
        return model, *chosen.batch()
    images = load(data)
    size, classes = chosen.batch_size, chosen.classes
    if images.image_shape != IMAGES or images.classes > classes or len(images.x_train) < size:
        raise DataError(
            f"--data takes at least {size} training images of shape {IMAGES} in at most {classes} classes; {data} has "
            f"{len(images.x_train)} of shape {images.image_shape} in {images.classes}: give it CIFAR-10, or leave it out"
        )
    return model, images.x_train[:size], images.y_train[:size]


def time_ways(
    task: str, names: list[str], rounds: int = 9, seconds: float = 60, data: str | None = None
) -> dict[str, Any]:
    """Check ways on a few samples, and time those that are right on the batch.

    Returns:
        {way: {"outcomes": {quantity: …}}}, with "milliseconds", {round: time}, or "failure", why there are none.
    """
    model, x, y = prepare(task, data)
    expected = expect(model, x[:SAMPLES], y[:SAMPLES])
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], float]] = {}
    for name in [PLAIN.name, *names]:
        outcomes = examine(BY_NAME[name], model, x[:SAMPLES], y[:SAMPLES], expected)
        found[name] = {"outcomes": {q: asdict(outcome) for q, outcome in outcomes.items()}}
        if all(outcome.status == "right" for outcome in outcomes.values()):
            steps[name] = _clocked(BY_NAME[name], copy.deepcopy(model), x, y)
    times, failures = take_turns(steps, rounds, seconds)
    for name in steps:
        found[name] |= {"failure": failures[name]} if name in failures else {"milliseconds": times[name]}
    return found


def take_turns(
    steps: dict[str, Callable[[], float]], rounds: int, seconds: float
) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """Take every step once a round, after a round that does not count.

    Args:
        steps: each returns the seconds that it took.
        rounds: how many are wanted.
        seconds: after which a step, if it has had a round that counts, has had its share.

    Returns:
        {step: {round: milliseconds}}, and {step: why} of those that raised; they are left out from then on.
    """
    times: dict[str, dict[int, float]] = {name: {} for name in steps}
    spent, failures = dict.fromkeys(steps, 0.0), {}
    for k in range(-1, rounds):
        for name, step in steps.items():
            if name in failures or (k >= 1 and spent[name] > seconds):
                continue
            try:
                elapsed = step()
            except Exception as error:  # as in `examine`
                failures[name] = first_line(error)
                continue
            spent[name] += elapsed
            if k >= 0:
                times[name][k] = 1e3 * elapsed
    return times, failures


def _clocked(way: Way, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    """The way's step from no gradients; returns its seconds."""
    step = way.make(model, x, y)

    def clocked():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.zero_grad()
            start = time.perf_counter()
            step()
            return time.perf_counter() - start

    return clocked


def memory_of(task: str, name: str, seconds: float = 60, data: str | None = None) -> int:
    """Bytes by which three steps, of slow ones fewer, raise this process's high-water mark."""
    model, x, y = prepare(task, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = BY_NAME[name].make(model, x, y)
        before, start = high_water_mark(), time.perf_counter()
        for k in range(3):
            if k and time.perf_counter() - start > seconds / 3:
                break
            model.zero_grad()
            step()
    return high_water_mark() - before


def ask(task: str, what: str, names: list[str], options: argparse.Namespace) -> Any:
    """The answer of a process of its own, or an `Outcome` that says why there is none."""
    command = [sys.executable, "-m", "benchmarks.peers.measuring", task, what, *names]
    command += ["--rounds", str(options.rounds), "--threads", str(options.threads)]
    command += ["--seconds", str(options.seconds)]
    command += ["--data", options.data] if options.data else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return Outcome("refuses", why=f"took longer than {PATIENCE} s")
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        return Outcome("refuses", why=f"killed by signal {-done.returncode}")
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith(" ")]
    return Outcome("refuses", why=lines[-1] if lines else f"exit code {done.returncode}")


def _bound_memory() -> None:
    """Let torch say that there is no memory before the system ends the process."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = math.floor(SHARE * free)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))


def main() -> None:
    """The other end of `ask`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=PEER_TASKS)
    parser.add_argument("what", choices=("memory", "time"))
    parser.add_argument("ways", nargs="+", choices=BY_NAME)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    _bound_memory()
    if options.what == "memory":
        print(json.dumps(memory_of(options.task, options.ways[0], options.seconds, options.data)))
    else:
        print(json.dumps(time_ways(options.task, options.ways, options.rounds, options.seconds, options.data)))


if __name__ == "__main__":
    main()
