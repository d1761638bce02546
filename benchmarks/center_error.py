"""How far each center is from the full-data gradient, over a training run: c is known before a step, g = ∇L(S; θ) is its truth.

    relative error ‖c − g‖/‖g‖        cosine ⟨c, g⟩/(‖c‖ ‖g‖)

The reference CNN learns scikit-learn's digits by SGD, plain and with momentum; medians over steps of each third of the run,
and over seeds.

    python -m benchmarks.center_error [--data digits] [--batch 32] [--epochs 12] [--lr 0.05] [--seeds 3]
"""

import argparse
import itertools
import statistics
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bootgrad import centers
from bootgrad.training.data import ImageData, load
from bootgrad.training.model import reference_cnn

from .results import FOLDER, setting, write

MOMENTA = (0.0, 0.9)
THIRDS = ("first third", "second third", "last third")
MOVING = {
    "ema 0.9": lambda: centers.EmaMean(0.9),
    "ema 0.99": lambda: centers.EmaMean(0.99),
    "window 4": lambda: centers.WindowMean(4),
    "window 16": lambda: centers.WindowMean(16),
    "window 64": lambda: centers.WindowMean(64),
    "window 16, bf16": lambda: centers.WindowMean(16, storage="bf16"),
}
REFRESHED = (10, 50)  # steps between full gradients
MEASURED_EVERY = 7  # which divides none of them


def flat(parts) -> Tensor:
    """One vector, in float64."""
    return torch.cat([p.detach().flatten().double() for p in parts])


def full_gradient(model: nn.Module, data: ImageData) -> Tensor:
    """∇L over the training set, (P,)."""
    total = sum(
        F.cross_entropy(model(x), y, reduction="sum")
        for x, y in zip(data.x_train.split(512), data.y_train.split(512), strict=True)
    )
    return flat(torch.autograd.grad(total / len(data.x_train), list(model.parameters())))


def run(data: ImageData, batch: int, epochs: int, lr: float, momentum: float, seed: int):
    """Yield (third, center, relative error, cosine) of one training run."""
    torch.manual_seed(seed)
    model = reference_cnn(data.image_shape, data.classes)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr * (1 - momentum), momentum=momentum)
    moving = {name: make() for name, make in MOVING.items()}
    refreshed: dict[int, Tensor] = {}
    steps = epochs * (len(data.x_train) // batch)
    for step in range(steps):
        if step % (len(data.x_train) // batch) == 0:
            order = torch.randperm(len(data.x_train))
        index = order[(step * batch) % (len(order) // batch * batch) :][:batch]
        optimizer.zero_grad()
        F.cross_entropy(model(data.x_train[index]), data.y_train[index]).backward()
        gradient = {name: p.grad for name, p in parameters.items()}
        measures = step % MEASURED_EVERY == 0 and step > 0
        renewed = [k for k in REFRESHED if step % k == 0]
        if measures or renewed:
            g = full_gradient(model, data)
            refreshed |= dict.fromkeys(renewed, g)
        if measures:
            values = {name: flat(c.value(parameters)[n] for n in parameters) for name, c in moving.items()}
            values |= {f"full, every {k}": c for k, c in refreshed.items()}
            values["the mini-batch itself"] = flat(gradient[n] for n in parameters)
            values["zero"] = torch.zeros_like(g)
            for name, c in values.items():
                cosine = float(c @ g / (c.norm() * g.norm())) if c.norm() > 0 else 0.0
                yield THIRDS[3 * step // steps], name, float((c - g).norm() / g.norm()), cosine
        for c in moving.values():
            c.update(gradient)
        optimizer.step()


def main() -> None:
    """Train, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=0.05, help="of plain SGD; times 1 − momentum with it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=FOLDER / "center_error.csv")
    options = parser.parse_args()
    data = load(options.data)
    measured: dict[tuple[float, str, str], list[tuple[float, float]]] = defaultdict(list)
    for momentum, seed in itertools.product(MOMENTA, range(options.seeds)):
        for third, name, error, cosine in run(data, options.batch, options.epochs, options.lr, momentum, seed):
            measured[momentum, name, third].append((error, cosine))
    rows = []
    for (momentum, name, third), values in sorted(
        measured.items(), key=lambda item: (*item[0][:2], THIRDS.index(item[0][2]))
    ):
        errors, cosines = zip(*values, strict=True)
        rows.append(
            setting()
            | {
                "data": options.data,
                "batch": options.batch,
                "momentum": momentum,
                "center": name,
                "part": third,
                "steps": len(values),
            }
            | {"relative_error": f"{statistics.median(errors):.2f}", "cosine": f"{statistics.median(cosines):.2f}"}
        )
    for row in rows:
        print(
            f"momentum {row['momentum']}  {row['center']:24}{row['part']:14}"
            f"error {row['relative_error']:>6}   cosine {row['cosine']:>6}"
        )
    write(options.csv, rows)


if __name__ == "__main__":
    main()
