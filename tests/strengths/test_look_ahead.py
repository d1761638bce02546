"""LookAhead against plain autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bootgrad
from bootgrad.strengths import LookAhead

from ..methods.steps import data, gradient_of, losses_of, regularizer
from .steps import START, batches_of, penalty_gradients, plain_gradient, run


class Point(nn.Module):
    """A parameter θ as the output."""

    def __init__(self, start):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.layer.weight, start)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(("minimum", "sign"), [(2.0, -1), (-2.0, 1)], ids=["hurts", "helps"])
def test_look_ahead_on_a_quadratic(minimum, sign):
    """ℓ_i = ½ (θ − m)² + ½ z_i θ² with z_i = ±1: Γ = θ² draws to 0, away from the minimum m or on the way to it."""
    model = Point(1.0).double()
    x, z = torch.ones(8, 1, dtype=torch.float64), torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)

    def losses(x, z):
        theta = model(x)[:, 0]
        return 0.5 * (theta - minimum).square() + 0.5 * z * theta.square()

    rule = LookAhead(0.1, every=1, start=START)
    reg = bootgrad.GradientRegularizer(model, reg1=rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    values = []
    for _ in range(8):
        gradient_of(reg, losses, x, z)
        optimizer.step()
        values.append(rule.value)
    assert values == pytest.approx([START * math.exp(0.1 * sign * k) for k in range(8)], rel=1e-9)


@pytest.mark.parametrize("center", ["zero", "batch_mean", "ema"])
@pytest.mark.parametrize("options", [{}, {"statistics": False}, {"every": 2}], ids=str)
def test_look_ahead_moves_by_the_cosine(center, options):
    model = data()[0]
    rule = LookAhead(0.5, every=4, start=START)
    reg = regularizer(model, center, reg1=rule, reg2=0.0, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values, held, added = [], [], {}
    for step, batch in enumerate(batches_of(8)):
        before = reg.state_dict()
        plain = plain_gradient(losses_of(model)(*batch), model)
        if step - 1 in added:
            cosine = F.cosine_similarity(plain, added.pop(step - 1), dim=0)
            values.append(float(rule.value * (0.5 * cosine).exp()))
        else:
            values.append(rule.value)
        grad, _ = gradient_of(reg, losses_of(model), *batch)
        assert rule.value == pytest.approx(values[-1], rel=1e-7)
        held.append(bool(before["strengths"]["reg1"]["held"]))
        if rule.waits:
            added[step] = grad - plain
        optimizer.step()
    first = options.get("every", 1) if center == "ema" else 0  # the first with a center
    assert [k for k, h in enumerate(held) if h] == [k for k in (first + 1, first + 5) if k < 8]
    assert rule.value != START


def test_look_ahead_of_two_penalties():
    """A pair each, one after the other, of steps that take one penalty alone."""
    model = data()[0]
    rules = [LookAhead(0.5, every=3, start=0.1), LookAhead(0.25, every=3, start=0.2)]
    reg = regularizer(model, "zero", reg1=rules[0], reg2=rules[1])
    batches = batches_of(3)
    measured = [penalty_gradients(model, *batch, 0.0) for batch in batches]  # parameters stay where they are
    asked, _ = run(reg, batches, model)
    cosines = [F.cosine_similarity(measured[k + 1][0], measured[k][1 + k], dim=0).item() for k in range(2)]
    assert rules[0].value == pytest.approx(0.1 * math.exp(0.5 * cosines[0]), rel=1e-9)
    assert rules[1].value == pytest.approx(0.2 * math.exp(0.25 * cosines[1]), rel=1e-9)
    assert [a["reg1"] for a in asked] == [0.1, 0.1, rules[0].value]
