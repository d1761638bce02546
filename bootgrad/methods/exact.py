"""The penalties' own derivative, by visits of the layers in the backward pass through the per-sample gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import graph, waiting
from ..errors import UnsupportedError
from ..ops.product import Mask, Visit
from ..penalties import total_sq_distance, total_sq_norm
from ..per_sample import PerSampleGradients, Zeros
from ..rules.terms import DenseTerm, SqDistances, VisitedBias, VisitedTerm, total
from ..scaling import Number, multiplied, seeds
from ..statistics import difference
from .base import (
    Directions,
    FirstOrder,
    Forward,
    Gradients,
    Method,
    Penalties,
    Whole,
    first_order,
)
from .weighted import unrecorded

LARGEST_RATIO = 10.0  # λ₂/λ₁ up to which one visit is made for both penalties


class Exact(Method):
    """λ₁ Reg1 + λ₂ Reg2 differentiated as they are: no bias, no variance on the whole batch; 2.0 to 3.0 plain steps."""

    name = "exact"

    def plain(self, forward: Forward) -> FirstOrder:
        """One backward pass, with Γ where it was recorded."""
        return first_order(forward) if forward.recording else unrecorded(forward)

    def penalized(self, forward: Forward, penalties: Penalties, whole: Whole) -> Gradients:
        """One backward pass through the objective."""
        recording, losses = forward.recording, forward.losses
        assert recording is not None
        reach, scale = forward.reach(), forward.scale
        G = recording._per_sample_gradients(losses, reach, create_graph=True, visited=True, scale=scale.first)
        # All parameters: a center may depend on what this batch does not reach.
        asked = [*forward.parameters.values(), *(reach.other_leaves if penalties.others else ())]
        apart = [] if penalties.others or whole.known else reach.other_leaves
        others: Sequence[Tensor | None] = []
        if apart:
            weights = seeds(losses, scale.sample * whole.share)
            others = graph.gradients(losses, apart, weights, retain_graph=True, allow_unused=True)
        penalty = _Penalty(G, penalties, whole, scale.first)
        objective = (losses * (scale.sample * whole.share)).sum() + penalty.zero / (scale.to_mean * scale.first**2)
        try:
            grads: list[Tensor | None] = [*torch.autograd.grad(objective, asked, allow_unused=True), *others]
        except RuntimeError as error:
            if "is not implemented" in str(error):
                raise UnsupportedError(
                    f"an operation of the model has no second derivative in torch ({error}): use an implementation that has, "
                    'or method="random_signs" with derivative="finite_difference", an estimate'
                ) from error
            raise
        penalty.finish()
        own = penalty.own_mean() if penalties.mean else {}
        covariance = penalty.covariance() if penalties.statistics else None
        reg1 = penalty.norms().mean() if penalty.tells_reg1 and not penalties.statistics else None
        spread = reg1 if whole.known and penalties.centers["reg1"] is None else None
        grads = multiplied(grads, scale.to_mean)
        forward.let_go()
        return Gradients(losses.detach(), [*asked, *apart], grads, own, covariance, reach.finite, reg1, spread)


@dataclass(frozen=True)
class _Directions:
    """c and ḡ − c₂ by parameter, times ``scale``, made when they are used: none is held for all parameters at once.

    c is ``base``, less ``ratio`` = λ₂/λ₁ times the other where it takes Reg2 along.
    """

    base: Directions
    mean: Directions
    c2: Directions | None
    ratio: float
    scale: Number

    @property
    def is_zero(self) -> bool:
        """Whether c is known to be zero."""
        return isinstance(self.base, Zeros) and not self.ratio

    def away(self, name: str) -> Tensor:
        """ḡ − c₂."""
        return self._scaled(self.mean[name] if self.c2 is None else self.mean[name] - self.c2[name])

    def center(self, name: str) -> Tensor | None:
        """c, None for zero."""
        if not self.ratio:
            return None if self.is_zero else self._scaled(self.base[name])
        return self._scaled(self.base[name]) - self.ratio * self.away(name)

    def _scaled(self, t: Tensor) -> Tensor:
        return t if isinstance(self.scale, float) and self.scale == 1 else t * self.scale


class _Penalty:
    """λ₁ Reg1 + λ₂ Reg2 as something to differentiate, and what its visits tell when that is done.

    It has the gradient of λ₁ (1/m) Σ_S ‖g_i − c₁‖² + 2 λ₂ ⟨ḡ_S, ḡ − c₂⟩ with c₁ and ḡ − c₂ held constant, c₁ = ḡ about the
    batch mean. Both together are one of them about a center that takes the other along, c = c₁ − (λ₂/λ₁)(ḡ − c₂): the same
    gradient for the price of one. Where λ₂ is much the larger, c would be far away, and Γ lost in the distance.

    The rows of G are σ̃ g_i, see `scaling`, and so are means, centers and norms in here; what is handed out is divided by it.

    Attributes:
        zero: (), has the gradient, times σ̃².
        tells_reg1: whether the norms are those of Reg1.
    """

    def __init__(self, G: PerSampleGradients, penalties: Penalties, whole: Whole, scale: Number):
        """Ask G's terms for what the penalties need; the pairs of visited ones go as they are differentiated."""
        a, b = penalties.strength("reg1") / G.batch_size, 2 * penalties.strength("reg2") / G.batch_size
        c1, c2 = penalties.centers["reg1"], penalties.centers["reg2"]
        self._G, self._scale = G, scale
        self._visited = {name: term for name, term in G._terms.items() if isinstance(term, VisitedTerm)}
        self._biases = {id(term.visit): name for name, term in G._terms.items() if isinstance(term, VisitedBias)}
        self._sq_norms: Tensor | None = None  # ‖g_i‖², (B,), for Γ
        if penalties.statistics and not a:
            with torch.no_grad():
                self._sq_norms = G.sq_norms()  # in the visit that makes ḡ
        self._own_mean: Directions = {}  # where the penalties need it
        mean: Directions = whole.mean(self._make_own_mean) if b or (a and c1 is None) else {}
        along = 0 < b <= 2 * LARGEST_RATIO * a
        self._directions = _Directions(mean if c1 is None else c1, mean, c2, b / (2 * a) if along else 0.0, scale)
        self.tells_reg1 = bool(a and not b)
        self._about_own_mean = self.tells_reg1 and c1 is None and whole.alone
        # Layer by layer Γ is told from the distance, where there is one and a question does not stop a device.
        self._at_once = waiting.answers_at_once(next(iter(G.parameters.values())))
        self._tells_apart = (
            penalties.statistics and not (self._about_own_mean or self._directions.is_zero) and self._at_once
        )
        self._covariances: list[Tensor] = []
        self._others: Tensor | None = None  # ‖g_i − c‖², (B,), of all terms that are not visited
        parts = self._ask(a, 0.0 if along else b, penalties.mean and not self._own_mean) if a or b else []
        self.zero: Tensor | float = total(parts) if parts else 0.0

    def own_mean(self) -> dict[str, Tensor]:
        """ḡ of the rows."""
        mean = self._G._mean_values()
        return dict(zip(mean, multiplied(list(mean.values()), 1 / self._scale), strict=True))  # type: ignore[arg-type]

    def _make_own_mean(self) -> dict[str, Tensor]:
        """The same, when nobody will ask the visits for it any more."""
        self._own_mean = self._G._mean_values()
        for term in self._visited.values():
            term.forget_total()
        return self.own_mean()

    def _ask(self, a: float, b: float, sums: bool) -> list[Tensor]:
        """Scalars with the gradients of a Σ_i ‖g_i − c‖² + b ⟨Σ_i g_i, ḡ − c₂⟩; the visits make ``sums``, too."""
        parts: list[Tensor] = []
        others: list[Tensor] = []
        rows: dict[str, Tensor] = {}
        for name, term in self._G._terms.items():
            if isinstance(term, VisitedTerm):
                center, away = (partial(f, name) for f in (self._directions.center, self._directions.away))
                parts.append(term.ask((a, b), center, away, sums))
                term.visit.reads_numbers = self._at_once
                if a and self._tells_apart:
                    names = [n for n in (name, self._biases.get(id(term.visit))) if n is not None]
                    means = [self._own_mean[n] for n in names] if self._own_mean else None
                    term.visit.on_norms = partial(_note_covariance, self._covariances, means)
                continue
            if isinstance(term, VisitedBias):
                term.ask(*(partial(f, name) for f in (self._directions.center, self._directions.away)))
                continue
            if a and isinstance(term, DenseTerm):
                rows[name] = term.values
            elif a:
                others.append(term.sq_norms(self._directions.center(name)))
            if b:
                parts.append(b * (term.weighted_sum(None) * self._directions.away(name)).sum())
        if rows:
            centers = None if self._directions.is_zero else [self._directions.center(name) for name in rows]
            others.append(SqDistances.apply(centers, *rows.values()))
        if others:
            value = total(others)
            parts.append(a * value.sum())
            self._others = value.detach()
        return parts

    def finish(self) -> None:
        """Make the visits that the backward pass did not come by, where nothing was to be differentiated."""
        for term in self._visited.values():
            term.finish()

    @torch.no_grad()
    def norms(self) -> Tensor:
        """‖g_i − c‖², (B,), once that is done; what the losses do not reach has its share, too."""
        parts = [term.visit.sq_norms for term in self._visited.values() if term.visit.sq_norms is not None]
        out = total(parts if self._others is None else [*parts, self._others])
        absent = [self._directions.center(name) for name in self._G.parameters if name not in self._G._terms]
        distances = [c for c in absent if c is not None]
        return (out + total_sq_norm(distances).to(out.dtype) if distances else out) / self._scale**2

    @torch.no_grad()
    def covariance(self) -> Tensor:
        """Γ of the rows, (), float64, once that is done."""
        return self._covariance(self._G._mean_values()) / self._scale**2

    def _covariance(self, mean: Directions) -> Tensor:
        if self._sq_norms is not None:
            return difference(self._sq_norms.double(), total_sq_norm(mean.values()))
        if not self._tells_apart:
            value = self.norms().double().mean() * self._scale**2
            return value if self._about_own_mean else (value - self._distance(mean)).clamp(min=0)
        if self._others is None:
            return total(self._covariances)
        others = {
            name: term for name, term in self._G._terms.items() if not isinstance(term, VisitedTerm | VisitedBias)
        }
        own = {name: mean[name] for name in others}
        about, sq_mean = self._distance(own), total_sq_norm(own.values())

        def again() -> Tensor:
            return total(term.sq_norms() for term in others.values())

        return total([*self._covariances, _covariance(self._others, about, sq_mean, again)])

    def _distance(self, mean: Directions) -> Tensor:
        """‖ḡ − c‖² over the parameters of ``mean``, (), float64."""
        if self._directions.is_zero:
            return total_sq_norm(mean.values())
        centers = (self._directions.center(name) for name in mean)
        return total_sq_distance(mean.values(), (c for c in centers if c is not None))


