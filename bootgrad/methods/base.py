"""What a method is given, a forward pass over samples and the penalties to differentiate, and what it hands back.

A method makes the gradient of the penalized mean loss of a batch from a pass over m of its B samples, S:

    m/B ∇L_S + λ₁ (2/m) Σ_S H_i (g_i − c₁) + λ₂ (2/m) Σ_S H_i (ḡ − c₂)  + (B − m)/B ∇L_rest

H_i is the Hessian of ℓ_i. For S the whole batch that is the gradient itself. For random samples its mean over all S is: the
first and the last part together are ∇L, always; the sums have the mean (2/B) Σ_i …, for ḡ is that of the whole batch, known
from the rest's plain pass, and so g_i − c₁ and ḡ − c₂ do not depend on S. About the batch mean c₁ = ḡ is a constant, too: what
its derivative would add is Σ_i (g_i − ḡ) = 0. (About ḡ_S instead, E_S (1/m) Σ_S ‖g_i − ḡ_S‖² = (m − 1) B/(m (B − 1)) Γ, so that
the factor m (B − 1)/((m − 1) B) would be needed, and m ≥ 2.) The variance of a sum over S is (1 − m/B) S²/m with S² that of its
B addends; the price of u forward-sized products becomes 3 + (m/B)(u − 3).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..penalties import Distances, total_sq_distance
from ..rules.terms import total
from ..second_pass import Replay
from ..statistics import record as Record

Directions = Mapping[str, Tensor]


@dataclass
class Forward:
    """Losses (m,) of a model, what was recorded of their forward pass, and the means to run it again."""

    losses: Tensor
    parameters: dict[str, Tensor]
    recording: Record | None
    replay: Replay | None

    def let_go(self) -> None:
        """Of the graph behind the losses."""
        if self.recording is not None:
            self.recording.release()
        self.losses = self.losses.detach()


@dataclass(frozen=True)
class Penalties:
    """λ by the penalties that are taken, the centers of both, and the random numbers of this step.

    A center is None where Reg1 is about the batch mean, and where Reg2 cannot be taken. ``statistics`` says whether Γ is
    wanted, and ``mean`` whether ḡ is: what the penalties themselves do not need is not made otherwise.
    """

    strengths: Mapping[str, float]
    centers: Mapping[str, Directions | None]
    generator: torch.Generator
    statistics: bool = True
    mean: bool = True

    def strength(self, name: str) -> float:
        """λ, zero for a penalty that is not taken."""
        return self.strengths.get(name, 0.0)


@dataclass(frozen=True)
class FirstOrder:
    """The gradient of the mean loss of n samples, without penalties.

    Attributes:
        losses: (n,), detached.
        leaves, grads: the gradient by leaf of the graph, None where it is not reached.
        mean: ḡ by parameter name; empty where it was not made.
        covariance: Γ of the n samples about their own mean, (), float64; nan where nothing tells it.
        finite: whether the losses are, where that was not waited for.
    """

    losses: Tensor
    leaves: list[Tensor]
    grads: list[Tensor | None]
    mean: dict[str, Tensor]
    covariance: Tensor
    finite: Tensor | None


@dataclass(frozen=True)
class Gradients(FirstOrder):
    """`FirstOrder` of a whole batch, with the penalties' gradients added to ``grads``.

    Attributes:
        distances: those of ``mean``.
        reg1: Reg1, (), where it is known otherwise than as Γ + ‖ḡ − c‖².
        notes: for the report.
    """

    distances: Distances
    reg1: Tensor | None = None
    notes: tuple[str, ...] = ()


class Method(ABC):
    """One way to the gradient of the penalties.

    Attributes:
        name: as users choose it, and reports name it.
        records: whether the forward pass has to be recorded.
        repeats: whether it is run more than once, for which the function that makes the losses is needed.
    """

    name: str
    records = True
    repeats = False

    @abstractmethod
    def plain(self, forward: Forward) -> FirstOrder:
        """The gradient of the mean loss alone; the graph is let go."""

    @abstractmethod
    def penalized(self, forward: Forward, penalties: Penalties, rest: FirstOrder | None) -> Gradients:
        """The gradient of the mean loss and the penalties.

        Args:
            forward: the pass over the samples that the penalties are taken on; its graph is let go.
            penalties: what to take.
            rest: the plain gradient of the batch's other samples, if there are any.
        """


def first_order(forward: Forward) -> FirstOrder:
    """The plain gradient and Γ from one backward pass through a recording."""
    recording, losses = forward.recording, forward.losses
    assert recording is not None
    reach = recording.reach(losses)
    B = losses.numel()
    seed = torch.full_like(losses, 1 / B, requires_grad=False)
    grads, by_name = recording._first_order(losses, reach, seed, None, False)
    leaves = [*reach.parameters.values(), *reach.other_leaves]
    forward.let_go()
    mean = mean_by_name(forward.parameters, leaves, grads)
    norms = total([torch.zeros(B, dtype=torch.float64, device=losses.device), *(s for s, _ in by_name.values())]) * B**2
    covariance = (norms.mean() - Distances(mean, {}).sq_mean).clamp(min=0)
    return FirstOrder(losses.detach(), leaves, list(grads), mean, covariance, reach.finite)


def mean_by_name(
    parameters: Mapping[str, Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """The gradient of each parameter, zeros where it is not among the leaves or was not reached."""
    by_leaf = {id(leaf): g for leaf, g in zip(leaves, grads, strict=True) if g is not None}
    return {
        name: by_leaf[id(p)].to_dense() if id(p) in by_leaf else torch.zeros_like(p, requires_grad=False)
        for name, p in parameters.items()
    }


@torch.no_grad()
def whole_mean(mean: dict[str, Tensor], m: int, rest: FirstOrder | None) -> dict[str, Tensor]:
    """ḡ of the batch, from that of m samples and of the rest."""
    if rest is None:
        return mean
    share = m / (m + rest.losses.numel())
    return dict(
        zip(mean, torch._foreach_lerp([rest.mean[name] for name in mean], list(mean.values()), share), strict=True)
    )


@torch.no_grad()
def whole_covariance(covariance: Tensor, mean: Directions, m: int, rest: FirstOrder | None) -> Tensor:
    """Γ of the batch from the parts' own: Σ_parts share (Γ_part + ‖ḡ_part − ḡ‖²)."""
    if rest is None:
        return covariance
    share = m / (m + rest.losses.numel())
    apart = total_sq_distance(mean.values(), (rest.mean[name] for name in mean))
    return share * covariance + (1 - share) * rest.covariance + share * (1 - share) * apart


