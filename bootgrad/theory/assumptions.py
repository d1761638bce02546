"""What the theory asks of a trained model, and whether it is so.

    ε₁ = ‖∇L_S‖        ε₂ = max_i ‖Δ_i‖        λ_min(∇²L_S)        the remainder of the second-order expansion

Letters as in `gap`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..second_pass import traceless
from ..statistics import record
from .curvature import Hessian
from .gap import GapDecomposition, Neighbours, gap_decomposition

HOLDS, FAILS, UNCLEAR = "holds", "does not", "unclear"


@dataclass(frozen=True)
class Assumption:
    """One assumption at one place.

    Attributes:
        name: what is assumed.
        quantity: what was measured.
        value: of it.
        relative: the value by the one that ``unit`` names.
        unit: what ``relative`` is relative to.
        verdict: ``holds``, ``does not`` or ``unclear``.
        error: how far the value may be off.
    """

    name: str
    quantity: str
    value: float
    relative: float
    unit: str
    verdict: str
    error: float = 0.0


@dataclass(frozen=True)
class Assumptions:
    """What `check_assumptions` found; prints as a table.

    Attributes:
        checks: one for each assumption that could be looked at.
        decomposition: of the gap, where neighbours were given.
    """

    checks: tuple[Assumption, ...]
    decomposition: GapDecomposition | None

    @property
    def ok(self) -> bool:
        """Whether all hold."""
        return all(check.verdict == HOLDS for check in self.checks)

    def __getitem__(self, name: str) -> Assumption:
        """The assumption of a name."""
        return next(check for check in self.checks if check.name == name)

    def __str__(self) -> str:
        """The table."""
        rows = [("assumption", "measured", "relative to", "verdict")]
        for c in self.checks:
            error = f" ± {c.error:.1g}" if c.error else ""
            rows.append((c.name, f"{c.quantity} = {c.value:.3g}{error}", f"{c.relative:.2g} {c.unit}", c.verdict))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def check_assumptions(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    *batch: Any,
    neighbours: Neighbours | None = None,
    tolerance: float = 0.1,
    steps: int = 200,
    chunk: int | None = None,
) -> Assumptions:
    """Check, at the model's parameters, what the expansion of the generalization gap assumes.

    ================  ==============================================================================================
    stationary        ε₁ = ‖∇L_S‖ is at most ``tolerance`` times the root mean square ‖g_i‖
    nondegenerate     the smallest eigenvalue of H = ∇²L_S is positive, by more than its residual and rounding
    stable            ε₂, the largest ‖Δ_i‖, is at most ``tolerance`` times ‖θ‖; with neighbours only
    second order      the remainder is at most ``tolerance`` times the curvature term; with neighbours only
    ================  ==============================================================================================

    An overparameterized model is hardly ever nondegenerate: where it fits the data, or units are redundant, H has eigenvalues
    zero. What that does to the expansion is then what the remainder tells.

    Args:
        model: which stays as it is, ``.grad`` included.
        loss_fn: ``loss_fn(*batch)`` gives losses (N,).
        batch: the training set S.
        neighbours: as for `gap_decomposition`.
        tolerance: what is small.
        steps: the products with H that Lanczos's method takes for the smallest eigenvalue, P at most. With fewer than P of them
            it may miss that one, so that "holds" is then no proof.
        chunk: as for `Hessian`.

    Raises:
        BootgradError: as `Hessian`, `gap_decomposition` and `record.per_sample_gradients`.
    """
    if not tolerance > 0:
        raise ArgumentError(f"tolerance must be above 0; got {tolerance}")
    H = Hessian(model, loss_fn, *batch, chunk=chunk)
    checks = [_stationary(H, tolerance), _nondegenerate(H, steps)]
    found = None
    if neighbours is not None:
        found = gap_decomposition(model, loss_fn, *batch, neighbours=neighbours, tolerance=tolerance, chunk=chunk)
        size = float(H.parameter_vector().double().norm())
        share = found.largest_move / size if size else float("inf")
        verdict = HOLDS if share <= tolerance else FAILS
        checks.append(Assumption("stable", "max ‖Δ_i‖", found.largest_move, share, "‖θ‖", verdict))
        verdict = HOLDS if found.holds else FAILS
        remainder = found.sizes[2] / H.samples
        checks.append(Assumption("second order", "mean |remainder|", remainder, found.share, "½ Δᵀ H Δ", verdict))
    return Assumptions(tuple(checks), found)


def _stationary(H: Hessian, tolerance: float) -> Assumption:
    sq_norms = []
    with traceless(H.model):
        for part in H.parts:
            with torch.enable_grad(), record(H.model, compiled=False) as rec:
                losses = H.loss_fn(*part)
            sq_norms.append(rec.per_sample_gradients(losses).sq_norms().double())
            rec.release()
    norm, scale = float(H.gradient().double().norm()), float(torch.cat(sq_norms).mean().sqrt())
    share = norm / scale if scale else 0.0
    return Assumption(
        "stationary", "‖∇L‖", norm, share, "root mean square ‖g_i‖", HOLDS if share <= tolerance else FAILS
    )


def _nondegenerate(H: Hessian, steps: int) -> Assumption:
    pair = H.eigenpairs(
        smallest=True, tolerance=0, steps=min(steps, H.size)
    )  # it may be any small share of the largest
    largest = float(H.eigenpairs(steps=min(steps, H.size)).values.abs())
    value, residual = float(pair.values), float(pair.residuals)
    eps = max(torch.finfo(p.dtype).eps for p in H.parameters.values())
    rounding = 10 * eps * max(largest, abs(value))
    if value > residual + rounding:
        verdict = HOLDS
    else:
        verdict = FAILS if value < -residual - rounding or residual <= rounding else UNCLEAR
    share = value / largest if largest else 0.0
    return Assumption("nondegenerate", "λ_min", value, share, "λ_max", verdict, residual + rounding)
