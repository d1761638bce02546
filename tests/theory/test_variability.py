"""The bounds on Tr V: their recursions, and that they hold where a convex problem is retrained with every sample replaced."""

import math

import pytest
import torch

import bootgrad
from bootgrad.errors import ArgumentError
from bootgrad.theory import VariabilityBound

from .problems import Direct

N, B, POOL, D, RIDGE = 8, 2, 12, 3, 0.2


def test_the_recursions_are_the_sums_that_they_stand_for():
    bound = VariabilityBound(10)
    steps = [(0.1, 2, 3.0, 1.0, 0.9), (0.2, 5, 2.0, 0.5, 1.1), (0.05, 1, 7.0, 4.0, 0.8)]
    for lr, batch, population, deviation, rho in steps:
        bound.update(lr, batch, population=population, deviation=deviation, expansion=rho)
    after = [math.prod(s[4] for s in steps[t + 1 :]) for t in range(3)]
    a = [s[0] * math.sqrt((s[2] + s[3]) / (s[1] * 10)) for s in steps]
    assert bound.any_order == pytest.approx(sum(r * v for r, v in zip(after, a, strict=True)) ** 2)
    assert bound.leading_order == pytest.approx(sum(r**2 * v**2 for r, v in zip(after, a, strict=True)))
    of_population = sum(r**2 * s[0] ** 2 * s[2] / (s[1] * 10) for r, s in zip(after, steps, strict=True))
    assert bound.population_part == pytest.approx(of_population)
    y = 0.0
    for lr, batch, population, deviation, rho in steps:
        rms = lr * math.sqrt(population + deviation)
        y = rho**2 * y + 2 * rho * math.sqrt(y) * rms / 10 + rms**2 / (batch * 10)
    assert bound.fresh_batches == pytest.approx(y) and bound.steps == 3
    assert bound.leading_order < bound.fresh_batches < bound.any_order
    assert "after 3 steps" in str(bound) and f"{100 * of_population / bound.leading_order:.0f} %" in str(bound)
    other = VariabilityBound(10)
    other.load_state_dict(bound.state_dict())
    for each in (bound, other):
        each.update(0.1, 2, population=1.0, deviation=1.0)
    assert other.state_dict() == bound.state_dict()


def test_a_full_batch_without_expansion_adds_moves_up():
    """With B = N all three ways of a sample's own moves being alike give (T η)² (Γ_pop + D)/N²."""
    bound = VariabilityBound(5)
    for _ in range(7):
        bound.update(0.1, 5, population=2.0, deviation=1.0)
    assert bound.any_order == pytest.approx((7 * 0.1) ** 2 * 3 / 25)
    assert bound.fresh_batches == pytest.approx(bound.any_order)
    assert bound.leading_order == pytest.approx(bound.any_order / 7)


def test_statistics_estimate_both_parts():
    model = torch.nn.Linear(3, 1).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6).double()
    with bootgrad.record(model) as rec:
        losses = (model(x)[:, 0] - y).square()
    stats = rec.backward(losses)
    trace = float(stats.covariance_trace) * 6 / 5
    ours, expected = VariabilityBound(20), VariabilityBound(20)
    ours.update(0.1, 4, stats)
    expected.update(0.1, 4, population=trace, deviation=trace)
    assert ours.state_dict() == expected.state_dict()
    ours.update(0.1, 4, stats, population=9.0)
    expected.update(0.1, 4, population=9.0, deviation=trace)
    assert ours.state_dict() == expected.state_dict()
    reg = bootgrad.GradientRegularizer(model, reg1=0.1)
    report = reg.backward(lambda x, y: (model(x)[:, 0] - y).square(), x, y)
    ours.update(0.1, 4, report)
    expected.update(0.1, 4, population=trace, deviation=trace)
    assert ours.any_order == pytest.approx(expected.any_order)


def gradients(theta, x, y):
    """Per-sample gradients of ridge logistic losses: θ (R, D), x (R, n, D), y (R, n) to (R, n, D)."""
    z = (x * theta[:, None]).sum(-1)
    return (torch.sigmoid(z) - y)[..., None] * x + RIDGE * theta[:, None]


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(POOL, D, generator=generator).double()
    y = (torch.rand(POOL, generator=generator) < torch.sigmoid(2 * x[:, 0])).double()
    largest = RIDGE + float(x.square().sum(1).max()) / 4
    lr = 1.5 / largest
    return x, y, lr, max(abs(1 - lr * RIDGE), abs(1 - lr * largest))


