"""Look-ups in a tracked table: ``F.embedding``, ``F.embedding_bag``, indexing by tokens, ``index_select``.

    y_n = p[tok_n]                          g_i = Σ_n onehot(tok_n) ⊗ gy_n
    y_r = Σ_{n in bag r} a_n p[tok_n]       g_i = Σ_n onehot(tok_n) ⊗ a_n gy_{r(n)}         a_n = 1, 1/count or a weight

and by maxima each number of a bag is looked up at its own token. Look-ups with indices that do not depend on the data are
functions of parameters alone, and do not come here. Letters: ``N`` look-ups, ``R`` rows of the output.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..errors import UnsupportedError
from ..ops import embedding
from ..ops.embedding import LookUps, without
from .base import Operation, Phase, Recorder, rule
from .lookup_term import LookUpTerm
from .stand_ins import written_out

_T = torch.Tensor
_MODES = {"sum": 0, "mean": 1, "max": 2}


@dataclass
class Call:
    """One look-up, however it was written.

    Attributes:
        name: of the function.
        table: (V, …), tracked.
        index: (N,) int64, all of them rows of the table.
        look_ups: the same by rows of the output, none where there is no gradient.
        shape: of the output.
        mode: of a bag; None where every look-up is a row of its own.
        weights: (N,) of a bag's look-ups, or None.
        padding_idx: the token that is left out of bags.
    """

    name: str
    table: Tensor
    index: Tensor
    look_ups: LookUps
    shape: torch.Size
    mode: str | None = None
    weights: Tensor | None = None
    padding_idx: int | None = None

    @property
    def inner(self) -> tuple[int, int]:
        """The table's shape as a matrix, (V, D)."""
        return self.table.size(0), math.prod(self.table.shape[1:])

    @torch.no_grad()
    def output(self) -> tuple[Tensor, Tensor | None]:
        """What the call puts out, without a graph; and of maxima which token each number is from, (R, D), negative for none."""
        if self.mode is None:
            found = self.table.detach().index_select(0, self.index)
            return torch.ops.aten._unsafe_view(found, self.shape), None  # no view, which must not be changed in place
        weights = None if self.weights is None else self.weights.detach()
        y, _, sizes, maxima = self._bags(self.table.detach(), self.index, weights, self.padding_idx)
        return y, maxima.masked_fill((sizes == 0).unsqueeze(1), -1) if self.mode == "max" else None

    def pooled(self, rows: Tensor) -> Tensor:
        """The output where look-up n finds ``rows`` (N, D)."""
        if self.mode is None:
            return rows.reshape(self.shape)
        # Rows of their own table, with one more for what takes no part.
        N = rows.size(0)
        index = torch.arange(N, device=rows.device).masked_fill(self.look_ups.tokens < 0, N)
        return self._bags(torch.cat([rows, rows.new_zeros(1, rows.size(1))]), index, self.weights, N)[0]

    def _bags(
        self, table: Tensor, index: Tensor, weights: Tensor | None, padding_idx: int | None
    ) -> tuple[Tensor, ...]:
        assert self.mode is not None
        bounds, mode = self.look_ups.bounds, _MODES[self.mode]
        return torch.embedding_bag(table, index, bounds, False, mode, False, weights, True, padding_idx)