def whole_losses(losses: Tensor, finite: Tensor | None, rest: FirstOrder | None) -> tuple[Tensor, Tensor | None]:
    """The losses of the batch, detached, and whether they are finite where that was not waited for."""
    if rest is None:
        return losses.detach(), finite
    both = None if finite is None or rest.finite is None else finite & rest.finite
    return torch.cat([losses.detach(), rest.losses]), both


def after_second(losses: Tensor, finite: Tensor | None, second: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The losses and whether they are finite, both spoiled where a second pass, of which nobody waited, was not."""
    if finite is None or second is None:
        return losses, finite
    return torch.where(second, losses, torch.nan), finite & second


@torch.no_grad()
def combined(*parts: tuple[float | Tensor, Sequence[Tensor], Sequence[Tensor | None]]) -> tuple[list, list]:
    """Σ_k weight_k · grads_k by leaf: the leaves of all parts, each once, and the sums.

    Args:
        parts: weight, leaves, and gradients, of each.
    """
    leaves: dict[int, Tensor] = {}
    sums: dict[int, Tensor] = {}
    for weight, own, grads in parts:
        for leaf, g in zip(own, grads, strict=True):
            leaves[id(leaf)] = leaf
            if g is None:
                continue
            if id(leaf) not in sums:
                sums[id(leaf)] = g if isinstance(weight, float) and weight == 1 else weight * g
            elif isinstance(weight, float):
                sums[id(leaf)] = torch.add(sums[id(leaf)], g, alpha=weight)
            else:
                sums[id(leaf)] = sums[id(leaf)] + weight * g
    return list(leaves.values()), [sums.get(key) for key in leaves]
