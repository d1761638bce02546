"""Rules for λ against plain autograd: what they measure, what they make of it, and that nothing disturbs them."""

import copy
import io
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import GradScaler

import bootgrad
from bootgrad import strengths
from bootgrad.centers import FullBatchMean
from bootgrad.strengths import Bound, LookAhead, Share

from .methods.steps import CENTERS, SIGN_OPTIONS, data, flat, gradient_of, losses_of, regularizer, rows_of

EVERY_STEP = {"every": 1, "decay": 0.0}
WAYS = {
    "exact": {},
    "exact, no statistics": {"statistics": False},
    "every": {"every": 2},
    "fraction": {"fraction": 0.5},
    "differences": {"method": "finite_difference", "epsilon": 1e-5},
    "signs": SIGN_OPTIONS["exact"],
    "signs by differences": SIGN_OPTIONS["finite_difference"] | {"statistics": False},
}


def plain_gradient(losses, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), list(model.parameters()))])


def penalty_gradients(model, x, y, c1=None, c2=0.0):
    """ḡ, ∇Reg1 and ∇Reg2, (P,) each, from rows."""
    parameters = list(model.parameters())
    G = rows_of(losses_of(model)(x, y), parameters)
    mean = G.mean(0)
    terms = (G - (mean if c1 is None else c1)).square().sum(1).mean(), (mean - c2).square().sum()
    grads = (torch.autograd.grad(term, parameters, retain_graph=True) for term in terms)
    return mean.detach(), *(torch.cat([g.flatten() for g in gs]) for gs in grads)


def run(reg, batches, model, optimizer=None):
    """The λ of every step, and gradients."""
    asked, grads = [], []
    for batch in batches:
        grad, report = gradient_of(reg, losses_of(model), *batch)
        asked.append(dict(report.strengths))
        grads.append(grad)
        if optimizer is not None:
            optimizer.step()
    return asked, grads


def batches_of(count, B=6):
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(B, 3, generator=generator, dtype=torch.float64),
            torch.randint(0, 2, (B,), generator=generator),
        )
        for _ in range(count)
    ]


# Share


