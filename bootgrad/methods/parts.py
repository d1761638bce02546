"""Penalties on a part of a batch: what the part has to know of the rest, and the batch put together again.

Where S are m random samples of B and the rest had a plain pass,

    m/B ∇L_S + λ₁ (2/m) Σ_S H_i (g_i − c₁) + λ₂ (2/m) Σ_S H_i (ḡ − c₂)  + (B − m)/B ∇L_rest

has the penalized gradient of the batch as its mean over all S: the first and the last part together are ∇L, always; the sums
have the mean (2/B) Σ_i …, for ḡ is that of the whole batch, and so g_i − c₁ and ḡ − c₂ do not depend on S. (About ḡ_S instead,
E_S (1/m) Σ_S ‖g_i − ḡ_S‖² = (m − 1) B/(m (B − 1)) Γ, so that the factor m (B − 1)/((m − 1) B) would be needed, and m ≥ 2.) The
variance of a sum over S is (1 − m/B) S²/m with S² that of its B addends; the price of u forward-sized products becomes
3 + (m/B)(u − 3).
"""

import torch
from torch import Tensor

from ..penalties import total_sq_distance
from .base import FirstOrder, Gradients, Whole, combined


class WithRest(Whole):
    """Samples of a batch whose ``rest`` has had its plain pass."""

    alone = False

    def __init__(self, rest: FirstOrder, m: int):
        """Keep the rest of a batch, of which m samples are penalized."""
        self.rest, self.share = rest, m / (m + rest.losses.numel())
        self._mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def mean(self, own):
        """ḡ from both parts' own, made once."""
        if not self._mean:
            mine, theirs = own(), self.rest.mean
            means = torch._foreach_lerp([theirs[name] for name in mine], list(mine.values()), self.share)
            self._mean = dict(zip(mine, means, strict=True))
        return self._mean

    def complete(self, part):
        """The batch of both."""
        rest = self.rest
        leaves, grads = combined((1.0, part.leaves, part.grads), (1 - self.share, rest.leaves, rest.grads))
        mean = self.mean(lambda: part.mean) if part.mean else {}
        covariance = merged_covariance(part, rest, self.share) if part.spread is None else part.spread
        losses, finite = torch.cat([part.losses, rest.losses]), both_finite(part.finite, rest.finite)
        return Gradients(losses, leaves, grads, mean, covariance, finite, part.reg1, part.spread, part.notes)


@torch.no_grad()
def merged_covariance(a: FirstOrder, b: FirstOrder, share: float) -> Tensor | None:
    """Γ of two parts together, of which ``share`` of the samples are in a: Σ_parts share (Γ_part + ‖ḡ_part − ḡ‖²).

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    if a.covariance is None or b.covariance is None:
        return None
    apart = total_sq_distance(a.mean.values(), (b.mean[name] for name in a.mean))
    return share * a.covariance + (1 - share) * b.covariance + share * (1 - share) * apart


def both_finite(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Whether the losses of two parts are, where that was not waited for."""
    return None if a is None or b is None else a & b
