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


class Exact(Method):
    """λ₁ Reg1 + λ₂ Reg2 differentiated as they are: no bias, no variance on the whole batch; 2.0 to 3.0 plain steps."""

    name = "exact"

    def plain(self, forward: Forward) -> FirstOrder:
        """One recorded backward pass."""
        return first_order(forward)

    def penalized(self, forward: Forward, penalties: Penalties, rest: FirstOrder | None) -> Gradients:
        """One backward pass through the objective."""
        recording, losses = forward.recording, forward.losses
        assert recording is not None
        G = recording.per_sample_gradients(losses, create_graph=True)
        assert recording.last_reach is not None
        # All parameters: a center may depend on what this batch does not reach.
        leaves = [*forward.parameters.values(), *recording.last_reach.other_leaves]
        objective, values = _whole(G, losses, penalties) if rest is None else _part(G, losses, penalties, rest)
        with torch.no_grad():
            own = G.mean()
        mean = whole_mean(own, G.batch_size, rest)
        distances = Distances(mean, penalties.centers)
        around = distances if rest is None else Distances(own, {"reg1": penalties.centers["reg1"] or mean})
        covariance = whole_covariance(_covariance(G, values, around), own, G.batch_size, rest, mean)
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
        return Gradients(all_losses, leaves, grads, mean, covariance, finite, distances, {} if rest else values)


def _whole(G: PerSampleGradients, losses: Tensor, penalties: Penalties) -> tuple[Tensor, dict[str, Tensor]]:
    """L + λ₁ Reg1 + λ₂ Reg2 of the whole batch, and the penalties' values."""
    objective = losses.mean()
    values = {}
    for name, function in (("reg1", reg1), ("reg2", reg2)):
        if name in penalties.strengths:
            value = function(G, penalties.centers[name])  # type: ignore[arg-type]
            objective = objective + penalties.strengths[name] * value
            values[name] = value.detach()
    return objective, values


def _part(
    G: PerSampleGradients, losses: Tensor, penalties: Penalties, rest: FirstOrder
) -> tuple[Tensor, dict[str, Tensor]]:
    """A function whose gradient is that of m samples' part of the batch's objective, and Reg1 of the samples.

    m/B L_S + λ₁ (1/m) Σ_S ‖g_i − c₁‖² + 2 λ₂ ⟨ḡ_S, ḡ − c₂⟩, with ḡ held constant.
    """
    m = G.batch_size
    with torch.no_grad():
        mean = whole_mean(G.mean(), m, rest)
    objective = m / (m + rest.losses.numel()) * losses.mean()
    values = {}
    if "reg1" in penalties.strengths:
        value = reg1(G, penalties.centers["reg1"] or mean)
        objective = objective + penalties.strengths["reg1"] * value
        values["reg1"] = value.detach()
    c = penalties.centers["reg2"]
    if "reg2" in penalties.strengths and c is not None:
        inner = total((g * (mean[name] - c[name])).sum() for name, g in G.mean().items())
        objective = objective + 2 * penalties.strengths["reg2"] * inner
    return objective, values


@torch.no_grad()
def _covariance(G: PerSampleGradients, values: dict[str, Tensor], own: Distances) -> Tensor:
    """Γ of the samples, from Reg1 = Γ + ‖ḡ − c‖² where it is there."""
    about = own.about
    covariance = (values["reg1"].double() - about).clamp(min=0) if "reg1" in values else None
    # About a far center Γ is lost in ‖ḡ − c‖²: then it is worth another visit, where to ask does not stop a device.
    if covariance is None or (graph.answers_at_once(about) and about > torch.maximum(own.sq_mean, 100 * covariance)):
        covariance = difference(G.sq_norms().double(), own.sq_mean)
    return covariance