def _note_covariance(
    found: list[Tensor],
    means: list[Tensor] | None,
    visit: Visit,
    centers: tuple[Tensor | None, ...],
    x: Tensor,
    gy: Tensor,
) -> None:
    """Append Γ of a layer that was visited about a center; its mean gradient is known, or was made on the way."""
    assert visit.sq_norms is not None
    cs = [c for c in centers if c is not None]
    if means is None:
        means = [t / x.size(0) for t in (visit.total, visit.bias_total) if t is not None]
    means = [mean.reshape(c.shape) for mean, c in zip(means, cs, strict=True)]

    def again() -> Tensor:
        wanted = Mask(False, False, False, visit.with_bias)
        return visit.product.visit(x, gy, (None, None), wanted).sq_norms

    found.append(_covariance(visit.sq_norms, total_sq_distance(means, cs), total_sq_norm(means), again))


def _covariance(norms: Tensor, about: Tensor, sq_mean: Tensor, again: Callable[[], Tensor]) -> Tensor:
    """Γ from ‖g_i − c‖² and ‖ḡ − c‖²; or from ‖g_i‖², made again, where c is so far away that Γ is lost in the distance."""
    covariance = (norms.double().mean() - about).clamp(min=0)
    if not about <= torch.maximum(sq_mean, 100 * covariance):
        covariance = difference(again().double(), sq_mean)
    return covariance
