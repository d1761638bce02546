"""The penalties' own derivative, through the differentiable matrix of the per-sample gradients."""

import torch
from torch import Tensor

from .. import graph
from ..errors import UnsupportedError
from ..penalties import Distances, reg1, reg2
from ..per_sample import PerSampleGradients
from ..rules.terms import total
from ..statistics import difference
from .base import (
    Directions,
    FirstOrder,
    Forward,
    Gradients,
    Method,
    Penalties,
    combined,
    first_order,
    whole_covariance,
    whole_losses,
    whole_mean,
)
from .weighted import unrecorded

LARGEST_RATIO = 10.0  # λ₂/λ₁ up to which one visit is made for both penalties


class Exact(Method):
    """λ₁ Reg1 + λ₂ Reg2 differentiated as they are: no bias, no variance on the whole batch; 2.0 to 3.0 plain steps."""

    name = "exact"

    def plain(self, forward: Forward) -> FirstOrder:
        """One backward pass, with Γ where it was recorded."""
        return first_order(forward) if forward.recording else unrecorded(forward)

    def penalized(self, forward: Forward, penalties: Penalties, rest: FirstOrder | None) -> Gradients:
        """One backward pass through the objective."""
        recording, losses = forward.recording, forward.losses
        assert recording is not None
        G = recording.per_sample_gradients(losses, create_graph=True)
        assert recording.last_reach is not None
        # All parameters: a center may depend on what this batch does not reach.
        leaves = [*forward.parameters.values(), *recording.last_reach.other_leaves]
        if not penalties.mean:
            G._forgo_mean()
        if penalties.statistics and not penalties.strength("reg1"):
            with torch.no_grad():
                G.sq_norms()  # for Γ, in the visit that makes ḡ
        objective, about, value = _objective(G, losses, penalties, rest)
        with torch.no_grad():
            own = G.mean() if penalties.mean else {}
        mean = whole_mean(own, G.batch_size, rest) if own else {}
        distances = Distances(mean, penalties.centers)
        covariance = torch.full_like(distances.sq_mean, torch.nan)
        if penalties.statistics:
            around = (
                distances if about is penalties.centers["reg1"] and rest is None else Distances(own, {"reg1": about})
            )
            covariance = whole_covariance(_covariance(G, value, around), own, G.batch_size, rest)
        all_losses, finite = whole_losses(losses, recording.last_reach.finite, rest)
        try:
            grads: list[Tensor | None] = list(torch.autograd.grad(objective, leaves, allow_unused=True))
        except RuntimeError as error:
            if "is not implemented" in str(error):
                raise UnsupportedError(
                    f"an operation of the model has no second derivative in torch ({error}): use an implementation that has, "
                    'or method="random_signs" with derivative="finite_difference", an estimate'
                ) from error
            raise
        recording.release()
        if rest is not None:
            share = rest.losses.numel() / all_losses.numel()
            leaves, grads = combined((1.0, leaves, grads), (share, rest.leaves, rest.grads))
        # About a center that takes Reg2 along, the value is not Reg1's.
        estimate = None if penalties.statistics or penalties.strength("reg2") else value
        return Gradients(all_losses, leaves, grads, mean, covariance, finite, distances, estimate)


def _objective(
    G: PerSampleGradients, losses: Tensor, penalties: Penalties, rest: FirstOrder | None
) -> tuple[Tensor, Directions | None, Tensor | None]:
    """A function whose gradient is that of the samples' part of the batch's objective; a center, and Reg1 about it.

    L + λ₁ Reg1 + λ₂ Reg2 for a whole batch, else m/B L_S + λ₁ (1/m) Σ_S ‖g_i − c₁‖² + 2 λ₂ ⟨ḡ_S, ḡ − c₂⟩ with ḡ held constant.
    Both penalties together are one of them about a center that takes the other along, λ₁ (1/m) Σ_S ‖g_i − c‖² with
    c = c₁ − (λ₂/λ₁)(ḡ − c₂): the same gradient for the price of one. Where λ₂ is much the larger, that would be far away, and Γ
    lost in the distance.
    """
    lambda_1, lambda_2 = penalties.strength("reg1"), penalties.strength("reg2")
    c1, c2 = penalties.centers["reg1"], penalties.centers["reg2"]
    share = 1.0 if rest is None else G.batch_size / (G.batch_size + rest.losses.numel())
    loss = share * losses.mean()
    if not lambda_1 and rest is None:
        return loss + lambda_2 * reg2(G, c2), c1, None  # type: ignore[arg-type]
    if not lambda_2 and (rest is None or c1 is not None):
        value = reg1(G, c1)
        return loss + lambda_1 * value, c1, value.detach()
    with torch.no_grad():
        mean = whole_mean(G.mean(), G.batch_size, rest)
        away = mean if c2 is None else {name: g - c2[name] for name, g in mean.items()}
    about = mean if c1 is None else c1
    if 0 < lambda_2 <= LARGEST_RATIO * lambda_1:
        about = {name: c - lambda_2 / lambda_1 * away[name] for name, c in about.items()}
    elif lambda_2:
        loss = loss + 2 * lambda_2 * total((g * away[name]).sum() for name, g in G.mean().items())
    if not lambda_1:
        return loss, c1, None
    value = reg1(G, about)
    return loss + lambda_1 * value, about, value.detach()


@torch.no_grad()
def _covariance(G: PerSampleGradients, value: Tensor | None, own: Distances) -> Tensor:
    """Γ of the samples, from Reg1 = Γ + ‖ḡ − c‖² where it is there."""
    about = own.about
    covariance = None if value is None else (value.double() - about).clamp(min=0)
    # About a far center Γ is lost in ‖ḡ − c‖²: then it is worth another visit, where to ask does not stop a device.
    if covariance is None or (
        graph.answers_at_once(about) and not about <= torch.maximum(own.sq_mean, 100 * covariance)
    ):
        covariance = difference(G.sq_norms().double(), own.sq_mean)
    return covariance
