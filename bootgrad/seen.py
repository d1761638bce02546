"""A step that is done, as rules for λ see it: the gradient of its mean loss, and what a penalty has added to it.

    ∇R = (∇(L + λ R) − ḡ)/λ

Nothing is computed before a rule asks.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .methods.base import Directions, Gradients, mean_by_name
from .penalties import Report, total_sq_distance, total_sq_norm


class Seen:
    """A finished step, as the rule of one of its penalties is shown it.

    Attributes:
        penalty: ``"reg1"`` or ``"reg2"``.
        step: its number.
        batch_size: B.
        is_measured: whether the gradient has this penalty in it and no other, so that `norms` and `gradient` tell of it.
        has_center: whether Reg1 was about a center, and not about the batch mean.
        mean: ḡ by parameter name; empty where it was not made.
    """

    def __init__(
        self,
        penalty: str,
        step: int,
        outcome: Gradients,
        parameters: Mapping[str, Tensor],
        report: Report,
        finite: Tensor | None,
        taken: float | None,
        has_center: bool,
    ):
        """Keep what came of the step; ``taken`` is what the penalty was multiplied by, None where it is not measured."""
        self.penalty, self.step, self.batch_size, self.mean = penalty, step, outcome.batch_size, outcome.mean
        self.is_measured, self.has_center = taken is not None, has_center
        self._outcome, self._parameters, self._report = outcome, parameters, report
        self._finite, self._taken = finite, taken

    def is_finite(self) -> bool:
        """Whether the gradient is, and the optimizer's step is not skipped; an accelerator is waited for."""
        return self._finite is None or bool(self._finite)

    @torch.no_grad()
    def norms(self) -> tuple[float, float]:
        """‖ḡ‖ and ‖∇R‖."""
        assert self._taken is not None
        apart = total_sq_distance(self._totals().values(), self.mean.values())
        sq_mean, sq_penalty = torch.stack([total_sq_norm(self.mean.values()), apart]).tolist()
        return math.sqrt(sq_mean), math.sqrt(sq_penalty) / self._taken

    @torch.no_grad()
    def gradient(self) -> dict[str, Tensor]:
        """∇R by parameter name, in memory of its own."""
        assert self._taken is not None
        return {name: (g - self.mean[name]).div_(self._taken) for name, g in self._totals().items()}

    def spreads(self) -> tuple[float, float]:
        """Γ and the value of Reg1, nan where the report does not tell."""
        return float(self._report.covariance_trace), float(self._report.reg1)

    def _totals(self) -> dict[str, Tensor]:
        by_name = mean_by_name(self._parameters, self._outcome.leaves, self._outcome.grads)
        return {name: by_name[name] for name in self.mean}


def cosine_of(a: Directions, b: Directions) -> float:
    """⟨a, b⟩/(‖a‖ ‖b‖) over the parameters that both have; nan where one is zero."""
    pairs = [(t.to(b[name].device), b[name]) for name, t in a.items() if name in b]
    if not pairs:
        return math.nan
    inner = torch.stack([(s.double() * t.double()).sum().to(pairs[0][1].device) for s, t in pairs]).sum()
    norms = (total_sq_norm(side) for side in zip(*pairs, strict=True))
    product, sq_a, sq_b = torch.stack([inner, *norms]).tolist()
    return product / math.sqrt(sq_a) / math.sqrt(sq_b) if sq_a > 0 and sq_b > 0 else math.nan
