"""Rules of copies against the library's regularizer, plain autograd, and λ that does not change."""

import math
from types import SimpleNamespace

import pytest
import torch

import bootgrad
from bootgrad.centers import FullBatchMean
from bootgrad.experiments import ensemble_rules
from bootgrad.experiments import sparse_regression as sparse
from bootgrad.experiments.ensemble_rules import evaluate, train
from bootgrad.experiments.image_runs import LOSSES, MEASURES
from bootgrad.strengths import Bound, LookAhead, Share

from .test_ensembles import Diagonal, flat

MAKERS = {
    "share": lambda lr: Share(0.3, every=3, decay=0.5),
    "bound": lambda lr: Bound(lr, 0.4),
    "look-ahead": lambda lr: LookAhead(0.5, every=3),
}
LRS, STEPS = (0.05, 0.02), 11
make_of = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@pytest.fixture
def problem():
    """Two data sets in float64."""
    found = sparse.Problem(range(2))
    found.train = tuple(t.double() for t in found.train)
    return found


def batches(problem, steps):
    generator = torch.Generator().manual_seed(0)
    return [problem.batch(sparse.BATCH, generator) for _ in range(steps)]


def network():
    return Diagonal(torch.full((2 * sparse.INPUTS,), sparse.START, dtype=torch.float64))


@make_of
def test_lambda_and_steps_are_the_librarys(problem, make):
    """Of Reg2 about the full gradient, which moves with the parameters."""
    mine = [make(lr) for _ in range(2) for lr in LRS]
    theta, strength = train(problem, LRS, mine, 0.0, STEPS)
    drawn = batches(problem, STEPS)
    for copy, rule in enumerate(mine):
        seed, m = divmod(copy, len(LRS))
        model, theirs = network(), make(LRS[m])
        whole = problem.train[0][seed], problem.train[1][seed]

        def losses(x, y, model=model):
            return 0.5 * (model(x) - y).square()

        center = FullBatchMean([whole], losses, differentiable=True)
        reg = bootgrad.GradientRegularizer(model, reg2=theirs, center=center)
        optimizer = torch.optim.SGD(model.parameters(), lr=LRS[m])
        values = set()
        for x, y in drawn:
            optimizer.zero_grad()
            report = reg.backward(losses, x[seed], y[seed])
            optimizer.step()
            values.add(report.strengths["reg2"])
        assert float(strength[seed, m]) == pytest.approx(report.strengths["reg2"], rel=1e-8)
        torch.testing.assert_close(theta[seed, m], flat(model.parameters()).detach(), rtol=1e-8, atol=1e-12)
        if not isinstance(rule, Bound):
            assert len(values) > 2 and rule.state_dict()["next"] == theirs.state_dict()["next"]
            assert rule.value == pytest.approx(theirs.value, rel=1e-8)


@make_of
def test_lambda_and_steps_of_both_penalties_are_those_of_plain_autograd(problem, make):
    """Of Reg2 + ½ Reg1 from per-sample gradients, with a rule that is shown them by hand."""
    mine = [make(0.05) for _ in range(2)]
    theta, strength = train(problem, [0.05], mine, 0.5, STEPS)
    for seed in range(2):
        model, rule = network(), make(0.05)
        parameters = list(model.parameters())
        for number, (x, y) in enumerate(batches(problem, STEPS)):
            G, B = (rows(model, *part) for part in ((p[seed] for p in problem.train), (x[seed], y[seed])))
            penalty = (B.mean(0) - G.mean(0)).square().sum() + 0.5 * (G - G.mean(0)).square().sum(1).mean()
            added, mean = flat(torch.autograd.grad(penalty, parameters)), B.mean(0).detach()
            shown = seen(number, rule.due(number), mean, added)
            is_trial = shown.is_measured and rule.trial is not None
            lam = rule.found(shown.added) if is_trial else rule.strength("reg2", number)
            rule.after(shown)
            with torch.no_grad():
                torch.nn.utils.vector_to_parameters(flat(parameters) - 0.05 * (mean + lam * added), parameters)
        assert float(strength[seed, 0]) == pytest.approx(lam, rel=1e-8)
        torch.testing.assert_close(theta[seed, 0], flat(parameters).detach(), rtol=1e-8, atol=1e-12)


