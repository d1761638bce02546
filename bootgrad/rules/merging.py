"""Several uses of one parameter as one term, where that is cheaper than to add up rows.

linear layers       Σ_uses Σ_t gy ⊗ x is one layer's, of the positions of all uses
rows                are added
disjoint parts      of a parameter have no products between them: norms add up
"""

import itertools
from collections.abc import Sequence

import torch

from ..ops.linear import LinearProduct
from .parts import DisjointTerm, PartTerm
from .terms import DenseTerm, FactoredTerm, SumTerm, Term, total


def merged(terms: Sequence[Term]) -> Term:
    """The sum of terms of one parameter."""
    linear = [t for t in terms if isinstance(t, FactoredTerm) and isinstance(t.product, LinearProduct)]
    dense = [t for t in terms if type(t) is DenseTerm]
    joined = [*_by_dtype(linear), *([DenseTerm(total(t.values for t in dense))] if dense else [])]
    joined += [t for t in terms if not any(t is other for other in (*linear, *dense))]
    if len(joined) == 1:
        return joined[0]
    parts = [t for t in joined if isinstance(t, PartTerm)]
    return DisjointTerm(parts) if len(parts) == len(joined) and _are_disjoint(parts) else SumTerm(joined)


def _by_dtype(terms: Sequence[FactoredTerm]) -> list[FactoredTerm]:
    """Terms of linear layers, those of one dtype as one of the positions of all."""
    kinds: dict[tuple[torch.dtype, torch.dtype], list[FactoredTerm]] = {}
    for term in terms:
        kinds.setdefault((term.x.dtype, term.gy.dtype), []).append(term)
    return [_joined(group) for group in kinds.values()]


def _joined(terms: Sequence[FactoredTerm]) -> FactoredTerm:
    if len(terms) == 1:
        return terms[0]
    product = terms[0].product
    pairs = [t.pair() if t.product == product else t.pair()[::-1] for t in terms]  # a transposed layer's are exchanged
    x, gy = (torch.cat(side, 1) for side in zip(*pairs, strict=True))  # (B, ΣT, I), (B, ΣT, O)
    return FactoredTerm(product, x, gy, terms[0].shape, terms[0].inner)


def _are_disjoint(parts: Sequence[PartTerm]) -> bool:
    """Whether no entry of the parameter is in two of the parts."""
    whole = torch.empty(parts[0].shape, device="meta")
    views = [part.pick(whole) for part in parts]
    if all(view._base is whole for view in views):
        spans = sorted(_span(view) for view in views if view.numel())
        apart = all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        if apart or sum(end - begin for begin, end in spans) == sum(view.numel() for view in views):
            return apart
    places = torch.arange(whole.numel()).view(whole.shape)
    picked = torch.cat([part.pick(places).flatten() for part in parts])
    return picked.unique().numel() == picked.numel()


def _span(view: torch.Tensor) -> tuple[int, int]:
    """The first place of a view's entries in memory, and the one after the last."""
    begin = int(view.storage_offset())
    return begin, begin + 1 + sum((n - 1) * int(stride) for n, stride in zip(view.shape, view.stride(), strict=True))
