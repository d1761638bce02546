"""How near the covariance of N samples' gradients is to the population's, and what a mini-batch shows of it.

    Σ_N = (1/N) Σ_i (g_i − ḡ)(g_i − ḡ)ᵀ        ‖Σ_N − Σ‖_F / ‖Σ‖_F  ≈  √((E‖g − E g‖⁴/‖Σ‖_F² − 1)/N)

Everything is a function of inner products ⟨g_k, g_l⟩: with weights w over the samples of a pool, zero mean over the pool,

    ‖Σ_w − Σ_u‖_F² = dᵀ (K∘K) d − 2 Σ_k d_k (K w)_k² + (wᵀ K w)²,        d = w − u,  u = 1/M,

so that no P×P matrix is made.

Letters: ``M`` samples in the pool, which stands for the population, ``N`` in a data set, ``B`` in a mini-batch, ``K`` (M, M)
the Gram matrix of the pool's gradients about their mean.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..intervals import Interval, interval
from ..rules.process_wide import eager
from ..second_pass import traceless
from ..statistics import record
from .curvature import refuse_unlike


@dataclass(frozen=True)
class BootstrapError:
    """What `bootstrap_error` found; prints as a table. Errors are relative to ‖Σ‖_F.

    Attributes:
        sizes: N.
        sample: of Σ_N, for each N, over draws of the data set.
        predicted: of Σ_N, to leading order in N.
        mini_batch: of B times the covariance of mini-batch gradients, for each N, over the same data sets; or None.
        rate: slope of log error of Σ_N on log N, over draws; theory −½.
    """

    sizes: tuple[int, ...]
    sample: tuple[Interval, ...]
    predicted: tuple[float, ...]
    mini_batch: tuple[Interval, ...] | None
    rate: Interval

    def __str__(self) -> str:
        """The table."""
        header = f"{'N':>8}  {'of N samples':28}{'predicted':12}"
        lines = [header + ("" if self.mini_batch is None else "of mini-batches")]
        for k, n in enumerate(self.sizes):
            line = f"{n:8}  {self.sample[k]!s:28}{self.predicted[k]:<12.3g}"
            lines.append(line + ("" if self.mini_batch is None else str(self.mini_batch[k])))
        lines.append(f"error ∝ N^{self.rate}; theory −0.5")
        return "\n".join(lines)


def bootstrap_error(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    *batch: Any,
    sizes: Sequence[int],
    batch_size: int | None = None,
    batches: int = 256,
    draws: int = 16,
    seed: int = 0,
) -> BootstrapError:
    """Distance of covariances of N samples' gradients, at the model's parameters, from that of a large pool.

    Data sets are drawn from the pool with replacement, which makes the pool's covariance the population's, exactly. Of each,
    the covariance is compared as it is, and as SGD sees it: B times the covariance of the mean gradients of mini-batches, which
    are drawn from the data set with replacement, as a bootstrap does.

    Args:
        model: which is left as it is, ``.grad`` and buffers included.
        loss_fn: ``loss_fn(*batch)`` gives losses (M,).
        batch: the pool.
        sizes: N, two or more different ones.
        batch_size: B; without it, no mini-batches.
        batches: how many mini-batches of a data set.
        draws: how many data sets of each size.
        seed: of the draws.

    Raises:
        ArgumentError: fewer than two sizes, numbers out of range, gradients that are all alike, or losses that differ when
            they are computed again, as under dropout.
        BootgradError: as `record.per_sample_gradients`.
    """
    sizes = tuple(sizes)
    if len(set(sizes)) < 2 or min(sizes) < 2:
        raise ArgumentError(f"sizes must be two or more different numbers of at least 2, for a rate; got {list(sizes)}")
    least = {"draws": (draws, 2), "batches": (batches, 2), "batch_size": (1 if batch_size is None else batch_size, 1)}
    for name, (value, low) in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ArgumentError(f"{name} must be a whole number of at least {low}; got {value!r}")
    with traceless(model):
        with torch.enable_grad(), record(model, compiled=False) as rec:
            losses = loss_fn(*batch)
        K = rec.per_sample_gradients(losses).gram().double()
        rec.release()
        with eager, torch.no_grad():
            refuse_unlike(loss_fn(*batch), loss_fn(*batch))
    K = K - K.mean(0) - K.mean(1, keepdim=True) + K.mean()  # of gradients about the pool's mean
    M, sq_norm = len(K), float(K.square().mean())
    if not sq_norm > 0:
        raise ArgumentError(
            "all gradients of the pool are alike, so that their covariance is zero: nothing to compare with"
        )
    generator = torch.Generator().manual_seed(seed)
    of_samples: list[list[float]] = []
    of_batches: list[list[float]] = []
    for n in sizes:
        drawn = torch.randint(M, (draws, n), generator=generator)
        weights = torch.zeros(draws, M, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(draws, n).double() / n)
        of_samples.append((sq_distances_to_pool(K, weights.to(K)) / sq_norm).sqrt().tolist())
        if batch_size is not None:
            errors = []
            for data_set in drawn:
                chosen = data_set[torch.randint(n, (batches, batch_size), generator=generator)]
                ones = torch.ones(batches, batch_size).double() / batch_size
                rows = torch.zeros(batches, M, dtype=torch.float64).scatter_add_(1, chosen, ones)
                errors.append(math.sqrt(sq_distance_of_means(K, rows.to(K), batch_size) / sq_norm))
            of_batches.append(errors)
    kurtosis = float(K.diagonal().square().mean()) / sq_norm - 1
    logs = [math.log(n) for n in sizes]
    slopes = [
        statistics.linear_regression(logs, [math.log(e) if e > 0 else -math.inf for e in errors]).slope
        for errors in zip(*of_samples, strict=True)
    ]
    return BootstrapError(
        sizes,
        tuple(map(interval, of_samples)),
        tuple(math.sqrt(kurtosis / n) for n in sizes),
        tuple(map(interval, of_batches)) if of_batches else None,
        interval(slopes),
    )


def sq_distances_to_pool(K: Tensor, weights: Tensor) -> Tensor:
    """‖Σ_w − Σ_u‖_F² of rows of weights (R, M), each with sum 1; K (M, M) of gradients with mean zero over the pool."""
    d = weights - 1 / K.size(0)
    Kw = weights @ K  # (R, M)
    quadratic = ((d @ K.square()) * d).sum(1)
    return (quadratic - 2 * (d * Kw.square()).sum(1) + (weights * Kw).sum(1).square()).clamp(min=0)


def sq_distance_of_means(K: Tensor, rows: Tensor, batch_size: int) -> float:
    """‖B C − Σ_u‖_F² with C the unbiased covariance of R mini-batch gradients, each a row of weights in rows (R, M)."""
    R, M = rows.shape
    y = rows - rows.mean(0)
    factor = batch_size / (R - 1)
    yK = y @ K  # (R, M)
    of_means = factor**2 * float((yK @ y.T).square().sum())
    across = factor / M * float(yK.square().sum())
    return max(0.0, of_means - 2 * across + float(K.square().mean()))
