"""Steps of ranks that train together: what a step with statistics or a penalty costs more than on one process.

    (step ÷ plain DistributedDataParallel step, of R processes) ÷ (step ÷ plain step, of one process)

In each round one process takes its steps while the others wait, then all take theirs; each process has one thread and a batch
of its own. The numbers told are medians over rounds, of seconds and of processor seconds of all threads of a process, which
others on the machine disturb less, and which know nothing of waiting; and of the rank that takes most, peak memory as
`training_step` measures it. Ranks meet by gloo, on one machine. Statistics and gradients are compared with those of one process
on the batches of all ranks first; where they differ nothing is timed.

    python -m benchmarks.distributed [--model reference] [--batch 128] [--ranks 2] [--rounds 21] [--processes 3]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import bootgrad

from .models import MODELS, batch
from .results import FOLDER, spread, step_rows, tell
from .training_step import measure_memory, memory_rise, require_equal

WARMUP = 3
Times = dict[tuple[str, str], list[tuple[float, float]]]  # by kind and step


def make_variants(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    """One function per way to take a step's gradient, which returns what the library tells."""

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    def statistics_of_backward():
        with bootgrad.record(model) as rec:
            values = losses(x, y)
        return rec.backward(values)

    def regularized(**options):
        reg = bootgrad.GradientRegularizer(model, **options)
        return lambda: reg.backward(losses, x, y)

    return {
        "plain": lambda: losses(x, y).mean().backward(),
        "rec.backward": statistics_of_backward,
        "reg1 ema": regularized(reg1=0.1, center="ema"),
        "reg1 batch_mean": regularized(reg1=0.1),
        "reg1 + reg2 ema": regularized(reg1=0.1, reg2=0.1, center="ema"),
    }


def work(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """Check and measure, on each rank; the first tells."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.ranks)
    torch.manual_seed(0)
    model, shape = MODELS[options.model]()
    x, y = batch(shape, options.batch * options.ranks)
    own = slice(rank * options.batch, (rank + 1) * options.batch)
    wrapped = DDP(model)
    if options.memory_of:
        step = make_variants(wrapped, x[own], y[own])[options.memory_of]
        rise = torch.tensor(memory_rise(model, step))
        dist.all_reduce(rise, dist.ReduceOp.MAX)
        if rank == 0:
            print(int(rise))
    else:
        check(model, make_variants(wrapped, x[own], y[own]), make_variants(model, x, y), own)
        alone, together = (make_variants(module, x[own], y[own]) for module in (model, wrapped))
        times = measure(model, alone, together, options.rounds)
        if rank == 0:
            report(times, options)
    dist.destroy_process_group()


def check(model: nn.Module, together: dict[str, Callable], whole: dict[str, Callable], own: slice) -> None:
    """Stop unless steps of all ranks are those of one process on the whole batch, of which this rank has its own part.

    A second step has a center from the first.
    """
    for name in [*whole, *whole]:
        found = []
        for step, rows in ((together[name], slice(None)), (whole[name], own)):
            model.zero_grad()
            told = step()
            figures = [] if told is None else [torch.as_tensor(told.covariance_trace)]
            figures += [told.sq_norms[rows]] if name == "rec.backward" else []
            found.append([*figures, *(p.grad.clone() for p in model.parameters())])
        require_equal(*found)


def measure(model: nn.Module, alone: dict[str, Callable], together: dict[str, Callable], rounds: int) -> Times:
    """Seconds, and processor seconds, of each step by one process and by all, by round."""
    times: Times = {}
    for k in range(-WARMUP, rounds):
        for name in alone:
            for kind, step in (("alone", alone[name]), ("together", together[name])):
                model.zero_grad()
                dist.barrier()
                start = time.perf_counter(), time.process_time()
                if kind == "together" or dist.get_rank() == 0:
                    step()
                elapsed = time.perf_counter() - start[0], time.process_time() - start[1]
                dist.barrier()
                if k >= 0:
                    times.setdefault((kind, name), []).append(elapsed)
    return times


def report(times: Times, options: argparse.Namespace) -> None:
    """Print the table and append to the CSV file."""
    same = ["--model", options.model, "--batch", str(options.batch), "--ranks", str(options.ranks)]
    steps = [name for kind, name in times if kind == "together"]
    memory = {name: measure_memory("benchmarks.distributed", name, same, options.processes) for name in steps}
    seconds = {name: [t for t, _ in times["together", name]] for name in steps}
    rows = step_rows({"model": options.model, "batch": options.batch, "ranks": options.ranks}, seconds, memory)
    for row in rows:
        row |= spread("alone", ratios(times, "alone", row["step"], 0))
        row |= spread("quotient", quotients(times, row["step"], 0), digits=3)
        row |= spread("of_processors", quotients(times, row["step"], 1), digits=3)
    tell(options.csv, f"{options.model}, batch {options.batch} on each of {options.ranks} ranks", rows)


def ratios(times: Times, kind: str, name: str, clock: int) -> list[float]:
    """Of a step to the plain one, by round."""
    return [a[clock] / b[clock] for a, b in zip(times[kind, name], times[kind, "plain"], strict=True)]


def quotients(times: Times, name: str, clock: int) -> list[float]:
    """Of these of all processes to those of one."""
    pairs = zip(ratios(times, "together", name, clock), ratios(times, "alone", name, clock), strict=True)
    return [a / b for a, b in pairs]


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="reference")
    parser.add_argument("--batch", type=int, default=128, help="of each rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--processes", type=int, default=3, help="as of benchmarks.training_step, of each rank")
    parser.add_argument("--csv", type=Path, default=FOLDER / "distributed.csv")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (options, f"{folder}/meeting"), options.ranks, start_method="spawn")


if __name__ == "__main__":
    main()
