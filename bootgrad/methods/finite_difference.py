"""The penalties' gradient from one more pass at displaced parameters, in place of a second derivative.

    ∇L + (2/(ε B)) Σ_i [∇ℓ_i(θ + ε δ_i) − ∇ℓ_i(θ)],    δ_i = λ₁ (g_i − c₁) + λ₂ (ḡ − c₂)

tends to the exact gradient ∇L + (2/B) Σ_i H_i δ_i as ε → 0, with an error of ε/B Σ_i ∇³ℓ_i[δ_i, δ_i] on smooth networks. About
the batch mean c₁ = ḡ. Where Reg1 is not taken all samples share δ, and the pass is an ordinary one.

**Where a network is not smooth** — ReLU, max-pooling — **this is another estimate**, not an approximation of the exact one: a
unit that changes sides between θ and θ + ε δ changes the gradient by a finite amount, which over ε is large where it happens
and which no derivative at θ knows of. What comes out is the derivative of a penalty smoothed over steps of that length, with
noise: the shorter the step, the fewer and the larger the jumps.

**Where a value is detached**, or a backward pass is not that of its forward pass (straight-through estimators), this is another
quantity: the exact gradient holds what is detached constant, and the second pass, which runs the function anew, moves it. Take
``method="exact"`` for such models.

The step's length is relative, ε‖δ‖ = epsilon·‖θ‖. In float32, the penalties' gradients of a CNN (two convolutions, group norm,
two linear layers) on 64 digits, Reg1, Reg2 and random signs, were off by, relative to their norms:

    epsilon                                1e-5             1e-4             1e-3
    tanh or GELU, average pooling, new     3e-4 … 3e-3      8e-4 … 4e-3      8e-3 … 4e-2
    the same after 300 steps               8e-4 … 6e-3      6e-3 … 6e-2      6e-2 … 4e-1
    ReLU, max-pooling, new                 4e-4 … 1e+2      8e-4 … 1e+1      2e+0 … 4e+0
    the same after 300 steps               2e-3 … 7e-3      9e-3 … 7e-2      3e-1 … 7e-1

To the left rounding grows, to the right the third derivative; 1e-4 leaves room for either, and jumps smaller than 1e-5 does.
"""

from torch import Tensor

from ..graph import gradients
from ..penalties import total_sq_norm
from ..per_sample import PerSampleGradients
from ..per_sample_pass import PerSamplePass
from ..rules.process_wide import eager
from ..rules.terms import total
from ..scaling import multiplied, seeds
from ..second_pass import check_parameters, check_second, displaced, finite_step, quotient
from ..statistics import difference
from .base import (
    FirstOrder,
    Forward,
    Gradients,
    Method,
    Penalties,
    Whole,
    after_second,
    combined,
    first_order,
    of_parameters,
)
from .weighted import unrecorded


class FiniteDifference(Method):
    """Forward differences of first-order passes: biased by O(ε), without variance on the whole batch.

    Price in forward-sized products, of which a plain step has 3: 6, and for Reg1 the products of the samples' own displacements
    with the inputs and the gradients of each layer, 2 more where they are as large as the layer's. For Reg1 the length of the
    step is a number, for which an accelerator is waited for once.

    Args:
        epsilon: ε‖δ‖ over ‖θ‖, root mean square over samples.
    """

    name = "finite_difference"
    repeats = True

    def __init__(self, epsilon: float):
        """Keep the step's length."""
        self.epsilon = epsilon

    def plain(self, forward: Forward) -> FirstOrder:
        """One backward pass, with Γ where it was recorded."""
        return first_order(forward) if forward.recording else unrecorded(forward)

    def penalized(self, forward: Forward, penalties: Penalties, whole: Whole) -> Gradients:
        """A first pass with its statistics, and one at displaced parameters."""
        check_parameters(forward.parameters)
        has_rows = "reg1" in penalties.strengths and forward.losses.numel() > 1
        first, G = _with_rows(forward) if has_rows else (first_order(forward), None)
        second, quotients, sq_spread = self._second(forward, penalties, first, G, whole.mean(lambda: first.mean))
        losses, finite = after_second(first.losses, first.finite, second)
        added = first.leaves, quotients
        if not penalties.others:
            added = of_parameters(forward.parameters, *added)
        leaves, grads = combined((whole.share, first.leaves, first.grads), (2.0, *added))
        tells_reg1 = "reg2" not in penalties.strengths and not penalties.statistics
        reg1 = sq_spread / penalties.strength("reg1") ** 2 if tells_reg1 else None
        return Gradients(losses, leaves, grads, first.mean, first.covariance, finite, reg1)

    def _second(self, forward: Forward, penalties: Penalties, first: FirstOrder, G: PerSampleGradients | None, mean):
        """Whether the losses at θ + ε δ_i are finite, (∇L_S there − ∇L_S)/ε, and the mean of ‖δ_i‖².

        With rows G, δ_i is λ₁ g_i and what all samples share, else they share it all.
        """
        strength1, strength2 = penalties.strength("reg1"), penalties.strength("reg2")
        c1, c2 = penalties.centers["reg1"] or mean, penalties.centers["reg2"] or mean

        def shared(name: str) -> Tensor:
            own = -c1[name] if G is not None else first.mean[name] - c1[name]
            return strength2 * (mean[name] - c2[name]) + strength1 * own

        if G is None:
            sq_spread = total(total_sq_norm([shared(name)]) for name in first.mean)
        else:
            of_mean = total(total_sq_norm([strength1 * g + shared(name)]) for name, g in first.mean.items())
            assert first.covariance is not None
            sq_spread = strength1**2 * first.covariance + of_mean
        step = finite_step(sq_spread.sqrt(), list(forward.parameters.values()), self.epsilon)
        assert forward.replay is not None and forward.recording is not None
        scale, context = forward.scale, None
        if G is not None:  # its rows are scaled
            factor, recording = strength1 * float(step / scale.first), forward.recording
            context = PerSamplePass(G, factor, *recording.modules, batchnorm=recording.batchnorm)
        # As the first pass: of two kinds of kernels, the difference of roundings would be divided by the step, too.
        with eager, displaced(forward.parameters, shared, step), forward.replay.again(context) as losses:
            second = check_second(losses, first.losses.numel(), forward.scaling)
            moved = gradients(losses, first.leaves, seeds(losses, scale.sample), allow_unused=True)
        return second, quotient(multiplied(moved, scale.to_mean), first.grads, step), sq_spread


def _with_rows(forward: Forward) -> tuple[FirstOrder, PerSampleGradients]:
    """As `first_order`, and the rows σ̃ g_i, see `scaling`, from which the mean and the norms are made."""
    recording, losses = forward.recording, forward.losses
    assert recording is not None
    reach = forward.reach()
    scale = forward.scale
    G = recording._per_sample_gradients(losses, reach, create_graph=False, scale=scale.first)
    others = gradients(losses, reach.other_leaves, seeds(losses, scale.sample), allow_unused=True)
    values = G._mean_values()
    mean = dict(zip(values, multiplied(list(values.values()), 1 / scale.first), strict=True))
    leaves = [*reach.parameters.values(), *reach.other_leaves]
    grads = [*(mean[name] for name in reach.parameters), *multiplied(others, scale.to_mean)]
    covariance = difference(G.sq_norms().double() / scale.first**2, total_sq_norm(mean.values()))
    forward.let_go()
    return FirstOrder(losses.detach(), leaves, grads, mean, covariance, reach.finite), G
