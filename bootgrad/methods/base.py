"""What a method is given, a forward pass over samples and the penalties to differentiate, and what it hands back.

A method makes the gradient of a mean loss and of the penalties from a pass over m samples S of a batch of B:

    w ∇L_S + λ₁ (2/m) Σ_S H_i (g_i − c₁) + λ₂ (2/m) Σ_S H_i (ḡ − c₂)

H_i is the Hessian of ℓ_i, w what the samples' own mean loss weighs. ḡ is that of the whole batch: it is all that penalties on S
depend on beside S, and where it comes from is told by a `Whole`. About the batch mean c₁ = ḡ is a constant, too: what its
derivative would add is Σ_i (g_i − ḡ) = 0, over the whole batch. For S the whole batch and w = 1 that is the gradient itself.
Penalties on parts of a batch, averaged with their shares m/B, are those of the batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..graph import Reach
from ..penalties import Distances, total_sq_norm
from ..rules.terms import total
from ..scaling import Scale, Scaling, multiplied, seeds
from ..second_pass import Replay
from ..statistics import record as Record

Directions = Mapping[str, Tensor]


@dataclass
class Forward:
    """Losses (m,) of a model, what was recorded of their forward pass, the means to run it again, and how losses are scaled."""

    losses: Tensor
    parameters: dict[str, Tensor]
    recording: Record | None
    replay: Replay | None
    scaling: Scaling = field(default_factory=Scaling)
    scale: Scale = Scale(1.0)

    def reach(self) -> Reach:
        """What the recorded losses depend on; then ``scale`` says what they are to be multiplied by."""
        assert self.recording is not None
        self.recording.scaling = self.scaling
        reach = self.recording.reach(self.losses)
        self.scale = self.scaling.of(reach.narrow, self.losses.numel())
        return reach

    def let_go(self) -> None:
        """Of the graph behind the losses."""
        if self.recording is not None:
            self.recording.release()
        self.losses = self.losses.detach()


@dataclass(frozen=True)
class Penalties:
    """What the penalties that are taken are multiplied by, the centers of both, and the random numbers of this step.

    A center is None where Reg1 is about the batch mean, and where Reg2 cannot be taken. ``statistics`` says whether Γ is
    wanted, and ``mean`` whether ḡ is: what the penalties themselves do not need is not made otherwise. Without ``others``,
    leaves outside of the model have the gradient of the mean loss alone.
    """

    strengths: Mapping[str, float]
    centers: Mapping[str, Directions | None]
    generator: torch.Generator
    statistics: bool = True
    mean: bool = True
    others: bool = True

    def strength(self, name: str) -> float:
        """λ, zero for a penalty that is not taken."""
        return self.strengths.get(name, 0.0)

    @property
    def needs_mean(self) -> bool:
        """Whether what is taken depends on ḡ."""
        return "reg2" in self.strengths or ("reg1" in self.strengths and self.centers["reg1"] is None)


@dataclass(frozen=True)
class FirstOrder:
    """The gradient of the mean loss of n samples, without penalties.

    Attributes:
        losses: (n,), detached.
        leaves, grads: the gradient by leaf of the graph, None where it is not reached.
        mean: ḡ by parameter name; empty where it was not made.
        covariance: Γ of the n samples about their own mean, (), float64; None where nothing tells it.
        finite: whether the losses are, where that was not waited for.
    """

    losses: Tensor
    leaves: list[Tensor]
    grads: list[Tensor | None]
    mean: dict[str, Tensor]
    covariance: Tensor | None
    finite: Tensor | None


@dataclass(frozen=True)
class Gradients(FirstOrder):
    """`FirstOrder` of the samples of a pass, with the penalties' gradients in ``grads``, beside w times that of the mean loss.

    Attributes:
        reg1: (1/m) Σ_S ‖g_i − c₁‖², (), where it is known otherwise than as Γ + ‖ḡ − c‖².
        spread: (1/m) Σ_S ‖g_i − ḡ‖² about the mean of the whole batch, (), or an estimate, where the pass tells it: averaged
            over the parts of a batch that is Γ.
        count, loss: of the whole batch, where losses are those of one rank of several.
        notes: for the report.
    """

    reg1: Tensor | None = None
    spread: Tensor | None = None
    notes: tuple[str, ...] = ()
    count: int | None = None
    loss: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """B."""
        return self.losses.numel() if self.count is None else self.count

    def value(self, name: str, distances: Distances) -> Tensor | None:
        """Reg1 = Γ + ‖ḡ − c₁‖² or Reg2 = ‖ḡ − c₂‖², (); nan where Γ is not known, None where there is no c₂."""
        if name == "reg2":
            return distances.from_center["reg2"]
        if self.reg1 is not None:
            return self.reg1
        return distances.about + (torch.nan if self.covariance is None else self.covariance)


class Whole:
    """The batch that the samples of a pass are a part of: they alone, unless a subclass says otherwise.

    Attributes:
        share: w, what the samples' own mean loss weighs beside the penalties.
        alone: whether they are all that there are.
        known: whether ḡ, and with it all that is of first order, is known from an earlier pass.
    """

    share = 1.0
    alone = True
    known = False

    def mean(self, own: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """ḡ by parameter name, in the midst of the pass, as soon as ``own`` can make that of its samples."""
        return own()

    def complete(self, part: Gradients) -> Gradients:
        """What a pass over the samples gave, as what it is to the whole batch."""
        return part if part.spread is None else replace(part, covariance=part.spread)


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
    def penalized(self, forward: Forward, penalties: Penalties, whole: Whole) -> Gradients:
        """The gradient of the mean loss and the penalties.

        Args:
            forward: the pass over the samples that the penalties are taken on; its graph is let go.
            penalties: what to take.
            whole: the batch that they are a part of.
        """


def first_order(forward: Forward) -> FirstOrder:
    """The plain gradient and Γ from one backward pass through a recording."""
    recording, losses = forward.recording, forward.losses
    assert recording is not None
    reach, scale = forward.reach(), forward.scale
    grads, by_name = recording._first_order(losses, reach, seeds(losses, scale.sample), None, False)
    grads, leaves = multiplied(grads, scale.to_mean), [*reach.parameters.values(), *reach.other_leaves]
    forward.let_go()
    mean = mean_by_name(forward.parameters, leaves, grads)
    zeros = torch.zeros(losses.numel(), dtype=torch.float64, device=losses.device)
    norms = total([zeros, *(s for s, _ in by_name.values())]) / scale.sample**2
    covariance = (norms.mean() - total_sq_norm(mean.values())).clamp(min=0)
    return FirstOrder(losses.detach(), leaves, grads, mean, covariance, reach.finite)


def mean_by_name(
    parameters: Mapping[str, Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """The gradient of each parameter, zeros where it is not among the leaves or was not reached."""
    by_leaf = {id(leaf): g for leaf, g in zip(leaves, grads, strict=True) if g is not None}
    return {
        name: by_leaf[id(p)].to_dense() if id(p) in by_leaf else torch.zeros_like(p, requires_grad=False)
        for name, p in parameters.items()
    }


def after_second(losses: Tensor, finite: Tensor | None, second: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The losses and whether they are finite, both spoiled where a second pass, of which nobody waited, was not."""
    if finite is None or second is None:
        return losses, finite
    return torch.where(second, losses, torch.nan), finite & second


