"""A table's share of the implicit matrix: rows E_i = Σ_n onehot(tok_n) ⊗ gy_n, held as tokens and gy, never multiplied out.

Letters as in `ops.embedding`: ``N`` look-ups, ``V`` rows of the table, ``D`` its columns, E_i the rows of G.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor

from ..ops import embedding
from ..ops.embedding import LookUps
from ..ops.linear import LinearProduct
from ..ops.schema import accumulation_dtype
from .terms import CHUNK_BYTES, DenseTerm, FactoredTerm, SumTerm, Term, ranges, recomputed, total


@dataclass
class LookUpTerm(Term):
    """Rows E_i of a table of any ``shape``, whose look-ups are in (V, D) = ``inner``, the same numbers."""

    look_ups: LookUps
    gy: Tensor  # (N, D)
    shape: torch.Size
    inner: tuple[int, int]

    @property
    def batch_size(self) -> int:  # noqa: D102
        return self.look_ups.batch_size

    def rows(self, start, stop):  # noqa: D102
        part = self.select(torch.arange(start, stop, device=self.gy.device))
        V, D = self.inner
        tokens = part.look_ups.tokens
        # One table of (stop − start) · V rows, in which no two samples meet.
        apart = torch.where(tokens < 0, tokens, tokens + V * part.look_ups.samples)
        rows = embedding.weighted_sum(replace(part.look_ups, tokens=apart), part.gy, (stop - start) * V)
        return rows.reshape(stop - start, *self.shape)

    def sq_norms(self, center=None):  # noqa: D102
        return embedding.sq_norms(self.look_ups, self.gy, None if center is None else center.reshape(self.inner))

    def covariance(self, mean):  # noqa: D102
        return embedding.covariance(self.look_ups, self.gy, mean.reshape(self.inner))

    def jvp(self, v):  # noqa: D102
        return embedding.jvp(self.look_ups, self.gy, v.reshape(self.inner))

    def weighted_sum(self, w):  # noqa: D102
        return embedding.weighted_sum(self.look_ups, self.gy, self.inner[0], w).reshape(self.shape)

    def gram(self):  # noqa: D102
        return total(recomputed(_gram_of(places, index, size), self) for places, index, size in self._used_tokens())

    def _used_tokens(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """The batch's distinct tokens in runs: where they are looked up, which of the run's each is, and how many there are."""
        distinct, index = self.look_ups.tokens.unique(return_inverse=True)
        first = int((distinct < 0).sum())  # none is not a token
        step = max(1, CHUNK_BYTES // (8 * max(1, self.batch_size * self.inner[1])))
        for start in range(first, max(distinct.numel(), first + 1), step):
            places = ((index >= start) & (index < start + step)).nonzero().squeeze(1)
            yield places, index[places] - start, min(step, distinct.numel() - start)

    def select(self, index):  # noqa: D102
        look_ups, places = self.look_ups.select(index)
        return replace(self, look_ups=look_ups, gy=self.gy.index_select(0, places))

    def map(self, function):  # noqa: D102
        return replace(self, gy=function(self.gy))

    def inner_product(self, other):  # noqa: D102
        if isinstance(other, LookUpTerm) and other.inner == self.inner:
            return lambda: _with_look_ups(self, other)
        if _is_linear(other, self.inner[1]) and self.look_ups.each is not None:
            return lambda: _with_linear(self, other)
        return None

    def found_by(self, look_ups: LookUps, columns: int) -> Tensor:
        """As the function of this name."""
        if columns == self.inner[1]:
            return embedding.rows_elsewhere(self.look_ups, self.gy, look_ups)
        # Held number by number.
        tokens = look_ups.tokens.unsqueeze(1) * columns + torch.arange(columns, device=self.gy.device)
        tokens = tokens.masked_fill(look_ups.none, -1).flatten()
        each = None if look_ups.each is None else look_ups.each * columns
        numbers = LookUps(tokens, look_ups.bounds * columns, each)
        return embedding.rows_elsewhere(self.look_ups, self.gy, numbers).view(-1, columns)


@torch.no_grad()
def found_by(term: Term, look_ups: LookUps, columns: int) -> Tensor | None:
    """The rows of the samples' tables that look-ups of theirs find, (N, columns), zeros where there is no token.

    None where that takes whole tables.
    """
    if isinstance(term, SumTerm):
        parts = [found_by(part, look_ups, columns) for part in term.parts]
        return None if any(part is None for part in parts) else total(part for part in parts if part is not None)
    if isinstance(term, LookUpTerm):
        return term.found_by(look_ups, columns)
    if isinstance(term, DenseTerm):
        tables = term.values.reshape(term.batch_size, -1, columns)
        return tables[look_ups.samples, look_ups.tokens].masked_fill(look_ups.none, 0)
    if not _is_linear(term, columns) or look_ups.each is None:
        return None
    x, chosen = _chosen_of_linear(term, look_ups)
    dtype = accumulation_dtype(x.dtype)
    return (chosen.mT.to(dtype) @ x.to(dtype)).flatten(0, 1).masked_fill(look_ups.none, 0)


def _gram_of(places: Tensor, index: Tensor, size: int) -> Callable[[LookUpTerm], Tensor]:
    """A function that makes ⟨E_i, E_j⟩ over some tokens of which ``index`` says which is looked up at ``places``."""

    def gram(term: LookUpTerm) -> Tensor:
        B = term.batch_size
        samples = term.look_ups.samples[places]
        one = LookUps(samples * size + index, torch.tensor([0, places.numel()], device=index.device))
        rows = embedding.weighted_sum(one, term.gy[places], B * size).view(B, size * term.inner[1])
        return rows @ rows.t()

    return gram


def _with_look_ups(a: LookUpTerm, b: LookUpTerm) -> Tensor:
    """⟨E_i, E'_i⟩: the rows of one that the other looks up."""
    dtype = accumulation_dtype(a.gy.dtype)
    found = embedding.rows_elsewhere(a.look_ups, a.gy, b.look_ups)
    return b.look_ups.summed((found.to(dtype) * b.gy).sum(1))


