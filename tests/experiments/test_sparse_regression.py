"""The experiment on sparse regression: its parts, and its quick form."""

import math

import pytest
import torch

from bootgrad.experiments import sparse_regression as sparse
from bootgrad.experiments.conduct import conduct
from bootgrad.experiments.ensembles import diagonal_network, penalized_gradient
from bootgrad.experiments.sparse_regression import PENALTY, Problem, evaluate, train
from bootgrad.experiments.study import Options
from bootgrad.experiments.table import Table


def setting(lr=0.05, strength=0.0, ratio=0.0):
    return {"lr": lr, "strength": strength, "ratio": ratio}


@pytest.fixture
def problem():
    return Problem(range(2))


def first_batch(problem):
    return problem.batch(sparse.BATCH, torch.Generator().manual_seed(0))


def test_data_are_sparse_and_the_test_loss_is_that_of_many_samples(problem):
    assert problem.train[0].shape == (2, sparse.SAMPLES, sparse.INPUTS)
    assert problem.validation[0].shape == (2, sparse.VALIDATION, sparse.INPUTS)
    assert (problem.truth.abs().sum(1) == sparse.NONZERO).all() and (problem.truth != 0).sum() == 2 * sparse.NONZERO
    theta = 0.5 * torch.randn(2, 3, 2 * sparse.INPUTS, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    fresh = torch.randn(2, 20_000, sparse.INPUTS, generator=generator)
    labels = (fresh @ problem.truth[..., None])[..., 0] + sparse.NOISE * torch.randn(2, 20_000, generator=generator)
    # a squared normal's deviation is √2 of its mean
    torch.testing.assert_close(
        problem.test_loss(theta), diagonal_network(theta, fresh, labels).loss, rtol=4.5 * (2 / 20_000) ** 0.5, atol=0
    )


@pytest.mark.parametrize("method", ["sgd", "gd", "weight decay", "sam", PENALTY])
def test_a_step_is_what_its_name_says(problem, method):
    at = setting(strength=0.2, ratio=0.5)
    start = torch.full((2, 1, 2 * sparse.INPUTS), sparse.START, requires_grad=True)
    part = first_batch(problem)
    loss = diagonal_network(start, *(problem.train if method == "gd" else part)).loss.sum()
    (gradient,) = torch.autograd.grad(loss, start)
    if method == "weight decay":
        gradient = gradient + 0.2 * start
    elif method == "sam":
        ahead = (start + 0.2 * gradient / gradient.norm(dim=-1, keepdim=True)).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(diagonal_network(ahead, *part).loss.sum(), ahead)
    elif method == PENALTY:
        gradient, _ = penalized_gradient(diagonal_network, start, part, 0.1, 0.2, whole=problem.train)
    torch.testing.assert_close(train(method, problem, [at], 1), (start - 0.05 * gradient).detach())


def test_noise_without_direction_has_the_power_of_sgds(problem):
    start = torch.full((2, 1, 2 * sparse.INPUTS), sparse.START)
    whole = diagonal_network(start, *problem.train)
    moved = train("noisy gd", problem, [setting()], 1)
    noise = (start - moved) / 0.05 - whole.gradient
    power = noise.square().sum(-1)
    torch.testing.assert_close(power, whole.covariance_trace / sparse.BATCH, rtol=4.5 * (2 / 200) ** 0.5, atol=0)
    drawn = [
        diagonal_network(start, *problem.batch(sparse.BATCH, generator)) for generator in [torch.Generator()] * 1500
    ]
    sgd = torch.stack([(d.gradient - whole.gradient).square().sum(-1) for d in drawn])
    assert ((sgd.mean(0) - whole.covariance_trace / sparse.BATCH).abs() < 4.5 * sgd.std(0) / 1500**0.5).all()


def test_settings_do_not_touch_each_other_and_times_are_steps(problem):
    grid = [setting(), setting(0.01, 0.01, 0.5), setting(1e3, 1e3, 1.0)]
    together = train(PENALTY, problem, grid, 30)
    assert not together[:, 2].isfinite().any()
    for k in (0, 1):
        torch.testing.assert_close(together[:, k : k + 1], train(PENALTY, problem, grid[k : k + 1], 30))
    torch.testing.assert_close(together[:, :1], train("sgd", problem, grid[:1], 30))
    torch.testing.assert_close(train("sgd, 3 × the steps", problem, grid[:1], 10), together[:, :1])


def test_a_run_that_diverges_is_a_row_for_each_seed():
    rows = evaluate("sgd", range(3, 6), [setting(), setting(lr=1e4)], 30)
    assert [row["seed"] for row in rows] == [3, 4, 5] * 2
    assert all(math.isfinite(row["test_loss"]) == (row["lr"] < 1) for row in rows)
    assert all(math.isinf(row["validation_loss"]) for row in rows[3:])


def made(losses):
    """A table in which seed k's test loss is what ``losses`` says, times 1 + k/10."""
    rows = []
    for (method, *values), loss in losses.items():
        for stage, seed in [("search", 1000), ("search", 1001), *(("final", seed) for seed in range(3))]:
            found = loss * (1 + seed / 10) if stage == "final" else loss
            numbers = {"train_loss": 0.0, "validation_loss": found, "test_loss": found}
            at = dict(zip(sparse.SETTING, values, strict=True))
            rows.append({"stage": stage, "method": method, **at, "seed": seed, **numbers})
    return Table(sparse.COLUMNS, rows)


def test_claims_are_about_the_settings_that_the_search_found():
    table = made(
        {
            ("sgd", 0.01, 0.0, 0.0): 2.0,
            ("sgd", 0.1, 0.0, 0.0): 1.0,
            ("gd", 0.01, 0.0, 0.0): 0.5,
            (PENALTY, 0.01, 0.03, 0.5): 0.8,
            (PENALTY, 0.01, 0.1, 0.5): 3.0,
            (PENALTY, 0.01, 0.3, 0.5): math.inf,
            (PENALTY, 0.01, 0.03, 2.0): 0.1,  # not at λ₁/λ₂ = ½
            (PENALTY, 0.1, 0.03, 0.5): 1.1,
            (PENALTY, 0.1, 0.1, 0.5): math.nan,
        }
    )
    sgd, gd, by_lr, by_strength = sparse.claims(table)
    assert (sgd.source, gd.source) == (sparse.SECTION, "ours") and "gd" in gd.text
    found = [claim.found.mean for claim in (sgd, gd, by_lr, by_strength)]
    assert found == pytest.approx([1 - 0.8, 1 - 0.8 / 0.5, (1 - 0.4) - (1 - 1.1), (1 - 0.4) - (1 - 1.5)])
    assert "0.1, the largest" in by_strength.quantity
    text = sparse.tables(table)
    assert "10 of the 45 runs diverged" in text and "0.95 [0.95, 0.95]" in text  # 1 − 0.1/2


@pytest.mark.slow
def test_the_quick_form_runs_and_the_penalties_beat_gradient_descent(tmp_path):
    summary = conduct(Options("sparse-regression", seeds=3, threads=1), tmp_path).read_text(encoding="utf-8")
    table = Table.read(tmp_path / "results.csv", sparse.COLUMNS)
    best = sparse.chosen(table, PENALTY, ratio=sparse.RATIO)
    assert best["strength"] > 0
    for method in ("sgd", "gd"):
        gains = sparse.reduction(table, best, method, sparse.chosen(table, method))
        assert sum(gains) / 3 > 0.05, method
    gentle, fast = (sum(sparse.against_sgd(table, ratio=sparse.RATIO, lr=lr)) / 3 for lr in (0.003, 0.04))
    assert gentle > fast > 0
    decayed = sparse.outcome(table, "weight decay", sparse.chosen(table, "weight decay"))
    assert sum(decayed) < sum(sparse.outcome(table, PENALTY, best))
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and "runs diverged" in summary
