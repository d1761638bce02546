import math

import pytest
import torch

from bootgrad.experiments.covariances import _sq_norm_of_population, compared, gram

from .images import blobs, network, per_sample


def plainly(a, b, k):
    """The same from P×P matrices; ‖Σ‖² by Himeno and Yamada's formula as they give it."""
    A, B, m = torch.cov(a.T), torch.cov(b.T), len(b)
    U, V = (torch.linalg.eigh(M)[1][:, -k:] for M in (A, B))
    Q = (b - b.mean(0)).square().sum(1).square().sum() / (m - 1)
    sq_norm = (m - 1) / (m * (m - 2) * (m - 3))
    sq_norm = sq_norm * ((m - 1) * (m - 2) * (B @ B).trace() + B.trace() ** 2 - m * Q)
    return {
        "trace_ratio": float(A.trace() / B.trace()),
        "overlap": float((U.T @ V).square().sum() / k),
        "sq_error": float((A.square().sum() - 2 * (A * B).sum() + sq_norm) / sq_norm),
    }


def test_gram_blocks_tell_what_the_matrices_do():
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, 40, dtype=torch.float64)
    a, b = (scale * torch.randn(n, 40, dtype=torch.float64, generator=generator) + 3 for n in (12, 60))
    rows = torch.cat([a, b])
    assert compared(rows @ rows.T, 12, 4) == pytest.approx(plainly(a, b, 4), rel=1e-8)


def test_a_set_and_itself_are_the_same():
    rows = torch.randn(9, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    found = compared(rows @ rows.T, 9)
    assert found["trace_ratio"] == pytest.approx(1) and found["overlap"] == pytest.approx(1)


def skewed_rows(count, samples, generator):
    """Rows [count, samples, 6] of long tails, whose covariance is diagonal: that of s (e − 1), e of the exponential law."""
    s = torch.linspace(1, 0.1, 6, dtype=torch.float64)
    e = torch.empty(count, samples, 6, dtype=torch.float64).exponential_(generator=generator)
    return s * (e - 1), s.square().diag()


def test_the_norm_of_the_population_is_without_bias():
    rows, truth = skewed_rows(4000, 8, torch.Generator().manual_seed(0))
    centered = rows - rows.mean(1, keepdim=True)
    found = torch.stack([_sq_norm_of_population(x @ x.T / 7) for x in centered])
    expected = truth.square().sum()
    assert abs(found.mean() - expected) < 3 * found.std() / math.sqrt(len(found)) < 0.1 * expected


def test_the_error_is_that_against_the_population():
    """Of 12 rows against 12 others: what these are off is not in it, so that times their ‖Σ‖² it is without bias."""
    rows, truth = skewed_rows(4000, 24, torch.Generator().manual_seed(0))
    found, real = [], []
    for x in rows:
        b = x[12:] - x[12:].mean(0)
        found.append(compared(x @ x.T, 12, 2)["sq_error"] * _sq_norm_of_population(b @ b.T / 11))
        real.append((torch.cov(x[:12].T) - truth).square().sum())
    apart = torch.stack(found) - torch.stack(real)  # paired, for both have the noise of the 12 rows
    assert abs(apart.mean()) < 3 * apart.std() / math.sqrt(len(apart)) < 0.1 * torch.stack(real).mean()
    plain = torch.stack([(torch.cov(x[:12].T) - torch.cov(x[12:].T)).square().sum() for x in rows]).mean()
    assert plain > 1.8 * torch.stack(real).mean()


def test_the_gram_matrix_is_that_of_the_gradients():
    data, model = blobs(train=20), network(torch.float64)
    G = per_sample(model, dict(model.named_parameters()), data.x_train.double(), data.y_train).detach()
    torch.testing.assert_close(gram(model, data.x_train.double(), data.y_train), G @ G.T, rtol=1e-10, atol=1e-12)
