"""What watching a run costs: whole training steps of SGD, plain and watched in ways that take turns.

A ratio is that of the sums over a number of steps, in which the first ones are, too: with the checks of the batch dimension on
the first, second, fourth, eighth … watched step, and the observations written to a file. Variants take turns in blocks.

    python -m benchmarks.monitoring [--model reference] [--batch 128] [--threads 2] [--steps 400]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from bootgrad.monitoring import JSONLWriter, Monitor

from .models import MODELS, batch
from .results import FOLDER, append, setting, spread
from .training_step import check

BLOCK = 10  # steps between two turns
WAYS: dict[str, dict] = {
    "every=50": {"every": 50},
    "every=10": {"every": 10},
    "every=1": {"every": 1},
    "every=50, normalization": {"every": 50, "layers": "normalization"},
    "every=1, normalization": {"every": 1, "layers": "normalization"},
}


def make_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, monitor: Monitor | None) -> Callable[[], None]:
    """A step of training, watched where there is a monitor."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def plain():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, reduction="none").mean().backward()
        optimizer.step()

    def watched():
        assert monitor is not None
        optimizer.zero_grad()
        with monitor.record():
            losses = F.cross_entropy(model(x), y, reduction="none")
        monitor.backward(losses)
        optimizer.step()

    return plain if monitor is None else watched


def measure(steps: dict[str, Callable[[], None]], count: int) -> dict[str, list[float]]:
    """Seconds of each block of each way, taking turns; the order turns around from one round to the next."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(count // BLOCK):
        names = list(steps) if k % 2 == 0 else list(reversed(steps))
        for name in names:
            start = time.perf_counter()
            for _ in range(BLOCK):
                steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def rows(name: str, size: int, count: int, folder: Path) -> list[dict]:
    """A row of each way: its time over all steps, as a ratio to plain steps, and the spread of parts of the run."""
    torch.manual_seed(0)
    make, shape = MODELS[name]()
    x, y = batch(shape, size)
    check(make, x, y)
    ways = {way: options for way, options in WAYS.items() if "normalization" not in way or _has_norms(make)}
    steps, monitors = {"plain": make_step(make, x, y, None), "plain again": make_step(make, x, y, None)}, []
    for way, options in ways.items():
        model, _ = MODELS[name]()
        monitors.append(Monitor(model, writers=[JSONLWriter(folder / f"{way}.jsonl")], **options))
        steps[way] = make_step(model, x, y, monitors[-1])
    for _ in range(3):
        steps["plain"]()  # what is allocated once
    seconds = measure(steps, count)
    plain = seconds["plain"]
    out = []
    for way, of_way in seconds.items():
        total = sum(of_way) / sum(plain)
        fifty = range(0, len(plain) - 4, 5)  # parts of 50 steps, in which each way has all that it does
        parts = [sum(of_way[k : k + 5]) / sum(plain[k : k + 5]) for k in fifty]
        figures = {"steps": count, "plain_ms": f"{1e3 * sum(plain) / count:.1f}", "ratio_of_sums": f"{total:.3f}"}
        out.append(setting() | {"model": name, "batch": size, "way": way} | figures | spread("ratio", parts, 3))
        print(f"{name}, batch {size}, {way}: {', '.join(f'{k} {v}' for k, v in list(out[-1].items())[9:])}", flush=True)
    for monitor in monitors:
        monitor.close()
    return out


def _has_norms(model: nn.Module) -> bool:
    return any(isinstance(module, nn.GroupNorm | nn.LayerNorm) for module in model.modules())


def main() -> None:
    """Measure, print, append to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="reference")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--csv", type=Path, default=FOLDER / "monitoring.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        append(options.csv, rows(options.model, options.batch, options.steps, Path(folder)))


if __name__ == "__main__":
    main()
