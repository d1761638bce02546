"""What watching a run costs: training steps by SGD, plain and watched in ways that take turns step by step.

Time is the process's own, so that what else runs on the machine is not counted, beside that of the clock:

    run       the sum over all steps, the first ones too, with the observations written to a file, by that of plain steps
    watched   the median of the watched steps by that of the plain ones
    checked   the same of those on which the batch dimension is checked: the first, second, fourth, eighth … watched one

The second plain way shows how far chance goes.

    python -m benchmarks.monitoring [--model reference] [--batch 128] [--threads 1] [--steps 200]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from bootgrad.monitoring import JSONLWriter, Monitor

from .models import MODELS, batch
from .results import FOLDER, append, setting
from .training_step import check

WAYS: dict[str, dict] = {
    "every=50": {"every": 50},
    "every=1": {"every": 1},
    "every=1, normalization": {"every": 1, "layers": "normalization"},
}
Times = list[tuple[float, float]]  # of each step, of the process and of the clock


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


def measure(steps: dict[str, Callable[[], None]], count: int) -> dict[str, Times]:
    """Seconds of each step of each way, taking turns; the order turns around from one round to the next."""
    times: dict[str, Times] = {name: [] for name in steps}
    for k in range(count):
        for name in steps if k % 2 == 0 else reversed(steps):
            start = time.process_time(), time.perf_counter()
            steps[name]()
            times[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return times


def figures(times: Times, plain: Times, every: int | None) -> dict[str, str]:
    """The ratios of a way, of whose steps every k-th is watched."""
    out = {
        name: _ratio(sum(t[k] for t in times), sum(t[k] for t in plain)) for k, name in enumerate(("run", "run_clock"))
    }
    usual = statistics.median(seconds for seconds, _ in plain)
    watched = [] if every is None else [seconds for seconds, _ in times[::every]]
    checked = [seconds for k, seconds in enumerate(watched, 1) if k & (k - 1) == 0]
    others = [seconds for k, seconds in enumerate(watched, 1) if k & (k - 1)]
    for name, some in (("watched", others), ("checked", checked)):
        out[name] = _ratio(statistics.median(some), usual) if some else ""
    return out | {"plain_ms": f"{1e3 * usual:.1f}"}


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.3f}"


def rows(name: str, size: int, count: int, folder: Path) -> list[dict]:
    """A row of each way."""
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    x, y = batch(shape, size)
    check(model, x, y)
    has_norms = any(isinstance(module, nn.GroupNorm | nn.LayerNorm) for module in model.modules())
    steps = {plain: make_step(MODELS[name]()[0], x, y, None) for plain in ("plain", "plain again")}
    monitors = {}
    for way, options in WAYS.items():
        if has_norms or "layers" not in options:
            watched, _ = MODELS[name]()
            monitors[way] = Monitor(watched, writers=[JSONLWriter(folder / f"{way}.jsonl")], **options)
            steps[way] = make_step(watched, x, y, monitors[way])
    for _ in range(3):
        steps["plain"]()  # what is allocated once
    times = measure(steps, count)
    for monitor in monitors.values():
        monitor.close()
    place = setting() | {"model": name, "batch": size, "steps": count}
    return [
        place | {"step": way} | figures(of_way, times["plain"], monitors[way].every if way in monitors else None)
        for way, of_way in times.items()
    ]


def main() -> None:
    """Measure, print, append to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="reference")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--csv", type=Path, default=FOLDER / "monitoring.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = rows(options.model, options.batch, options.steps, Path(folder))
    for row in found:
        print(", ".join(f"{key} {row[key]}" for key in list(row)[6:]))
    append(options.csv, found)


if __name__ == "__main__":
    main()
