"""Per-sample gradients of embeddings: look-ups y_n = p[tok_n] in a table p (V, D).

    E_i = Σ_n onehot(tok_n) ⊗ gy_n          over the look-ups n of sample i

Two look-ups of a sample meet where their tokens are one. Whatever is quadratic goes through one linear map, its own adjoint,

    S(gy)_n = Σ_{n' of the same sample, tok_n' = tok_n} gy_n'         n's row of E_i
    ‖E_i‖² = Σ_n ⟨gy_n, S(gy)_n⟩          ∂‖E_i‖²/∂gy = 2 S(gy)

so that costs grow with N, and nothing has V·D numbers but what is a table itself. Letters: ``N`` look-ups of all samples,
``V`` rows of the table, ``D`` its columns. ∂/∂gy of ‖E_i − c‖² is 2 (E_i − c)[tok_n], and ∂/∂c is 2 (c − E_i).
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function

from ..errors import ArgumentError
from .schema import accumulation_dtype, argument_errors, check_shape

_raw = torch.ops.bootgrad


def embedding_sq_norms(tokens: Tensor, gy: Tensor, padding_idx: int | None = None) -> Tensor:
    """Squared norms of an embedding's per-sample gradients.

        s_i = ‖Σ_t onehot(tok_{i,t}) ⊗ gy_{i,t}‖² = Σ_v ‖Σ_{t: tok_{i,t} = v} gy_{i,t}‖²

    Args:
        tokens: what was looked up, integers (B,) or (B, …), not negative.
        gy: gradient of the summed losses by what was found, (B, D) or (B, …, D).
        padding_idx: a token whose row has no gradient.

    Returns:
        (B,) in the accumulation dtype (float32 for half precisions); twice differentiable by gy.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit together.
    """
    return sq_norms(*_pair(tokens, gy, padding_idx))


def embedding_deviation_sq_norms(tokens: Tensor, gy: Tensor, center: Tensor, padding_idx: int | None = None) -> Tensor:
    """Squared distances ‖E_i − center‖² of an embedding's per-sample gradients from a center (V, D).

    Args and raises as `embedding_sq_norms`; the result is (B,) and differentiable by the center, too.
    """
    return sq_norms(*_pair(tokens, gy, padding_idx, center=center), center)


def embedding_jvp(tokens: Tensor, gy: Tensor, v: Tensor, padding_idx: int | None = None) -> Tensor:
    """Inner products ⟨E_i, v⟩ of an embedding's per-sample gradients with v (V, D): the rows of G @ v, (B,)."""
    return jvp(*_pair(tokens, gy, padding_idx, v=v), v)


def embedding_weighted_sum(
    tokens: Tensor, gy: Tensor, num_embeddings: int, w: Tensor | None = None, padding_idx: int | None = None
) -> Tensor:
    """Σ_i w_i E_i of an embedding, (V, D): G.T @ w; with w (B,) absent the ordinary gradient of its V = num_embeddings rows."""
    return weighted_sum(*_pair(tokens, gy, padding_idx, w), num_embeddings, w)


def _pair(
    tokens: Tensor, gy: Tensor, padding_idx: int | None, w: Tensor | None = None, **tables: Tensor
) -> tuple["LookUps", Tensor]:
    """The look-ups and gy (N, D), checked against weights w (B,) and tables."""
    if tokens.dim() < 1 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ArgumentError(
            f"tokens must be integers, (B,) or (B, …); got {tokens.dtype} of shape {tuple(tokens.shape)}"
        )
    if gy.shape[:-1] != tokens.shape:
        raise ArgumentError(
            f"gy must be (B, …, D), as tokens but for the last; got {tuple(gy.shape)} and {tuple(tokens.shape)}"
        )
    flat = without(tokens.reshape(-1).long(), padding_idx)
    with argument_errors():
        check_shape("w", w, tokens.shape[:1])
        for name, table in tables.items():
            check_shape(name, table, (table.size(0) if table.dim() else 0, gy.size(-1)))
    return LookUps.of_equal(flat, tokens.size(0)), gy.reshape(flat.numel(), gy.size(-1))


def without(tokens: Tensor, padding_idx: int | None) -> Tensor:
    """``tokens`` with none in the place of padding; in memory of their own."""
    return tokens.clone() if padding_idx is None else tokens.masked_fill(tokens == padding_idx, -1)