def of_parameters(
    parameters: Mapping[str, Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The leaves that are parameters, and their gradients."""
    own = set(map(id, parameters.values()))
    kept = [(leaf, g) for leaf, g in zip(leaves, grads, strict=True) if id(leaf) in own]
    return [leaf for leaf, _ in kept], [g for _, g in kept]


@torch.no_grad()
def combined(*parts: tuple[float | Tensor, Sequence[Tensor], Sequence[Tensor | None]]) -> tuple[list, list]:
    """Σ_k weight_k · grads_k by leaf: the leaves of all parts, each once, and the sums; nothing is made of a weight of zero.

    Args:
        parts: weight, leaves, and gradients, of each.
    """
    leaves: dict[int, Tensor] = {}
    sums: dict[int, Tensor] = {}
    for weight, own, grads in parts:
        for leaf, g in zip(own, grads, strict=True):
            leaves[id(leaf)] = leaf
            if g is None or (isinstance(weight, float) and weight == 0):
                continue
            if id(leaf) not in sums:
                sums[id(leaf)] = g if isinstance(weight, float) and weight == 1 else weight * g
            elif isinstance(weight, float):
                sums[id(leaf)] = torch.add(sums[id(leaf)], g, alpha=weight)
            else:
                sums[id(leaf)] = sums[id(leaf)] + weight * g
    return list(leaves.values()), [sums.get(key) for key in leaves]
