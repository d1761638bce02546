"""A step that is done, as rules for λ see it: the gradient of its mean loss, and what a penalty has added to it.

    λ ∇R = ∇(L + λ R) − ḡ

Nothing is computed before a rule asks.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .methods.base import Directions, Gradients, mean_by_name
from .ops.schema import accumulation_dtype
from .penalties import Distances, Report, total_sq_distance, total_sq_norm

# Roundings of parameters, and of the sums that gradients are, in which what is shorter than them is lost.
LOST = 8.0, 64.0
CANCELLED = 10.0  # roundings of sums in E‖g‖², of which Reg1 = E‖g‖² − ‖ḡ‖² cannot be told from zero
STRONGER, WEAKER = 1e4, 1e-2  # what λ is multiplied by at most, to be measured; float16 has little room below overflow


class Added:
    """What the ``penalty`` has added to the gradient of a step, ``taken`` times ∇R."""

    def __init__(
        self, outcome: Gradients, parameters: Mapping[str, Tensor], penalty: str, taken: float, distances: Distances
    ):
        """Keep the gradients, and what R is and of what lengths it is a difference."""
        self._outcome, self._parameters, self._taken = outcome, parameters, taken
        self._penalty, self._value, self._sq_mean = penalty, outcome.value(penalty, distances), distances.sq_mean
        self._apart: dict[str, Tensor] | None = None  # where the outcome has it no more
        self._numbers: tuple[float, float, float] | None = None

    def norms(self) -> tuple[float, float]:
        """‖ḡ‖ and ‖taken ∇R‖."""
        sq_mean, sq_added, _ = self._read()
        return math.sqrt(sq_mean), math.sqrt(sq_added)

    def is_empty(self) -> bool:
        """Whether R is zero but for rounding, as all g_i are one, or ḡ its center: so is then what was added, at any λ.

        Of lengths d that are differences of gradients what is lost is d² ≤ r² ‖ḡ‖², r as in `log_ratio`; Γ, which is one of
        squares, is lost in their sums' rounding as well.
        """
        sq_mean, _, value = self._read()
        relative = self._resolution() ** 2
        if self._penalty == "reg1":
            relative = max(relative, *(CANCELLED * torch.finfo(accumulation_dtype(d)).eps for d in self._dtypes()))
        return value <= relative * sq_mean

    @torch.no_grad()
    def _read(self) -> tuple[float, float, float]:
        """‖ḡ‖², ‖taken ∇R‖² and R."""
        if self._numbers is None:
            if self._apart is None:
                sq_added = total_sq_distance(self._totals().values(), self._outcome.mean.values())
            else:
                sq_added = total_sq_norm(self._apart.values())
            assert self._value is not None
            numbers = [t.to(sq_added) for t in (self._sq_mean, sq_added, self._value)]
            sq_mean, of_added, value = torch.stack(numbers).tolist()
            self._numbers = sq_mean, of_added, value
        return self._numbers

    def _dtypes(self) -> set[torch.dtype]:
        return {p.dtype for p in self._parameters.values()}

    def _resolution(self) -> float:
        """‖d‖/‖ḡ‖ below which differences d of gradients are lost in their rounding."""
        dtypes = self._dtypes()
        pairs = [(LOST[0], d) for d in dtypes] + [(LOST[1], accumulation_dtype(d)) for d in dtypes]
        return max(count * torch.finfo(d).eps for count, d in pairs)

    def is_finite(self) -> bool:
        """Whether both norms are."""
        return all(map(math.isfinite, self.norms()))

    def log_ratio(self) -> float | None:
        """The logarithm of ‖∇R‖/‖ḡ‖; None where one is zero or not finite, or the difference lost in the rounding of ḡ."""
        mean, added = self.norms()
        if not (0 < mean < math.inf and self._resolution() * mean <= added < math.inf):
            return None
        return math.log(added) - math.log(self._taken) - math.log(mean)

    def remedy(self) -> float:
        """What to multiply λ by, where there is no ratio, for ‖λ ∇R‖ to be nearer to ‖ḡ‖; one where that is no help."""
        mean, added = self.norms()
        if not 0 < mean < math.inf:
            return 1.0
        if not added < math.inf:
            return WEAKER
        return min(mean / added, STRONGER) if added > 0 else STRONGER

    @torch.no_grad()
    def gradient(self) -> dict[str, Tensor]:
        """∇R by parameter name, in memory of its own."""
        return {name: t / self._taken for name, t in self._by_name().items()}

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Let the step's gradient be ḡ + factor · taken ∇R; leaves outside of the model keep theirs."""
        self._apart, outcome = self._by_name(), self._outcome
        names = {id(p): name for name, p in self._parameters.items()}
        for k, (leaf, g) in enumerate(zip(outcome.leaves, outcome.grads, strict=True)):
            name = names.get(id(leaf))
            if g is None or name is None:
                continue
            mean = outcome.mean[name]
            whole = torch.add(mean, self._apart[name], alpha=factor) if factor else mean.clone()
            outcome.grads[k] = whole.to(g.dtype) if g.layout == torch.strided else whole.to_sparse(g.sparse_dim())

    def _by_name(self) -> dict[str, Tensor]:
        if self._apart is not None:
            return self._apart
        return {name: g - self._outcome.mean[name] for name, g in self._totals().items()}

    def _totals(self) -> dict[str, Tensor]:
        by_name = mean_by_name(self._parameters, self._outcome.leaves, self._outcome.grads)
        return {name: by_name[name] for name in self._outcome.mean}


class Seen:
    """A finished step, as the rule of one of its penalties is shown it.

    Attributes:
        penalty: ``"reg1"`` or ``"reg2"``.
        step: its number.
        batch_size: B.
        is_measured: whether the gradient had this penalty in it and no other, which `added` then tells of.
        has_center: whether Reg1 was about a center, and not about the batch mean.
        mean: ḡ by parameter name; empty where it was not made.
    """

    def __init__(
        self,
        penalty: str,
        step: int,
        outcome: Gradients,
        report: Report,
        finite: Tensor | None,
        added: Added | None,
        has_center: bool,
    ):
        """Keep what came of the step; ``added`` is what the penalty has, None where it is not measured."""
        self.penalty, self.step, self.batch_size, self.mean = penalty, step, outcome.batch_size, outcome.mean
        self.is_measured, self.has_center = added is not None, has_center
        self._report, self._finite, self._added = report, finite, added

    def is_finite(self) -> bool:
        """Whether the gradient is, and the optimizer's step is not skipped; an accelerator is waited for."""
        return self._finite is None or bool(self._finite)

    @property
    def added(self) -> Added:
        """What the penalty has added, of a step that is measured."""
        assert self._added is not None
        return self._added

    def spreads(self) -> tuple[float, float]:
        """Γ and the value of Reg1, nan where the report does not tell."""
        return float(self._report.covariance_trace), float(self._report.reg1)


def cosine_of(a: Directions, b: Directions) -> float:
    """⟨a, b⟩/(‖a‖ ‖b‖) over the parameters that both have; nan where one is zero."""
    pairs = [(t.to(b[name].device), b[name]) for name, t in a.items() if name in b]
    if not pairs:
        return math.nan
    inner = torch.stack([(s.double() * t.double()).sum().to(pairs[0][1].device) for s, t in pairs]).sum()
    norms = (total_sq_norm(side) for side in zip(*pairs, strict=True))
    product, sq_a, sq_b = torch.stack([inner, *norms]).tolist()
    return product / math.sqrt(sq_a) / math.sqrt(sq_b) if sq_a > 0 and sq_b > 0 else math.nan
