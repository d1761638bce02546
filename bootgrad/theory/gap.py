"""The generalization gap from how the solution moves when one sample is replaced.

    Δ_i = A(Sⁱ) − A(S)        E gap = E Σ_i [L_S(A(S) + Δ_i) − L_S(A(S))]  =  E (1/N) Σ_i [ℓ_i(A(S) + Δ_i) − ℓ_i(A(S))]

The first sum, expanded about A(S), is N⟨∇L_S, Δ̄⟩ + ½ N Tr[H V] and a remainder of third order, with V = (1/N) Σ_i Δ_i Δ_iᵀ.
docs/theory.md has the derivations.

Letters: ``N`` samples, ``Sⁱ`` the data set S with sample i replaced by a fresh one, ``A(S)`` the trained parameters, both with
the same initialization, batches and all other noise, ``m`` ≤ N neighbours that are known.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..intervals import Interval, interval
from ..per_sample import Direction
from ..wrappers import by_names_as_written
from .curvature import Hessian

Neighbours = Mapping[int, Direction] | Iterable[tuple[int, Direction]]
_BLOCK = 16  # moves held at a time
_TERMS = ("gradient", "curvature", "remainder", "loss_rise", "replace_one", "variability")


@dataclass(frozen=True)
class GapDecomposition:
    """What `gap_decomposition` found; prints as a table. All terms are in units of the loss.

    Attributes:
        samples: N.
        gradient: N ⟨∇L_S, Δ̄⟩, zero where training has converged.
        curvature: ½ N Tr[H V].
        remainder: what the loss has beyond its second-order expansion, N times its mean.
        loss_rise: Σ_i [L_S(A(Sⁱ)) − L_S(A(S))], the sum of these three, whose expectation is the gap's.
        replace_one: mean of ℓ_i(A(Sⁱ)) − ℓ_i(A(S)), likewise, without any expansion.
        test_gap: loss on test samples minus that on S, or None; of one data set its interval is over the test samples.
        variability: Tr V.
        sizes: mean absolute gradient, curvature and remainder of a neighbour, N times.
        largest_move: the largest ‖Δ_i‖; nan where one is nan.
        rounding: of the losses' dtype, in the sum of all rises, about: N eps max(1, mean |ℓ|), as of cross entropy, whose
            error is that of the logits' exponentials however small the loss. A remainder below it is not known.
        tolerance: the share of the curvature term, both in mean absolute value, from which on the remainder is too large.
        over: what the intervals are over: ``"neighbours"``, of one data set, or ``"seeds"``.
    """

    samples: int
    gradient: Interval
    curvature: Interval
    remainder: Interval
    loss_rise: Interval
    replace_one: Interval
    test_gap: Interval | None
    variability: Interval
    sizes: tuple[float, float, float]
    largest_move: float
    rounding: float
    tolerance: float
    over: str = "neighbours"

    @property
    def share(self) -> float:
        """Mean absolute remainder by mean absolute curvature term; nan where no neighbour differs."""
        _, curvature, remainder = self.sizes
        if curvature == 0:
            return float("nan") if remainder == 0 else float("inf")
        return remainder / curvature

    @property
    def holds(self) -> bool:
        """Whether the second-order expansion does: the remainder's share is at most the tolerance."""
        return self.share <= self.tolerance

    @classmethod
    def over_seeds(cls, parts: Sequence["GapDecomposition"]) -> "GapDecomposition":
        """The same with intervals over data sets or seeds, of which each part is one: these are about E gap.

        Raises:
            ArgumentError: no parts, or parts of unlike N.
        """
        if not parts or len({part.samples for part in parts}) > 1:
            raise ArgumentError(
                "over_seeds needs one decomposition or more, of equally large data sets; got N of "
                f"{sorted({part.samples for part in parts}) or 'none'}"
            )

        def mean(name: str) -> Interval:
            return interval(getattr(part, name).mean for part in parts)

        return cls(
            samples=parts[0].samples,
            **{name: mean(name) for name in _TERMS},
            test_gap=None if any(part.test_gap is None for part in parts) else mean("test_gap"),
            sizes=_mean_sizes(list(zip(*(part.sizes for part in parts), strict=True))),
            largest_move=_largest(part.largest_move for part in parts),
            rounding=max(part.rounding for part in parts),
            tolerance=parts[0].tolerance,
            over="seeds",
        )

    def __str__(self) -> str:
        """The table, and whether the expansion holds."""
        test = "not given" if self.test_gap is None else str(self.test_gap)
        if self.test_gap is not None and self.over == "neighbours":
            test += f" over {self.test_gap.n} test samples"
        rows = [
            ("gradient", "N ⟨∇L, Δ⟩", self.gradient),
            ("curvature", "½ N Tr[H V]", self.curvature),
            ("remainder", "third order and beyond", self.remainder),
            ("their sum", "Σ [L(A(Sⁱ)) − L(A(S))]", self.loss_rise),
            ("replace-one", "mean of ℓ_i(A(Sⁱ)) − ℓ_i(A(S))", self.replace_one),
            ("test", "L_test(A(S)) − L(A(S))", test),
            ("variability", "Tr V", self.variability),
        ]
        lines = [f"{'term':12}{'':32}mean [95 % interval over {self.curvature.n} {self.over}]"]
        lines += [f"{name:12}{formula:32}{value}" for name, formula, value in rows]
        verdict = "holds" if self.holds else "FAILS"
        lines.append(
            f"The second-order expansion {verdict}: the remainder is {self.share:.2g} of the curvature term in mean absolute "
            f"value, tolerance {self.tolerance:g}."
        )
        if self.rounding > self.tolerance * self.sizes[1]:
            lines.append(f"Rounding may be {self.rounding:.1g} of these numbers: take the model in float64.")
        return "\n".join(lines)


