"""Reg1 estimated from one random combination of the samples instead of all of them, for any architecture.

    Reg1 ≈ (1/m) ‖d‖²,   d = Σ_i v_i (g_i − c),   v_i = ±1 with equal chances, independent

Unbiased: E v_i v_j = δ_ij, so that E ‖d‖² = Σ_i ‖g_i − c‖². About the batch mean the weights are a_i = v_i − v̄: c drops out,
for Σ a_i = 0, and E a_i a_j = δ_ij − 1/B gives Σ_i ‖g_i‖² − B ‖ḡ‖² = B Γ. Both hold at every θ, and thus for the gradient

    (2/m) Σ_i v_i H_i d  =  (2/m) [∇L_v(θ + ε d) − ∇L_v(θ)] / ε + O(ε),   L_v = Σ_i v_i ℓ_i

whose mean is (2/m) Σ_i H_i (g_i − c). The variance of the estimate of Reg1 is (2/m²) Σ_{i≠j} ⟨g_i − c, g_j − c⟩² over the
number of probes, that of its gradient falls likewise: it is small where the deviations are many and nearly orthogonal.

Letters: ``v`` signs, ``w`` the weights made of them, ``D`` = Σ_i w_i g_i.
"""

import torch
from torch import Tensor

from ..penalties import Distances, total_sq_norm
from ..per_sample import sq_norm
from ..rules.terms import total
from ..second_pass import check_parameters, check_second, displaced, finite_step, quotient
from .base import (
    Directions,
    FirstOrder,
    Forward,
    Gradients,
    Method,
    Penalties,
    after_second,
    combined,
    mean_by_name,
    whole_losses,
    whole_mean,
)
from .weighted import WeightedPass, second_derivatives