def _with_linear(term: LookUpTerm, layer: FactoredTerm) -> Tensor:
    """⟨E_i, L_i⟩ = Σ_{t,t'} ⟨gy_t, x_t'⟩ gy'_t'[tok_t] for a linear layer L with the table as its weight, by T×T' numbers."""
    B, T = term.batch_size, layer.x.size(1)
    step = max(1, CHUNK_BYTES // (8 * max(1, T * (term.look_ups.each or 0))))
    parts = []
    for start, stop in ranges(B, step):
        samples = torch.arange(start, stop, device=term.gy.device)
        parts.append(recomputed(_inner_of_linear, term.select(samples), layer.select(samples)))
    return torch.cat(parts)


def _inner_of_linear(term: LookUpTerm, layer: FactoredTerm) -> Tensor:
    dtype = accumulation_dtype(term.gy.dtype)
    x, chosen = _chosen_of_linear(layer, term.look_ups)
    own = term.gy.masked_fill(term.look_ups.none, 0).view(x.size(0), chosen.size(2), -1)  # (B, T, D)
    products = x.to(dtype) @ own.to(dtype).mT  # (B, T', T)
    return (products * chosen).flatten(1).sum(1)


def _is_linear(term: Term, columns: int) -> TypeGuard[FactoredTerm]:
    """Whether the term is that of a linear layer with a table of so many columns as its weight."""
    return isinstance(term, FactoredTerm) and isinstance(term.product, LinearProduct) and term.shape[1] == columns


def _chosen_of_linear(layer: FactoredTerm, look_ups: LookUps) -> tuple[Tensor, Tensor]:
    """(B, T', D) x and (B, T', T) gy_t'[tok_t] of the weight's Σ_t' gy_t' ⊗ x_t'."""
    x, gy = layer.pair()
    if layer.product.transposed:  # type: ignore[attr-defined]  # a linear layer's
        x, gy = gy, x
    tokens = look_ups.tokens.clamp(min=0).view(x.size(0), 1, -1)
    return x, gy.gather(2, tokens.expand(-1, gy.size(1), -1))
