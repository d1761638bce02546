"""How the noise of mini-batch gradients lies to the curvature: Tr(HΣ), and Σ's share in the Hessian's top eigenvectors.

    ratio = P Tr(HΣ) / (Tr H Tr Σ)        share = Σ_{j≤k} v_jᵀ Σ v_j / Tr Σ

of H = ∇²L and the covariance Σ of the per-sample gradients; noise without direction has the ratio 1 and the share k/P. Neither
matrix is made: Σ v = (1/N) G̃ᵀ (G̃ v) by the implicit matrix of gradients, H v by one more backward pass, and

    Tr(HΣ) = Σ_j ⟨H q_j, Σ q_j⟩ + E ⟨H v, Σ v⟩        v random signs without their part along q_1 … q_k

for any orthonormal q_j: with the top eigenvectors for q_j, little is left to the probes.

Letters: ``N`` samples, ``P`` parameter entries, ``k`` eigenvectors, ``G̃`` the gradients about their mean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..intervals import Interval, interval
from ..second_pass import traceless
from ..statistics import record
from .curvature import Hessian


@dataclass(frozen=True)
class NoiseAlignment:
    """What `noise_alignment` found.

    Attributes:
        hessian_noise_trace: Tr(HΣ), with the 95 % interval of its probes.
        hessian_trace: Tr H, likewise.
        covariance_trace: Tr Σ = Γ.
        eigenvalues: the k largest of H.
        noise: v_jᵀ Σ v_j along their eigenvectors.
        parameters: P.
        ratio_interval: P Tr(HΣ) / (Tr H Tr Σ), with the 95 % interval of the same probes in both traces, to first order in
            their deviations; unbounded where the interval of Tr H reaches zero, and nan where Tr H is not positive, or there
            is no noise.
    """

    hessian_noise_trace: Interval
    hessian_trace: Interval
    covariance_trace: float
    eigenvalues: tuple[float, ...]
    noise: tuple[float, ...]
    parameters: int
    ratio_interval: Interval

    @property
    def ratio(self) -> float:
        """The mean of ``ratio_interval``."""
        return self.ratio_interval.mean

    @property
    def share(self) -> float:
        """Σ_j v_jᵀ Σ v_j / Tr Σ over the k eigenvectors; nan where there is no noise."""
        return sum(self.noise) / self.covariance_trace if self.covariance_trace > 0 else float("nan")

    @property
    def uniform_share(self) -> float:
        """k/P."""
        return len(self.noise) / self.parameters

    def __str__(self) -> str:
        """In a line."""
        k, ratio = len(self.noise), f"{self.ratio_interval} times its value for noise without direction"
        if not math.isfinite(self.ratio):
            ratio = f"with no value for noise without direction to compare with, for Tr H = {self.hessian_trace}"
        elif not math.isfinite(self.ratio_interval.high):
            ratio += " (and anything else, for Tr H is not known to be positive)"
        return (
            f"Tr(HΣ) = {self.hessian_noise_trace}, {ratio}; the {k} largest eigenvalues, {self.eigenvalues[0]:.3g} to "
            f"{self.eigenvalues[-1]:.3g}, have {self.share:.3g} of Tr Σ = {self.covariance_trace:.3g} (without direction "
            f"{self.uniform_share:.2g})"
        )


def noise_alignment(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    *batch: Any,
    k: int = 10,
    probes: int = 32,
    tolerance: float = 1e-2,
    steps: int = 200,
    seed: int = 0,
) -> NoiseAlignment:
    """Compare the covariance of the per-sample gradients with the Hessian of their mean loss, at the model's parameters.

    Args:
        model: which stays as it is, ``.grad`` included.
        loss_fn: ``loss_fn(*batch)`` gives losses (N,).
        batch: the data set.
        k: eigenvectors.
        probes: vectors of random signs, two or more; each takes a product with H and two with the gradients.
        tolerance: of the eigenvectors, as for `Hessian.eigenpairs`. The traces are right without it.
        steps: likewise.
        seed: of the probes, and of Lanczos's start.

    Raises:
        BootgradError: as `Hessian` and `record.per_sample_gradients`.
    """
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 2:
        raise ArgumentError(f"probes must be a whole number of at least 2, for an interval; got {probes!r}")
    H = Hessian(model, loss_fn, *batch)
    with traceless(model), torch.enable_grad(), record(model, compiled=False) as rec:
        losses = loss_fn(*batch)
    G = rec.per_sample_gradients(losses)
    rec.release()
    N, P = G.shape
    mean = H.vector(G.mean())

    def covariance_product(v: Tensor) -> Tensor:
        a = G @ v - mean @ v  # (N,), with sum zero
        return H.vector(G.T @ (a / N))

    top = H.eigenpairs(k, tolerance=tolerance, steps=max(steps, k), seed=seed)
    Q = top.vectors.to(mean)  # (k, P)
    of_top = torch.stack([covariance_product(q) for q in Q])
    known, known_trace = float((top.products * of_top).sum()), float((top.products * top.vectors).sum())
    generator = torch.Generator().manual_seed(seed)
    products, traces = [], []
    with H.one_graph():
        for _ in range(probes):
            v = torch.randint(2, (P,), generator=generator).to(mean) * 2 - 1
            v = v - Q.T @ (Q @ v)
            Hv = H @ v
            products.append(known + float(Hv @ covariance_product(v)))
            traces.append(known_trace + float(Hv @ v))
    gamma = float(G.covariance_trace())
    return NoiseAlignment(
        interval(products),
        interval(traces),
        gamma,
        tuple(top.values.tolist()),
        tuple((Q * of_top).sum(1).tolist()),
        P,
        _ratio(products, traces, gamma / P),
    )


def _ratio(products: list[float], traces: list[float], each: float) -> Interval:
    """Mean product by ``each`` times mean trace: a/b ± t s/√n, s of (a_i − (a/b) b_i)/b, the first order in both."""
    a, b = interval(products), interval(traces)
    if not b.mean * each > 0 or not math.isfinite(a.mean):
        return interval([math.nan] * len(products))
    ratio = a.mean / (b.mean * each)
    if not b.low > 0:
        return Interval(ratio, -math.inf, math.inf, a.n, a.diverged)
    away = interval((p - ratio * each * t) / (b.mean * each) for p, t in zip(products, traces, strict=True))
    return Interval(ratio, ratio + away.low, ratio + away.high, a.n, a.diverged)
