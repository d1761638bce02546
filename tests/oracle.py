"""The oracle: every quantity of a model from one backward pass per sample, in plain torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import bootgrad
from bootgrad import reference
from bootgrad.rules.stand_ins import StandIns


def losses_of(y: Tensor | tuple) -> Tensor:
    """Smooth losses (B,) of an output, or of the first of several."""
    y = y[0] if isinstance(y, tuple) else y
    return (y.sin() + y.square() / 3).flatten(1).sum(1)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_like(parameters: Mapping[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=g, dtype=p.dtype) for name, p in parameters.items()}


def flat(rows: Mapping[str, Tensor]) -> Tensor:
    """(B, P) of rows (B, *shape) by name."""
    return torch.cat([g.reshape(len(g), -1) for g in rows.values()], 1)


@dataclass
class Oracle:
    """Rows with a graph, {name: (B, *shape)}, of the losses that ``run`` computes."""

    model: nn.Module
    run: Callable[[], Tensor]

    def __post_init__(self):
        self.parameters = parameters_of(self.model)
        # Torch's fused attention has no second derivative, and its weight norm a wrong one.
        with StandIns(), sdpa_kernel(SDPBackend.MATH):
            self.losses = self.run()
        self.rows = reference.per_sample_gradients_of(self.losses, self.parameters, create_graph=True)
        self.matrix = flat(self.rows)

    def gradient(self, value: Tensor) -> dict[str, Tensor]:
        """Of a function of the rows, by parameter name; zeros where nothing leads there."""
        grads = torch.autograd.grad(value, self.parameters.values(), retain_graph=True, materialize_grads=True)
        return dict(zip(self.parameters, grads, strict=True))

    def reg1(self, center: Tensor | None = None) -> Tensor:
        D = self.matrix
        return (D - (D.mean(0) if center is None else center)).square().sum(1).mean()

    def reg2(self, center: Tensor) -> Tensor:
        return (self.matrix.mean(0) - center).square().sum()


def record(model: nn.Module, run: Callable[[], Tensor], **options) -> tuple[bootgrad.record, Tensor]:
    with bootgrad.record(model, **options) as rec:
        losses = run()
    return rec, losses
