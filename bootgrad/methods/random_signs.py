"""Reg1 estimated from one random combination of the samples instead of all of them, for any architecture.

    Reg1 ≈ (1/m) ‖d‖²,   d = Σ_i v_i (g_i − c),   v_i = ±1 with equal chances, independent

Unbiased: E v_i v_j = δ_ij, so that E ‖d‖² = Σ_i ‖g_i − c‖². About the batch mean the weights are a_i = v_i − v̄: c drops out,
for Σ a_i = 0, and E a_i a_j = δ_ij − 1/B gives Σ_i ‖g_i‖² − B ‖ḡ‖² = B Γ. Both hold at every θ, and thus for the gradient

    (2/m) Σ_i v_i H_i d  =  (2/m) [∇L_v(θ + ε d) − ∇L_v(θ)] / ε + O(ε),   L_v = Σ_i v_i ℓ_i

whose mean is (2/m) Σ_i H_i (g_i − c). The variance of the estimate of Reg1 is (2/m²) Σ_{i≠j} ⟨g_i − c, g_j − c⟩² over the
number of probes, that of its gradient falls likewise: it is small where the deviations are many and nearly orthogonal.

By finite differences, what `finite_difference` says of functions that are not smooth, or detach values, holds here, too.

Letters: ``v`` signs, ``w`` the weights made of them, ``D`` = Σ_i w_i g_i.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..penalties import total_sq_norm
from ..rules.terms import total
from ..scaling import multiplied
from ..second_pass import check_parameters, check_second, displaced, finite_step, quotient
from .base import (
    Directions,
    FirstOrder,
    Forward,
    Gradients,
    Method,
    Penalties,
    Whole,
    after_second,
    combined,
    mean_by_name,
    of_parameters,
)
from .weighted import WeightedPass, second_derivatives, unrecorded


@dataclass(frozen=True)
class _Term:
    """A penalty's gradient, 2 s Σ_i w_i H_i d with d held constant.

    Attributes:
        strength: s.
        weights: w, (m,).
        direction: makes d of D = Σ_i w_i g_i, both by parameter name.
        grads: ∇L_w by leaf, where it is there already.
    """

    strength: float
    weights: Tensor
    direction: Callable[[Directions], Directions]
    grads: list[Tensor | None] | None = None


class RandomSigns(Method):
    """Reg1 by random signs, Reg2 as it is; by double backward, or by finite differences of first-order passes.

    Nothing is recorded, so that nothing finds samples that are coupled by batch statistics or otherwise: what comes out is then
    about the derivatives of Σ w_i ℓ_i, which are no samples' own.

    Price in forward-sized products, of which a plain step has 3: by finite differences 3, and 5 more for each probe (6 with a
    compiled model) and 3 for Reg2; by double backward 3, and at most 8 more for each probe and for Reg2.

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
        """One backward pass; Γ is not known."""
        return unrecorded(forward)

    def penalized(self, forward: Forward, penalties: Penalties, whole: Whole) -> Gradients:
        """The mean gradient, and one or two more passes for each penalty and probe."""
        if not self.exact:
            check_parameters(forward.parameters)
        m, run = forward.losses.numel(), WeightedPass(forward)
        uniform = torch.full_like(forward.losses, 1 / m, requires_grad=False)
        probes = self.probes if "reg1" in penalties.strengths else 0
        by_difference = not self.exact and "reg2" in penalties.strengths
        own: list[Tensor | None] = [None] * len(run.leaves)
        if not whole.known or by_difference:
            own = run.gradient(uniform, last=not (self.exact or probes))
        own_mean = {} if whole.known else mean_by_name(forward.parameters, run.leaves, own)
        mean = whole.mean(lambda: own_mean)
        c1, c2 = penalties.centers["reg1"], penalties.centers["reg2"]
        centered = c1 is None and whole.alone
        about = None if centered else c1 or mean
        signs = [draw_signs(m, penalties.generator).to(forward.losses) for _ in range(probes)]
        signs = [v - v.mean() if centered else v for v in signs]
        terms = [
            _Term(penalties.strengths["reg1"] / (m * probes), w, partial(_deviation, w=w, center=about)) for w in signs
        ]
        if "reg2" in penalties.strengths and c2 is not None:
            toward = {name: g - c2[name] for name, g in mean.items()}
            terms.append(_Term(penalties.strengths["reg2"], uniform, lambda D: toward, own))
        with run.traceless():
            sums, parts, second = _double_backward(run, terms) if self.exact else self._quotients(run, forward, terms)
        losses, finite = after_second(forward.losses.detach(), run.finite, second)
        if not penalties.others:
            parts = [(weight, *of_parameters(forward.parameters, *part)) for weight, *part in parts]
        leaves, grads = combined((whole.share, run.leaves, own), *parts)
        if not signs:
            return Gradients(losses, leaves, grads, own_mean, None, finite)
        reg1, spread = (
            torch.stack([total_sq_norm(_deviation(D, w, c).values()) for D, w in zip(sums, signs, strict=False)]).mean()
            / m
            for c in (about, mean)
        )
        notes = (f"reg1 and the covariance trace are estimates from {probes} random sign vectors",)
        return Gradients(losses, leaves, grads, own_mean, None, finite, reg1, spread, notes)

    def _quotients(self, run: WeightedPass, forward: Forward, terms: Sequence[_Term]):
        """As `_double_backward`, by finite differences; and whether the losses of all passes are finite."""
        asked = [term.weights for term in terms if term.grads is None]
        firsts = [run.gradient(w, last=w is asked[-1]) for w in asked]  # before the parameters move
        firsts += [term.grads for term in terms if term.grads is not None]
        sums, parts, second = [], [], None
        for term, grads in zip(terms, firsts, strict=True):
            sums.append(mean_by_name(forward.parameters, run.leaves, grads))
            direction = term.direction(sums[-1])
            length = total_sq_norm(direction.values()).sqrt()
            step = finite_step(length, list(forward.parameters.values()), self.epsilon)
            assert forward.replay is not None
            with displaced(forward.parameters, direction.__getitem__, step), forward.replay.again() as losses:
                finite = check_second(losses, term.weights.numel(), forward.scaling)
                second = finite if second is None or finite is None else second & finite
                parts.append((2 * term.strength, run.leaves, quotient(run.of(losses, term.weights), grads, step)))
        return sums, parts, second