def retrained(x, y, lr, rho, order, steps):
    """Tr V, over all i and all z'_i of the pool, and the bounds, after each step of SGD with the batches of ``order``."""
    S = torch.arange(N)  # of the pool
    sets = S.repeat(1 + N * POOL, 1)
    rows = torch.arange(N * POOL)
    sets[1 + rows, rows % N] = rows // N
    theta = torch.zeros(len(sets), D).double()
    bound, found = VariabilityBound(N), []
    for chosen in order[:steps]:
        model = Direct(theta[0])

        def losses(x, y, model=model):
            z = x @ model.theta
            return torch.nn.functional.softplus(z) - y * z

        with bootgrad.record(model) as rec:
            values = losses(x, y)
        population = rec.backward(values)
        center, model.theta.grad = {"theta": model.theta.grad}, None
        with bootgrad.record(model) as rec:
            values = losses(x[S[chosen]], y[S[chosen]])
        deviation = rec.backward(values, center=center).reg1
        bound.update(lr, B, population=float(population.covariance_trace), deviation=float(deviation), expansion=rho)
        picked = sets[:, chosen]
        theta = theta - lr * gradients(theta, x[picked], y[picked]).mean(1)
        found.append((float((theta[1:] - theta[0]).square().sum(1).mean()), bound.any_order, bound.fresh_batches))
    return torch.tensor(found, dtype=torch.float64)


def shuffled(generator, epochs):
    return [part for _ in range(epochs) for part in torch.randperm(N, generator=generator).split(B)]


def fresh(generator, steps):
    return [torch.randperm(N, generator=generator)[:B] for _ in range(steps)]


def test_the_first_step_is_met_exactly():
    x, y, lr, rho = problem()
    truth, any_order, fresh_batches = retrained(x, y, lr, rho, fresh(torch.Generator().manual_seed(1), 1), 1)[0]
    assert float(any_order) == pytest.approx(float(truth), rel=1e-9)
    assert float(fresh_batches) == pytest.approx(float(truth), rel=1e-9)


def test_the_bound_for_any_order_holds_on_each_path():
    x, y, lr, rho = problem()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for order in (shuffled(generator, 12), fresh(generator, 48)):
            found = retrained(x, y, lr, rho, order, 48)
            assert (found[:, 1] >= found[:, 0] * (1 - 1e-9)).all()
    assert float(found[-1, 1] / found[-1, 0]) < 30


def test_the_bound_for_fresh_batches_holds_on_average_and_is_nearer():
    x, y, lr, rho = problem()
    paths = [retrained(x, y, lr, rho, fresh(torch.Generator().manual_seed(seed), 16), 16) for seed in range(12)]
    mean = torch.stack(paths).mean(0)
    assert (mean[:, 2] >= mean[:, 0] * (1 - 1e-9)).all()
    assert float(mean[-1, 2] / mean[-1, 0]) < 0.6 * float(mean[-1, 1] / mean[-1, 0])


GOOD = {"samples": 4, "steps": 2, "parts": [4.0, 3.0, 2.0, 1.0]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 5},
        {"steps": -1},
        {"parts": [1.0]},
        {"parts": [1, 2, 3, math.nan]},
        {"parts": [1, 2, 3, math.inf]},
        {"parts": None},
    ],
)
def test_what_is_no_state_is_refused(wrong):
    bound = VariabilityBound(4)
    with pytest.raises(ArgumentError, match="not a state_dict of a VariabilityBound"):
        bound.load_state_dict(GOOD | wrong)
    assert bound.state_dict() == VariabilityBound(4).state_dict()


def test_mistakes_are_errors():
    with pytest.raises(ArgumentError, match="samples must be a whole number of at least 1"):
        VariabilityBound(0)
    bound = VariabilityBound(4)
    both = {"population": 1.0, "deviation": 1.0}
    for options, message in (
        ({"lr": -0.1}, "lr must be finite and not negative; got -0.1"),
        ({"expansion": math.inf}, "expansion must be finite"),
        ({"population": math.nan}, "population must be finite"),
        ({"batch_size": 5}, "batch_size must be a whole number in 1 … N = 4; got 5"),
        ({"population": None}, "statistics must be of two samples or more.*got none"),
    ):
        with pytest.raises(ArgumentError, match=message):
            bound.update(**{"lr": 0.1, "batch_size": 2, **both, **options})
    assert bound.state_dict() == VariabilityBound(4).state_dict()


@pytest.mark.parametrize(
    "step",
    [
        {"lr": 1e200, "population": 1e300, "deviation": 1.0},
        {"lr": 0.1, "population": 1.7e308, "deviation": 1.7e308},
        {"lr": 0.1, "population": 1.0, "deviation": 1.0, "expansion": 1e200},
    ],
)
def test_a_bound_beyond_all_numbers_is_refused(step):
    bound = VariabilityBound(4)
    bound.update(0.1, 1, population=1.0, deviation=1.0)
    before = bound.state_dict()
    with pytest.raises(ArgumentError, match="beyond the numbers that a float holds"):
        bound.update(**{"batch_size": 1, **step})
    assert bound.state_dict() == before
    bound.update(1e-200, 1, population=1e300, deviation=0.0)
    assert bound.steps == 2