class LookUpOperation(Operation):
    """A look-up; tracked is its table."""

    def __init__(self, recorder, call: Call):
        """Describe the call."""
        super().__init__(recorder, call.name, [call.table])
        self.look_ups, self.inner, self.table_shape = call.look_ups, call.inner, call.table.shape
        self.is_bag = call.mode is not None
        self.shares: Tensor | None = None  # (R, 1), of a bag's mean

    def __call__(self, call: Call) -> Tensor:
        """The output, in the record."""
        y, maxima = call.output()
        if maxima is not None:  # look-ups of numbers, not of rows
            D = self.inner[1]
            numbers = maxima * D + torch.arange(D, device=maxima.device)
            self.look_ups = LookUps.of_equal(numbers.masked_fill_(maxima < 0, -1).flatten(), y.size(0))
            self.inner, self.is_bag = (self.table_shape.numel(), 1), False
        elif call.mode == "mean":
            self.shares = _shares(self.look_ups, y.dtype)
        rows = self.count_rows(y.shape[: 1 if call.mode is not None else y.dim() - call.table.dim() + 1])
        probe, alias = self.new_probe(rows, y), self.recorder.alias(call.table)
        return self.attach(RecordedLookUp.apply(self, probe, alias, call.weights, y))

    def of_look_ups(self, gy: Tensor, weights: Tensor | None) -> Tensor:
        """Each look-up's gradient, (N, D), from that of the output."""
        if not self.is_bag:
            return gy.reshape(-1, self.inner[1])
        spread = self.look_ups.spread(gy if self.shares is None else gy * self.shares)
        return spread if weights is None else spread * weights.unsqueeze(1)

    def term(self, gy: Tensor, weights: Tensor | None, batch_size: int) -> LookUpTerm:
        """The table's term; of one sample that of them all."""
        if self.reading is None or self.is_bag or batch_size == 1:  # bags are the samples' own, in their order
            own = self.look_ups.merged(batch_size), self.of_look_ups(gy, weights)
            return LookUpTerm(*own, self.table_shape, self.inner)
        tokens = self.look_ups.tokens.view(*self.output_shape[: self.row_dims], -1)
        tokens = self.reading.gradients(tokens + 1) - 1  # none where a sample has fewer rows than others
        own = LookUps.of_equal(tokens.flatten(), batch_size), self.of_look_ups(self.reading.gradients(gy), weights)
        return LookUpTerm(*own, self.table_shape, self.inner)

    @property
    def reads_samples(self) -> bool:  # type: ignore[override]
        """Bags' look-ups stay in their order."""
        return not self.is_bag

    def terms(self, gy, batch_size):  # noqa: D102
        return [self.term(gy, self.saved()[1], batch_size)]

    @property
    def rows_reached(self) -> Tensor | None:
        """Of a table of rows: those of its tokens."""
        tokens = self.look_ups.tokens
        return tokens[tokens >= 0] if self.inner[0] == self.table_shape[0] else None

    def held_bytes(self, batch_size):  # noqa: D102
        number = self.tracked[0].element_size()
        return self.look_ups.tokens.numel() * (self.inner[1] * number + self.look_ups.tokens.element_size())


class RecordedLookUp(Function):
    """``y`` as what was looked up in a table, with a probe."""

    @staticmethod
    def forward(ctx, operation, probe, table, weights, y):
        """Pass y on."""
        ctx.operation, ctx.dtype = operation, table.dtype
        ctx.mark_dirty(y)
        ctx.save_for_backward(table if ctx.needs_input_grad[3] else None, weights)
        return y

    @staticmethod
    def backward(ctx, gy):
        """Differentiate by what the phase asks for."""
        operation, phase = ctx.operation, ctx.operation.phase
        table, weights = operation.hold(ctx.saved_tensors)
        probe = by_table = by_weights = term = None
        if phase is Phase.ROW_NORMS:
            probe = operation.row_norms(gy)
        elif phase is Phase.STATISTICS and operation.recorder.takes_statistics(operation):
            term = operation.term(gy, weights, operation.recorder.batch_size)
            center = operation.recorder.center_of(operation.tracked[0])
            deviation = None if center is None else term.sq_norms(center)
            probe = operation.probe_gradient([(term.sq_norms(), deviation)])
        if ctx.needs_input_grad[2] and phase in (Phase.PLAIN, Phase.STATISTICS):
            term = operation.term(gy, weights, 1) if term is None else term
            by_table = term.weighted_sum(None).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            found = embedding.looked_up(operation.look_ups, table.reshape(operation.inner), gy.dtype)
            by_weights = (operation.look_ups.spread(gy) * found).sum(1).to(weights.dtype)
        return None, probe, by_table, by_weights, None


