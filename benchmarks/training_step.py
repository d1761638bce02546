"""Whole training steps: time and peak memory of each way, as ratios to the plain step.

Variants take turns in one process, so that the machine's moods meet them alike; a ratio is the median over rounds of a
variant's time to the plain step's in the same round. Memory is measured in a fresh process per variant: the rise of VmHWM
over three steps, from its value just before them. Results are checked first; a wrong one is not timed.

    python -m benchmarks.training_step [--model reference] [--batch 128] [--threads 2] [--rounds 15]

With ``--parts 8`` the batch comes in eight micro-batches, beside plain accumulation of their gradients.
"""

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

import bootgrad

from .models import MODELS, batch
from .results import FOLDER, step_rows, tell


def make_variants(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], None]]:
    """One function per way to take a step's gradient; the bare ones report nothing that the penalty does not need."""

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    def plain():
        losses(x, y).mean().backward()

    def statistics_of_backward(center=None):
        with bootgrad.record(model) as rec:
            values = losses(x, y)
        rec.backward(values, center=center)

    def regularized(**options):
        reg = bootgrad.GradientRegularizer(model, **options)
        return lambda: reg.backward(losses, x, y)

    center = {name: torch.full_like(p, 1e-3) for name, p in model.named_parameters()}
    differences = {"method": "finite_difference"}
    signs = {"method": "random_signs", "derivative": "finite_difference"}
    return {
        "plain": plain,
        "rec.backward": statistics_of_backward,
        "rec.backward center": lambda: statistics_of_backward(center),
        "reg1 batch_mean": regularized(reg1=0.1),
        "reg1 ema": regularized(reg1=0.1, center="ema"),
        "reg1 zero": regularized(reg1=0.1, center="zero"),
        "reg1 zero, bare": regularized(reg1=0.1, center="zero", statistics=False),
        "reg1 differences": regularized(reg1=0.1, **differences),
        "reg1 on B/8": regularized(reg1=0.1, fraction=1 / 8),
        "reg1 on B/8, bare": regularized(reg1=0.1, fraction=1 / 8, statistics=False),
        "reg1 random signs": regularized(reg1=0.1, **signs),
        "reg2 ema": regularized(reg2=0.1, center="ema"),
        "reg2 differences": regularized(reg2=0.1, center="ema", **differences),
        "reg1 + reg2 ema": regularized(reg1=0.1, reg2=0.1, center="ema"),
    }


def make_parts_variants(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, n: int
) -> dict[str, Callable[[], None]]:
    """The same of a batch in n micro-batches."""
    parts = list(zip(x.chunk(n), y.chunk(n), strict=True))

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    def plain():
        for part in parts:
            (losses(*part).sum() / len(x)).backward()

    def statistics_of_all():
        with bootgrad.accumulate(model) as whole:
            for part in parts:
                with whole.record():
                    values = losses(*part)
                whole.backward(values)

    def regularized(**options):
        reg = bootgrad.GradientRegularizer(model, **options)

        def step():
            with reg.accumulate():
                for part in parts:
                    reg.backward(losses, *part)

        return step

    return {
        "plain": plain,
        "accumulate": statistics_of_all,
        "reg1 ema": regularized(reg1=0.1, center="ema"),
        "reg1 zero": regularized(reg1=0.1, center="zero"),
        "reg1 batch_mean": regularized(reg1=0.1),
        "reg2 ema": regularized(reg2=0.1, center="ema"),
        "reg1 + reg2 ema": regularized(reg1=0.1, reg2=0.1, center="ema"),
    }


def build(name: str, size: int, parts: int):
    """Model, variants and batch."""
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    x, y = batch(shape, size)
    if parts == 1:
        return model, make_variants(model, x, y), x, y
    return model, {f"{name}, {parts} parts": f for name, f in make_parts_variants(model, x, y, parts).items()}, x, y


def check(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Stop unless the library agrees with plain autograd on this model."""
    result = bootgrad.verify(model, lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y)
    if not result.ok:
        sys.exit("results are wrong: not timed")


def require_equal(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    """Stop unless all of these are alike, up to float32's rounding."""
    for ours, theirs in zip(found, expected, strict=True):
        if not (ours - theirs).norm() <= 1e-4 * theirs.norm():
            sys.exit("results are wrong: not timed")


def measure_time(
    model, variants, rounds: int, warmup: int = 3, of_other_shapes: Sequence[str] = ()
) -> dict[str, list[float]]:
    """Seconds of each variant, by round.

    Samples' independence is checked on the first, second, fourth … step of each shape, for the price of two backward passes.
    Variants ``of_other_shapes`` than the rest's take 16 steps before, so that they meet no more of these than the others.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for name in of_other_shapes:
        for _ in range(16):
            model.zero_grad()
            variants[name]()
    for k in range(-warmup, rounds):
        for name, step in variants.items():
            model.zero_grad()
            start = time.perf_counter()
            step()
            elapsed = time.perf_counter() - start
            if k >= 0:
                times[name].append(elapsed)
    return times


def high_water_mark() -> int:
    """VmHWM of this process in bytes."""
    line = next(ln for ln in Path("/proc/self/status").read_text().splitlines() if ln.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure_memory(module: str, variant: str, options: Sequence[str], processes: int) -> float:
    """Bytes that three steps of a variant raise the high-water mark by: the median of fresh processes.

    Args:
        module: what they run, with ``--memory-of``; it prints `memory_rise` last.
        variant: the step.
        options: further ones of the module.
        processes: how many, one after another.
    """
    command = [sys.executable, "-m", module, "--memory-of", variant, *options]
    # The heap's history differs from process to process by 10 % and more.
    rises = [
        int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
        for _ in range(processes)
    ]
    return statistics.median(rises)


def memory_rise(model: torch.nn.Module, step: Callable[[], object], warmup: bool = False) -> int:
    """The other end of `measure_memory`.

    Args:
        model: whose gradients are dropped before each step.
        step: what is measured.
        warmup: take a step before, as a compiled one is compiled in, and give its memory back.
    """
    if warmup:
        step()
        model.zero_grad()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes what is resident now
    before = high_water_mark()
    for _ in range(3):
        model.zero_grad()
        step()
    return high_water_mark() - before


def main() -> None:
    """Measure, print the table, append to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="reference")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--parts", type=int, default=1, help="micro-batches that the batch comes in")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--processes", type=int, default=11, help="that a step's memory is measured in, one after another"
    )
    parser.add_argument("--csv", type=Path, default=FOLDER / "training_step.csv")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, variants, x, y = build(options.model, options.batch, options.parts)
    if options.memory_of:
        return print(memory_rise(model, variants[options.memory_of]))
    check(model, x, y)
    fractions = [name for name in variants if "B/8" in name]
    times = measure_time(model, variants, options.rounds, of_other_shapes=fractions)
    same = ["--model", options.model, "--batch", str(options.batch), "--threads", str(options.threads)]
    same += ["--parts", str(options.parts)]
    memory = {name: measure_memory("benchmarks.training_step", name, same, options.processes) for name in variants}
    rows = step_rows({"model": options.model, "batch": options.batch}, times, memory)
    tell(options.csv, f"{options.model}, batch {options.batch}", rows)


if __name__ == "__main__":
    main()
