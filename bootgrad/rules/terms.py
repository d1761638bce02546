"""One parameter's share of the implicit matrix G: B rows, each of the parameter's shape, held in the cheapest form.

    FactoredTerm    (x, gy) of a linear or convolution layer, never multiplied out
    DenseTerm       the rows themselves, where they are small: biases, affine and elementwise parameters
    VisitedTerm     the same, held by the graph alone until a penalty's backward pass has come by
    VisitedBias     the layer's bias, visited along with it
    ComputedTerm    rows made in chunks of samples when they are needed: unknown operations, derived parameters
    SumTerm         several uses of one parameter; ‖Σ_uses G_i‖² has cross terms: inner products where all pairs of uses have
                    them, else rows are added before squaring

Every method is differentiable when the tensors inside have a graph. Results are in the accumulation dtype.
"""

import functools
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..errors import RecordingError
from ..ops import product
from ..ops.product import CovarianceTrace, LayerStatistics, Product, Visit, WeightGrad
from ..ops.schema import accumulation_dtype

CHUNK_BYTES = 64 * 2**20
LONG = 2**14  # entries of a row that are added up at once


class Term(ABC):
    """B rows of the shape of one parameter."""

    shape: torch.Size

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """B."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start…stop − 1, (stop − start, *shape)."""

    @abstractmethod
    def weighted_sum(self, w: Tensor | None) -> Tensor:
        """Σ_i w_i g_i, shaped as the parameter; w (B,) is ones when absent."""

    @abstractmethod
    def jvp(self, v: Tensor) -> Tensor:
        """⟨g_i, v⟩, (B,)."""

    @abstractmethod
    def select(self, index: Tensor) -> "Term":
        """The term of the samples ``index`` (long, (b,))."""

    @abstractmethod
    def map(self, function: Callable[[Tensor], Tensor]) -> "Term":
        """The term with ``function`` applied to each tensor it is made of."""

    def inner_product(self, other: "Term") -> Callable[[], Tensor] | None:
        """A function that makes ⟨g_i, g'_i⟩, (B,), with the rows of another term, where that takes no rows; else None."""
        return None

    def sq_norms(self, center: Tensor | None = None) -> Tensor:
        """‖g_i − center‖², (B,)."""
        return torch.cat(self._chunked(lambda rows, c: sq_norms_of_rows(rows if c is None else rows - c), center))

    def sq_norms_alone(self) -> Tensor:
        """‖g_i‖², (B,), where nothing is asked of the rows' sum."""
        return self.sq_norms()

    def covariance(self, mean: Tensor) -> Tensor:
        """Σ_i ‖g_i − ḡ‖², where ``mean`` is the value of ḡ."""
        return self.sq_norms(self.weighted_sum(None) / self.batch_size).sum()

    def gram(self) -> Tensor:
        """⟨g_i, g_j⟩, (B, B), by blocks of rows."""
        blocks = list(self.chunks())
        columns = []
        for j in blocks:
            columns.append(torch.cat([self._block(i, j) for i in blocks]))
        return torch.cat(columns, dim=1)

    def _block(self, i: tuple[int, int], j: tuple[int, int]) -> Tensor:
        def product_of_rows(term):
            left, right = _flat(term.rows(*i)), _flat(term.rows(*j))
            return (left @ right.t()).to(accumulation_dtype(left.dtype))

        return recomputed(product_of_rows, self)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of samples whose rows fit into the chunk budget."""
        return ranges(self.batch_size, max(1, CHUNK_BYTES // max(1, 8 * self.shape.numel())))

    def _chunked(self, function: Callable[[Tensor, Tensor | None], Tensor], extra: Tensor | None) -> list[Tensor]:
        """``function(rows, extra)`` of each chunk of rows."""
        return [
            recomputed(lambda term, extra, i=i, j=j: function(term.rows(i, j), extra), self, extra)
            for i, j in self.chunks()
        ]


def ranges(size: int, step: int) -> Iterator[tuple[int, int]]:
    """Ranges of ``step`` numbers up to ``size``; where a compiler leaves the size open, and could not their number, one."""
    if not isinstance(size, int):
        yield 0, size
        return
    for start in range(0, size, step):
        yield start, min(start + step, size)


def recomputed(function: Callable[..., Tensor], *arguments: Term | Tensor | None) -> Tensor:
    """``function(*arguments)``, keeping only the arguments: what it needs in between is made again in a backward pass."""
    tensors: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        tensors.append(t)
        return t

    _map(arguments, keep)
    return _Recomputed.apply(function, arguments, *tensors)


def _map(arguments: Sequence[Any], function: Callable[[Tensor], Tensor]) -> list[Any]:
    return [a.map(function) if isinstance(a, Term) else function(a) if isinstance(a, Tensor) else a for a in arguments]


def total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of one tensor or more, a tensor of its own."""
    out = sum(parts)
    assert isinstance(out, Tensor)
    return out