def call_of(recorder: Recorder, func: Callable, args: tuple, kwargs: dict) -> Any:
    """The look-up that a torch function makes in a tracked table; NotImplemented where it makes none that is known here.

    Raises:
        UnsupportedError: options under which per-sample gradients do not exist, or are not made.
    """
    return PARSERS[func](recorder, *args, **kwargs)


def _of_embedding(
    recorder: Recorder,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
):
    if not recorder.is_tracked(weight) or weight.dim() != 2:
        return NotImplemented
    _refuse_options(recorder, "embedding", weight, max_norm, scale_grad_by_freq, sparse)
    if padding_idx is not None and not -weight.size(0) <= padding_idx < weight.size(0):
        return NotImplemented  # torch refuses it
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.size(0)
    return _of_rows("embedding", weight, input, padding_idx)


def _of_torch_embedding(
    recorder: Recorder, weight: Tensor, indices: Tensor, padding_idx=-1, scale_grad_by_freq=False, sparse=False
):
    """In which a negative padding_idx is none."""
    padding = None if padding_idx < 0 else padding_idx
    return _of_embedding(recorder, indices, weight, padding, None, 2.0, scale_grad_by_freq, sparse)


def _of_index_select(recorder: Recorder, input: Tensor, dim: int, index: Tensor, *, out: Tensor | None = None):
    if not recorder.is_tracked(input) or dim not in (0, -input.dim()) or not input.dim() or out is not None:
        return NotImplemented
    return _of_rows("index_select", input, index)


def _of_item(recorder: Recorder, table: Tensor, index: Any):
    """``p[tokens]``, also with full slices or dots behind."""
    if isinstance(index, tuple):
        if not index or not all(i is Ellipsis or (isinstance(i, slice) and i == slice(None)) for i in index[1:]):
            return NotImplemented
        index = index[0]
    if not recorder.is_tracked(table) or not isinstance(index, Tensor) or not table.dim():
        return NotImplemented
    return _of_rows("indexing", table, index, wraps=True)


def _of_rows(name: str, table: Tensor, index: Tensor, padding_idx: int | None = None, wraps: bool = False):
    if index.dtype not in (torch.int64, torch.int32) or not index.dim():
        return NotImplemented  # a mask, or a look-up without samples
    flat = index.detach().reshape(-1).to(table.device, torch.int64)
    if wraps:
        flat = torch.where(flat < 0, flat + table.size(0), flat)
    look_ups = LookUps.of_equal(without(flat, padding_idx), index.size(0))
    return Call(name, table, flat, look_ups, torch.Size((*index.shape, *table.shape[1:])))


def _of_bag(recorder: Recorder, *args, **kwargs):
    options = _bag_options(args, kwargs)
    table, weights = options["weight"], options["per_sample_weights"]
    if recorder.is_tracked(weights):
        raise UnsupportedError(
            f"embedding_bag takes {recorder.name_of(weights)} as per_sample_weights, which belong to look-ups and not to "
            "samples: look them up by token too, as weights[tokens], or freeze them"
        )
    if not recorder.is_tracked(table):
        return NotImplemented
    _refuse_options(recorder, "embedding_bag", table, *(options[name] for name in _OPTIONS))
    return _bag(options)


_OPTIONS = ("max_norm", "scale_grad_by_freq", "sparse")


def _bag_options(args: tuple, kwargs: dict) -> dict[str, Any]:
    given = inspect.signature(F.embedding_bag).bind(*args, **kwargs)
    given.apply_defaults()
    return given.arguments


