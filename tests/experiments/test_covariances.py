import pytest
import torch

from bootgrad.experiments.covariances import compared, gram

from .images import blobs, network, per_sample


def plainly(a, b, k):
    """The same from P×P matrices."""
    A, B = torch.cov(a.T), torch.cov(b.T)
    U, V = (torch.linalg.eigh(M)[1][:, -k:] for M in (A, B))
    return {
        "trace_ratio": float(A.trace() / B.trace()),
        "overlap": float((U.T @ V).square().sum() / k),
        "error": float((A - B).norm() / B.norm()),
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
    assert found["error"] == pytest.approx(0, abs=1e-6)


def test_the_gram_matrix_is_that_of_the_gradients():
    data, model = blobs(train=20), network(torch.float64)
    G = per_sample(model, dict(model.named_parameters()), data.x_train.double(), data.y_train).detach()
    torch.testing.assert_close(gram(model, data.x_train.double(), data.y_train), G @ G.T, rtol=1e-10, atol=1e-12)