class _Recomputed(Function):
    """A function of terms, run without a graph and again, with one, when it is differentiated; closed under that."""

    @staticmethod
    def forward(ctx, function, arguments, *tensors):
        ctx.function, ctx.arguments = function, arguments
        ctx.save_for_backward(*tensors)
        return function(*_map(arguments, torch.Tensor.detach))

    @staticmethod
    def backward(ctx, grad):
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases, so that a path from one argument to another outside of this function is not walked here.
            aliases = [t.view_as(t) for t in ctx.saved_tensors]
            order = iter(aliases)
            out = ctx.function(*_map(ctx.arguments, lambda t: next(order)))
            if not out.requires_grad:  # constant in all tensors that require grad
                return None, None, *(None for _ in aliases)
            wanted = [t for t in aliases if t.requires_grad]
            grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph, allow_unused=True))
        return None, None, *(next(grads) if t.requires_grad else None for t in aliases)


def vmap(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """`torch.func.vmap`, without its warning where a kernel is run row by row: that rows are slow here is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        return torch.func.vmap(function)(*rows)


def sq_norms_of_rows(rows: Tensor) -> Tensor:
    """‖r_i‖², (B,), of rows (B, *shape), in the accumulation dtype; long ones by blocks, whatever the number of threads."""
    squares = _flat(rows).to(accumulation_dtype(rows.dtype)).square()
    if squares.size(1) <= LONG:
        return squares.sum(1)
    whole = squares.size(1) // LONG * LONG
    return squares[:, :whole].unflatten(1, (-1, LONG)).sum(2).sum(1) + squares[:, whole:].sum(1)


def _sq_norms_at_once(rows: Tensor) -> Tensor:
    """The same without squares in memory where rows are short: a norm is added up entry by entry, which loses digits."""
    if rows.shape[1:].numel() > LONG:
        return sq_norms_of_rows(rows)
    return torch.linalg.vector_norm(_flat(rows), dim=1, dtype=accumulation_dtype(rows.dtype)).square()


def _flat(rows: Tensor) -> Tensor:
    return rows.reshape(rows.size(0), -1)


@dataclass
class FactoredTerm(Term):
    """Rows Σ_t gy_{i,t} ⊗ u_{i,t} of a product; ``inner`` is the weight's shape in the product's own terms."""

    product: Product
    x: Tensor
    gy: Tensor
    shape: torch.Size
    inner: torch.Size

    @property
    def batch_size(self) -> int:  # noqa: D102
        return self.x.size(0)

    def __post_init__(self):
        """Note the versions of x and gy."""
        self._versions = self.x._version, self.gy._version
        self._total: Tensor | None = None  # Σ G_i, a value without a graph, once it is known

    def pair(self) -> tuple[Tensor, Tensor]:
        """(x, gy), which must be as they were when the term was made."""
        if self._versions != (self.x._version, self.gy._version):
            raise RecordingError(
                "an input of a recorded layer was changed in place since the per-sample gradients were made: clone it first"
            )
        return self.x, self.gy

    def map(self, function):  # noqa: D102
        return FactoredTerm(self.product, *map(function, self.pair()), self.shape, self.inner)

    @functools.cached_property
    def statistics(self) -> LayerStatistics:
        """Σ G_i and ‖G_i‖² in one visit, values without a graph."""
        x, gy = self.pair()
        with torch.no_grad():
            statistics = self.product.statistics(x.detach(), gy.detach(), None)
        self._total = statistics.weight_grad
        return statistics

    @property
    def differentiable(self) -> bool:
        """Whether results made now have a graph."""
        return torch.is_grad_enabled() and (self.x.requires_grad or self.gy.requires_grad)

    def rows(self, start, stop):  # noqa: D102
        x, gy = (t[start:stop] for t in self.pair())
        return self.product.rows(x, gy).reshape(x.size(0), *self.shape)

    def sq_norms_alone(self):  # noqa: D102
        if self.differentiable or "statistics" in self.__dict__:  # the cached property
            return self.sq_norms()
        return product.sq_norms(self.product, *(t.detach() for t in self.pair()))

    def sq_norms(self, center=None):  # noqa: D102
        if center is None and not self.differentiable:
            return self.statistics.sq_norms
        center = None if center is None else center.reshape(self.inner)
        s, total = product.sq_norms_and_sum(self.product, *self.pair(), center, self._total is None)
        self._total = total if self._total is None else self._total
        return s

    def covariance(self, mean):  # noqa: D102
        mean = mean.detach().to(accumulation_dtype(self.x.dtype)).reshape(self.inner)
        return CovarianceTrace.apply(self.product, *self.pair(), mean)

    def jvp(self, v):  # noqa: D102
        return product.jvp(self.product, *self.pair(), v.reshape(self.inner))

    def weighted_sum(self, w):  # noqa: D102
        if w is not None:
            return product.weighted_sum(self.product, *self.pair(), w).reshape(self.shape)
        if self._total is None:
            x, gy = self.pair()
            # Where there are derivatives to make, the norms come with them.
            made_alone = x.requires_grad or gy.requires_grad
            self._total = (
                self.product.weight_grad(x.detach(), gy.detach()) if made_alone else self.statistics.weight_grad
            )
        if self.differentiable:
            return WeightGrad.apply(self.product, *self.pair(), self._total.dtype, self._total).reshape(self.shape)
        return self._total.reshape(self.shape)

    def select(self, index):  # noqa: D102
        return self.map(lambda t: t[index])


class VisitedTerm(FactoredTerm):
    """Rows of a product whose (x, gy) are held by the graph alone, and let go after a penalty has visited them there."""

    def __init__(self, product: Product, shape: torch.Size, inner: torch.Size, visit: Visit, token: Tensor):
        """Stand for the rows whose pair the node of ``token`` holds, a `Visited`."""
        self.product, self.shape, self.inner, self.visit, self._token = product, shape, inner, visit, token
        x = self.x
        self._batch_size, self.dtype = x.size(0), accumulation_dtype(x.dtype)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(x, gy), until the visit."""
        try:
            return self._token.grad_fn.saved_tensors  # type: ignore[union-attr]  # a Function's node; the stub is any node's
        except RuntimeError as error:
            raise RecordingError(
                f"the pair of a layer was let go after its visit, or changed in place ({error})"
            ) from None

    x = property(lambda self: self.pair()[0])  # type: ignore[assignment]
    gy = property(lambda self: self.pair()[1])  # type: ignore[assignment]

    @property
    def batch_size(self) -> int:  # noqa: D102
        return self._batch_size

    @property
    def _total(self) -> Tensor | None:  # type: ignore[override]
        return self.visit.total

    @_total.setter
    def _total(self, value: Tensor | None) -> None:
        self.visit.total = value

    def ask(
        self,
        factors: tuple[float, float],
        center: Callable[[], Tensor | None],
        direction: Callable[[], Tensor | None],
        sum_wanted: bool,
    ) -> Tensor:
        """A zero to differentiate in the place of a Σ_i ‖g_i − c‖² + b ⟨Σ_i g_i, v⟩, with factors a and b; see `Visit`."""
        visit = self.visit
        visit.factors, visit.sum_wanted = factors, sum_wanted
        visit.center, visit.direction = (_in_form(make, self.inner, self.dtype) for make in (center, direction))
        return self._token

    def forget_total(self) -> None:
        """Let go of Σ_i g_i, of which nobody will ask."""
        self.visit.total = None
        self.__dict__.pop("statistics", None)  # the cached property

    def finish(self) -> None:
        """After the backward pass: make the norms that were asked for, where no derivative led to them."""
        if self.visit.factors[0] and self.visit.sq_norms is None:
            with torch.no_grad():
                self.visit.make(*self.pair(), (False, False))


def _in_form(make: Callable[[], Tensor | None], shape: torch.Size, dtype: torch.dtype) -> Callable[[], Tensor | None]:
    """What ``make`` makes, if anything, in this shape and dtype."""

    def made() -> Tensor | None:
        t = make()
        return None if t is None else t.reshape(shape).to(dtype)

    return made


@dataclass
class DenseTerm(Term):
    """Rows held as they are, (B, *shape)."""

    values: Tensor

    @property
    def batch_size(self) -> int:  # noqa: D102
        return self.values.size(0)

    def __post_init__(self):
        """Note the shape of a row."""
        self.shape = self.values.shape[1:]

    def rows(self, start, stop):  # noqa: D102
        return self.values[start:stop]

    def sq_norms(self, center=None):  # noqa: D102
        return sq_norms_of_rows(self.values if center is None else self.values - center)

    def jvp(self, v):  # noqa: D102
        dtype = accumulation_dtype(self.values.dtype)
        return _flat(self.values).to(dtype) @ v.flatten().to(dtype)

    def weighted_sum(self, w):  # noqa: D102
        dtype = accumulation_dtype(self.values.dtype)
        if w is None:
            return self.values.sum(0, dtype=dtype)
        return (w.to(dtype) @ _flat(self.values).to(dtype)).reshape(self.shape)

    def map(self, function):  # noqa: D102
        return DenseTerm(function(self.values))

    def select(self, index):  # noqa: D102
        return DenseTerm(self.values[index])


class SqDistances(Function):
    """Σ_k ‖r_{k,i} − c_k‖², (B,), of the rows r_k (B, *shape) of several parameters: one node for them all."""

    @staticmethod
    def forward(ctx, centers, *rows):
        """Compute the sum; ``centers`` is None for zeros."""
        apart = rows if centers is None else torch._foreach_sub(rows, centers)
        ctx.centers = centers
        ctx.save_for_backward(*rows)
        return torch.stack([_sq_norms_at_once(t) for t in apart]).sum(0)

    @staticmethod
    def backward(ctx, alpha):
        """Differentiate by the rows."""
        rows, factors = ctx.saved_tensors, 2 * alpha
        apart = rows if ctx.centers is None else torch._foreach_sub(rows, ctx.centers)
        shaped = {n: factors.reshape(-1, *[1] * (n - 1)) for n in {t.dim() for t in apart}}
        return None, *torch._foreach_mul(apart, [shaped[t.dim()] for t in apart])


class VisitedBias(DenseTerm):
    """Rows Σ_t gy_{i,t} of a layer's bias, which the visit of the layer's weight makes along with its own."""

    def __init__(self, weight: VisitedTerm, shape: torch.Size):
        """Join the visit of ``weight``."""
        self.visit, self.shape, self._weight = weight.visit, shape, weight
        self.visit.with_bias = True

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The rows, from the visit that a weight's norms without a graph take, or made anew."""
        at_hand = self._weight.__dict__.get("statistics")
        return self._weight.product.bias_rows(self._weight.gy) if at_hand is None else at_hand.bias_rows

    @property
    def batch_size(self) -> int:  # noqa: D102
        return self._weight.batch_size

    def weighted_sum(self, w):  # noqa: D102
        return super().weighted_sum(w) if w is not None or self.visit.bias_total is None else self.visit.bias_total

    def ask(self, center: Callable[[], Tensor | None], direction: Callable[[], Tensor | None]) -> None:
        """Say what the visit's center and direction are for the bias; the rest is the weight's to ask."""
        self.visit.bias_center = _in_form(center, self.shape, self._weight.dtype)
        self.visit.bias_direction = _in_form(direction, self.shape, self._weight.dtype)


@dataclass
class ComputedTerm(Term):
    """Rows that ``compute(index, *parts)`` makes for a long tensor of samples; ``index`` are this term's samples."""

    compute: Callable[..., Tensor]
    index: Tensor
    shape: torch.Size
    parts: Sequence[Any]  # tensors, terms and constants

    @property
    def batch_size(self) -> int:  # noqa: D102
        return self.index.numel()

    def rows(self, start, stop):  # noqa: D102
        self._check_unchanged()
        return self.compute(self.index[start:stop], *self.parts)

    def __post_init__(self):
        """Note the versions of the tensors that rows are made from."""
        self._versions = self._present_versions()

    def _present_versions(self) -> list[int]:
        return [part._version for part in self.parts if isinstance(part, Tensor)]

    def _check_unchanged(self) -> None:
        if self._versions != self._present_versions():
            raise RecordingError(
                "a parameter or an input was changed in place since the per-sample gradients were made, and these rows are "
                "made from it anew: use them before the optimizer's step"
            )

    def jvp(self, v):  # noqa: D102
        return torch.cat(self._chunked(lambda rows, v: DenseTerm(rows).jvp(v), v))

    def weighted_sum(self, w):  # noqa: D102
        def weigh(i: int, j: int):
            return lambda term, w: DenseTerm(term.rows(i, j)).weighted_sum(None if w is None else w[i:j])

        return torch.stack([recomputed(weigh(i, j), self, w) for i, j in self.chunks()]).sum(0)

    def map(self, function):  # noqa: D102
        self._check_unchanged()
        return replace(self, parts=_map(self.parts, function))

    def select(self, index):  # noqa: D102
        return replace(self, index=self.index[index])


@dataclass
class SumTerm(Term):
    """The sum of several terms of one parameter."""

    parts: Sequence[Term]

    @property
    def batch_size(self) -> int:  # noqa: D102
        return self.parts[0].batch_size

    def __post_init__(self):
        """Note the shape of a row."""
        self.shape = self.parts[0].shape

    def rows(self, start, stop):  # noqa: D102
        return total(part.rows(start, stop) for part in self.parts)

    def sq_norms(self, center=None):  # noqa: D102
        pairs = [a.inner_product(b) or b.inner_product(a) for a, b in itertools.combinations(self.parts, 2)]
        if any(pair is None for pair in pairs):
            return super().sq_norms(center)
        s = total(
            [*(part.sq_norms_alone() for part in self.parts), *(2 * pair() for pair in pairs if pair is not None)]
        )
        if center is not None:
            c = center.to(s.dtype)
            s = s - 2 * self.jvp(c) + c.square().sum()
        return s - s.detach().clamp(max=0)  # what rounding leaves below zero; the derivative is as it was

    def jvp(self, v):  # noqa: D102
        return total(part.jvp(v) for part in self.parts)

    def weighted_sum(self, w):  # noqa: D102
        return total(part.weighted_sum(w) for part in self.parts)

    def map(self, function):  # noqa: D102
        return SumTerm([part.map(function) for part in self.parts])

    def select(self, index):  # noqa: D102
        return SumTerm([part.select(index) for part in self.parts])