def _bag(options: dict[str, Any]):
    """The call of `F.embedding_bag` with these arguments; NotImplemented for those of which torch says what is wrong."""
    table, index, offsets, weights = (options[n] for n in ("weight", "input", "offsets", "per_sample_weights"))
    padding_idx, mode, flat = options["padding_idx"], options["mode"], index.detach().reshape(-1).long()
    if index.is_nested or table.dim() != 2 or mode not in _MODES or (weights is not None and mode != "sum"):
        return NotImplemented
    if index.dim() == 2 and offsets is None:
        look_ups = LookUps.of_equal(flat, index.size(0))
    elif index.dim() == 1 and offsets is not None:
        bounds = offsets.detach().long()
        last = bounds.new_full((0 if options["include_last_offset"] else 1,), flat.numel())
        bounds = torch.cat([bounds, last])  # in memory of their own
        look_ups = LookUps(flat, bounds)
    else:
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += table.size(0)
    look_ups = replace(look_ups, tokens=without(flat, padding_idx))
    shape = torch.Size((look_ups.batch_size, table.size(1)))
    flat_weights = None if weights is None else weights.reshape(-1)
    return Call("embedding_bag", table, flat, look_ups, shape, mode, flat_weights, padding_idx)


@written_out(F.embedding_bag)
def embedding_bag(*args, **kwargs) -> Tensor:
    """`F.embedding_bag` in operations that can be differentiated twice, which torch's own cannot."""
    options = _bag_options(args, kwargs)
    call = NotImplemented if any(options[name] for name in _OPTIONS) else _bag(options)
    if call is NotImplemented:
        return F.embedding_bag(*args, **kwargs)
    look_ups, table = call.look_ups, call.table
    if call.mode == "max":
        maxima = call.output()[1]
        return table.gather(0, maxima.clamp(min=0)).masked_fill(maxima < 0, 0)
    rows = table.index_select(0, look_ups.tokens.clamp(min=0)).masked_fill(look_ups.none, 0)
    if call.weights is not None:
        rows = rows * call.weights.unsqueeze(1)
    y = rows.new_zeros(call.shape).index_add(0, look_ups.samples, rows)
    return y if call.mode == "sum" else y * _shares(look_ups, y.dtype)


def _shares(look_ups: LookUps, dtype: torch.dtype) -> Tensor:
    """One over the look-ups in each bag, (R, 1)."""
    counts = look_ups.summed((look_ups.tokens >= 0).long())
    return counts.clamp(min=1).double().reciprocal().to(dtype).unsqueeze(1)


def _refuse_options(recorder: Recorder, name: str, table: Tensor, max_norm, scale_grad_by_freq, sparse) -> None:
    parameter = recorder.name_of(table)
    if max_norm is not None:
        raise UnsupportedError(
            f"{name} with max_norm changes rows of {parameter} in place in the forward pass: leave max_norm out, and "
            f"renormalize after the optimizer's step, by `with torch.no_grad(): table.copy_(table.renorm(2, 0, {max_norm}))`"
        )
    if scale_grad_by_freq:
        raise UnsupportedError(
            f"{name} with scale_grad_by_freq divides the gradient of {parameter} by how often a token is in the batch, so that "
            "per-sample gradients depend on other samples and do not exist: leave scale_grad_by_freq out"
        )
    if sparse:
        raise UnsupportedError(
            f"{name} would give {parameter} a sparse gradient, and gradients here are dense: make the embedding with "
            "sparse=False"
        )


PARSERS: dict[Callable, Callable] = {
    F.embedding: _of_embedding,
    torch.embedding: _of_torch_embedding,
    F.embedding_bag: _of_bag,
    torch.index_select: _of_index_select,
    _T.index_select: _of_index_select,
    _T.__getitem__: _of_item,
}


@rule(*PARSERS)
def _look_up(recorder: Recorder, func, args, kwargs):
    call = call_of(recorder, func, args, kwargs)
    return call if call is NotImplemented else LookUpOperation(recorder, call)(call)
