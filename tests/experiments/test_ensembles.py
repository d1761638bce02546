"""Ensembles against the library and against plain autograd, copy by copy."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bootgrad
from bootgrad.experiments.ensembles import TwoLayers, diagonal_network, penalized_gradient

COPIES, SAMPLES, BATCH, INPUTS, CLASSES = 3, 9, 4, 5, 4
REG1, REG2 = 0.3, 0.7


class Diagonal(nn.Module):
    def __init__(self, theta):
        super().__init__()
        self.u, self.v = (nn.Parameter(part.clone()) for part in theta.chunk(2))

    def forward(self, x):
        return F.linear(x, (self.u * self.u - self.v * self.v)[None])[:, 0]


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def diagonal():
    theta, x, y = random(COPIES, 2 * INPUTS), random(SAMPLES, INPUTS, seed=1), random(SAMPLES, seed=2)
    models = [Diagonal(row) for row in theta]
    return diagonal_network, theta, x, y, models, lambda output, y: 0.5 * (output - y).square()


def two_layers():
    network = TwoLayers(INPUTS, 6, CLASSES)
    theta = torch.stack([network.start(torch.Generator().manual_seed(seed)) for seed in range(COPIES)]).double()
    x, y = random(SAMPLES, INPUTS, seed=1), torch.arange(SAMPLES) % CLASSES
    models = []
    for row in theta:
        model = nn.Sequential(nn.Linear(INPUTS, 6), nn.ReLU(), nn.Linear(6, CLASSES)).double()
        nn.utils.vector_to_parameters(row, model.parameters())
        models.append(model)
    return network, theta, x, y, models, lambda output, y: F.cross_entropy(output, y, reduction="none")


@pytest.fixture(params=[diagonal, two_layers])
def case(request):
    return request.param()


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def recorded(model, loss, x, y):
    with bootgrad.record(model) as rec:
        losses = loss(model(x), y)
    return losses, rec.per_sample_gradients(losses, create_graph=True)


def test_moments_are_the_librarys(case):
    network, theta, x, y, models, loss = case
    found = network(theta, x, y)
    for k, model in enumerate(models):
        losses, G = recorded(model, loss, x, y)
        torch.testing.assert_close(found.loss[k], losses.mean())
        torch.testing.assert_close(found.sq_norm[k], G.sq_norms().mean())
        torch.testing.assert_close(found.gradient[k], flat(G.mean()[name] for name, _ in model.named_parameters()))
        torch.testing.assert_close(found.covariance_trace[k], G.covariance_trace())


@pytest.mark.parametrize("center", ["constant", "none"])
def test_penalties_of_a_mini_batch_are_the_librarys(case, center):
    network, theta, x, y, models, loss = case
    part = (x[:BATCH], y[:BATCH])
    c = random(*theta.shape, seed=3) if center == "constant" else None
    found, mean = penalized_gradient(network, theta, part, REG1, REG2, center=c)
    for k, model in enumerate(models):
        losses, G = recorded(model, loss, *part)
        total = losses.mean() + REG1 * bootgrad.reg1(G)
        if c is not None:
            sizes = [p.numel() for p in model.parameters()]
            parts = zip(model.named_parameters(), c[k].split(sizes), strict=True)
            total = total + REG2 * bootgrad.reg2(G, center={name: v.view_as(p) for (name, p), v in parts})
        expected = torch.autograd.grad(total, list(model.parameters()))
        torch.testing.assert_close(found[k], flat(expected))
        torch.testing.assert_close(mean[k], flat(G.mean()[name] for name, _ in model.named_parameters()))


def test_penalties_about_the_full_gradient_keep_its_derivative(case):
    network, theta, x, y, models, loss = case
    part = (x[:BATCH], y[:BATCH])
    found, _ = penalized_gradient(network, theta, part, REG1, REG2, whole=(x, y))
    for k, model in enumerate(models):
        parameters = list(model.parameters())
        losses = loss(model(x), y)
        rows = torch.stack([flat(torch.autograd.grad(one, parameters, create_graph=True)) for one in losses])
        center = rows.mean(0)
        reg1 = (rows - center).square().sum(1).mean()
        reg2 = (rows[:BATCH].mean(0) - center).square().sum()
        expected = torch.autograd.grad(losses[:BATCH].mean() + REG1 * reg1 + REG2 * reg2, parameters)
        torch.testing.assert_close(found[k], flat(expected))


def test_factors_may_be_those_of_each_copy_and_one_copy_does_not_touch_another(case):
    network, theta, x, y, *_ = case
    factors = random(COPIES, seed=4).abs()
    found, _ = penalized_gradient(network, theta, (x, y), factors, factors, whole=(x, y))
    broken = theta.clone()
    broken[1] = torch.nan
    others, _ = penalized_gradient(network, broken, (x, y), factors, factors, whole=(x, y))
    for k in (0, 2):
        alone, _ = penalized_gradient(network, theta[k : k + 1], (x, y), factors[k], factors[k], whole=(x, y))
        torch.testing.assert_close(found[k], alone[0])
        torch.testing.assert_close(others[k], alone[0])
    assert others[1].isnan().all()


def test_a_start_is_as_torchs():
    network = TwoLayers(100, 50, 10)
    theta = network.start(torch.Generator().manual_seed(0))
    assert theta.shape == (100 * 50 + 50 + 50 * 10 + 10,)
    first, second = theta[:5050], theta[5050:]
    for part, bound in ((first, 100**-0.5), (second, 50**-0.5)):
        assert part.abs().max() <= bound and part.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