class RandomSigns(Method):
    """Reg1 by random signs, Reg2 as it is; by double backward, or by finite differences of first-order passes.

    Nothing is recorded, so that nothing finds samples that are coupled by batch statistics or otherwise: what comes out is then
    about the derivatives of Σ w_i ℓ_i, which are no samples' own.

    Price in forward-sized products, of which a plain step has 3: by finite differences 3, and 5 more for each probe (6 with a
    compiled model) and 3 for Reg2; by double backward 3, and 8 more for each probe and for Reg2.

    Args:
        probes: vectors of signs that are averaged over.
        exact: differentiate ‖d‖² itself, not by finite differences.
        epsilon: length of the finite step, relative to ‖θ‖.
    """

    name = "random_signs"
    records = False

    def __init__(self, probes: int, exact: bool, epsilon: float):
        """Keep the options."""
        self.probes, self.exact, self.epsilon = probes, exact, epsilon
        self.repeats = not exact

    def plain(self, forward: Forward) -> FirstOrder:
        """One backward pass; Γ is not known, nan."""
        pass_ = WeightedPass(forward)
        grads = pass_.gradient(torch.full_like(forward.losses, 1 / forward.losses.numel()), last=True)
        mean = mean_by_name(forward.parameters, pass_.leaves, grads)
        unknown = torch.full_like(Distances(mean, {}).sq_mean, torch.nan)
        return FirstOrder(forward.losses.detach(), pass_.leaves, grads, mean, unknown, pass_.finite)

    def penalized(self, forward: Forward, penalties: Penalties, rest: FirstOrder | None) -> Gradients:
        """The mean gradient, and one or two more passes for each penalty and probe."""
        if not self.exact:
            check_parameters(forward.parameters)
        m = forward.losses.numel()
        run = WeightedPass(forward)
        uniform = torch.full_like(forward.losses, 1 / m, requires_grad=False)
        probes = self.probes if "reg1" in penalties.strengths else 0
        own = run.gradient(uniform, last=not (self.exact or probes))
        mean = whole_mean(mean_by_name(forward.parameters, run.leaves, own), m, rest)
        distances = Distances(mean, penalties.centers)
        c1, c2 = penalties.centers["reg1"], penalties.centers["reg2"]
        centered = c1 is None and rest is None
        signs = [draw_signs(m, penalties.generator).to(forward.losses) for _ in range(probes)]
        signs = [v - v.mean() if centered else v for v in signs]
        about = None if centered else c1 or mean
        toward = {name: g - c2[name] for name, g in mean.items()} if "reg2" in penalties.strengths and c2 else None
        losses, finite = whole_losses(forward.losses, run.finite, rest)
        parts = [(m / losses.numel(), run.leaves, own)]
        if rest is not None:
            parts.append((rest.losses.numel() / losses.numel(), rest.leaves, rest.grads))
        with run.traceless():
            if self.exact:
                sums, grads = self._double_backward(run, forward, penalties, signs, uniform, about, toward)
                parts.append((1.0, run.leaves, grads))
            else:
                sums, quotients, second = self._quotients(run, forward, penalties, signs, uniform, own, about, toward)
                parts += [(weight, run.leaves, grads) for weight, grads in quotients]
                losses, finite = after_second(losses, finite, second)
        notes, values = [], {}
        covariance = torch.full_like(distances.sq_mean, torch.nan)
        if signs:
            estimates = [
                [total_sq_norm(_deviation(D, w, c).values()) / m for c in (about, mean)]
                for D, w in zip(sums, signs, strict=True)
            ]
            values["reg1"], covariance = (torch.stack(each).mean() for each in zip(*estimates, strict=True))
            notes.append(f"reg1 and the covariance trace are estimates from {self.probes} random sign vectors")
        leaves, total_grads = combined(*parts)
        return Gradients(losses, leaves, total_grads, mean, covariance, finite, distances, values, tuple(notes))

    def _double_backward(
        self, run: WeightedPass, forward: Forward, penalties: Penalties, signs, uniform, about, toward
    ):
        """D of each vector of signs, detached, and the gradient of λ₁ Σ ‖d‖²/(m probes) + 2 λ₂ ⟨ḡ_S, ḡ − c₂⟩ by leaf."""
        sums, objective = [], forward.losses.new_zeros((), requires_grad=False)
        for w in signs:
            D = run.differentiable_gradient(w)
            sums.append({name: g.detach() for name, g in D.items()})
            d = _deviation(D, w, about)
            objective = objective + penalties.strength("reg1") / (w.numel() * len(signs)) * total(
                map(sq_norm, d.values())
            )
        if toward is not None:
            own = run.differentiable_gradient(uniform)
            inner = total((g * toward[name]).sum() for name, g in own.items())
            objective = objective + 2 * penalties.strength("reg2") * inner
        if not objective.requires_grad:  # no penalty, or gradients that are constant in everything
            return sums, [None] * len(run.leaves)
        with second_derivatives():
            return sums, list(torch.autograd.grad(objective, run.leaves, allow_unused=True))

    def _quotients(self, run: WeightedPass, forward: Forward, penalties: Penalties, signs, uniform, own, about, toward):
        """D of each vector of signs, and the penalties' gradients with their weights; and whether all passes were finite.

        The first graph is done with before the parameters move.
        """
        firsts = [run.gradient(w, last=k == len(signs) - 1) for k, w in enumerate(signs)]
        sums = [mean_by_name(forward.parameters, run.leaves, grads) for grads in firsts]
        tasks = []
        for D, w, grads in zip(sums, signs, firsts, strict=True):
            weight = 2 * penalties.strength("reg1") / (w.numel() * len(signs))
            tasks.append((weight, w, grads, _deviation(D, w, about)))
        if toward is not None:
            tasks.append((2 * penalties.strength("reg2"), uniform, own, toward))
        out, second = [], None
        for weight, w, grads, direction in tasks:
            step = finite_step(
                total_sq_norm(direction.values()).sqrt(), list(forward.parameters.values()), self.epsilon
            )
            assert forward.replay is not None
            with displaced(forward.parameters, direction, step), forward.replay.again() as losses:
                finite = check_second(losses, w.numel())
                second = finite if second is None or finite is None else second & finite
                out.append((weight, quotient(run.of(losses, w), grads, step)))
        return sums, out, second


def draw_signs(m: int, generator: torch.Generator) -> Tensor:
    """Signs v_i = ±1, (m,) int64."""
    return torch.randint(0, 2, (m,), generator=generator).mul_(2).sub_(1)


def _deviation(D: Directions, w: Tensor, center: Directions | None) -> Directions:
    """Σ_i w_i (g_i − c); without a center, for weights whose sum is zero, D."""
    return D if center is None else {name: g - w.sum() * center[name] for name, g in D.items()}
