"""Terms of tensors that hold some of a parameter's entries, or all of them in another order: transposed, split, indexed.

Where c is a center, c_part its entries that the tensor holds, in the tensor's order, and c_rest the others,

    ‖g_i − c‖² = ‖g'_i − c_part‖² + ‖c_rest‖²
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .terms import SumTerm, Term, sq_norms_of_rows, total, vmap


@dataclass
class PartTerm(Term):
    """The rows of ``term`` in their places among a parameter's entries, which ``pick`` takes such a tensor from."""

    term: Term
    shape: torch.Size
    pick: Callable[[Tensor], Tensor]

    @property
    def batch_size(self) -> int:  # noqa: D102
        return self.term.batch_size

    def rows(self, start, stop):  # noqa: D102
        return vmap(self.put, self.term.rows(start, stop))

    def sq_norms(self, center=None):  # noqa: D102
        return _about([self], center)

    def covariance(self, mean):  # noqa: D102
        return self.term.covariance(self.pick(mean))

    def jvp(self, v):  # noqa: D102
        return self.term.jvp(self.pick(v))

    def weighted_sum(self, w):  # noqa: D102
        return self.put(self.term.weighted_sum(w))

    def gram(self):  # noqa: D102
        return self.term.gram()

    def map(self, function):  # noqa: D102
        return PartTerm(self.term.map(function), self.shape, self.pick)

    def select(self, index):  # noqa: D102
        return PartTerm(self.term.select(index), self.shape, self.pick)

    def put(self, value: Tensor) -> Tensor:
        """The transpose of ``pick``: entries in their places, zeros elsewhere."""
        return torch.func.vjp(self.pick, value.new_zeros(()).expand(self.shape))[1](value)[0]


class DisjointTerm(SumTerm):
    """The sum of parts that have no entry in common, so that their norms and inner products add up."""

    parts: Sequence[PartTerm]

    def sq_norms(self, center=None):  # noqa: D102
        return _about(self.parts, center)

    def covariance(self, mean):  # noqa: D102
        return total(part.covariance(mean) for part in self.parts)

    def gram(self):  # noqa: D102
        return total(part.gram() for part in self.parts)

    def map(self, function):  # noqa: D102
        return DisjointTerm([part.map(function) for part in self.parts])

    def select(self, index):  # noqa: D102
        return DisjointTerm([part.select(index) for part in self.parts])


def _about(parts: Sequence[PartTerm], center: Tensor | None) -> Tensor:
    """‖g_i − c‖² of disjoint parts."""
    if center is None:
        return total(part.term.sq_norms() for part in parts)
    picked = [part.pick(center) for part in parts]
    apart = total(part.term.sq_norms(c) for part, c in zip(parts, picked, strict=True))
    if sum(c.numel() for c in picked) == center.numel():
        return apart
    rest = center - total(part.put(c) for part, c in zip(parts, picked, strict=True))
    return apart + sq_norms_of_rows(rest.unsqueeze(0))
