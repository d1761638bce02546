"""Steps of ranks that train together: what a step with statistics or a penalty costs more than on one process.

    (step ÷ plain DistributedDataParallel step, of R processes) ÷ (step ÷ plain step, of one process)

In each round one process takes its steps while the others wait, then all take theirs; each process has one thread and a batch
of its own. The numbers told are medians over rounds, of seconds and of processor seconds of all threads of a process, which
others on the machine disturb less, and which know nothing of waiting. Ranks meet by gloo, on one machine.

    python -m benchmarks.distributed [--model reference] [--batch 128] [--ranks 2] [--rounds 21]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import bootgrad

from .models import MODELS, batch
from .results import FOLDER, append, setting

WARMUP = 3


def make_variants(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor):
    """One function per way to take a step's gradient."""

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    def statistics_of_backward():
        with bootgrad.record(model) as rec:
            values = losses(x, y)
        rec.backward(values)

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
    """Measure, on each rank; the first tells."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.ranks)
    torch.manual_seed(rank)
    model, shape = MODELS[options.model]()
    x, y = batch(shape, options.batch)
    alone, together = make_variants(model, x, y), make_variants(DDP(model), x, y)
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for k in range(-WARMUP, options.rounds):
        for name in alone:
            for kind, step in (("alone", alone[name]), ("together", together[name])):
                model.zero_grad()
                dist.barrier()
                start = time.perf_counter(), time.process_time()
                if kind == "together" or rank == 0:
                    step()
                elapsed = time.perf_counter() - start[0], time.process_time() - start[1]
                dist.barrier()
                if k >= 0:
                    times.setdefault((kind, name), []).append(elapsed)
    if rank == 0:
        tell(times, options)
    dist.destroy_process_group()


def tell(times: dict[tuple[str, str], list[tuple[float, float]]], options: argparse.Namespace) -> None:
    """Print the table and append to the CSV file."""
    rows = []
    print(f"\n{options.model}, batch {options.batch} on each of {options.ranks} ranks of one thread")
    print(f"{'step':20}{'ms':>8}{'÷ plain':>9}{'alone':>8}{'quotient':>10}{'(10–90 %)':>14}{'of processors':>15}")
    for kind, name in times:
        if kind == "alone" or name == "plain":
            continue
        seconds, processor = quotients(times, name, 0), quotients(times, name, 1)
        row = {
            "model": options.model,
            "batch": options.batch,
            "ranks": options.ranks,
            "step": name,
            "milliseconds": f"{1e3 * statistics.median(t for t, _ in times[kind, name]):.1f}",
            "ratio": f"{statistics.median(ratios(times, kind, name, 0)):.3f}",
            "ratio_alone": f"{statistics.median(ratios(times, 'alone', name, 0)):.3f}",
            "quotient": f"{statistics.median(seconds):.3f}",
            "quotient_low": f"{seconds[len(seconds) // 10]:.3f}",
            "quotient_high": f"{seconds[-1 - len(seconds) // 10]:.3f}",
            "processor_quotient": f"{statistics.median(processor):.3f}",
        }
        rows.append(setting() | row)
        spread = f"{row['quotient_low']}–{row['quotient_high']}"
        print(
            f"{name:20}{row['milliseconds']:>8}{row['ratio']:>9}{row['ratio_alone']:>8}{row['quotient']:>10}{spread:>14}"
            f"{row['processor_quotient']:>15}"
        )
    append(options.csv, rows)


def ratios(times, kind: str, name: str, clock: int) -> list[float]:
    """Of a step to the plain one, by round."""
    return [a[clock] / b[clock] for a, b in zip(times[kind, name], times[kind, "plain"], strict=True)]


def quotients(times, name: str, clock: int) -> list[float]:
    """Of these of all processes to those of one, in order of size."""
    pairs = zip(ratios(times, "together", name, clock), ratios(times, "alone", name, clock), strict=True)
    return sorted(a / b for a, b in pairs)


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="reference")
    parser.add_argument("--batch", type=int, default=128, help="of each rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--csv", type=Path, default=FOLDER / "distributed.csv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (options, f"{folder}/meeting"), options.ranks, start_method="spawn")


if __name__ == "__main__":
    main()