def gap_decomposition(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    *batch: Any,
    neighbours: Neighbours,
    test: Sequence[Any] | None = None,
    tolerance: float = 0.1,
    chunk: int | None = None,
) -> GapDecomposition:
    """Decompose the generalization gap at the model's parameters, A(S).

        E gap = E [ N ⟨∇L_S, Δ̄⟩ + ½ N Tr[H V] + remainder ]

    One Hessian–vector product and one forward pass over S for each neighbour.

    Args:
        model: with the parameters A(S); it stays as it is.
        loss_fn: ``loss_fn(*batch)`` gives losses (N,).
        batch: the training set S.
        neighbours: pairs of i and A(Sⁱ), or a mapping from the one to the other: the parameters, by name or flat, after the
            same training with sample i replaced by a fresh one and all else alike; frozen ones may be among them. Buffers are
            the model's for all: running statistics of A(Sⁱ) are not taken over. Some of the N are enough, drawn at random.
        test: a batch of fresh samples, for the measured gap.
        tolerance: the share of the curvature term from which on a remainder is too large.
        chunk: how many samples to run at a time, as for `Hessian`.

    Raises:
        ArgumentError: no neighbours, an i outside of 0 … N − 1, or parameters that do not fit the model.
        BootgradError: as `Hessian`.
    """
    if not tolerance > 0:
        raise ArgumentError(f"tolerance must be above 0; got {tolerance}")
    H = Hessian(model, loss_fn, *batch, chunk=chunk)
    N, theta = H.samples, H.parameter_vector().double()
    losses, gradient = H.losses(), H.gradient().double()
    terms: list[list[float]] = []
    pairs = iter(neighbours.items() if isinstance(neighbours, Mapping) else neighbours)
    for block in iter(lambda: list(_moves(itertools.islice(pairs, _BLOCK), H, theta)), []):
        with H.one_graph():
            curvatures = [float(move @ (H @ move).double()) / 2 for _, move in block]
        for (i, move), curvature in zip(block, curvatures, strict=True):
            moved = H.losses(move)
            first, rise = float(gradient @ move), float((moved - losses).mean())
            own = float(moved[i] - losses[i])
            terms.append([N * first, N * curvature, N * (rise - first - curvature), N * rise, own, float(move @ move)])
    if not terms:
        raise ArgumentError(
            "neighbours are empty: train at least one model with a sample replaced, and pass (i, parameters)"
        )
    columns = list(zip(*terms, strict=True))
    gradient_term, curvature_term, remainder, loss_rise, replace_one, variability = map(interval, columns)
    gap = None
    if test is not None:
        fresh = Hessian(model, loss_fn, *test, chunk=chunk).losses()
        gap = interval((fresh - losses.mean()).tolist())
    eps = max(torch.finfo(p.dtype).eps for p in H.parameters.values())
    return GapDecomposition(
        samples=N,
        gradient=gradient_term,
        curvature=curvature_term,
        remainder=remainder,
        loss_rise=loss_rise,
        replace_one=replace_one,
        test_gap=gap,
        variability=variability,
        sizes=_mean_sizes(columns),
        largest_move=_largest(columns[5]) ** 0.5,
        rounding=eps * N * max(1.0, float(losses.abs().mean())),
        tolerance=tolerance,
    )


def _mean_sizes(columns: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean absolute values of the first three columns: gradient, curvature and remainder."""
    gradient, curvature, remainder = (statistics.fmean(map(abs, column)) for column in columns[:3])
    return gradient, curvature, remainder


def _largest(values: Iterable[float]) -> float:
    """The largest, or nan if there is one, wherever it stands."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)


def _moves(pairs: Iterable[tuple[int, Direction]], H: Hessian, theta: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(i, Δ_i) in float64, of pairs (i, A(Sⁱ))."""
    frozen = by_names_as_written({name: p for name, p in H.model.named_parameters() if not p.requires_grad})
    for i, parameters in pairs:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < H.samples:
            raise ArgumentError(
                f"neighbours are numbered by the sample that was replaced, 0 … {H.samples - 1}; got {i!r}"
            )
        if isinstance(parameters, Mapping):
            by_name = by_names_as_written(parameters)
            parameters = {name: p for name, p in by_name.items() if name not in frozen}
        yield i, H.vector(parameters, f"neighbour {i}").double() - theta
