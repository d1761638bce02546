"""Steps of many kinds in turn, for as long as is asked, and what of the process grows meanwhile: nothing may.

One model is trained by one optimizer; regularizers, averages and their states live as long as the run. Now and then all garbage
is collected, and counted is what is left: tensors and the graphs that they hold, Python's objects, bytes of the C heap and of
the process, and bytes in the states that a run would save.

    python -m tests.trust.soak --steps 100000 --model small [--json benchmarks/results/trust/soak.json]
"""

import argparse
import gc
import json
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bootgrad
from bootgrad import recording
from bootgrad.training.environment import processor_name, versions

from ..alive import Model, tensors_in
from ..memory import heap_bytes

MEASUREMENTS = 40
SIZES = (4, 5, 6)  # of batches
MIB = 2**20
# What may be added between the second quarter of a run and its last: for counts a number, since they are exact, and for bytes
# what caches and the heap's own books take; it does not depend on how long a run is.
BOUNDS = {
    "tensors": 0,
    "graphs": 0,
    "objects": 20,
    "state_bytes": 0,
    "shapes": 0,
    "heap": MIB // 4,
    "resident": 2 * MIB,
}


def small() -> nn.Module:
    """The least in which a convolution and linear layers are recorded by ops of their own."""
    layers = nn.Conv2d(1, 2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)
    return nn.Sequential(*layers)


MODELS: dict[str, Callable[[], nn.Module]] = {"layers": Model, "small": small}


