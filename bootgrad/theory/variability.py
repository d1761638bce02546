"""A bound on the algorithmic variability Tr V, accumulated along training from first-order statistics.

    Δ_{t+1} = [step(A_t(Sⁱ)) − step(A_t(S))] − (η/B) 1[i ∈ B_t] (g(θ_t; z'_i) − g(θ_t; z_i))

The bracket expands ‖Δ_t‖ by at most ρ_t; what is added has the mean square, over z'_i and the samples i of the batch,

    E ‖g(z') − g(z_i)‖² = Γ_pop + D,        D = (1/B) Σ_{i ∈ B_t} ‖g(z_i) − ḡ_pop‖²,

the trace of the population's covariance, and the deviation of the samples that were trained on. docs/theory.md has the rest.

Letters: ``N`` samples in the data set, ``B`` in a batch, ``η`` learning rate, ``ρ`` expansion, ``V`` = (1/N) Σ_i Δ_i Δ_iᵀ.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

from ..errors import ArgumentError

_PARTS = ("any_order", "fresh_batches", "leading_order", "population_part")


class _Moments(Protocol):
    @property
    def batch_size(self) -> int: ...

    @property
    def covariance_trace(self) -> Any: ...


class VariabilityBound:
    """Bounds on Tr V of plain SGD, one `update` a step.

        bound = theory.VariabilityBound(samples=N)
        bound.update(lr, B, stats)              # of rec.backward(losses), or a Report, before the step
        bound.any_order, bound.fresh_batches

    With a_t² = η_t² (Γ_pop + D)/(B N), x ← ρ_t x + a_t from zero gives

        √(Tr V) ≤ x                                                                     ``any_order`` = x²

    whatever the order of the samples, for the batches that there were. Where each batch is drawn without regard to the ones
    before, which one that goes through the data in a shuffled order is not, the mean over batches has Tr V ≤ y,

        y ← ρ_t² y + 2 ρ_t √y (η_t/N) √(Γ_pop + D) + a_t²                               ``fresh_batches`` = y

    with the means of Γ_pop + D, for which the numbers of one run stand; and without the middle term, as if a sample's gradients
    at different steps had nothing to do with each other, this is ``leading_order``: no bound, and too small after more than
    about one pass over the data, unless ρ < 1 forgets sooner.

    Args:
        samples: N.

    Attributes:
        steps: taken in so far.
        any_order, fresh_batches: bounds on Tr V, squared units of the parameters.
        leading_order: the estimate.
        population_part: what Γ_pop contributes to ``leading_order``; the rest is that of D.
    """

    def __init__(self, samples: int):
        """Start with no steps, Δ = 0."""
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ArgumentError(
                f"samples must be a whole number of at least 1, the size of the data set; got {samples!r}"
            )
        self.samples, self.steps = samples, 0
        self.any_order = self.fresh_batches = self.leading_order = self.population_part = 0.0

    def update(
        self,
        lr: float,
        batch_size: int,
        statistics: _Moments | None = None,
        *,
        population: float | None = None,
        deviation: float | None = None,
        expansion: float = 1.0,
    ) -> None:
        """Take in a step, with what is known at the parameters before it.

        Args:
            lr: η.
            batch_size: B, distinct samples.
            statistics: of the mini-batch, or of more samples: ``covariance_trace`` and ``batch_size``. What is not given below
                is estimated from them without bias, as Γ M/(M − 1) of their M samples: right as long as training and fresh
                samples have gradients of the same distribution, and too small where those of the former have died away.
            population: Γ_pop, from samples that are not trained on.
            deviation: D, as ``reg1`` of `record.backward` with the population's mean gradient for a center.
            expansion: ρ, by how much the step increases distances at most: 1 for convex losses with η ≤ 2/L, L the largest
                eigenvalue of any batch's Hessian; max(|1 − η μ|, |1 − η L|) where all eigenvalues are in μ … L; 1 + η L else.

        Raises:
            ArgumentError: a number out of range, neither statistics nor both of ``population`` and ``deviation``, or a bound
                that a float does not hold; all is as before then.
        """
        if population is None or deviation is None:
            if statistics is None or statistics.batch_size < 2:
                raise ArgumentError(
                    "statistics must be of two samples or more where population or deviation is not given; got "
                    f"{'none' if statistics is None else 'those of one sample'}"
                )
            M = statistics.batch_size
            trace = float(statistics.covariance_trace) * M / (M - 1)
            population = trace if population is None else population
            deviation = trace if deviation is None else deviation
        numbers = {"lr": lr, "population": population, "deviation": deviation, "expansion": expansion}
        for name, value in numbers.items():
            if not (math.isfinite(value) and value >= 0):
                raise ArgumentError(f"{name} must be finite and not negative; got {value}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= self.samples:
            raise ArgumentError(f"batch_size must be a whole number in 1 … N = {self.samples}; got {batch_size!r}")
        rms = lr * math.sqrt(population + deviation)  # of η (g(z') − g(z_i))
        root = math.sqrt(batch_size * self.samples)
        added = (rms / root) * (rms / root)  # products, for a power that overflows raises
        of_population = lr * math.sqrt(population) / root
        together = 2 * expansion * math.sqrt(self.fresh_batches) * rms / self.samples
        length = expansion * math.sqrt(self.any_order) + rms / root
        parts = {
            "any_order": length * length,
            "fresh_batches": expansion * (expansion * self.fresh_batches) + together + added,
            "leading_order": expansion * (expansion * self.leading_order) + added,
            "population_part": expansion * (expansion * self.population_part) + of_population * of_population,
        }
        if not all(map(math.isfinite, parts.values())):
            raise ArgumentError(
                f"the bound would be beyond the numbers that a float holds, with lr {lr}, population {population}, deviation "
                f"{deviation} and expansion {expansion}: training has diverged, or the products of expansions have"
            )
        for name, value in parts.items():
            setattr(self, name, value)
        self.steps += 1

    def __str__(self) -> str:
        """The bounds, in words."""
        share = self.population_part / self.leading_order if self.leading_order else math.nan
        return (
            f"Tr V ≤ {self.any_order:.3g} after {self.steps} steps, ≤ {self.fresh_batches:.3g} if each batch was drawn anew; "
            f"leading order {self.leading_order:.3g}, of which the population's covariance is {100 * share:.0f} %"
        )

    def state_dict(self) -> dict[str, Any]:
        """The sums, to go on from."""
        return {"samples": self.samples, "steps": self.steps, "parts": [getattr(self, name) for name in _PARTS]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` for as many samples; on an error, all is as before."""
        try:
            samples, steps, parts = int(state["samples"]), int(state["steps"]), [float(v) for v in state["parts"]]
            if samples != self.samples:
                raise ValueError(f"it is about {samples} samples, this bound about {self.samples}")
            if steps < 0 or len(parts) != len(_PARTS) or not all(math.isfinite(v) and v >= 0 for v in parts):
                raise ValueError(f"{steps} steps and parts {parts}")
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"not a state_dict of a VariabilityBound: {error!r}") from None
        self.steps = steps
        for name, value in zip(_PARTS, parts, strict=True):
            setattr(self, name, value)
