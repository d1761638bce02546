"""One small model for each way of using a layer, on which every library is right, wrong, or refuses.

Models are chains of torch's own modules wherever the case allows, so that nothing but the case is in a library's way.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .oracle import Outcome, examine, expect
from .ways import WAYS

B = 4
CLASSES = 3


class Functional(nn.Module):
    """A product with a raw parameter between two modules."""

    def __init__(self):
        """Make the layers and the parameter."""
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(4, CLASSES)
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 3)."""
        return self.last(torch.tanh(F.linear(torch.tanh(self.first(x)), self.weight)))


def _convolution(layer: nn.Module, pixels: int = 25, *after: nn.Module) -> nn.Module:
    return nn.Sequential(layer, *after, nn.Tanh(), nn.Flatten(), nn.Linear(4 * pixels, CLASSES))


def _reused() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, CLASSES))


def _tied() -> nn.Module:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(6, CLASSES))


def _partly_frozen() -> nn.Module:
    first, second = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6)
    second.bias.requires_grad_(False)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(6, CLASSES))


# Each with the shape of a sample; (T,) of integers for an embedding's.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: _convolution(nn.Conv2d(2, 4, 3, padding=1)), (2, 5, 5)),
    "grouped": (lambda: _convolution(nn.Conv2d(4, 4, 3, padding=1, groups=2)), (4, 5, 5)),
    "depthwise": (lambda: _convolution(nn.Conv2d(4, 4, 3, padding=1, groups=4)), (4, 5, 5)),
    "circular padding": (lambda: _convolution(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")), (2, 5, 5)),
    "transposed": (lambda: _convolution(nn.ConvTranspose2d(2, 4, 3, padding=1)), (2, 5, 5)),
    "dilated": (lambda: _convolution(nn.Conv2d(2, 4, 3, padding=2, dilation=2)), (2, 5, 5)),
    "reused module": (_reused, (6,)),
    "tied weights": (_tied, (6,)),
    "sequence into a linear layer": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, CLASSES)),
        (4, 6),
    ),
    "functional call": (Functional, (6,)),
    "partly frozen": (_partly_frozen, (6,)),
    "group norm": (lambda: _convolution(nn.Conv2d(2, 4, 3, padding=1), 25, nn.GroupNorm(2, 4)), (2, 5, 5)),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, CLASSES)),
        (6,),
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Linear(20, CLASSES)), (4,)),
}


def outcomes(case: str) -> list[tuple[str, str, Outcome]]:
    """Peer, quantity and outcome, of everything that is offered, in float64."""
    with _float64():
        torch.manual_seed(0)
        build, shape = CASES[case]
        model = build()
        x = torch.randint(7, (B, *shape)) if case == "embedding" else torch.randn(B, *shape)
        y = torch.randint(CLASSES, (B,))
        expected = expect(model, x, y)
        return [
            (way.peer, quantity, outcome)
            for way in WAYS
            for quantity, outcome in examine(way, model, x, y, expected).items()
        ]


@contextmanager
def _float64() -> Iterator[None]:
    """A context in which tensors are float64 unless told: some libraries make theirs in the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
