"""The models that whole steps are timed on."""

import torch
from torch import nn

from bootgrad.training.model import reference_cnn


def reference() -> tuple[nn.Module, tuple[int, ...]]:
    """Reference CNN: conv 32 – pool – conv 64 – pool – conv 64 – fc 128 – fc 10 on 28×28×1."""
    return reference_cnn((1, 28, 28), 10), (1, 28, 28)


def mixed() -> tuple[nn.Module, tuple[int, ...]]:
    """Group norm, 5×5, depthwise strided, grouped and 1×1 convolutions on 28×28×1."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32),
        nn.Conv2d(32, 64, 1),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, groups=4),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1, groups=64),
        nn.Conv2d(64, 128, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    return model, (1, 28, 28)


MODELS = {"reference": reference, "mixed": mixed}


def batch(shape: tuple[int, ...], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(size, *shape, generator=generator), torch.randint(0, 10, (size,), generator=generator)
