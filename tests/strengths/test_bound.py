"""Bound against its formula."""

import math

import pytest
import torch
from torch import nn

import bootgrad
from bootgrad.strengths import Bound

from ..methods.steps import CENTERS, data, flat, gradient_of, losses_of, regularizer
from .steps import batches_of, penalty_gradients


def test_the_formula_of_the_bound():
    model, x, y = data(B=6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()  # before the schedule's, without gradients
    reg = regularizer(model, "zero", reg1=Bound(optimizer, 3.0), reg2=Bound(optimizer, 0.5, high=0.06))
    asked = []
    for _ in range(3):
        asked.append(gradient_of(reg, losses_of(model), x, y)[1].strengths)
        schedule.step()
    assert [a["reg1"] for a in asked] == pytest.approx([0.0, 3 * 0.2 / 12, 3 * 0.1 / 12])
    assert [a["reg2"] for a in asked] == pytest.approx([0.06, 0.05, 0.025])
    mean, g1, g2 = penalty_gradients(model, x, y, 0.0)
    torch.testing.assert_close(flat(model), mean + 0.025 * g1 + 0.025 * g2, rtol=1e-9, atol=1e-12)


def test_the_learning_rate_of_the_bound():
    parameters = [nn.Parameter(torch.ones(1))]
    for options, factor in (
        ({"momentum": 0.9}, 10.0),
        ({"momentum": 0.9, "nesterov": True}, 10.0),
        ({"momentum": 0.9, "dampening": 0.5}, 5.0),
        ({"weight_decay": 0.1}, 1.0),
    ):
        rule = Bound(torch.optim.SGD(parameters, lr=0.1, **options))
        assert rule.strength("reg2", 0) == pytest.approx(0.05 * factor)
    assert Bound(torch.optim.SGD(parameters, lr=torch.tensor(0.1))).strength("reg2", 0) == pytest.approx(0.05)
    assert Bound(0.2, batch_size=4).strength("reg1", 0) == pytest.approx(0.2 / 8)
    assert Bound(lambda step: 0.1 * step, batch_size=4).strength("reg1", 3) == pytest.approx(0.3 / 8)
    for rate in (-0.1, math.nan, math.inf):
        with pytest.raises(bootgrad.BootgradError, match="learning rate must be finite and not negative"):
            Bound(rate)
        with pytest.raises(bootgrad.BootgradError, match="learning rate must be finite and not negative"):
            Bound(lambda step, rate=rate: rate).strength("reg2", 0)


class Decorated(torch.optim.SGD):
    """With SGD's steps."""


class Own(torch.optim.SGD):
    """With steps of its own."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, Own])
def test_optimizers_that_are_not_sgd_are_refused(kind):
    parameters = [nn.Parameter(torch.ones(1))]
    assert Bound(Decorated(parameters, lr=0.1)).strength("reg2", 0) == pytest.approx(0.05)
    optimizer = kind(parameters, lr=0.1)
    with pytest.raises(
        bootgrad.errors.ArgumentError, match=f"got {kind.__name__}, whose steps are its own: .*give .*rate="
    ):
        Bound(optimizer)
    assert Bound(lambda step: optimizer.param_groups[0]["lr"]).strength("reg2", 0) == pytest.approx(0.05)


def test_groups_of_unlike_rates_are_refused():
    """When it is made, and when a schedule makes them so; whatever their lr, where that comes to one rate."""
    first, second = ({"params": [nn.Parameter(torch.ones(1))]} for _ in range(2))
    with pytest.raises(bootgrad.errors.ArgumentError, match=r"unlike rates lr/\(1 − momentum\), 0.1, 0.0001, .* rate="):
        Bound(torch.optim.SGD([first, second | {"lr": 1e-4}], lr=0.1))
    optimizer = torch.optim.SGD([first | {"momentum": 0.9, "weight_decay": 0.1}, second | {"lr": 1.0}], lr=0.1)
    rule = Bound(optimizer)
    assert rule.strength("reg2", 0) == pytest.approx(0.5)
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(bootgrad.errors.ArgumentError, match="unlike rates"):
        rule.strength("reg2", 1)


def test_what_is_no_rate_says_so():
    parameters = [nn.Parameter(torch.ones(1))]
    with pytest.raises(bootgrad.errors.ArgumentError, match="momentum must be below 1, .* got 1.0"):
        Bound(torch.optim.SGD(parameters, lr=0.1, momentum=1.0))
    for word in ("a", None):
        with pytest.raises(bootgrad.errors.ArgumentTypeError, match=f"rate must give a number, .* got {word!r}"):
            Bound(lambda step, word=word: word).strength("reg2", 0)


def test_a_bound_that_acts_is_noted():
    model, x, y = data(B=6)
    reg = regularizer(model, "zero", reg1=Bound(0.1, batch_size=6), reg2=Bound(0.5, high=0.1))
    _, report = gradient_of(reg, losses_of(model), x, y)
    assert report.notes == ("the λ of reg2 is held at 0.1, a bound of its rule",)


def test_a_batch_of_the_last_samples_does_not_set_the_bound():
    model, x, y = data(B=8)
    rule = Bound(0.1)
    reg = regularizer(model, "zero", reg1=rule, reg2=0.0)
    sizes = [8, 8, 1, 8]
    asked = [gradient_of(reg, losses_of(model), x[:B], y[:B])[1].strengths["reg1"] for B in sizes]
    weights = [0.81, 0.9, 1.0]
    mean = sum(w * B for w, B in zip(weights, sizes, strict=False)) / sum(weights)
    assert asked == pytest.approx([0.0, 0.1 / 16, 0.1 / 16, 0.1 / (2 * mean)])


@pytest.mark.parametrize("center", ["batch_mean", "ema"])
def test_the_measured_bound(center):
    """λ Reg1 is the gap η (S + D)/(4B), and so is the mean of λ Reg2 = λ S/B."""
    model = data()[0]
    options = {"measured": True, "every": 2, "batch_size": 6, "decay": 0.5}
    reg = regularizer(model, CENTERS[center], reg1=Bound(0.1, **options), reg2=Bound(0.1, **options))
    parts, weights, B = [], [], 6
    for step, batch in enumerate(batches_of(5)):
        _, report = gradient_of(reg, losses_of(model), *batch)
        if parts:
            S, D, R1 = (
                sum(w * p[k] for w, p in zip(weights, parts, strict=True)) / sum(weights) for k in range(3)
            )  # fmt: skip
            gap = 0.1 * (S + D) / (4 * B)
            assert report.strengths["reg1"] * R1 == pytest.approx(gap, rel=1e-9)
            assert report.strengths["reg2"] * S / B == pytest.approx(gap, rel=1e-9)
        else:
            assert report.strengths == pytest.approx({"reg1": 0.1 / 12, "reg2": 0.05})
        if step % 2 == 0:
            S = float(report.covariance_trace) * B / (B - 1)
            is_centered = center == "ema" and step > 0
            parts.append((S, float(report.reg1) if is_centered else S, float(report.reg1)))
            weights = [0.5 * w for w in weights] + [0.5]
    without = Bound(0.1, measured=True, every=1, batch_size=6)
    reg = regularizer(model, "zero", reg1=0.0, reg2=without, method="random_signs")  # tells no Γ
    assert [gradient_of(reg, losses_of(model), *b)[1].strengths["reg2"] for b in batches_of(2)] == [0.05, 0.05]
