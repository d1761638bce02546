"""Two covariances of per-sample gradients compared, from inner products of the gradients alone.

A covariance Σ is P×P, and never made. With centered gradients of two sets of images as the rows of
X_a and X_b, divided by √(n − 1), all that is asked comes from the Gram blocks K_ab = X_a X_bᵀ:

    Tr Σ_a = Tr K_aa        ⟨Σ_a, Σ_b⟩ = ‖K_ab‖_F²        ‖Σ_a − Σ‖_F² ≈ ‖K_aa‖_F² − 2 ‖K_ab‖_F² + T_b

T_b estimates ‖Σ‖_F² of the population that set b is drawn from without bias, where ‖K_bb‖_F² is too large by what is noise in
it. The eigenvectors of Σ_a are X_aᵀ u / √μ, with u and μ those of K_aa.

Letters: ``n`` images of a set, ``m`` of the other, ``k`` directions of a subspace.

Source of T_b: Himeno and Yamada, "Estimations for some functions of covariance matrix in high dimension under non-normality
and its applications", Journal of Multivariate Analysis, 2014.
"""

import math

import torch
from torch import Tensor, nn

import bootgrad

from .image_runs import losses_of

STATISTICS = ("trace_ratio", "overlap", "error")  # the error is the root of the mean of ``sq_error``
DIRECTIONS = 5


def compared(K: Tensor, n: int, k: int = DIRECTIONS) -> dict[str, float]:
    """What Σ of the first ``n`` rows of a Gram matrix says of Σ of the population of which the others are a sample.

    Args:
        K: ⟨g_i, g_j⟩ of all rows, float64; at least four others.
        n: rows of the estimate, more than ``k``.
        k: directions of the subspaces.

    Returns:
        ``trace_ratio``: Tr Σ_a / Tr Σ_b; ``overlap``: (1/k) ‖U_aᵀ U_b‖_F² of orthonormal bases of the spaces of the k largest
        eigenvalues; ``sq_error``: ‖Σ_a − Σ‖_F² / ‖Σ‖_F², both without the noise of the others, so that it can be below zero.
    """
    m = len(K) - n
    aa, ab, bb = (
        _centered(block) / scale
        for block, scale in (
            (K[:n, :n], n - 1),
            (K[:n, n:], math.sqrt((n - 1) * (m - 1))),
            (K[n:, n:], m - 1),
        )
    )
    sq_norm = _sq_norm_of_population(bb)
    (mu_a, u_a), (mu_b, u_b) = ((mu[-k:], u[:, -k:]) for mu, u in map(torch.linalg.eigh, (aa, bb)))
    cosines = u_a.T @ ab @ u_b / (mu_a[:, None] * mu_b).sqrt()  # [k, k]
    return {
        "trace_ratio": float(aa.trace() / bb.trace()),
        "overlap": float(cosines.square().sum() / k),
        "sq_error": float((aa.square().sum() - 2 * ab.square().sum()) / sq_norm + 1),
    }


def _sq_norm_of_population(bb: Tensor) -> Tensor:
    """‖Σ‖_F² without bias, from the Gram matrix [m, m] of centered rows over √(m − 1), whatever their distribution."""
    m = len(bb)
    fourth = (m - 1) * bb.diagonal().square().sum()  # (1/(m − 1)) Σ ‖x_i − x̄‖⁴
    total = (m - 1) * (m - 2) * bb.square().sum() + bb.trace().square() - m * fourth
    return (m - 1) / (m * (m - 2) * (m - 3)) * total


def _centered(block: Tensor) -> Tensor:
    return block - block.mean(0) - block.mean(1, keepdim=True) + block.mean()


def gram(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the gradients of images, in float64; raises `Diverged` where a loss is not finite."""
    with bootgrad.record(model) as rec:
        losses = losses_of(model, x, y)
    return rec.per_sample_gradients(losses).gram().double()
