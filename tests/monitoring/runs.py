"""A small model to watch, and observations of made-up numbers."""

import torch
import torch.nn.functional as F
from torch import nn

from bootgrad.monitoring import Flag, LayerObservation, Observation, Outlier

BATCH = 16


def network():
    """Two linear layers with a norm between, and a parameter of the model's own."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.last(torch.tanh(self.norm(self.first(x)))) * self.scale

    torch.manual_seed(0)
    return Net().double()


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (BATCH,), generator=generator)


def losses_of(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def observation(step=0, trace=2.5, **changes):
    """One with something in every field."""
    fields = {
        "loss": 1.25,
        "covariance_trace": trace,
        "sq_mean_norm": 0.5,
        "noise_scale": 4.0,
        "reg1": 2.0,
        "strengths": {"reg1": 0.1},
        "layers": {"conv": LayerObservation(1.5, 0.25, 6.0), "head.out": LayerObservation(1.0, 0.25, float("inf"))},
        "norms": {0.0: 0.5, 0.5: 1.0, 1.0: 9.0},
        "outliers": (Outlier("image 7", 9.0, 2),),
        "flags": (Flag("covariance_trace", trace, 0.1, "conv"),),
        "sample_norms": (0.5, 1.0, 1.0, 9.0),
    }
    return Observation(step, 4, **(fields | changes))
