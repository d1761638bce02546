import math

import pytest
import torch

from bootgrad.experiments import idealized
from bootgrad.experiments.idealized import Landscape, noise_power, population_loss, simulate


@pytest.fixture
def land():
    return Landscape(range(3))


def test_gradients_are_those_of_the_losses(land):
    theta = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    land.amplitudes, land.places = land.amplitudes.double(), land.places.double()
    expected = torch.autograd.functional.jacobian(land.losses, theta)  # (S, M, N, S, M, 2)
    own = torch.einsum("smnsmk->smnk", expected)
    torch.testing.assert_close(land.gradients(theta), own, atol=1e-6, rtol=1e-6)  # places of the wells are float32


def test_the_population_has_the_shared_basin_alone(land):
    many = Landscape([0], 200_000)
    theta = torch.cat([idealized.PLACE[None], land.wells])[None]
    mean = many.losses(theta).mean(2)
    deviation = many.losses(theta).std(2) / math.sqrt(200_000)
    assert (mean - population_loss(theta)).abs().lt(4.5 * deviation + 1e-5).all()
    assert population_loss(theta)[0].argmin() == 0


def test_noise_power_is_the_covariance_trace(land):
    g = land.gradients(torch.zeros(3, 1, 2))
    expected = torch.stack([torch.cov(own[0].T, correction=0).trace() for own in g])
    torch.testing.assert_close(noise_power(g)[:, 0], expected)


@pytest.mark.parametrize("method", idealized.METHODS)
def test_all_methods_start_alike_and_repeat_themselves(land, method):
    path, again = (simulate(method, land, 0.01, 0.1, 3, 5, power=1.0) for _ in range(2))
    assert path.shape == (3, 3, 5, 2) and torch.equal(path, again) and not path.requires_grad
    assert (path[0] - simulate("gd", land, 0.0, 0.0, 1, 5)[0]).abs().max() < 1


def test_a_step_along_reg1_is_the_gradient_of_the_covariance_trace(land):
    lr, strength = 0.1, 0.3
    start = simulate("gd", land, 0.0, 0.0, 1, 2)[0].requires_grad_()
    g = land.gradients(start)
    (slope,) = torch.autograd.grad(noise_power(g).sum(), start)
    expected = start - lr * (g.mean(2) + strength * slope)
    torch.testing.assert_close(simulate("gd + reg1", land, lr, strength, 1, 2)[0], expected.detach())


def test_a_run_that_diverges_is_a_row(land):
    rows = idealized.evaluate("gd + reg1", range(2), {"lr": 1e4, "strength": 1e8}, 20, 2)
    assert len(rows) == 2 * (idealized.WELLS + 2)
    assert all(math.isinf(row["test_loss"]) and math.isinf(row["validation_loss"]) for row in rows)


def test_shares_are_of_all_the_time(land):
    rows = idealized.evaluate("sgd 4", range(2), {"lr": 0.1, "strength": 0.0}, 40, 3)
    for seed in range(2):
        assert sum(row["share"] for row in rows if row["seed"] == seed) == pytest.approx(1)