def _double_backward(run: WeightedPass, terms: Sequence[_Term]):
    """D of each term, the gradient of all as a part for `combined`, and None, for there is no second pass."""
    graphs = [run.differentiable_gradient(term.weights) for term in terms]
    sums = []
    inner = []
    for term, (D, factor) in zip(terms, graphs, strict=True):
        values = multiplied([g.detach() for g in D.values()], 1 / factor)
        sums.append(dict(zip(D, values, strict=True)))
        direction = term.direction(sums[-1])  # type: ignore[arg-type]  # no gradient is None
        strength = 2 * term.strength / (factor * run.scale.to_mean)
        inner.append(strength * total((g * direction[name]).sum() for name, g in D.items()))
    objective = total(inner) if inner else run.losses.new_zeros((), requires_grad=False)
    if not objective.requires_grad:  # no penalty, or gradients that are constant in everything
        return sums, [], None
    with second_derivatives():
        grads = torch.autograd.grad(objective, run.leaves, allow_unused=True)
    return sums, [(1.0, run.leaves, multiplied(grads, run.scale.to_mean))], None


def draw_signs(m: int, generator: torch.Generator) -> Tensor:
    """Signs v_i = ±1, (m,) int64."""
    return torch.randint(0, 2, (m,), generator=generator).mul_(2).sub_(1)


def _deviation(D: Directions, w: Tensor, center: Directions | None) -> Directions:
    """Σ_i w_i (g_i − c); without a center, for weights whose sum is zero, D."""
    return D if center is None else {name: g - w.sum() * center[name] for name, g in D.items()}
