"""Whether normalization layers alone tell of the whole model's noise: Γ and the noise scale of both, along training.

Two models are trained by Adam from several seeds: a CNN with group norms on scikit-learn's digits, and a transformer with layer
norms that completes sequences, in which every second token is the sum of the two before on a circle. Every few steps both are
taken from the same backward pass. Of the logarithms:

    whole        correlation over a run, in which a common trend has its part
    about trend  correlation of what is left when a running mean of WINDOW observations is subtracted from both
    slope        of a line by least squares, from the normalization layers' to the whole model's

Γ is that of single batches, the noise scale the one that `bootgrad.NoiseScale` averages. Intervals are over seeds, at 95 %.

    python -m benchmarks.normalization_track [--seeds 5] [--steps 600]
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bootgrad
from bootgrad.intervals import interval
from bootgrad.monitoring import Monitor
from bootgrad.monitoring.measuring import Part, layer_of
from bootgrad.monitoring.watched import watched
from bootgrad.training.data import load

from .results import FOLDER, setting, write

WINDOW = 20  # observations
EVERY, DECAY = 4, 0.9
WORDS, LENGTH = 17, 24


def group_norm_cnn() -> nn.Module:
    """The reference CNN with a group norm behind each convolution, for 8×8 digits."""
    layers: list[nn.Module] = []
    for inputs, outputs, pooled in ((1, 32, True), (32, 64, True), (64, 64, False)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pooled else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


class Transformer(nn.Module):
    """Two pre-norm layers of 48 features and 4 heads over tokens, causal."""

    def __init__(self):
        """Make it."""
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 48), nn.Embedding(LENGTH, 48)
        layer = nn.TransformerEncoderLayer(48, 4, 192, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(48), enable_nested_tensor=False)
        self.head = nn.Linear(48, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) to logits (B, T, WORDS)."""
        T = tokens.size(1)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        return self.head(self.blocks(self.words(tokens) + self.places.weight[:T], mask=future, is_causal=True))


def digits(generator: torch.Generator) -> Callable[[nn.Module], Tensor]:
    """Losses of a batch of 64 digits."""
    data = load("digits")

    def losses(model: nn.Module) -> Tensor:
        chosen = torch.randint(len(data.x_train), (64,), generator=generator)
        return F.cross_entropy(model(data.x_train[chosen]), data.y_train[chosen], reduction="none")

    return losses


def circle(generator: torch.Generator) -> Callable[[nn.Module], Tensor]:
    """Losses of a batch of 32 sequences, whose tokens at even places follow from the two before."""

    def losses(model: nn.Module) -> Tensor:
        tokens = torch.randint(WORDS, (32, LENGTH + 1), generator=generator)
        for t in range(2, LENGTH + 1, 2):
            tokens[:, t] = (tokens[:, t - 2] + tokens[:, t - 1]) % WORDS
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")[:, 1::2].mean(1)

    return losses


MODELS = {"CNN, group norm": (group_norm_cnn, digits), "transformer, layer norm": (Transformer, circle)}


def follow(name: str, seed: int, steps: int) -> Iterator[dict[str, tuple[float, float]]]:
    """Train, and yield Γ and the noise scale of the normalization layers and of the whole model."""
    torch.manual_seed(seed)
    make, task = MODELS[name]
    model, losses_of = make(), task(torch.Generator().manual_seed(seed))
    own = {layer_of(parameter) for parameter in watched(model, "normalization") or ()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scales = bootgrad.NoiseScale(DECAY), bootgrad.NoiseScale(DECAY)
    monitor = Monitor(model, EVERY)
    for _ in range(steps):
        optimizer.zero_grad()
        with monitor.record():
            losses = losses_of(model)
        seen = monitor.backward(losses)
        optimizer.step()
        if seen is not None:
            parts = [seen.layers[layer] for layer in own], list(seen.layers.values())
            both = [
                Part(seen.batch_size, sum(p.covariance_trace for p in some), sum(p.sq_mean_norm for p in some))
                for some in parts
            ]
            noise = [scale.update(part) for scale, part in zip(scales, both, strict=True)]
            yield {"trace": tuple(part.covariance_trace for part in both), "noise scale": tuple(noise)}


def correlations(pairs: list[tuple[float, float]]) -> tuple[dict[str, float], int]:
    """What is measured of the pairs that are positive and finite, and how many are not."""
    kept = [pair for pair in pairs if all(0 < value < math.inf for value in pair)]
    x, y = torch.tensor(kept, dtype=torch.float64).log().unbind(1)
    x_rest, y_rest = (
        t - F.avg_pool1d(F.pad(t[None], (WINDOW // 2,) * 2, "replicate"), WINDOW + 1, 1)[0] for t in (x, y)
    )
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return {"whole": _correlation(x, y), "about_trend": _correlation(x_rest, y_rest), "slope": slope}, len(pairs) - len(
        kept
    )


def _correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def rows(seeds: int, steps: int) -> list[dict]:
    """A row of each model and quantity: means over seeds, with their intervals."""
    out = []
    for name in MODELS:
        runs = [list(follow(name, seed, steps)) for seed in range(seeds)]
        for quantity in runs[0][0]:
            found = [correlations([row[quantity] for row in run]) for run in runs]
            row = setting() | {"model": name, "quantity": quantity, "seeds": seeds, "observations": len(runs[0])}
            row["left_out"] = sum(count for _, count in found)
            for figure in found[0][0]:
                over = interval(values[figure] for values, _ in found)
                row |= {
                    figure: f"{over.mean:.3f}",
                    f"{figure}_low": f"{over.low:.3f}",
                    f"{figure}_high": f"{over.high:.3f}",
                }
            out.append(row)
            print(", ".join(f"{key} {row[key]}" for key in list(row)[6:]), flush=True)
    return out


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--csv", type=Path, default=FOLDER / "normalization_track.csv")
    options = parser.parse_args()
    write(options.csv, rows(options.seeds, options.steps))


if __name__ == "__main__":
    main()
