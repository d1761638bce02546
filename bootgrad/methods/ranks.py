"""Penalties on the samples of one rank of several, and the batch of all ranks put together.

    ∇ = Σ_r (m_r/B) ∇_r        Γ = Σ_r (m_r/B) (Γ_r + ‖ḡ_r − ḡ‖²) = Σ_r (m_r/B) (Γ_r + ‖ḡ_r‖²) − ‖ḡ‖²

with ∇_r as of a part of a batch, see `base`. A step takes one round between ranks, of gradients and numbers; where penalties
need ḡ it takes another before, in the midst of the pass or between two sweeps. ‖ḡ_r − ḡ‖² is then known when the last one is.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..distributed import Ranks, Rounds
from ..penalties import total_sq_distance, total_sq_norm
from .base import Gradients, Penalties, Whole

_NUMBERS = 6  # that a rank tells of its samples at the end


class Together:
    """What passes between ranks in one step.

    Attributes:
        needs_mean: whether there is a round for ḡ alone.
        rounds: all of them.
    """

    def __init__(self, ranks: Ranks, parameters: Mapping[str, Tensor], penalties: Penalties):
        """Plan the rounds that the penalties ask for."""
        is_plain = not penalties.strengths  # then ḡ is the gradient
        self.needs_mean = penalties.needs_mean
        self._tells_mean = is_plain or penalties.mean
        self._sends_mean = penalties.mean and not (is_plain or self.needs_mean)
        self._parameters = parameters
        self._mean: dict[str, Tensor] = {}  # ḡ of all, where it was needed
        last = (1 + self._sends_mean, _NUMBERS)
        self.rounds = Rounds(ranks, parameters, [(1, 0), last] if self.needs_mean else [last])

    def mean(self, own: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """ḡ of all ranks from that of the ``count`` samples of this one, taken once."""
        if not self._mean:
            self._mean = self._filled(self.rounds.take(count, [own], []).means[0])
        return self._mean

    @torch.no_grad()
    def joined(self, part: Gradients) -> Gradients:
        """The batch of all ranks from what came of this one; leaves outside of the model keep their own gradient."""
        grads = {id(leaf): g for leaf, g in zip(part.leaves, part.grads, strict=True)}
        own = {name: grads.pop(id(p), None) for name, p in self._parameters.items()}
        own_mean = part.mean if self._tells_mean else {}
        if self._mean:
            apart = total_sq_distance(own_mean.values(), (self._mean[name] for name in own_mean))
        else:
            apart = total_sq_norm(own_mean.values()) if own_mean else torch.tensor(torch.nan)
        told = (part.losses.double().mean(), part.covariance, apart, part.reg1, part.spread, part.finite)
        numbers = [torch.nan if t is None else t for t in told]
        result = self.rounds.take(part.losses.numel(), [own, own_mean] if self._sends_mean else [own], numbers)
        loss, covariance, between, reg1, spread, _ = result.averages().unbind()
        mean = self._mean
        if own_mean and not mean:
            mean = self._filled(result.means[-1])
            between = (between - total_sq_norm(mean.values())).clamp(min=0)
        others = [leaf for leaf in part.leaves if id(leaf) in grads]
        return replace(
            part,
            leaves=[*self._parameters.values(), *others],
            grads=[*result.means[0].values(), *(grads[id(leaf)] for leaf in others)],
            mean=mean,
            covariance=None if part.covariance is None else covariance + between if part.spread is None else spread,
            finite=None if part.finite is None else result.numbers[:, -1].bool().all(),
            reg1=None if part.reg1 is None else reg1,
            spread=None if part.spread is None else spread,
            count=result.count,
            loss=loss,
        )

    def _filled(self, mean: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Zeros where no rank reached a parameter."""
        return {
            name: torch.zeros_like(p, requires_grad=False) if (g := mean[name]) is None else g
            for name, p in self._parameters.items()
        }


class OfRanks(Whole):
    """A batch of which one rank has a part, ``here``, that the samples of a pass are, or are a part of."""

    alone = False

    def __init__(self, here: Whole, count: int, together: Together):
        """Keep the ``count`` samples of this rank."""
        self.share, self.known = here.share, here.known
        self._here, self._count, self._together = here, count, together

    def mean(self, own):
        """ḡ of all ranks, where a penalty needs it."""
        here = self._here.mean(own)
        return self._together.mean(here, self._count) if self._together.needs_mean else here

    def complete(self, part):
        """This rank's samples; their ``spread`` is that about ḡ of all, or is none."""
        part = self._here.complete(part)
        return part if self._together.needs_mean else replace(part, spread=None)
