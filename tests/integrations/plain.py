"""What the frameworks are compared with: loops of plain torch, in which penalties are differentiated by plain autograd."""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import Oracle, parameters_of

Batch = tuple[Tensor, Tensor]


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(sizes: Iterable[int], seed: int = 1) -> list[Batch]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(b, 6, generator=g, dtype=torch.float64), torch.randint(3, (b,), generator=g)) for b in sizes]


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def joined(parts: Iterable[Batch]) -> Batch:
    xs, ys = zip(*parts, strict=True)
    return torch.cat(xs), torch.cat(ys)


def trained(
    model: nn.Module,
    steps: Iterable[list[Batch]],
    reg1: float = 0.0,
    lr: float = 0.1,
    clip: float | None = None,
    losses=losses_of,
    momentum: float = 0.0,
) -> tuple[nn.Module, list[float]]:
    """A copy of the model after SGD steps on mean loss + λ₁ Γ, each of the batch that its parts are together; and the Γ."""
    model, traces = copy.deepcopy(model), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=momentum)
    for parts in steps:
        batch = joined(parts)
        oracle = Oracle(model, lambda batch=batch: losses(model, *batch))
        trace = oracle.reg1()
        for name, g in oracle.gradient(oracle.losses.mean() + reg1 * trace).items():
            parameters_of(model)[name].grad = g
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        traces.append(float(trace.detach()))
    return model, traces


def assert_same_parameters(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-10) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
