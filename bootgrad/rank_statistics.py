"""What ranks tell each other of a backward pass for its statistics, in one round: gradients in, norms as means over samples.

    (1/B) Σ_i ‖g_i‖² = Σ_r (m_r/B) (1/m_r) Σ_{i on r} ‖g_i‖²        Γ = (1/B) Σ_i ‖g_i‖² − ‖ḡ‖²

The norms themselves, one for each sample, stay on their rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed import Named, Ranks, Round, Rounds


@dataclass(frozen=True)
class Everywhere:
    """What the samples of all ranks have.

    Attributes:
        batch_size: B.
        mean_sq_norm: (1/B) Σ_i ‖g_i‖², (), float64.
        mean_sq_deviation: (1/B) Σ_i ‖g_i − c‖², (), float64, where a center was given.
    """

    batch_size: int
    mean_sq_norm: Tensor
    mean_sq_deviation: Tensor | None = None


class Exchange:
    """The one round of a backward pass.

    Args:
        ranks: who takes part.
        parameters: by name.
        centered: whether norms are taken about a center, too.
        sets: of gradients: of the mean loss, and of a weighted one, where that is wanted, too.
        watched: how many of the parameters, the first ones, norms are taken of; all when None.

    Attributes:
        rounds: the one.
    """

    def __init__(
        self,
        ranks: Ranks,
        parameters: Mapping[str, Tensor],
        centered: bool,
        sets: int = 1,
        watched: int | None = None,
    ):
        """Plan it."""
        self._kinds = 1 + centered
        norms = len(parameters) if watched is None else watched
        self.rounds = Rounds(ranks, parameters, [(sets, 1 + self._kinds * norms)])
        self._round: Round | None = None

    def bring(self, sets: Sequence[Named], weight: float | Tensor, finite: Tensor | None) -> None:
        """Of this rank: ``weight`` times each tensor is summed over ranks; ``finite`` says whether its losses are."""
        self._sets, self._weight, self._finite = sets, weight, finite

    def meet(self, sq_norms: Sequence[Tensor], deviations: Sequence[Tensor] | None) -> list[Everywhere]:
        """Take the round, with ‖g_i‖² and ‖g_i − c‖² of this rank, (m,) by parameter; those of all come back as means."""
        rows = torch.stack([*sq_norms, *(deviations or ())]).double().mean(1)
        finite = rows.new_ones(1) if self._finite is None else self._finite.to(rows).reshape(1)
        self._round = self.rounds.take(sq_norms[0].numel(), self._sets, torch.cat([finite, rows]), self._weight)
        means = self._round.averages()[1:].view(self._kinds, -1)
        return [Everywhere(self._round.count, *column.unbind()) for column in means.unbind(1)]

    def mean(self, k: int = 0) -> dict[str, Tensor | None]:
        """The sum over ranks of the k-th set of tensors, divided by B, by name; then."""
        assert self._round is not None
        return self._round.means[k]

    @property
    def finite(self) -> Tensor | None:
        """Whether the losses of all are, where that was not waited for."""
        assert self._round is not None
        return None if self._finite is None else self._round.numbers[:, 0].bool().all()
