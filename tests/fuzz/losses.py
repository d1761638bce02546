"""Losses (B,) of values of any shape."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..oracle import losses_of
from .programs import Loss


def _cross_entropy(y: Tensor) -> Tensor:
    """Of classes along the last dimension, a mean over positions."""
    classes = y.flatten(1, -2).mT if y.dim() > 2 else y
    target = torch.arange(classes[:, 0].numel()).view(classes[:, 0].shape) % classes.size(1)
    return F.cross_entropy(classes, target, reduction="none").reshape(len(y), -1).mean(1)


def _masked_mean(y: Tensor) -> Tensor:
    """Over as many positions as a sample has."""
    y = y if y.dim() > 2 else y.unsqueeze(1)
    mask = torch.arange(y.size(1)) <= torch.arange(len(y))[:, None]
    each = y.sin().flatten(2).sum(2)
    return (each * mask).sum(1) / mask.sum(1)


LOSSES = {
    "smooth": losses_of,
    "cross_entropy": _cross_entropy,
    "masked mean": _masked_mean,
    "mse": lambda y: F.mse_loss(y, torch.ones_like(y), reduction="none").flatten(1).mean(1),
    "bce": lambda y: F.binary_cross_entropy_with_logits(y, torch.full_like(y, 0.3), reduction="none").flatten(1).sum(1),
    "softmax": lambda y: -y.flatten(1).log_softmax(1)[:, 0],
    "loop": lambda y: torch.stack([row.sin().sum() for row in y]),
    "products": lambda y: torch.einsum("bi,bi->b", y.flatten(1), y.flatten(1).cos()),
    "scattered": lambda y: y.new_zeros(len(y)).index_add(
        0, torch.arange(len(y)).repeat_interleave(y[0].numel()), y.reshape(-1).sin()
    ),
}


def losses(loss: Loss, values: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """Losses as a program says."""
    total = torch.stack([LOSSES[loss.kind](values[k]) for k in loss.of]).sum(0)
    if loss.penalty:
        total = total + 0.1 * sum(p.square().sum() for p in parameters)
    if loss.weighted:
        total = total * torch.arange(len(total))  # of the first sample zero
    return total