def rows(model, x, y):
    losses = 0.5 * (model(x) - y).square()
    return torch.stack([flat(torch.autograd.grad(one, list(model.parameters()), create_graph=True)) for one in losses])


def seen(step, is_measured, mean, added):
    return SimpleNamespace(
        step=step,
        is_measured=is_measured,
        batch_size=sparse.BATCH,
        is_finite=lambda: True,
        mean={"theta": mean},
        added=SimpleNamespace(
            log_ratio=lambda: math.log(added.norm() / mean.norm()),
            remedy=lambda: 1.0,
            gradient=lambda: {"theta": added},
        ),
    )


@make_of
def test_a_copy_that_diverges_leaves_the_others_alone(problem, make):
    lrs = (1e4, 0.05)
    rules = [make(lr) for _ in range(2) for lr in lrs]
    theta, strength = train(problem, lrs, rules, 0.5, 40)
    alone, of_those = train(problem, lrs[1:], [make(lrs[1]) for _ in range(2)], 0.5, 40)
    torch.testing.assert_close(theta[:, 1:], alone)
    torch.testing.assert_close(strength[:, 1:], of_those)
    assert not theta[:, 0].isfinite().any() and strength.isfinite().all() and alone.isfinite().all()


def test_norms_are_made_where_a_rule_is_due_alone(problem, monkeypatch):
    made = []

    class Counted(ensemble_rules.Step):
        @property
        def norms(self):
            made.append(self.number)
            return torch.stack([self.mean, self.added], 1).norm(dim=-1).tolist()

    monkeypatch.setattr(ensemble_rules, "Step", Counted)
    train(problem, LRS, [Share(every=4) for _ in range(4)], 0.5, STEPS)
    assert set(made) == {0, 4, 8}


def test_a_rule_that_does_not_move_is_a_fixed_strength():
    grid = [{"lr": 0.02, "strength": 0.03}, {"lr": 0.05, "strength": 0.1}, {"lr": 1e4, "strength": 0.1}]
    fixed = evaluate(None, range(3, 5), grid, 30)
    ruled = evaluate(lambda value, lr: Bound(2 * value), range(3, 5), grid, 30)  # λ₂ = η/2
    assert [(row["lr"], row["strength"], row["seed"]) for row in fixed] == [
        (s["lr"], s["strength"], seed) for s in grid for seed in (3, 4)
    ]
    theirs = sparse.evaluate(sparse.PENALTY, range(3, 5), [{**s, "ratio": 0.5} for s in grid], 30)
    for a, b, c in zip(fixed, ruled, theirs, strict=True):
        assert set(a) == {"lr", "strength", "seed", *MEASURES}
        assert a == pytest.approx(b, rel=1e-4, nan_ok=True) and a["steps"] == 30
        assert all(a[name] == c[name] for name in ("train_loss", "validation_loss", "test_loss"))
        if a["lr"] < 1:
            assert (a["reg1"], a["reg2"]) == pytest.approx((a["strength"] / 2, a["strength"]))
            assert a["gap"] == pytest.approx(a["test_loss"] - a["train_loss"]) and a["gamma"] > 0
        else:
            assert all(math.isinf(a[name]) for name in LOSSES) and math.isnan(a["reg2"]) and math.isnan(a["gamma"])


def test_strength_zero_is_plain_sgd():
    grid = [{"lr": 0.05, "strength": 0.0}]
    (row,), (plain,) = (
        evaluate(None, [3], grid, 30),
        sparse.evaluate("sgd", [3], [{**grid[0], "ratio": 0.0}], 30),
    )
    assert row["test_loss"] == plain["test_loss"]
