"""Steps of compiled models: what statistics add to a compiled step, beside the same uncompiled.

    plain         losses.mean().backward() of the model as it is written, and compiled
    statistics    rec.backward(losses): norms, Γ, noise scale, of either

Each is a ratio to the compiled plain step in the same round: the steps take turns in one process, and the ratio is the median
over rounds. The compiled statistics are compared with the uncompiled ones first; where they differ nothing is timed. What
compiling itself takes is neither in the rounds nor in the memory, which is as `training_step`'s, above what a step before left.

    python -m benchmarks.compiled [--model encoder] [--threads 2] [--rounds 9] [--processes 3] [--csv FILE]
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bootgrad

from .models import MODELS, Block, batch
from .results import FOLDER, step_rows, tell
from .training_step import measure_memory, measure_time, memory_rise, require_equal


class Encoder(nn.Module):
    """A transformer of blocks with fused attention, and a linear layer on the mean over positions."""

    def __init__(self, blocks: int = 6, width: int = 256, heads: int = 4, classes: int = 10):
        """Make the layers."""
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.blocks = nn.Sequential(*(Block(width, heads, True) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to logits (B, classes)."""
        return self.head(self.norm(self.blocks(self.inner(x))).mean(1))


def encoder() -> tuple[nn.Module, Tensor, Tensor]:
    """Six blocks of width 256, and a batch of 16 sequences of 128."""
    return Encoder(), *batch((128, 256), 16)


def reference() -> tuple[nn.Module, Tensor, Tensor]:
    """The reference CNN, and a batch of 128 images."""
    model, shape = MODELS["reference"]()
    return model, *batch(shape, 128)


CASES = {"encoder": encoder, "reference": reference}


def make_variants(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], None]]:
    """The steps, the one that others are compared with first."""
    compiled = torch.compile(model, fullgraph=True)

    def plain(module):
        F.cross_entropy(module(x), y, reduction="none").mean().backward()

    def with_statistics(module):
        with bootgrad.record(model) as rec:
            losses = F.cross_entropy(module(x), y, reduction="none")
        return rec.backward(losses)

    return {
        "compiled plain": lambda: plain(compiled),
        "compiled statistics": lambda: with_statistics(compiled),
        "plain": lambda: plain(model),
        "statistics": lambda: with_statistics(model),
    }


def check(model: nn.Module, variants: dict[str, Callable[[], None]]) -> None:
    """Stop unless the compiled model has the same norms and gradients as it has uncompiled."""
    found = []
    for name in ("compiled statistics", "statistics"):
        model.zero_grad()
        found.append([variants[name]().sq_norms, *(p.grad.clone() for p in model.parameters())])
    require_equal(*found)


def main() -> None:
    """Measure, print the table, append to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CASES, default="encoder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processes", type=int, default=3, help="as of benchmarks.training_step")
    parser.add_argument("--csv", type=Path, default=FOLDER / "compiled.csv")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, x, y = CASES[options.model]()
    variants = make_variants(model, x, y)
    if options.memory_of:
        return print(memory_rise(model, variants[options.memory_of], warmup=True))
    start = time.perf_counter()
    check(model, variants)
    print(f"compiled and checked in {time.perf_counter() - start:.0f} s")
    both = [name for name in variants if "statistics" in name]
    times = measure_time(model, variants, options.rounds, of_other_shapes=both)  # whose checks are over by then
    same = ["--model", options.model, "--threads", str(options.threads)]
    memory = {name: measure_memory("benchmarks.compiled", name, same, options.processes) for name in variants}
    rows = step_rows({"model": options.model, "batch": len(y)}, times, memory)
    tell(options.csv, f"{options.model}, batch {len(y)}", rows)


if __name__ == "__main__":
    main()
