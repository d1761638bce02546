"""Alignment of noise and curvature against the matrices themselves."""

import math

import pytest
import torch

from bootgrad.errors import ArgumentError
from bootgrad.intervals import interval
from bootgrad.theory import noise_alignment
from bootgrad.theory.alignment import _ratio

from .problems import Direct, dense_hessian, network, rows


def test_traces_and_shares_are_those_of_the_matrices():
    model, loss_fn, x, y = network()
    G, H = rows(model, loss_fn, x, y), dense_hessian(model, x, y)
    sigma = torch.cov(G.T, correction=0)
    values, vectors = torch.linalg.eigh(H)
    top = vectors[:, -3:].flip(1)
    found = noise_alignment(model, loss_fn, x, y, k=3, probes=150, tolerance=1e-10)
    assert found.covariance_trace == pytest.approx(float(sigma.trace()))
    assert found.eigenvalues == pytest.approx(values[-3:].flip(0).tolist())
    assert found.noise == pytest.approx(((sigma @ top) * top).sum(0).tolist())
    assert found.share == pytest.approx(float((top.T @ sigma @ top).trace() / sigma.trace()))
    assert found.uniform_share == 3 / 26
    for ours, exact in ((found.hessian_noise_trace, (H @ sigma).trace()), (found.hessian_trace, H.trace())):
        assert ours.low < float(exact) < ours.high
    expected = 26 * float((H @ sigma).trace() / (H.trace() * sigma.trace()))
    assert found.ratio == pytest.approx(expected, rel=0.1)
    assert found.ratio_interval.low < expected < found.ratio_interval.high
    assert "without direction" in str(found) and all(p.grad is None for p in model.parameters())


def test_with_all_eigenvectors_nothing_is_left_to_the_probes():
    model, loss_fn, x, y = network()
    G, H = rows(model, loss_fn, x, y), dense_hessian(model, x, y)
    found = noise_alignment(model, loss_fn, x, y, k=26, probes=2)
    exact = float((H @ torch.cov(G.T, correction=0)).trace())
    assert found.hessian_noise_trace.mean == pytest.approx(exact, rel=1e-9)
    assert found.hessian_noise_trace.high - found.hessian_noise_trace.low < 1e-9
    assert found.share == pytest.approx(1)


@pytest.mark.parametrize(
    ("along", "ratio"), [([4.0, 1.0, 0.0], 3 * 17 / 25), ([1.0, 1.0, 1.0], 1), ([0.0, 1.0, 4.0], 3 * 1 / 25)]
)
def test_known_ratios(along, ratio):
    """H = diag(4, 1, 0) and Σ as it is made: of losses that are quadratic with sample-dependent slopes."""
    model = Direct(torch.zeros(3).double())
    curvature, scale = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor(along).double().sqrt()
    signs = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]).double()
    found = noise_alignment(
        model, lambda s: (curvature * model.theta.square()).sum() / 2 + (s * scale) @ model.theta, signs, k=1, probes=2
    )
    assert found.ratio == pytest.approx(ratio)


def test_no_noise_has_no_ratio_and_one_probe_no_interval():
    model = Direct(torch.zeros(3).double())
    found = noise_alignment(model, lambda z: model.theta.square().sum() + 0 * z, torch.zeros(4).double(), k=1)
    assert found.ratio != found.ratio and found.share != found.share
    assert "nan times" not in str(found) and "with no value for noise without direction" in str(found)
    with pytest.raises(ArgumentError, match="probes must be a whole number of at least 2"):
        noise_alignment(model, lambda z: model.theta.square().sum() + 0 * z, torch.zeros(4).double(), k=1, probes=1)


def test_the_interval_of_the_ratio_has_the_error_of_both_traces():
    """It holds as often as it says, has Tr H's error where Tr(HΣ) has none, and none where both deviate alike."""
    model, loss_fn, x, y = network()
    G, H = rows(model, loss_fn, x, y), dense_hessian(model, x, y)
    sigma = torch.cov(G.T, correction=0)
    exact = 26 * float((H @ sigma).trace() / (H.trace() * sigma.trace()))
    generator = torch.Generator().manual_seed(0)
    within = 0
    for _ in range(200):
        v = torch.randint(2, (40, 26), generator=generator).double() * 2 - 1
        products, traces = ((v @ H) * (v @ sigma)).sum(1), ((v @ H) * v).sum(1)
        found = _ratio(products.tolist(), traces.tolist(), float(sigma.trace()) / 26)
        within += found.low < exact < found.high
    assert 0.9 <= within / 200 <= 0.98
    traces = interval([1.0, 1.1, 1.3])
    found = _ratio([2.0, 2.0, 2.0], [1.0, 1.1, 1.3], 1.0)
    assert (found.high - found.mean) / found.mean == pytest.approx((traces.high - traces.mean) / traces.mean)
    together = _ratio([2.0, 2.2, 2.6], [1.0, 1.1, 1.3], 1.0)
    assert together.mean == pytest.approx(2) and together.high - together.low < 1e-12


def test_a_trace_that_may_be_zero_leaves_the_ratio_open():
    found = _ratio([1.0, 1.2, 0.9], [2.0, -1.0, 0.5], 1.0)
    assert found.mean == pytest.approx(3.1 / 1.5) and (found.low, found.high) == (-math.inf, math.inf)
    assert _ratio([1.0, 1.2], [-2.0, -1.0], 1.0).n == 0
    assert _ratio([1.0, 1.2], [2.0, 2.1], 0.0).n == 0
