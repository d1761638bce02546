"""The implicit matrix G: B rows, one per sample's gradient, and P columns, one per parameter entry; never stored.

Letters: ``B`` samples, ``P`` entries of all parameters that require grad, g_i the rows, ḡ their mean, c a center.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError
from .ops.schema import accumulation_dtype
from .rules.terms import Term, sq_norms_of_rows, total
from .wrappers import by_names_as_written

Direction = Mapping[str, Tensor] | Tensor


class Zeros(dict[str, Tensor]):
    """Zeros by parameter name, in no memory of their own: a center that need not be looked at to know what it is."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        """Zeros of the accumulation dtype, shaped as ``parameters``."""
        super().__init__(
            (name, torch.zeros((), dtype=accumulation_dtype(p.dtype), device=p.device).expand(p.shape))
            for name, p in parameters.items()
        )


def as_parameter_dict(value: Direction, parameters: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """A center or direction by parameter name, from such a mapping or from a flat (P,) tensor.

    Args:
        value: {name: tensor}, complete, also by the names of a compiled module's ``named_parameters``, or (P,) in the order of
            ``parameters``, each row-major.
        parameters: the model's parameters by name.
        what: what to call the value in errors.

    Returns:
        {name: tensor} in the order of ``parameters``, with the parameters' shapes.

    Raises:
        ArgumentError: a parameter is missing, unknown, of another shape or on another device.
        ArgumentTypeError: neither a mapping nor a tensor.
    """
    if isinstance(value, Tensor):
        P = sum(p.numel() for p in parameters.values())
        if value.shape != (P,):
            raise ArgumentError(
                f"{what} as one tensor must be flat, shape ({P},), one entry per parameter entry; got {tuple(value.shape)}"
            )
        parts = value.split([p.numel() for p in parameters.values()])
        for name, p in parameters.items():
            _check_place(value, name, p, what)
        return {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)}
    if not isinstance(value, Mapping):
        raise ArgumentTypeError(
            f"{what} must be a mapping by parameter name or a flat tensor; got {type(value).__name__}"
        )
    value = by_names_as_written(value)
    for problem, names in (
        ("lacks", [n for n in parameters if n not in value]),
        ("has unknown", [n for n in value if n not in parameters]),
    ):
        if names:
            raise ArgumentError(
                f"{what} {problem} {', '.join(map(str, names))}: it must name exactly the parameters that require grad"
            )
    out = {}
    for name, p in parameters.items():
        part = value[name]
        if not isinstance(part, Tensor):
            raise ArgumentTypeError(f"{what} must hold tensors; got {type(part).__name__} for {name}")
        if part.shape != p.shape:
            raise ArgumentError(f"{what} must have shape {tuple(p.shape)} for {name}; got {tuple(part.shape)}")
        _check_place(part, name, p, what)
        out[name] = part
    return out


def _check_place(part: Tensor, name: str, p: Tensor, what: str) -> None:
    if part.device != p.device:
        raise ArgumentError(f"{what} must be on {p.device} for {name}, where the parameter is; got {part.device}")


class PerSampleGradients:
    """The implicit B×P matrix of per-sample gradients, from `record(model).per_sample_gradients(losses)`.

    Made with ``create_graph=True``, every method is differentiable and may be called any number of times; otherwise results
    are detached and the matrix outlives the autograd graph. ``G[index]`` is a subset of the rows, without a copy of B×P.
    Results are tensors of their own: what is done to one in place changes no other.
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        parameters: Mapping[str, Tensor],
        batch_size: int,
        differentiable: bool,
        in_order: bool = True,
    ):
        """Hold one `Term` per parameter; parameters without one have zero gradients.

        ``in_order`` says whether the rows of all outputs were the samples' in their order.
        """
        self._terms = dict(terms)
        self._parameters = dict(parameters)
        self.batch_size = batch_size
        self.differentiable = differentiable
        self.in_order = in_order
        self._means: dict[bool, dict[str, Tensor]] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(B, P)."""
        return self.batch_size, sum(p.numel() for p in self._parameters.values())

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters by name, in the order of the columns."""
        return self._parameters

    def __repr__(self) -> str:
        """Size and kind."""
        B, P = self.shape
        return f"PerSampleGradients(B={B}, P={P}, differentiable={self.differentiable})"

    def __len__(self) -> int:
        """B."""
        return self.batch_size

    def __iter__(self) -> Iterator["PerSampleGradients"]:
        """The rows one by one, each a matrix of one row."""
        return (self[i] for i in range(self.batch_size))

    def __getitem__(self, index: Any) -> "PerSampleGradients":
        """The rows ``index``: a slice, a sequence of numbers, a long or a bool tensor. One number gives one row."""
        device = next(iter(self._parameters.values())).device
        rows = torch.arange(self.batch_size, device=device)
        try:
            if isinstance(index, Sequence):
                index = torch.as_tensor(index, device=device)
            chosen = rows[index].reshape(-1)
        except (IndexError, TypeError, ValueError) as error:
            raise ArgumentError(
                f"rows must be indexed within 0 … {self.batch_size - 1}; got {index!r} ({error})"
            ) from None
        if chosen.numel() == 0:
            raise ArgumentError("the index chooses no rows: a gradient matrix needs at least one")
        terms = {name: term.select(chosen) for name, term in self._terms.items()}
        return PerSampleGradients(terms, self._parameters, chosen.numel(), self.differentiable, self.in_order)

    def sq_norms(self) -> Tensor:
        """Squared norms of the rows, ‖g_i‖², (B,), units of loss²/parameter²."""
        return self._sum_over_parameters(lambda term, name: term.sq_norms())

    def sq_norms_by_parameter(self) -> dict[str, Tensor]:
        """Squared norms of the rows' parts, {name: (B,)}; parameters that the losses do not reach are left out."""
        with self._grad_mode():
            return {name: term.sq_norms().clone() for name, term in self._terms.items()}

    def deviation_sq_norms(self, center: Direction | None = None) -> Tensor:
        """Squared distances of the rows from a center, ‖g_i − c‖², (B,).

        Args:
            center: {name: tensor} or flat (P,); the batch mean ḡ when None.

        Raises:
            ArgumentError: the center does not fit the parameters.
        """
        if isinstance(center, Zeros):
            return self.sq_norms()
        c = self._mean() if center is None else self._direction(center, "center")
        with self._grad_mode():
            out = self._sum_over_parameters(lambda term, name: term.sq_norms(c[name]))
            absent = [sq_norm(c[name]) for name in self._parameters if name not in self._terms]
            return out + torch.stack(absent).sum() if absent else out

    def covariance_trace(self, unbiased: bool = False) -> Tensor:
        """Trace of the covariance of the rows, as a scalar.

            Γ = (1/B) Σ_i ‖g_i − ḡ‖²

        Args:
            unbiased: divide by B − 1 instead of B. Needs B ≥ 2.

        Raises:
            ArgumentError: ``unbiased`` with B = 1.

        Source: arXiv 2512.07676, eq. 10.
        """
        if unbiased and self.batch_size < 2:
            raise ArgumentError("the unbiased covariance trace needs at least two samples; got one")
        with torch.no_grad():
            mean = self._mean()
        with self._grad_mode():
            scatter = total(term.covariance(mean[name]) for name, term in self._terms.items())
            return scatter / (self.batch_size - unbiased)

    def __matmul__(self, v: Direction) -> Tensor:
        """G @ v: inner products ⟨g_i, v⟩, (B,), with v {name: tensor} or flat (P,)."""
        parts = self._direction(v, "v")
        return self._sum_over_parameters(lambda term, name: term.jvp(parts[name]))

    @property
    def T(self) -> "Transposed":
        """The transposed matrix, for ``G.T @ w``."""
        return Transposed(self)

    def weighted_sum(self, w: Tensor) -> dict[str, Tensor]:
        """G.T @ w: Σ_i w_i g_i by parameter name, for w (B,)."""
        if not isinstance(w, Tensor) or w.shape != (self.batch_size,):
            got = tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__
            raise ArgumentError(f"w must have shape ({self.batch_size},), one weight per sample; got {got}")
        return self._by_parameter(w)

    def mean(self) -> dict[str, Tensor]:
        """ḡ = (1/B) Σ_i g_i by parameter name."""
        with self._grad_mode():
            return {name: t.clone() for name, t in self._mean().items()}

    def gram(self) -> Tensor:
        """Inner products of all rows, ⟨g_i, g_j⟩, (B, B). Rows are made in blocks: B²·P operations, B·P/blocks memory."""
        with self._grad_mode():
            return total(term.gram() for term in self._terms.values())

    def materialize(self) -> dict[str, Tensor]:
        """The rows themselves, {name: (B, *shape)}: B·P numbers."""
        with self._grad_mode():
            return {
                name: self._terms[name].rows(0, self.batch_size).clone()
                if name in self._terms
                else p.new_zeros(self.batch_size, *p.shape)
                for name, p in self._parameters.items()
            }

    def _grad_mode(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled())

    def _mean(self) -> dict[str, Tensor]:
        """ḡ, kept from one call to the next."""
        with self._grad_mode():
            attached = torch.is_grad_enabled()
            if attached not in self._means:
                sums = self._by_parameter(None)
                means = torch._foreach_div(list(sums.values()), self.batch_size)
                self._means[attached] = dict(zip(sums, means, strict=True))
            return self._means[attached]

    def _mean_values(self) -> dict[str, Tensor]:
        """ḡ without a graph, kept from one call to the next."""
        with torch.no_grad():
            return self._mean()

    def _direction(self, value: Direction, what: str) -> dict[str, Tensor]:
        return as_parameter_dict(value, self._parameters, what)

    def _sum_over_parameters(self, function: Callable[[Term, str], Tensor]) -> Tensor:
        with self._grad_mode():
            return total(function(term, name) for name, term in self._terms.items())

    def _by_parameter(self, w: Tensor | None) -> dict[str, Tensor]:
        with self._grad_mode():
            return {
                name: self._terms[name].weighted_sum(w).to(p.dtype) if name in self._terms else torch.zeros_like(p)
                for name, p in self._parameters.items()
            }


class Transposed:
    """The P×B transpose of a `PerSampleGradients`."""

    def __init__(self, G: PerSampleGradients):
        """Transpose ``G``."""
        self.T = G

    def __matmul__(self, w: Tensor) -> dict[str, Tensor]:
        """Σ_i w_i g_i by parameter name, for w (B,)."""
        return self.T.weighted_sum(w)


def sq_norm(t: Tensor) -> Tensor:
    """‖t‖² in the accumulation dtype."""
    return sq_norms_of_rows(t.unsqueeze(0)).squeeze(0)


def grouped(tensors: Sequence[Tensor], function: Callable[[list[Tensor]], Iterable[Tensor]]) -> list[Tensor]:
    """``function`` of tensors, called with all of one dtype and device at once: many small calls take longer than they do."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for k, t in enumerate(tensors):
        groups.setdefault((t.dtype, t.device), []).append(k)
    out = list(tensors)
    for places in groups.values():
        for k, value in zip(places, function([tensors[k] for k in places]), strict=True):
            out[k] = value
    return out