class Training:
    """A model with its optimizer and all that keeps a state from step to step; ``kinds`` of steps, by name."""

    def __init__(self, model: str = "layers", seed: int = 0):
        torch.manual_seed(seed)
        self.model = MODELS[model]()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.x, self.y = torch.randn(64, 1, 8, 8), torch.randint(0, 3, (64,))
        self.noise_scale = bootgrad.NoiseScale()
        self.center = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        options: dict[str, dict] = {
            "exact, moving average": {"center": "ema"},
            "exact, window": {"center": "window"},
            "exact, batch mean": {"reg2": 0.0},
            "exact, strengths of their own": {"reg1": bootgrad.strengths.Share(0.1), "center": "ema"},
            "finite differences": {"method": "finite_difference", "center": "ema"},
            "random signs": {"method": "random_signs", "center": "ema"},
            "exact on a half": {"fraction": 0.5, "center": "ema"},
        }
        self.regularizers = {
            name: bootgrad.GradientRegularizer(self.model, **({"reg1": 1e-3, "reg2": 1e-3} | given))
            for name, given in options.items()
        }
        self.kinds: dict[str, Callable[[Tensor, Tensor], None]] = {
            "statistics": self._statistics,
            "statistics about a center": self._about_center,
            "per-sample gradients": self._matrix,
            "accumulated statistics": self._accumulated,
            "accumulated penalties": self._accumulated_penalties,
            **{name: lambda x, y, name=name: self._penalties(name, x, y) for name in options},
        }
        self.steps = 0

    def step(self) -> None:
        """Take the next step, of the next kind, with a batch of the next size where all kinds have had one."""
        names = list(self.kinds)
        name, size = names[self.steps % len(names)], SIZES[self.steps // len(names) % len(SIZES)]
        first = 7 * self.steps % (len(self.x) - size)
        self.optimizer.zero_grad()
        self.kinds[name](self.x[first : first + size], self.y[first : first + size])
        self.optimizer.step()
        self.steps += 1

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """(B,)."""
        return F.cross_entropy(self.model(x), y, reduction="none")

    def states(self) -> list:
        """All that a run would save, beside the model."""
        kept = [reg.state_dict() for reg in self.regularizers.values()]
        return [*kept, self.noise_scale.state_dict(), self.optimizer.state_dict()]

    def _statistics(self, x, y):
        with bootgrad.record(self.model) as rec:
            losses = self.losses(x, y)
        self.noise_scale.update(rec.backward(losses))

    def _about_center(self, x, y):
        with bootgrad.record(self.model) as rec:
            losses = self.losses(x, y)
        rec.backward(losses, center=self.center)

    def _matrix(self, x, y):
        with bootgrad.record(self.model) as rec:
            losses = self.losses(x, y)
        G = rec.per_sample_gradients(losses, create_graph=True)
        (losses.mean() + 1e-3 * bootgrad.reg1(G)).backward()

    def _accumulated(self, x, y):
        with bootgrad.accumulate(self.model) as whole:
            for part in zip(x.split(4), y.split(4), strict=True):
                with whole.record():
                    losses = self.losses(*part)
                whole.backward(losses)

    def _accumulated_penalties(self, x, y):
        reg = self.regularizers["exact, moving average"]
        with reg.accumulate():
            for part in zip(x.split(4), y.split(4), strict=True):
                reg.backward(self.losses, *part)

    def _penalties(self, name, x, y):
        self.regularizers[name].backward(self.losses, x, y)


def measured(training: Training) -> dict[str, int]:
    """What is alive, after all garbage is gone."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [t for t in objects if issubclass(type(t), Tensor)]  # without asking lazy modules for their class
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * resource.getpagesize()
    return {
        "step": training.steps,
        "tensors": len(tensors),
        "graphs": sum(t.grad_fn is not None for t in tensors),
        "objects": len(objects),
        "state_bytes": sum(t.nbytes for t in tensors_in(training.states())),
        "shapes": sum(len(vars(state)) + sum(_sizes(state)) for state in recording._states.values()),
        "heap": heap_bytes(),
        "resident": resident,
    }


def _sizes(state: object) -> list[int]:
    return [len(value) for value in vars(state).values() if hasattr(value, "__len__")]


def growth(rows: list[dict[str, int]]) -> dict[str, int]:
    """From the median of the second quarter of a run to that of its last, by what is measured."""
    quarter = len(rows) // 4
    early, late = rows[quarter : 2 * quarter], rows[-quarter:]
    return {
        name: round(statistics.median(row[name] for row in late) - statistics.median(row[name] for row in early))
        for name in BOUNDS
    }


def slope(rows: list[dict[str, int]], name: str) -> float:
    """What is added by a step, by least squares over the rows after the first quarter."""
    rows = rows[len(rows) // 4 :]
    return statistics.linear_regression([row["step"] for row in rows], [row[name] for row in rows]).slope


def soak(
    steps: int,
    model: str = "layers",
    each: Callable[[Training, list[dict[str, int]]], None] = lambda training, rows: None,
) -> tuple[Training, list[dict[str, int]]]:
    """Train for whole rounds of all kinds and sizes, so many that it is at least ``steps``, and measure after some of them.

    After each measurement ``each`` is told of all so far.
    """
    training, rows = Training(model), []
    a_round = len(training.kinds) * len(SIZES)
    rounds = -(-steps // a_round)
    for k in range(1, min(rounds, MEASUREMENTS) + 1):
        while training.steps < a_round * (k * rounds // min(rounds, MEASUREMENTS)):
            training.step()
        rows.append(measured(training))
        each(training, rows)
    return training, rows


def result(training: Training, rows: list[dict[str, int]]) -> dict:
    """What is stored of a run."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor_name(),
        "versions": {name: v for name, v in versions().items() if name in ("bootgrad", "python", "torch")},
        "steps": training.steps,
        "model": str(training.model),
        "kinds": list(training.kinds),
        "seconds_of_processor": round(time.process_time()),
        "growth": growth(rows),
        "bounds": BOUNDS,
        "bytes_per_step": {name: round(slope(rows, name), 3) for name in ("heap", "resident")},
        "measurements": rows,
    }


def main() -> int:
    """Run from the command line; 1 where anything has grown."""
    parser = argparse.ArgumentParser(prog="python -m tests.trust.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument(
        "--model", choices=MODELS, default="layers", help="with most kinds of layers, or a small one, which is quick"
    )
    parser.add_argument("--json", type=Path, help="file for the result, of as far as the run has come")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", bootgrad.BootgradWarning)

    def each(training: Training, rows: list[dict[str, int]]) -> None:
        print("  ".join(f"{name} {value:,}" for name, value in rows[-1].items()), flush=True)
        if options.json and len(rows) >= 4:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result(training, rows), indent=1) + "\n", encoding="utf-8")

    training, rows = soak(options.steps, options.model, each)
    found = result(training, rows)
    too_much = {name: value for name, value in found["growth"].items() if value > BOUNDS[name]}
    print({name: found[name] for name in ("seconds_of_processor", "growth", "bytes_per_step")})
    print(f"grown beyond its bound: {too_much}" if too_much else "nothing has grown")
    return bool(too_much)


if __name__ == "__main__":
    sys.exit(main())
