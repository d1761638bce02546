"""Reg1 and Reg2, penalties on the noise of mini-batch gradients, and the report of a step that took them.

    Reg1 = (1/B) Σ_i ‖g_i − c‖²        Reg2 = ‖ḡ − c‖²

Source: "A Bootstrap Perspective on Stochastic Gradient Descent", arXiv 2512.07676, eqs. 11 and 12.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError, RecordingError
from .ops.distances import sq_distances
from .per_sample import Direction, PerSampleGradients, Zeros, as_parameter_dict, sq_norm
from .rules.terms import total
from .statistics import CheckedOnRead


def reg1(G: PerSampleGradients, center: Direction | None = None) -> Tensor:
    """Mean squared deviation of the per-sample gradients, without its strength λ₁.

        Reg1 = (1/B) Σ_i ‖g_i − c‖²

    Args:
        G: made with ``create_graph=True``.
        center: {name: tensor} or flat (P,), constant; the batch mean ḡ when None, which makes Reg1 = Γ, zero with B = 1.

    Returns:
        Scalar, units of loss²/parameter²; its gradient is (2/B) Σ_i H_i (g_i − c).

    Raises:
        RecordingError: G was made without ``create_graph=True``: the penalty would silently do nothing.

    Source: arXiv 2512.07676, eq. 11.
    """
    _check_differentiable(G, "reg1")
    return G.covariance_trace() if center is None else G.deviation_sq_norms(center).mean()


def reg2(G: PerSampleGradients, center: Direction) -> Tensor:
    """Squared distance of the mini-batch gradient from a center, without its strength λ₂.

        Reg2 = ‖ḡ − c‖²

    Args:
        G: made with ``create_graph=True``.
        center: {name: tensor} or flat (P,), constant.

    Returns:
        Scalar, units of loss²/parameter²; its gradient is 2 H̄ (ḡ − c).

    Raises:
        ArgumentError: no center; about the batch mean Reg2 is identically zero.
        RecordingError: as `reg1`.

    Source: arXiv 2512.07676, eq. 12.
    """
    _check_differentiable(G, "reg2")
    if center is None:
        raise ArgumentError("reg2 needs a center: about the batch mean it is identically zero")
    c = as_parameter_dict(center, dict(G.parameters), "center")
    return total(sq_norm(g - c[name]) for name, g in G.mean().items())


def _check_differentiable(G: PerSampleGradients, name: str) -> None:
    if not isinstance(G, PerSampleGradients):
        raise ArgumentTypeError(f"{name} takes per-sample gradients of record(model); got {type(G).__name__}")
    if not G.differentiable:
        raise RecordingError(
            f"{name} of per-sample gradients made without create_graph=True has no gradient and would silently do nothing: "
            "make them with rec.per_sample_gradients(losses, create_graph=True)"
        )


@dataclass(frozen=True)
class Report(CheckedOnRead):
    """What one step of a `GradientRegularizer` saw; detached, and about the loss gradient, never the penalized one.

    All is of the whole batch, where the penalties are taken on a fraction of it, too. By random signs ``reg1``,
    ``covariance_trace`` and what follows from them are unbiased estimates, from the samples of the fraction; on steps without
    signs, where Reg1 is not taken, they are nan.

    Attributes:
        loss: mean loss without penalty, ().
        reg1: Reg1 without λ₁, (); about the batch mean zero for a batch of one sample, which is its own mean.
        reg2: Reg2 without λ₂, (), or None where there is no center to measure it from.
        covariance_trace: Γ of the batch, ().
        mean_sq_norm: (1/B) Σ ‖g_i‖², ().
        sq_mean_norm: ‖ḡ‖², ().
        batch_size: B.
        method: how the penalty's gradient was made; ``"plain"`` on the steps between penalties.
        strengths: λ of this step by penalty, ``"reg1"`` and ``"reg2"``: what was given or set by a rule, and on steps between
            penalties is not taken.
        notes: what was done otherwise than asked, or on a part of the batch, or is an estimate.
        finite: with a GradScaler, whether the gradient is, (); where it is not, the scaler skips the step, and the centers were
            left alone. None without.

    On an accelerator, without a GradScaler, the first read raises if the losses were not finite; ``.grad`` and the centers were
    then left alone.
    """

    loss: Tensor
    reg1: Tensor
    reg2: Tensor | None
    covariance_trace: Tensor
    mean_sq_norm: Tensor
    sq_mean_norm: Tensor
    batch_size: int
    method: str
    strengths: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    finite: Tensor | None = None
    unchecked: Tensor | None = None

    @property
    def minibatch_covariance_trace(self) -> Tensor:
        """Γ / B."""
        return self.covariance_trace / self.batch_size

    @property
    def noise_scale(self) -> Tensor:
        """Γ / ‖ḡ‖², the biased plug-in ratio; feed reports to `NoiseScale` for the unbiased one."""
        return self.covariance_trace / self.sq_mean_norm


class Distances:
    """Squared norms of a mean gradient and of its distances from the penalties' centers, in float64.

    Attributes:
        sq_mean: ‖ḡ‖², ().
        from_center: ‖ḡ − c‖² by penalty, (), or None where there is no center.
    """

    @torch.no_grad()
    def __init__(self, mean: Mapping[str, Tensor], centers: Mapping[str, Mapping[str, Tensor] | None]):
        """Measure ``mean``; of none, which was not made, all is nan."""
        if not mean:
            device = next((t.device for c in centers.values() if c for t in c.values()), None)
            self.sq_mean = torch.full((), torch.nan, dtype=torch.float64, device=device)
            self.from_center = {name: None if c is None else self.sq_mean for name, c in centers.items()}
            return
        self.sq_mean = total_sq_norm(mean.values())
        known: dict[int, Tensor] = {}  # both penalties may have one center
        for c in centers.values():
            if c is not None and id(c) not in known:
                known[id(c)] = (
                    self.sq_mean if isinstance(c, Zeros) else total_sq_distance(mean.values(), (c[n] for n in mean))
                )
        self.from_center = {name: None if c is None else known[id(c)] for name, c in centers.items()}

    @property
    def about(self) -> Tensor:
        """What Reg1 has beside Γ: ‖ḡ − c‖², zero about the batch mean."""
        distance = self.from_center["reg1"]
        return self.sq_mean.new_zeros(()) if distance is None else distance


def total_sq_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Σ ‖t‖² over tensors, in float64."""
    return sq_distances(list(tensors)).sum()


def total_sq_distance(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    """Σ ‖a_k − b_k‖² over pairs of tensors, in float64."""
    return sq_distances(list(a), list(b)).sum()
