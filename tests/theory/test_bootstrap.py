"""Distances of covariances against the covariances themselves, the rate, and eq. 10 by enumeration of all mini-batches."""

import itertools

import pytest
import torch

from bootgrad import record
from bootgrad.errors import ArgumentError
from bootgrad.theory import bootstrap_error
from bootgrad.theory.bootstrap import sq_distance_of_means, sq_distances_to_pool

from .problems import CLOSE, Direct, network, rows


def covariance(G):
    return torch.cov(G.T, correction=0)


def centered_gram(G):
    away = G - G.mean(0)
    return away @ away.T


def test_distances_by_gram_matrices_are_those_of_the_covariances():
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(9, 4, generator=generator).double() + 3
    K = centered_gram(G)
    drawn = torch.randint(9, (5, 6), generator=generator)
    weights = torch.zeros(5, 9).double().scatter_add_(1, drawn, torch.full((5, 6), 1 / 6, dtype=torch.float64))
    expected = torch.stack([(covariance(G[d]) - covariance(G)).square().sum() for d in drawn])
    torch.testing.assert_close(sq_distances_to_pool(K, weights), expected, **CLOSE)
    batches = torch.randint(9, (7, 3), generator=generator)
    of_batches = torch.zeros(7, 9).double().scatter_add_(1, batches, torch.full((7, 3), 1 / 3, dtype=torch.float64))
    means = torch.stack([G[b].mean(0) for b in batches])
    expected = (3 * torch.cov(means.T) - covariance(G)).square().sum()
    assert sq_distance_of_means(K, of_batches, 3) == pytest.approx(float(expected), rel=1e-9)


def test_errors_of_a_model_are_those_of_its_gradients():
    model, loss_fn, x, y = network()
    found = bootstrap_error(model, loss_fn, x, y, sizes=(4, 9), draws=3, seed=7)
    G = rows(model, loss_fn, x, y)
    generator = torch.Generator().manual_seed(7)
    for k, n in enumerate((4, 9)):
        drawn = torch.randint(12, (3, n), generator=generator)
        errors = [float((covariance(G[d]) - covariance(G)).norm() / covariance(G).norm()) for d in drawn]
        assert found.sample[k].mean == pytest.approx(sum(errors) / 3, rel=1e-9)
    away = G - G.mean(0)
    fourth = float(away.square().sum(1).square().mean() / covariance(G).square().sum())
    assert found.predicted == pytest.approx([((fourth - 1) / n) ** 0.5 for n in (4, 9)])
    assert found.mini_batch is None and all(p.grad is None for p in model.parameters())


def pool():
    model = Direct(torch.zeros(5).double())
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(150, 5, generator=generator).double() * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1])
    return model, lambda z: (model.theta - z).square().sum(1) / 2, z


def test_the_rate_is_a_half_and_the_constant_is_as_predicted():
    found = bootstrap_error(*pool(), sizes=(50, 200, 800, 3200), draws=200)
    assert found.rate.low < -0.5 < found.rate.high and found.rate.high - found.rate.low < 0.06
    for error, predicted in zip(found.sample, found.predicted, strict=True):
        assert 0.85 * predicted < error.mean < 1.02 * predicted  # of root mean squares, which are more than means


def test_mini_batches_show_the_covariance_but_for_their_number():
    """Of R of them, near to normal, ‖B C − Σ‖² ≈ (‖Σ‖² + (Tr Σ)²)/(R − 1), beside the error of the N samples."""
    model, loss_fn, z = pool()
    found = bootstrap_error(model, loss_fn, z, sizes=(50, 3200), batch_size=8, batches=400, draws=30)
    sigma = covariance(z)
    floor = float(((1 + sigma.trace() ** 2 / sigma.square().sum()) / 399).sqrt())
    assert found.mini_batch is not None
    for seen, error in zip(found.mini_batch, found.sample, strict=True):
        assert seen.mean == pytest.approx((error.mean**2 + floor**2) ** 0.5, rel=0.15)
    text = str(found)
    assert "of mini-batches" in text and "theory −0.5" in text and len(text.splitlines()) == 4


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_eq_10_for_all_mini_batches_that_there_are(size, replacement):
    """Tr Σ_B = Γ/B; of distinct samples (N − B)/(N − 1) of it."""
    model, loss_fn, x, y = network()
    x, y = x[:5], y[:5]
    G = rows(model, loss_fn, x, y)
    with record(model) as rec:
        losses = loss_fn(x, y)
    gamma = rec.backward(losses).covariance_trace
    batches = itertools.product(range(5), repeat=size) if replacement else itertools.combinations(range(5), size)
    means = torch.stack([G[list(b)].mean(0) for b in batches])
    factor = 1.0 if replacement else (5 - size) / 4
    torch.testing.assert_close(covariance(means).trace(), gamma / size * factor, **CLOSE)
    torch.testing.assert_close(covariance(means), covariance(G) / size * factor, **CLOSE)


def test_buffers_and_generators_stay_and_dropout_is_refused():
    model, loss_fn, x, y = network()

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            torch.rand(1)
            return x

    model.append(Counting())
    state = torch.get_rng_state()
    bootstrap_error(model, loss_fn, x, y, sizes=(2, 4), draws=2)
    assert float(model[-1].seen) == 0 and torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        bootstrap_error(model, loss_fn, x, y, sizes=(2, 4), draws=2)
    model.append(torch.nn.Dropout(0.5))
    with pytest.raises(ArgumentError, match=r"other losses when it was called again.*put dropout into eval\(\)"):
        bootstrap_error(model, loss_fn, x, y, sizes=(2, 4), draws=2)


def test_mistakes_are_errors():
    model, loss_fn, x, y = network()
    for options, message in (
        ({"sizes": (4,)}, r"two or more different numbers of at least 2, for a rate; got \[4\]"),
        ({"sizes": (1, 4)}, "two or more different numbers"),
        ({"draws": 1}, "draws must be a whole number of at least 2; got 1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1; got 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            bootstrap_error(model, loss_fn, x, y, **{"sizes": (2, 4), **options})
    flat = Direct(torch.zeros(2).double())
    with pytest.raises(ArgumentError, match="all gradients of the pool are alike"):
        bootstrap_error(flat, lambda z: z @ torch.ones(2).double() + flat.theta.sum(), x[:, :2], sizes=(2, 4))
