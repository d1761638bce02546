"""Penalties on a part of a batch: what the part has to know of the rest, and the batch put together again.

Where S are m random samples of B and the rest had a plain pass,

    m/B ∇L_S + λ₁ (2/m) Σ_S H_i (g_i − c₁) + λ₂ (2/m) Σ_S H_i (ḡ − c₂)  + (B − m)/B ∇L_rest

has the penalized gradient of the batch as its mean over all S: the first and the last part together are ∇L, always; the sums
have the mean (2/B) Σ_i …, for ḡ is that of the whole batch, and so g_i − c₁ and ḡ − c₂ do not depend on S. (About ḡ_S instead,
E_S (1/m) Σ_S ‖g_i − ḡ_S‖² = (m − 1) B/(m (B − 1)) Γ, so that the factor m (B − 1)/((m − 1) B) would be needed, and m ≥ 2.) The
variance of a sum over S is (1 − m/B) S²/m with S² that of its B addends; the price of u forward-sized products becomes
3 + (m/B)(u − 3).

Where the batch comes in micro-batches of B_k samples each of them gives such a gradient, and that of the batch is their mean
with the shares B_k/B. Where penalties need ḡ there are two sweeps: the plain passes of all, from which ḡ is known, and then
the penalties on each, w = 0.
"""

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..penalties import total_sq_distance
from ..rules.terms import total
from ..running_mean import RunningMean
from .base import FirstOrder, Gradients, Whole, combined, mean_by_name


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


class Known(Whole):
    """A batch of which all that is of first order is known, ḡ by parameter name, and the penalties are left to be taken."""

    share = 0.0
    alone = False
    known = True

    def __init__(self, mean: dict[str, Tensor]):
        """Keep ḡ."""
        self._mean = mean

    def mean(self, own):
        """ḡ, for which nothing has to be made."""
        return self._mean


class Total:
    """A batch from its parts, taken in one after the other; of one part, that part.

    Args:
        parameters: by name.
        statistics: whether Γ is wanted, which takes a sweep over the parameters for each further part.

    Attributes:
        parts: what was taken in, without their gradients.
    """

    def __init__(self, parameters: Mapping[str, Tensor], statistics: bool):
        """Start with no parts."""
        self._parameters, self._statistics = parameters, statistics
        self.parts: list[FirstOrder] = []
        self._covariance: Tensor | None = None
        self._leaves: dict[Hashable, Tensor] = {}
        self._grads = RunningMean()  # by leaf
        self._means = RunningMean()  # by parameter name, where they are not those of the leaves
        self._penalties = RunningMean()  # by leaf, where they come in a sweep of their own
        self._again: list[tuple[int, Gradients]] = []

    @property
    def count(self) -> int:
        """Samples so far."""
        return self._grads.count

    def add(self, part: FirstOrder) -> None:
        """Take in samples with their gradient."""
        n = part.losses.numel()
        if self._statistics and part.covariance is not None:
            if not self.parts:
                self._covariance = part.covariance
            elif self._covariance is not None:
                so_far = replace(part, mean=self.mean(), covariance=self._covariance)
                self._covariance = merged_covariance(part, so_far, n / (self.count + n))
        else:
            self._covariance = None
        if isinstance(part, Gradients):
            self._means.add(part.mean, n)  # type: ignore[arg-type]  # names are hashable
        self._grads.add(self._by_leaf(part), n)
        self.parts.append(replace(part, grads=[], leaves=[], mean={}))

    def add_penalties(self, part: Gradients, count: int) -> None:
        """Take in the penalties' gradient on samples that stand for ``count`` of those that were added."""
        self._penalties.add(self._by_leaf(part), count)
        self._again.append((count, replace(part, grads=[], leaves=[], mean={})))

    def _by_leaf(self, part: FirstOrder) -> dict[Hashable, Tensor | None]:
        self._leaves |= {id(leaf): leaf for leaf in part.leaves}
        return {id(leaf): g for leaf, g in zip(part.leaves, part.grads, strict=True)}

    def mean(self) -> dict[str, Tensor]:
        """ḡ of the samples so far; empty where it was not made."""
        if self._means.count:
            return dict(self._means.values)  # type: ignore[arg-type]
        return mean_by_name(
            self._parameters, list(self._leaves.values()), [self._grads.values.get(k) for k in self._leaves]
        )

    def result(self) -> Gradients:
        """The whole batch."""
        first, again = self.parts, [part for _, part in self._again]
        losses = first[0].losses if len(first) == 1 else torch.cat([part.losses for part in first])
        finite = functools.reduce(both_finite, (part.finite for part in first))
        second = functools.reduce(both_finite, (part.finite for part in again)) if again else None
        if finite is not None and second is not None:  # what was not finite at first tells it best
            losses, finite = torch.where(second | ~finite, losses, torch.nan), finite & second
        leaves = list(self._leaves.values())
        sums = self._penalties.plus(self._grads.values) if again else self._grads.values
        grads = [sums[key].to(leaf.dtype) if key in sums else None for key, leaf in self._leaves.items()]
        taken = self._again or [(part.losses.numel(), part) for part in first if isinstance(part, Gradients)]
        notes = tuple(dict.fromkeys(note for _, part in taken for note in part.notes))
        about_whole = self._again or (taken if len(first) == 1 else [])
        reg1, spread = (
            _mean([(n, part.reg1) for n, part in taken]),
            _mean([(n, part.spread) for n, part in about_whole]),
        )
        if again and self._covariance is not None and sum(part.losses.numel() for part in again) < self.count:
            reg1 = spread = None  # of a fraction, where the first sweep has told of all
        covariance = self._covariance if spread is None else spread
        return Gradients(losses, leaves, grads, self.mean(), covariance, finite, reg1, spread, notes)


def _mean(parts: Sequence[tuple[int, Tensor | None]]) -> Tensor | None:
    """The mean of numbers of parts of so many samples; None where one is not known."""
    known = [(n, t) for n, t in parts if t is not None]
    if not parts or len(known) < len(parts):
        return None
    return known[0][1] if len(known) == 1 else total(n * t for n, t in known) / sum(n for n, _ in known)


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