@pytest.mark.parametrize("center", ["zero", "batch_mean"])
@pytest.mark.parametrize("name", ["reg1", "reg2"])
def test_the_share_is_the_share(name, center):
    model, x, y = data(B=6)
    rule = Share(0.25, **EVERY_STEP)
    reg = regularizer(model, CENTERS[center], **{"reg1": 0.0, "reg2": 0.0, name: rule})
    mean, *grads = penalty_gradients(model, x, y, 0.0 if center == "zero" else None)
    penalty = grads[name == "reg2"]
    first, report = gradient_of(reg, losses_of(model), x, y)
    torch.testing.assert_close(first, mean + strengths.START * penalty, rtol=1e-10, atol=1e-14)
    assert report.strengths == {"reg1": 0.0, "reg2": 0.0, name: strengths.START}
    second, report = gradient_of(reg, losses_of(model), x, y)
    assert float((second - mean).norm() / mean.norm()) == pytest.approx(0.25, rel=1e-9)
    assert report.strengths[name] == pytest.approx(0.25 * float(mean.norm() / penalty.norm()), rel=1e-9)
    torch.testing.assert_close(second, mean + report.strengths[name] * penalty, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("name", ["reg1", "reg2"])
def test_in_every_way_it_is_that_of_what_is_added(way, center, name):
    """Measured from the gradient that the step leaves, and plain autograd's."""
    model = data()[0]
    rule = Share(0.1, **EVERY_STEP, high=1e6)
    options = {"reg1": 0.0, "reg2": 0.0, name: rule} | WAYS[way]
    torch.manual_seed(2)
    reg = regularizer(model, CENTERS[center], **options)
    every = WAYS[way].get("every", 1)
    for step, (x, y) in enumerate(batches_of(5)):
        before = rule.value
        grad, report = gradient_of(reg, losses_of(model), x, y)
        plain = plain_gradient(losses_of(model)(x, y), model)
        added = (grad - plain) / (every * before)
        if step % every or any("center knows nothing" in note for note in report.notes):
            assert rule.value == before
        else:
            assert rule.value == pytest.approx(0.1 * float(plain.norm() / added.norm()), rel=1e-7)
        assert report.strengths[name] == before


def test_it_is_held_between_measurements_and_averaged_over_them():
    model = data()[0]
    rule = Share(0.2, 3, decay=0.5)
    reg = regularizer(model, "zero", reg1=rule, reg2=0.0)
    batches = batches_of(8)
    asked, _ = run(reg, batches, model)
    logs = []
    for step in (0, 3, 6):
        mean, penalty, _ = penalty_gradients(model, *batches[step], 0.0)
        logs.append(math.log(float(penalty.norm() / mean.norm())))
    averages = [logs[0], (logs[0] + 2 * logs[1]) / 3, (logs[0] + 2 * logs[1] + 4 * logs[2]) / 7]
    expected = [0.2 * math.exp(-average) for average in averages]
    steps = [strengths.START, *[expected[0]] * 3, *[expected[1]] * 3, expected[2]]
    assert [a["reg1"] for a in asked] == pytest.approx(steps, rel=1e-9)


def test_units_of_the_loss_do_not_matter():
    found = []
    for factor in (1.0, 50.0):
        model, x, y = data(B=6)
        rule = Share(0.3, **EVERY_STEP)
        reg = regularizer(model, "zero", reg1=rule, reg2=0.0)
        for _ in range(2):
            grad, _ = gradient_of(reg, lambda x, y, m=model, f=factor: f * losses_of(m)(x, y), x, y)
        found.append((grad / factor, rule.value * factor))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("other", [0.7, "auto"])
def test_two_penalties_take_turns_to_be_measured(other):
    """Each alone with 2λ, so that two steps have what they would have had; and both at once between."""
    model = data()[0]
    rule, batches = Share(0.2, 4, decay=0.0), batches_of(6)
    reg = regularizer(model, "zero", reg1=rule, reg2=other)
    second = reg.strengths["reg2"]
    if other == "auto":
        assert isinstance(second, strengths.AUTO) and second is not rule
        reg.strengths["reg2"] = second = Share(0.1, 4, decay=0.0)
    measured = [penalty_gradients(model, *batch, 0.0) for batch in batches]

    def of_share(share, step, k):
        return share * float(measured[step][0].norm() / measured[step][k].norm())

    asked, grads = run(reg, batches, model)
    first = [strengths.START, *[of_share(0.2, 0, 1)] * 4, of_share(0.2, 4, 1)]
    assert [a["reg1"] for a in asked] == pytest.approx(first, rel=1e-9)
    fixed = [0.7] * 6
    held = [strengths.START] * 2 + [of_share(0.1, 1, 2)] * 4
    assert [a["reg2"] for a in asked] == pytest.approx(held if other == "auto" else fixed, rel=1e-9)
    factors = [(2, 0), (0, 2), (1, 1), (1, 1), (2, 0), (0, 2)]
    for a, grad, (mean, g1, g2), (k1, k2) in zip(asked, grads, measured, factors, strict=True):
        torch.testing.assert_close(grad, mean + k1 * a["reg1"] * g1 + k2 * a["reg2"] * g2, rtol=1e-9, atol=1e-12)


def test_turns_wait_for_steps_with_penalties_and_for_the_center():
    model = data()[0]
    rules = {"reg1": Share(**EVERY_STEP), "reg2": Share(0.1, 100)}
    reg = regularizer(model, "ema", every=2, **rules)
    notes = []
    for batch in batches_of(6):
        _, report = gradient_of(reg, losses_of(model), *batch)
        notes.append([note.split(" was ")[0] for note in report.notes if "take turns" in note])
    assert notes == [[], [], ["reg1"], [], ["reg2"], []]


def test_nothing_to_measure_leaves_it_as_it_is():
    model, x, y = data(B=6)
    rule = Share(**EVERY_STEP)
    reg = regularizer(model, "batch_mean", reg1=rule, reg2=0.0)
    gradient_of(reg, losses_of(model), x[:1], y[:1])  # its own mean
    assert rule.value == strengths.START
    gradient_of(reg, losses_of(model), x, y)
    value = rule.value
    assert value != strengths.START
    gradient_of(reg, lambda x: 0 * model(x).sum(1), x)  # no gradient at all
    gradient_of(reg, lambda x, y: 1e-200 * losses_of(model)(x, y), x, y)  # the penalty's is lost
    assert rule.value == value


def test_a_batch_of_one_sample_is_not_measured_about_its_own_mean():
    """The next one is, although ``every`` steps have not gone by."""
    model, x, y = data(B=6, dtype=torch.float32)
    rule = Share(every=10)
    reg = regularizer(model, "batch_mean", reg1=rule, reg2=0.0)
    gradient_of(reg, losses_of(model), x[:1], y[:1])
    assert rule.value == strengths.START and rule.due(1)
    gradient_of(reg, losses_of(model), x, y)
    assert rule.value != strengths.START and not rule.due(2)


def test_bounds():
    for low, high in ((1e-8, 1e-3), (1e-3, 10.0)):
        model, x, y = data(B=6)
        rule = Share(1e6 if high < 1 else 1e-6, **EVERY_STEP, low=low, high=high)
        gradient_of(regularizer(model, "zero", reg1=rule, reg2=0.0), losses_of(model), x, y)
        assert rule.value == strengths.START


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_in_single_and_half_precision(dtype):
    model, x, y = data(B=8, dtype=torch.float32)
    exact = copy.deepcopy(model).double()

    def losses(x, y):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            out = model(x)
        return F.cross_entropy(out.float(), y, reduction="none")

    rule, expected = (Share(0.2, **EVERY_STEP, start=1e-2) for _ in range(2))
    reg = regularizer(model, "zero", reg1=rule, reg2=0.0)
    for _ in range(3):
        gradient_of(reg, losses, x, y)
        gradient_of(regularizer(exact, "zero", reg1=expected, reg2=0.0), losses_of(exact), x.double(), y)
    assert rule.value == pytest.approx(expected.value, rel=1e-4 if dtype is None else 5e-2)


def test_a_differentiable_center_is_part_of_what_is_measured():
    model, x, y = data(B=6)
    other = batches_of(1)[0]
    rule = Share(0.3, **EVERY_STEP)
    center = FullBatchMean([other], losses_of(model), differentiable=True)
    reg = regularizer(model, {"reg1": "zero", "reg2": center}, reg1=0.0, reg2=rule)
    parameters = list(model.parameters())
    mean, full = (rows_of(losses_of(model)(*batch), parameters).mean(0) for batch in ((x, y), other))
    penalty = torch.cat([g.flatten() for g in torch.autograd.grad((mean - full).square().sum(), parameters)])
    gradient_of(reg, losses_of(model), x, y)
    assert rule.value == pytest.approx(0.3 * float(mean.detach().norm() / penalty.norm()), rel=1e-9)


def test_under_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = batches_of(1)[0]
    rule = Share(0.1, **EVERY_STEP)
    reg = regularizer(model, "zero", reg1=rule, reg2=0.0, batchnorm="contribution")
    grad, _ = gradient_of(reg, losses_of(model), x, y)
    plain = plain_gradient(losses_of(model)(x, y), model)
    added = (grad - plain) / strengths.START
    assert rule.value == pytest.approx(0.1 * float(plain.norm() / added.norm()), rel=1e-7)


# LookAhead


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

    rule = LookAhead(0.1, every=1, high=0.5)
    reg = bootgrad.GradientRegularizer(model, reg1=rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    values = []
    for _ in range(8):
        gradient_of(reg, losses, x, z)
        optimizer.step()
        values.append(rule.value)
    assert values == pytest.approx([strengths.START * math.exp(0.1 * sign * k) for k in range(8)], rel=1e-9)


@pytest.mark.parametrize("center", ["zero", "batch_mean", "ema"])
@pytest.mark.parametrize("options", [{}, {"statistics": False}, {"every": 2}], ids=str)
def test_look_ahead_moves_by_the_cosine(center, options):
    model = data()[0]
    rule = LookAhead(0.5, every=4)
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
    assert rule.value != strengths.START


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


# Bound


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
    assert Bound(torch.optim.Adam(parameters, lr=torch.tensor(0.1))).strength("reg2", 0) == pytest.approx(0.05)
    assert Bound(0.2, batch_size=4).strength("reg1", 0) == pytest.approx(0.2 / 8)
    assert Bound(lambda step: 0.1 * step, batch_size=4).strength("reg1", 3) == pytest.approx(0.3 / 8)
    for rate in (-0.1, math.nan, math.inf):
        with pytest.raises(bootgrad.BootgradError, match="learning rate must be finite and not negative"):
            Bound(rate)
        with pytest.raises(bootgrad.BootgradError, match="learning rate must be finite and not negative"):
            Bound(lambda step, rate=rate: rate).strength("reg2", 0)


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


# Whatever goes on around them


def rules_of(kind, optimizer):
    return {
        "share": lambda: (Share(0.2, 2), Share(0.1, 3)),
        "look ahead": lambda: (LookAhead(every=2), LookAhead(every=3)),
        "bound": lambda: (Bound(optimizer, measured=True, every=2), Bound(optimizer, measured=True, every=2)),
        "mixed": lambda: (LookAhead(every=2), 0.1),
    }[kind]()


def trained(kind, model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg1, reg2 = rules_of(kind, optimizer)
    torch.manual_seed(1)
    return regularizer(model, "ema", reg1=reg1, reg2=reg2, **options), optimizer


@pytest.mark.parametrize("options", [{}, {"method": "random_signs"}, {"every": 2}], ids=str)
@pytest.mark.parametrize("kind", ["share", "look ahead", "bound", "mixed"])
def test_state_goes_on_where_it_was(kind, options):
    batches = batches_of(9)
    model = data()[0]
    reg, optimizer = trained(kind, model, **options)
    states = []
    for batch in batches:
        file = io.BytesIO()
        torch.save((reg.state_dict(), model.state_dict()), file)
        states.append(file)
        run(reg, [batch], model, optimizer)
    expected = reg.state_dict(), flat(model), [p.detach() for p in model.parameters()]
    for step, file in enumerate(states):
        file.seek(0)
        state, parameters = torch.load(file)
        again = data()[0]
        again.load_state_dict(parameters)
        twin, optimizer = trained(kind, again, **options)
        twin.load_state_dict(state)
        run(twin, batches[step:], again, optimizer)
        found = twin.state_dict(), flat(again), [p.detach() for p in again.parameters()]
        for side in (found, expected):
            side[0]["rules"] = str(side[0].pop("strengths"))  # floats to the last digit
        assert found[0].pop("rules") == expected[0]["rules"]
        torch.testing.assert_close(found[1:], expected[1:], rtol=0, atol=0)
        expected = reg.state_dict(), *expected[1:]


def test_states_without_rules_and_of_other_ones():
    model, x, y = data(B=6)
    old = regularizer(model, "ema")
    gradient_of(old, losses_of(model), x, y)
    state = copy.deepcopy(old.state_dict())
    assert "strengths" not in state
    reg = regularizer(model, "ema", reg1=Share(), reg2="auto")
    reg.load_state_dict(state)
    assert reg.step == 1 and reg.strengths["reg1"].value == strengths.START
    gradient_of(reg, losses_of(model), x, y)
    assert reg.strengths["reg1"].value != strengths.START
    old.load_state_dict(copy.deepcopy(reg.state_dict()))  # with λ as numbers again
    assert old.step == 2
    before = copy.deepcopy(reg.state_dict())
    other = regularizer(model, "ema", reg1=LookAhead(), reg2=Bound(0.1))
    with pytest.raises(bootgrad.BootgradError, match="reg1 is a Share here, and was a LookAhead"):
        reg.load_state_dict(other.state_dict())
    for damage, message in (
        (lambda s: s["reg2"].pop("value"), "lacks 'value'"),
        (lambda s: s["reg2"].update(value=math.nan), "in the place of a finite number"),
        (lambda s: s["reg2"].update(log_ratio=[1.0]), "a weight and 1 numbers"),
        (lambda s: s.update(owed="reg3"), "'reg3' is no penalty"),
        (lambda s: s.pop("reg1"), "lacks 'reg1'"),
    ):
        damaged = copy.deepcopy(before)
        damaged["step"], damaged["strengths"]["reg1"]["value"] = 7, 0.5
        damage(damaged["strengths"])
        with pytest.raises(bootgrad.BootgradError, match=message):
            reg.load_state_dict(damaged)
        assert reg.step == 2 and str(reg.state_dict()["strengths"]) == str(before["strengths"])


@pytest.mark.parametrize("kind", ["share", "look ahead"])
def test_a_step_that_the_scaler_skips_moves_nothing(kind):
    """λ, whose turn it is, and what waits for the next step are as if it had not been."""
    batches = batches_of(6)
    model, twin = data()[0], data()[0]
    reg, optimizer = trained(kind, model)
    expected, other = trained(kind, twin)
    scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    for step, (x, y) in enumerate(batches):
        for bad in (True, False):
            model.zero_grad()
            before = str(reg.state_dict()["strengths"])

            def losses(x, y, factor=torch.inf if bad else 1.0):
                return losses_of(model)(x, y) * factor

            report = reg.backward(losses, x, y, scaler=scaler)
            assert bool(report.finite) is not bad
            assert (str(reg.state_dict()["strengths"]) == before) or not bad
            scaler.step(optimizer)
            scaler.update()
            reg.step = step + (not bad)
        _, told = gradient_of(expected, losses_of(twin), x, y)
        other.step()
        assert report.strengths == pytest.approx(told.strengths, rel=1e-9)
    torch.testing.assert_close([*model.parameters()], [*twin.parameters()], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("kind", ["share", "look ahead", "bound"])
def test_micro_batches_are_one_batch(kind, center):
    model, twin = data()[0], data()[0]
    rules, others = (rules_of(kind, torch.optim.SGD(m.parameters(), lr=0.1)) for m in (model, twin))
    ours = regularizer(model, copy.deepcopy(CENTERS[center]), reg1=rules[0], reg2=rules[1])
    whole = regularizer(twin, copy.deepcopy(CENTERS[center]), reg1=others[0], reg2=others[1])
    for x, y in batches_of(5):
        model.zero_grad()
        with ours.accumulate() as block:
            for part in zip(x.split([3, 1, 2]), y.split([3, 1, 2]), strict=True):
                of_call = ours.backward(losses_of(model), *part)
        grad, report = gradient_of(whole, losses_of(twin), x, y)
        torch.testing.assert_close(flat(model), grad, rtol=1e-9, atol=1e-12)
        assert of_call.strengths == block.report.strengths == pytest.approx(report.strengths, rel=1e-9)


def test_losses_in_place_of_a_function():
    model, twin = data()[0], data()[0]
    ours, whole = (regularizer(m, "zero", reg1=Share(every=2), reg2=LookAhead(every=2)) for m in (model, twin))
    for batch in batches_of(5):
        with ours.record():
            losses = losses_of(model)(*batch)
        told = ours.backward(losses).strengths
        assert told == gradient_of(whole, losses_of(twin), *batch)[1].strengths


def test_a_compiled_model():
    model, found = data()[0], []
    for module, options in (
        (torch.compile(model, backend="aot_eager"), {"method": "auto"}),
        (model, {"method": "random_signs", "derivative": "finite_difference"}),
    ):
        torch.manual_seed(0)
        reg = regularizer(module, "ema", reg1=Share(every=2), reg2=LookAhead(every=2), **options)
        found.append([gradient_of(reg, losses_of(module), *batch)[1].strengths for batch in batches_of(5)])
        assert reg.method == "random_signs"
    for ours, expected in zip(*found, strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)
    assert found[0][-1]["reg1"] != strengths.START != found[0][-1]["reg2"]


@pytest.mark.parametrize("kind", ["share", "look ahead", "bound"])
def test_a_failed_step_changes_nothing(kind):
    model = data()[0]
    reg, _ = trained(kind, model)
    batches = batches_of(4)
    run(reg, batches[:3], model)
    before = str(reg.state_dict()["strengths"])

    def fails(x, y):
        raise KeyError("own")

    with pytest.raises(KeyError):
        reg.backward(fails, *batches[3])
    with pytest.raises(bootgrad.BootgradError, match="samples: 0"):
        reg.backward(lambda x, y: losses_of(model)(x, y) * math.nan, *batches[3])
    assert str(reg.state_dict()["strengths"]) == before


def test_auto_is_the_default_rule():
    model = data()[0]
    reg = bootgrad.GradientRegularizer(model, reg1="auto", reg2="auto", center="ema")
    rules = reg.strengths.values()
    assert [type(rule) for rule in rules] == [strengths.AUTO] * 2 and len(set(map(id, rules))) == 2


def test_the_python_of_the_docs_runs():
    text = (Path(__file__).parents[1] / "docs/strengths.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    model, x, y = data()
    names = {"model": model, "loss_fn": losses_of(model), "x": x, "y": y}
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    exec(compile(block, "strengths.md", "exec"), names)  # noqa: S102 — our own file
    assert names["report"].strengths == {"reg1": strengths.START, "reg2": strengths.START}


def test_a_captured_graph_is_refused(monkeypatch):
    model, x, y = data(B=6)
    reg = regularizer(model, "zero", reg1=Share(), reg2=0.0)
    monkeypatch.setattr("bootgrad.graph.is_capturing", lambda: True)
    with pytest.raises(bootgrad.BootgradError, match="give λ as a number there"):
        reg.backward(losses_of(model), x, y)


RULE = Share()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: {"reg1": Share}, r"the class Share: give an object, Share\(…\)"),
        (lambda m: {"reg1": RULE, "reg2": RULE, "center": "ema"}, "make a rule for each"),
        (lambda m: {"reg2": Share()}, "identically zero"),
        (lambda m: {"reg2": "auto"}, "identically zero"),
        (lambda m: {"reg1": "Auto"}, '"auto" or a rule of bootgrad.strengths'),
        *((lambda m, s=s: {"reg1": Share(s)}, "share must be a finite number above zero") for s in (0, -1, math.inf, "a")),
        *((lambda m, k=k: {"reg1": Share(every=k)}, "every must be a whole number") for k in (0, 1.5, True)),
        *((lambda m, d=d: {"reg1": Share(decay=d)}, r"decay must be in \[0, 1\)") for d in (1, -0.1, "slow")),
        (lambda m: {"reg1": Share(low=0.0)}, "low must be above zero, for a penalty that is not taken"),
        (lambda m: {"reg1": LookAhead(low=1.0, high=0.5)}, "0 ≤ low ≤ high"),
        (lambda m: {"reg1": Bound(0.1, high=math.inf)}, "0 ≤ low ≤ high"),
        (lambda m: {"reg1": Share(start=0.0)}, "start must be a number from low"),
        (lambda m: {"reg1": Bound(0.1, low=0.1)}, "start must be a number from low"),
        (lambda m: {"reg1": LookAhead(0.0)}, "rate must be a finite number above zero"),
        (lambda m: {"reg1": Bound("fast")}, "rate must be an optimizer, a number or a function"),
        (lambda m: {"reg1": Bound(0.1, scale=0.0)}, "scale must be a finite number above zero"),
        (lambda m: {"reg1": Bound(0.1, batch_size=0)}, "batch_size must be a whole number"),
    ],
)  # fmt: skip
def test_bad_options(make, message):
    with pytest.raises(bootgrad.BootgradError, match=message):
        bootgrad.GradientRegularizer(data()[0], **make(None))
