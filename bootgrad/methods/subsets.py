"""A batch taken apart, into samples that penalties are taken on and the rest."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ArgumentError


def draw(batch: tuple, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which samples of the batch the penalties are taken on, in ascending order, and which others there are."""
    B = batch_size(batch)
    # Two samples stay together: of one alone nobody can tell whether others change its gradient.
    m = B if B == 2 else min(B, max(1, round(fraction * B)))
    order = torch.randperm(B, generator=generator)
    return order[:m].sort().values, order[m:].sort().values


def batch_size(batch: tuple) -> int:
    """The rows of the first tensor."""
    for t in pytree.tree_leaves(batch):
        if isinstance(t, Tensor) and t.dim() and t.size(0):
            return t.size(0)
    raise ArgumentError(
        "fraction takes rows of the batch's tensors; got a batch without tensors: pass the function and what it is called "
        "with, reg.backward(loss_fn, x, y)"
    )


def rows(batch: tuple, index: Tensor) -> tuple:
    """The batch with the rows ``index`` of each tensor that has as many rows as the first."""
    B = batch_size(batch)

    def select(t: Any) -> Any:
        return t[index.to(t.device)] if isinstance(t, Tensor) and t.dim() and t.size(0) == B else t

    return pytree.tree_map(select, batch)


def check_leaves(batch: tuple) -> None:
    """Raise where a tensor of a batch that is gone through twice has a graph, which the first backward pass lets go."""
    for t in pytree.tree_leaves(batch):
        if isinstance(t, Tensor) and t.grad_fn is not None:
            raise ArgumentError(
                f"a tensor of the batch, of shape {tuple(t.shape)}, is the result of {t.grad_fn.name()}, whose graph is gone "
                "after the first of several passes: compute it in the function, or detach it"
            )


def versions_of(batch: tuple) -> list[int]:
    """How often each tensor of the batch was written to."""
    return [t._version for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and not t.is_inference()]