@dataclass(frozen=True)
class LookUps:
    """Which token each of N look-ups has, and whose sample's it is.

    Attributes:
        tokens: (N,) int64, negative where a look-up has no gradient.
        bounds: (B + 1,) int64, where samples begin, from 0 to N.
        each: how many a sample has, where all have as many; known without asking a device.
    """

    tokens: Tensor
    bounds: Tensor
    each: int | None = None

    @staticmethod
    def of_equal(tokens: Tensor, batch_size: int) -> "LookUps":
        """Look-ups (N,) of samples that have N/B each."""
        each = tokens.numel() // max(1, batch_size)
        return LookUps(tokens, torch.arange(batch_size + 1, device=tokens.device) * each, each)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.bounds.numel() - 1

    @functools.cached_property
    def samples(self) -> Tensor:
        """The sample of each look-up, (N,)."""
        positions = torch.arange(self.tokens.numel(), device=self.tokens.device)
        return torch.searchsorted(self.bounds[1:], positions, right=True)

    @property
    def none(self) -> Tensor:
        """Where there is no token, (N, 1)."""
        return (self.tokens < 0).unsqueeze(1)

    def spread(self, values: Tensor) -> Tensor:
        """Of samples' ``values`` (B, …) each look-up's, (N, …)."""
        return values.index_select(0, self.samples)

    def summed(self, values: Tensor) -> Tensor:
        """Sums of look-ups' ``values`` (N,) over samples, (B,)."""
        if self.each is not None:
            return values.view(self.batch_size, self.each).sum(1)
        return values.new_zeros(self.batch_size).index_add(0, self.samples, values)

    def merged(self, batch_size: int) -> "LookUps":
        """Those of ``batch_size`` samples, each of as many consecutive ones of these."""
        if not self.batch_size:
            return LookUps(self.tokens, self.bounds.new_zeros(batch_size + 1), 0)
        many = self.batch_size // batch_size
        return LookUps(self.tokens, self.bounds[::many].contiguous(), None if self.each is None else self.each * many)

    def select(self, index: Tensor) -> tuple["LookUps", Tensor]:
        """Those of the samples ``index`` (b,), and where they are among these."""
        counts = self.bounds.diff()[index]
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        many = None if self.each is None else self.each * index.numel()
        shift = self.bounds[index] - bounds[:-1]
        places = shift.repeat_interleave(counts, output_size=many)
        places = places + torch.arange(places.numel(), device=places.device)
        return LookUps(self.tokens[places], bounds, self.each), places

    def joined(self, other: "LookUps") -> tuple["LookUps", Tensor]:
        """Each sample's look-ups of both, and where those are among these (N) and the others (N'), one behind the other."""
        order = torch.cat([self.samples, other.samples]).argsort(stable=True)
        tokens = torch.cat([self.tokens, other.tokens])[order]
        each = None if self.each is None or other.each is None else self.each + other.each
        return LookUps(tokens, self.bounds + other.bounds, each), order


def sq_norms(look_ups: LookUps, gy: Tensor, center: Tensor | None = None) -> Tensor:
    """‖E_i − c‖², (B,), c = 0 when absent; differentiable to any order, by the center too."""
    return SqNorms.apply(look_ups, gy, None if center is None else center.to(accumulation_dtype(gy.dtype)))


def covariance(look_ups: LookUps, gy: Tensor, mean: Tensor) -> Tensor:
    """Σ_i ‖E_i − ḡ‖² about the mean ḡ of the E_i, given as a value without a graph; differentiable to any order."""
    return Covariance.apply(look_ups, gy, mean.detach().to(accumulation_dtype(gy.dtype)))


def jvp(look_ups: LookUps, gy: Tensor, v: Tensor) -> Tensor:
    """⟨E_i, v⟩, (B,); differentiable to any order."""
    return Jvp.apply(look_ups, gy, v.to(accumulation_dtype(gy.dtype)))


def weighted_sum(look_ups: LookUps, gy: Tensor, size: int, w: Tensor | None = None) -> Tensor:
    """Σ_i w_i E_i, (size, D) in the accumulation dtype; differentiable to any order."""
    w = None if w is None else w.to(accumulation_dtype(gy.dtype))
    if w is not None and torch.is_grad_enabled() and (gy.requires_grad or w.requires_grad):
        gy, w = gy * _factors(look_ups, w, gy), None
    return TableSum.apply(look_ups, gy, w, size)


def rows(look_ups: LookUps, gy: Tensor) -> Tensor:
    """S(gy), (N, D); differentiable to any order."""
    return RowSums.apply(look_ups, gy)


def rows_elsewhere(look_ups: LookUps, gy: Tensor, others: LookUps) -> Tensor:
    """The rows of E_i that ``others`` look up, (N', D); differentiable to any order."""
    both, order = look_ups.joined(others)
    padded = torch.cat([gy, gy.new_zeros(others.tokens.numel(), gy.size(1))]).index_select(0, order)
    back = torch.empty_like(order).index_copy_(0, order, torch.arange(order.numel(), device=order.device))
    return rows(both, padded).index_select(0, back[gy.size(0) :])


