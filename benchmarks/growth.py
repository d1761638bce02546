"""How a step's time and memory grow with the batch, with depth, and with the number of parameters.

    batch    reference CNN, B samples                                   time / B
    depth    n convolutions 32→32, 3×3 on 14×14, with ReLU, between     (time of n − time of 0) / n
             a convolution before, so that all n are alike, and a linear layer after
    width    MLP 784 – h – h – 10, M beyond the plain step's memory     (M of h − M of h′) / (bytes of P − of P′)

Sizes and steps of one kind take turns in one process; times are medians over rounds. ``relative`` is the median ratio to the
same step's time per sample or layer at the largest size: 1 is growth in proportion. ``ratio`` is that to the plain step's
at the same size. Memory is measured as `training_step` does; ``copies`` of the parameters are what it takes on top of the
next smaller width h′, so that what is alike for all widths cancels. The largest model of each kind is checked first; a
wrong one is not timed.

    python -m benchmarks.growth [--batch 64] [--threads 2] [--rounds 9] [--processes 5] [--csv FILE]
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, get_num_threads, nn, set_num_threads

from .models import MODELS, batch
from .results import FOLDER, append, setting
from .training_step import check, make_variants, measure_memory, measure_time, memory_rise

STEPS = ("plain", "rec.backward", "reg1 ema", "reg1 zero")
CHANNELS, IMAGE = 32, 14
Step = Callable[[], None]


def steps_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Step]:
    """Those of `make_variants` that are looked at."""
    variants = make_variants(model, x, y)
    return {name: variants[name] for name in STEPS}


def stack(n: int) -> tuple[nn.Module, tuple[int, ...]]:
    """The model of n equal convolutions, and the shape of its input."""
    layers: list[nn.Module] = []
    for _ in range(n + 1):
        layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU()]
    head = nn.Linear(CHANNELS * IMAGE * IMAGE, 10)
    return nn.Sequential(*layers, nn.Flatten(), head), (CHANNELS, IMAGE, IMAGE)


def mlp(hidden: int) -> tuple[nn.Module, tuple[int, ...]]:
    """The model of two hidden layers, and the shape of its input."""
    layers = nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    return nn.Sequential(*layers), (784,)


def with_batch(sizes: Sequence[int], rounds: int) -> list[dict]:
    """Rows of batches."""
    model, shape = MODELS["reference"]()
    batches = {size: batch(shape, size) for size in sizes}
    check(model, *batches[max(sizes)])
    steps = {size: steps_of(model, *batches[size]) for size in sizes}
    times = take_turns(model, steps, rounds)
    each = {key: [t / key[0] for t in taken] for key, taken in times.items()}
    return [found | {"batch": found["size"]} for found in time_rows("batch", times, each)]


def with_depth(sizes: Sequence[int], B: int, rounds: int) -> list[dict]:
    """Rows of numbers of layers; of none, too."""
    models = {n: stack(n) for n in (0, *sizes)}
    batches = {n: batch(shape, B) for n, (_, shape) in models.items()}
    check(models[max(sizes)][0], *batches[max(sizes)])
    steps = {n: steps_of(model, *batches[n]) for n, (model, _) in models.items()}
    times = take_turns(nn.ModuleList(model for model, _ in models.values()), steps, rounds)
    each = {
        (n, name): [(t - less) / n for t, less in zip(taken, times[0, name], strict=True)]
        for (n, name), taken in times.items()
        if n
    }
    return [found | {"batch": B} for found in time_rows("depth", times, each)]


def with_width(sizes: Sequence[int], B: int, processes: int) -> list[dict]:
    """Rows of numbers of hidden units."""
    model, shape = mlp(max(sizes))
    check(model, *batch(shape, B))
    rises = {}
    for hidden in sizes:
        same = ["--width", str(hidden), "--batch", str(B), "--threads", str(get_num_threads())]
        rises[hidden] = {name: measure_memory("benchmarks.growth", name, same, processes) for name in STEPS}
    return [found | {"batch": B} for found in memory_rows(rises)]


def take_turns(model: nn.Module, steps: dict[int, dict[str, Step]], rounds: int) -> dict[tuple[int, str], list[float]]:
    """Seconds by size and step and round; the model has the parameters of all."""
    return measure_time(model, {(size, name): step for size, of in steps.items() for name, step in of.items()}, rounds)


def time_rows(
    kind: str, times: dict[tuple[int, str], list[float]], each: dict[tuple[int, str], list[float]]
) -> list[dict]:
    """Rows of the seconds that every step took and what they come to for each sample or layer, by round.

    A size of ``times`` that ``each`` does not have is what was subtracted.
    """
    largest = max(size for size, _ in times)
    rows = []
    for (size, name), taken in times.items():
        found = row(kind, size, name) | {"milliseconds": f"{1e3 * statistics.median(taken):.2f}"}
        own = each.get((size, name))
        if own is not None:
            found |= {
                "microseconds_each": f"{1e6 * statistics.median(own):.1f}",
                "relative": f"{_ratio(own, each[largest, name]):.2f}",
                "ratio": f"{_ratio(own, each[size, 'plain']):.2f}",
            }
        rows.append(found)
    return rows


def memory_rows(rises: dict[int, dict[str, float]]) -> list[dict]:
    """Rows of the bytes that each step takes, by hidden units and step."""
    rows, smaller = [], None
    for hidden, of in sorted(rises.items()):
        parameters = sum(p.numel() for p in mlp(hidden)[0].parameters())
        beyond = {name: rise - of["plain"] for name, rise in of.items()}
        for name, rise in of.items():
            found = row("width", hidden, name) | {
                "ratio": f"{rise / of['plain']:.2f}" if of["plain"] else "",
                "parameters": parameters,
                "memory_mib": f"{rise / 2**20:.1f}",
                "beyond_plain_mib": f"{beyond[name] / 2**20:.1f}",
            }
            if smaller:
                copies = (beyond[name] - smaller[1][name]) / (4 * (parameters - smaller[0]))
                found["copies"] = f"{copies:.2f}"
            rows.append(found)
        smaller = parameters, beyond
    return rows


def _ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.median(p / q for p, q in zip(a, b, strict=True))


def row(kind: str, size: int, step: str) -> dict:
    """Every column; what was not measured is empty."""
    times, memory = ("milliseconds", "microseconds_each", "relative"), ("memory_mib", "beyond_plain_mib", "copies")
    found = {"kind": kind, "size": size, "batch": "", "step": step}
    return setting() | found | dict.fromkeys((*times, "ratio", "parameters", *memory), "")


def show(rows: Sequence[dict]) -> None:
    """Rows of one kind as a table."""
    kind = rows[0]["kind"]
    columns = ("milliseconds", "microseconds_each", "relative", "ratio")
    if kind == "width":
        columns = ("parameters", "memory_mib", "beyond_plain_mib", "copies", "ratio")
    print(f"\n{rows[0]['device']}, {rows[0]['threads']} threads, {rows[0]['backend']}")
    print(f"{kind:>8}  {'step':14}" + "".join(f"{name:>19}" for name in columns))
    for r in rows:
        print(f"{r['size']:>8}  {r['step']:14}" + "".join(f"{r[name]:>19}" for name in columns))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, append to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--batch", type=int, default=64, help="of the growing models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processes", type=int, default=5, help="as of benchmarks.training_step")
    parser.add_argument("--csv", type=Path, default=FOLDER / "growth.csv")
    parser.add_argument("--memory-of", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    set_num_threads(options.threads)
    if options.memory_of:
        model, shape = mlp(options.width)
        variants = make_variants(
            model, *batch(shape, options.batch)
        )  # what any of them holds stays, whichever is measured
        return print(memory_rise(model, variants[options.memory_of]))
    for rows in (
        with_batch(options.batches, options.rounds),
        with_depth(options.depths, options.batch, options.rounds),
        with_width(options.widths, options.batch, options.processes),
    ):
        show(rows)
        append(options.csv, rows)


if __name__ == "__main__":
    main()
