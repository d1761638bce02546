"""The penalties' gradient from one more pass at displaced parameters, in place of a second derivative.

    ∇L + (2/(ε B)) Σ_i [∇ℓ_i(θ + ε δ_i) − ∇ℓ_i(θ)],    δ_i = λ₁ (g_i − c₁) + λ₂ (ḡ − c₂)

tends to the exact gradient ∇L + (2/B) Σ_i H_i δ_i as ε → 0, with an error of ε/B Σ_i ∇³ℓ_i[δ_i, δ_i] on smooth networks. About
the batch mean c₁ = ḡ. Where Reg1 is not taken all samples share δ, and the pass is an ordinary one.

**Where a network is not smooth** — ReLU, max-pooling — **this is another estimate**, not an approximation of the exact one: a
unit that changes sides between θ and θ + ε δ changes the gradient by a finite amount, which over ε is large where it happens
and which no derivative at θ knows of. What comes out is the derivative of a penalty smoothed over steps of that length.
"""

import torch

from ..graph import gradients
from ..penalties import Distances
from ..second_pass import check_parameters, check_second, displaced, finite_step, quotient
from .base import (
    FirstOrder,
    Forward,
    Gradients,
    Method,
    Penalties,
    after_second,
    combined,
    first_order,
    whole_covariance,
    whole_losses,
    whole_mean,
)


class FiniteDifference(Method):
    """Forward differences of first-order passes: biased by O(ε), without variance on the whole batch; 2.0 plain steps for Reg2.

    Args:
        epsilon: ε‖δ‖ over ‖θ‖, root mean square over samples.
    """

    name = "finite_difference"
    repeats = True

    def __init__(self, epsilon: float):
        """Keep the step's length."""
        self.epsilon = epsilon

    def plain(self, forward: Forward) -> FirstOrder:
        """One recorded backward pass."""
        return first_order(forward)

    def penalized(self, forward: Forward, penalties: Penalties, rest: FirstOrder | None) -> Gradients:
        """A first pass with its statistics, and one at displaced parameters."""
        check_parameters(forward.parameters)
        m = forward.losses.numel()
        first = first_order(forward)
        mean = whole_mean(first.mean, m, rest)
        losses, finite = whole_losses(first.losses, first.finite, rest)
        distances = Distances(mean, penalties.centers)
        covariance = whole_covariance(first.covariance, first.mean, m, rest, mean)
        parts = [(m / losses.numel(), first.leaves, first.grads)]
        if rest is not None:
            parts.append((rest.losses.numel() / losses.numel(), rest.leaves, rest.grads))
        c = penalties.centers["reg2"]
        if "reg2" in penalties.strengths and c is not None:
            direction = {name: g - c[name] for name, g in mean.items()}
            spread = Distances(direction, {}).sq_mean.sqrt()
            step = finite_step(spread, list(forward.parameters.values()), self.epsilon)
            assert forward.replay is not None
            with displaced(forward.parameters, direction, step), forward.replay.again() as again:
                losses, finite = after_second(losses, finite, check_second(again, m))
                weights = torch.full_like(again, 1 / m, requires_grad=False)
                moved = gradients(again, first.leaves, weights, allow_unused=True)
            parts.append((2 * penalties.strengths["reg2"], first.leaves, quotient(moved, first.grads, step)))
        leaves, grads = combined(*parts)
        return Gradients(losses, leaves, grads, mean, covariance, finite, distances)
