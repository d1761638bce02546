"""Steps whose reports tell nothing that the penalties do not need: the same gradients, from fewer products."""

import copy

import pytest
import torch

import bootgrad
from bootgrad.centers import Center
from bootgrad.ops.convolution import ConvProduct
from bootgrad.per_sample import PerSampleGradients

from .steps import CENTERS, data, gradient_of, losses_of, regularizer


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg1": 0.0},
        {"reg2": 0.0},
        {"reg2": 0.0, "fraction": 0.5},
        {"fraction": 0.5},
        {"every": 2},
        {"method": "finite_difference"},
        {"method": "finite_difference", "fraction": 0.5},
        {"method": "random_signs"},
    ],
    ids=str,
)
def test_gradients_are_the_same(center, options):
    model, x, y = data(B=6)
    told, bare = [], []
    for statistics, out in ((True, told), (False, bare)):
        torch.manual_seed(1)
        reg = regularizer(model, CENTERS[center], statistics=statistics, **options)
        for _ in range(3):
            out.append(gradient_of(reg, losses_of(model), x, y))
    for (expected, full), (ours, report) in zip(told, bare, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(report.loss, full.loss)
        if "method" not in options and report.method == "exact":
            assert report.covariance_trace.isnan() and report.noise_scale.isnan()
            both = options.get("reg1", 1) and options.get("reg2", 1) and "every" not in options
            if "fraction" not in options and not both and not report.reg1.isnan():
                torch.testing.assert_close(report.reg1, full.reg1)


@pytest.mark.parametrize("center", CENTERS)
def test_finite_differences_tell_reg1_where_it_is_taken_alone(center):
    model, x, y = data(B=6)
    regs = [
        regularizer(model, CENTERS[center], reg2=0.0, method="finite_difference", statistics=s) for s in (True, False)
    ]
    for _ in range(2):
        full, report = (gradient_of(reg, losses_of(model), x, y)[1] for reg in regs)
        torch.testing.assert_close(report.reg1, full.reg1)


def test_about_zero_no_mean_is_made(monkeypatch):
    model, x, y = data()
    full = gradient_of(regularizer(model, "zero", reg2=0.0), losses_of(model), x, y)[1]

    def refuse(self, *_):
        raise AssertionError("a mean was made")

    monkeypatch.setattr(PerSampleGradients, "mean", refuse)
    monkeypatch.setattr(PerSampleGradients, "_mean", refuse)
    reg = regularizer(model, "zero", reg2=0.0, statistics=False)
    for _ in range(2):
        report = gradient_of(reg, losses_of(model), x, y)[1]
        torch.testing.assert_close(report.reg1, full.reg1)
        assert report.sq_mean_norm.isnan() and report.notes == ()


def test_about_zero_no_sum_is_made_along_with_norms(monkeypatch):
    model, masks = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2)), []
    taken = ConvProduct.visit
    monkeypatch.setattr(ConvProduct, "visit", lambda self, *a: masks.append(a[3].total) or taken(self, *a))
    for statistics in (True, False):
        reg = regularizer(model, "zero", reg2=0.0, statistics=statistics)
        gradient_of(reg, losses_of(model), torch.randn(3, 2, 4, 4), torch.zeros(3, dtype=torch.long))
    assert masks == [True, False]


def test_moving_centers_get_their_mean():
    model, x, y = data()
    regs = [regularizer(model, "ema", reg2=0.0, statistics=s) for s in (True, False)]
    for reg in regs:
        for _ in range(2):
            gradient_of(reg, losses_of(model), x, y)
    states = [reg.state_dict()["centers"]["reg1"] for reg in regs]
    for name, average in states[0]["mean"].items():
        torch.testing.assert_close(states[1]["mean"][name], average)


class Anchored(Center):
    """c = θ/2, differentiated, which nothing moves."""

    def value(self, parameters):
        return {name: p.detach() / 2 for name, p in parameters.items()}

    def derivative(self, parameters, direction):
        return {name: d / 2 for name, d in direction.items()}


def test_differentiable_centers_get_their_mean():
    model, x, y = data()
    grads = [
        gradient_of(regularizer(model, Anchored(), reg2=0.0, statistics=s), losses_of(model), x, y)[0]
        for s in (True, False)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("center", ["zero", "batch_mean", "ema"])
@pytest.mark.parametrize(
    "layer", [torch.nn.Conv2d(2, 3, 3), torch.nn.Conv2d(2, 20, 3), torch.nn.Conv2d(4, 4, 3, groups=4)]
)
def test_a_visit_that_has_nothing_to_differentiate(layer, center):
    """Neither x nor gy depends on a parameter: norms, Γ and the mean come without derivatives."""
    model, x = copy.deepcopy(layer).double(), torch.randn(4, layer.in_channels, 6, 6, dtype=torch.float64)

    def losses(x):
        return model(x).flatten(1).sum(1)

    reg = bootgrad.GradientRegularizer(model, reg1=0.3, center=center)
    parts = (torch.autograd.grad(losses(x[i : i + 1]).sum(), model.parameters()) for i in range(4))
    rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in parts])
    for _ in range(2):
        model.zero_grad()
        report = reg.backward(losses, x)
        mean = rows.mean(0)
        gamma = (rows - mean).square().sum(1).mean()
        about = mean.square().sum() if center == "zero" else 0 * gamma
        torch.testing.assert_close(report.covariance_trace, gamma)
        torch.testing.assert_close(report.reg1, gamma + about)
        torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), mean)
