"""The exact method's backward pass: which layers it visits, when, and that none is forgotten."""

import pytest
import torch
from torch import nn

import bootgrad
from bootgrad.ops.product import InputGrad, Visit

from .steps import losses_of, regularizer


def deep_model(layers=5):
    torch.manual_seed(0)
    hidden = [m for _ in range(layers - 1) for m in (nn.Linear(3, 3), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(3, 2)).double()


@pytest.mark.parametrize(
    "options",
    [{"reg2": 0.0}, {"reg2": 0.0, "center": "zero"}, {"reg1": 0.0, "center": "zero"}, {"center": "zero"}],
    ids=["reg1", "reg1 about zero", "reg2", "both"],
)
def test_layers_are_visited_one_by_one_on_the_way_through_the_first_backward_pass(options, monkeypatch):
    """Made all at once, the derivatives of the norms would wait in memory until the pass comes to their layers."""
    events = []
    made, passed = Visit.make, InputGrad.backward

    def make(self, *arguments):
        events.append("visit")
        return made(self, *arguments)

    def passes(ctx, h):
        events.append("pass")
        return passed(ctx, h)

    monkeypatch.setattr(Visit, "make", make)
    monkeypatch.setattr(InputGrad, "backward", staticmethod(passes))
    model, x, y = deep_model(), torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0])
    regularizer(model, **options).backward(losses_of(model), x, y)
    assert events == ["visit", "pass"] * 4 + ["visit"]


@pytest.mark.parametrize("center", ["batch_mean", "zero", "ema"])
@pytest.mark.parametrize("statistics", [True, False])
def test_a_layer_that_no_derivative_leads_to_is_visited_for_its_norms(center, statistics):
    """Losses that are linear in all parameters: rows are constant, the penalties' gradients zero, their values not."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3).double()
    reg = bootgrad.GradientRegularizer(model, reg1=1.0, center=center, statistics=statistics)
    for _ in range(2):
        model.zero_grad()
        report = reg.backward(lambda: model(x).sum(1))
        rows = torch.cat([x, x, torch.ones(5, 2).double()], 1)
        torch.testing.assert_close(model.weight.grad, x.mean(0).expand(2, 3))
        if statistics:
            torch.testing.assert_close(report.covariance_trace, (rows - rows.mean(0)).square().sum(1).mean())
            torch.testing.assert_close(report.mean_sq_norm, rows.square().sum(1).mean())