def looked_up(look_ups: LookUps, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The tokens' rows of ``table`` in this dtype, (N, D), zeros where there is no token; differentiable to any order."""
    return TableRows.apply(look_ups, table, dtype)


class RowSums(Function):
    """S(gy), linear and its own adjoint."""

    @staticmethod
    def forward(ctx, look_ups, gy):
        """Add up."""
        ctx.look_ups = look_ups
        return _raw.embedding_rows(look_ups.tokens, look_ups.bounds, gy, None)[1]

    @staticmethod
    def backward(ctx, h):
        """Differentiate by gy."""
        return None, RowSums.apply(ctx.look_ups, h)


class TableSum(Function):
    """Σ_i w_i E_i, of which only gy is differentiated, and that without weights."""

    @staticmethod
    def forward(ctx, look_ups, gy, w, size):
        """Add up."""
        ctx.look_ups, ctx.dtype = look_ups, gy.dtype
        return _raw.embedding_weighted_sum(look_ups.tokens, look_ups.bounds, gy, w, size)

    @staticmethod
    def backward(ctx, v):
        """Differentiate by gy: its adjoint takes rows from v (V, D)."""
        return None, TableRows.apply(ctx.look_ups, v, ctx.dtype), None, None


class TableRows(Function):
    """Rows of a table, zeros where there is no token: the adjoint of `TableSum`."""

    @staticmethod
    def forward(ctx, look_ups, table, dtype):
        """Take them."""
        ctx.look_ups, ctx.size, ctx.dtype = look_ups, table.size(0), table.dtype
        found = table.index_select(0, look_ups.tokens.clamp(min=0))
        return found.masked_fill_(look_ups.none, 0).to(dtype)

    @staticmethod
    def backward(ctx, h):
        """Differentiate by the table."""
        return None, TableSum.apply(ctx.look_ups, h, None, ctx.size).to(ctx.dtype), None


class Jvp(Function):
    """⟨E_i, v⟩, bilinear."""

    @staticmethod
    def forward(ctx, look_ups, gy, v):
        """Multiply."""
        ctx.look_ups = look_ups
        ctx.save_for_backward(gy, v)
        return _raw.embedding_jvp(look_ups.tokens, look_ups.bounds, gy, v)

    @staticmethod
    def backward(ctx, alpha):
        """Differentiate by gy and v."""
        gy, v = ctx.saved_tensors
        factors = _factors(ctx.look_ups, alpha, gy)
        dgy = TableRows.apply(ctx.look_ups, v, gy.dtype) * factors if ctx.needs_input_grad[1] else None
        dv = TableSum.apply(ctx.look_ups, gy * factors, None, v.size(0)) if ctx.needs_input_grad[2] else None
        return None, dgy, dv


class SqNorms(Function):
    """s_i = ‖E_i − c‖²; half of ∂s_i/∂gy, which is made in the same visit, is kept."""

    @staticmethod
    def forward(ctx, look_ups, gy, center):
        """Compute s (B,)."""
        ctx.look_ups, ctx.kept = look_ups, None
        ctx.save_for_backward(gy, center)
        if not ctx.needs_input_grad[1]:
            return _raw.embedding_sq_norms(look_ups.tokens, look_ups.bounds, gy, center)
        s, ctx.kept = _raw.embedding_rows(look_ups.tokens, look_ups.bounds, gy, center)
        return s

    @staticmethod
    def backward(ctx, alpha):
        """Differentiate by gy and c."""
        gy, center = ctx.saved_tensors
        dgy = _adjoint(ctx, gy, center, 2 * alpha) if ctx.needs_input_grad[1] else None
        dc = None
        if ctx.needs_input_grad[2]:
            dc = 2 * (alpha.sum() * center - weighted_sum(ctx.look_ups, gy, center.size(0), alpha))
        return None, dgy, dc


class Covariance(Function):
    """Σ_i ‖E_i − ḡ‖² about the mean ḡ of the E_i, whose own derivative cancels: Σ_i (E_i − ḡ) = 0."""

    @staticmethod
    def forward(ctx, look_ups, gy, mean):
        """Compute the sum; ``mean`` is ḡ, a value without a graph."""
        ctx.look_ups = look_ups
        s, ctx.kept = _raw.embedding_rows(look_ups.tokens, look_ups.bounds, gy, mean)
        ctx.save_for_backward(gy, mean)
        return s.sum()

    @staticmethod
    def backward(ctx, alpha):
        """Differentiate by gy; under create_graph the mean is attached, so that further derivatives are right."""
        gy, mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            mean = weighted_sum(ctx.look_ups, gy, mean.size(0)) / ctx.look_ups.batch_size
        return None, _adjoint(ctx, gy, mean, (2 * alpha).expand(ctx.look_ups.batch_size)), None


def _adjoint(ctx, gy: Tensor, center: Tensor | None, alpha: Tensor) -> Tensor:
    """α_i (E_i − c)[tok_n], from what the visit kept, the first time, or made again."""
    look_ups, (kept, ctx.kept) = ctx.look_ups, (ctx.kept, None)
    factors = _factors(look_ups, alpha, gy)
    if not torch.is_grad_enabled():
        if kept is None:
            kept = _raw.embedding_rows(look_ups.tokens, look_ups.bounds, gy, center)[1]
        return kept.mul_(factors)
    apart = rows(look_ups, gy)
    if center is not None:
        apart = apart - looked_up(look_ups, center, gy.dtype)
    return apart * factors


def _factors(look_ups: LookUps, alpha: Tensor, gy: Tensor) -> Tensor:
    """Samples' factors (B,), to multiply gy (N, D) by, in its dtype."""
    return look_ups.spread(alpha.to(gy.dtype)).unsqueeze(1)
