"""Share against plain autograd: what is measured, when, and what λ becomes of it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bootgrad.centers import FullBatchMean
from bootgrad.strengths import Share
from bootgrad.strengths.rule import HIGH, LOW

from ..methods.steps import CENTERS, SIGN_OPTIONS, data, flat, gradient_of, losses_of, regularizer, rows_of
from .steps import EVERY_STEP, START, batches_of, penalty_gradients, plain_gradient, run

WAYS = {
    "exact": {},
    "exact, no statistics": {"statistics": False},
    "every": {"every": 2},
    "fraction": {"fraction": 0.5},
    "differences": {"method": "finite_difference", "epsilon": 1e-5},
    "signs": SIGN_OPTIONS["exact"],
    "signs by differences": SIGN_OPTIONS["finite_difference"] | {"statistics": False},
}


@pytest.mark.parametrize("center", ["zero", "batch_mean"])
@pytest.mark.parametrize("name", ["reg1", "reg2"])
def test_the_share_is_the_share(name, center):
    model, x, y = data(B=6)
    rule = Share(0.25, **EVERY_STEP, start=START)
    reg = regularizer(model, CENTERS[center], **{"reg1": 0.0, "reg2": 0.0, name: rule})
    mean, *grads = penalty_gradients(model, x, y, 0.0 if center == "zero" else None)
    penalty = grads[name == "reg2"]
    first, report = gradient_of(reg, losses_of(model), x, y)
    torch.testing.assert_close(first, mean + START * penalty, rtol=1e-10, atol=1e-14)
    assert report.strengths == {"reg1": 0.0, "reg2": 0.0, name: START}
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
    rule = Share(0.1, **EVERY_STEP, start=START)
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
    rule = Share(0.2, 3, decay=0.5, start=START)
    reg = regularizer(model, "zero", reg1=rule, reg2=0.0)
    batches = batches_of(8)
    asked, _ = run(reg, batches, model)
    logs = []
    for step in (0, 3, 6):
        mean, penalty, _ = penalty_gradients(model, *batches[step], 0.0)
        logs.append(math.log(float(penalty.norm() / mean.norm())))
    averages = [logs[0], (logs[0] + 2 * logs[1]) / 3, (logs[0] + 2 * logs[1] + 4 * logs[2]) / 7]
    expected = [0.2 * math.exp(-average) for average in averages]
    steps = [START, *[expected[0]] * 3, *[expected[1]] * 3, expected[2]]
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


@pytest.mark.parametrize("other", [0.7, "rule"])
def test_two_penalties_take_turns_to_be_measured(other):
    """Each alone with 2λ, so that two steps have what they would have had; and both at once between."""
    model = data()[0]
    rule, batches = Share(0.2, 4, decay=0.0, start=START), batches_of(6)
    second = Share(0.1, 4, decay=0.0, start=START) if other == "rule" else other
    reg = regularizer(model, "zero", reg1=rule, reg2=second)
    measured = [penalty_gradients(model, *batch, 0.0) for batch in batches]

    def of_share(share, step, k):
        return share * float(measured[step][0].norm() / measured[step][k].norm())

    asked, grads = run(reg, batches, model)
    first = [START, *[of_share(0.2, 0, 1)] * 4, of_share(0.2, 4, 1)]
    assert [a["reg1"] for a in asked] == pytest.approx(first, rel=1e-9)
    fixed = [0.7] * 6
    held = [START] * 2 + [of_share(0.1, 1, 2)] * 4
    assert [a["reg2"] for a in asked] == pytest.approx(held if other == "rule" else fixed, rel=1e-9)
    factors = [(2, 0), (0, 2), (1, 1), (1, 1), (2, 0), (0, 2)]
    for a, grad, (mean, g1, g2), (k1, k2) in zip(asked, grads, measured, factors, strict=True):
        torch.testing.assert_close(grad, mean + k1 * a["reg1"] * g1 + k2 * a["reg2"] * g2, rtol=1e-9, atol=1e-12)


def test_turns_wait_for_steps_with_penalties_and_for_the_center():
    model = data()[0]
    rules = {"reg1": Share(**EVERY_STEP, start=START), "reg2": Share(0.1, 100, start=START)}
    reg = regularizer(model, "ema", every=2, **rules)
    notes = []
    for batch in batches_of(6):
        _, report = gradient_of(reg, losses_of(model), *batch)
        notes.append([note.split(" was ")[0] for note in report.notes if "take turns" in note])
    assert notes == [[], [], ["reg1"], [], ["reg2"], []]


def test_nothing_to_measure_leaves_it_as_it_is():
    model, x, y = data(B=6)
    rule = Share(**EVERY_STEP, start=START)
    reg = regularizer(model, "batch_mean", reg1=rule, reg2=0.0)
    gradient_of(reg, losses_of(model), x[:1], y[:1])  # its own mean
    assert rule.value == START
    gradient_of(reg, losses_of(model), x, y)
    value = rule.value
    assert value != START
    gradient_of(reg, lambda x: 0 * model(x).sum(1), x)  # no gradient at all
    gradient_of(reg, lambda x, y: 1e-200 * losses_of(model)(x, y), x, y)  # the penalty's is lost
    assert rule.value == value


@pytest.mark.parametrize("start", [None, START])
def test_a_batch_of_one_sample_is_not_measured_about_its_own_mean(start):
    """The next one is, although ``every`` steps have not gone by."""
    model, x, y = data(B=6, dtype=torch.float32)
    rule = Share(every=10, start=start)
    reg = regularizer(model, "batch_mean", reg1=rule, reg2=0.0)
    gradient_of(reg, losses_of(model), x[:1], y[:1])
    assert rule.value == start and rule.due(1)
    plain = plain_gradient(losses_of(model)(x[:1], y[:1]), model)
    torch.testing.assert_close(flat(model), plain, rtol=1e-6, atol=1e-8)
    gradient_of(reg, losses_of(model), x, y)
    assert rule.value != start and not rule.due(2)


def test_bounds():
    for low, high in ((1e-8, 1e-3), (1e-3, 10.0)):
        model, x, y = data(B=6)
        rule = Share(1e6 if high < 1 else 1e-6, **EVERY_STEP, low=low, high=high)
        reg = regularizer(model, "zero", reg1=rule, reg2=0.0)
        for _ in range(2):
            _, report = gradient_of(reg, losses_of(model), x, y)
            assert report.strengths["reg1"] == rule.value == START
            assert report.notes == ("the λ of reg1 is held at 0.001, a bound of its rule",)
        rule.low, rule.high = LOW, HIGH
        for is_bounded in (True, False):  # as of the measurement before
            assert bool(gradient_of(reg, losses_of(model), x, y)[1].notes) is is_bounded
        assert rule.value != START


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_in_single_and_half_precision(dtype):
    model, x, y = data(B=8, dtype=torch.float32)
    exact = copy.deepcopy(model).double()

    def losses(x, y):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            out = model(x)
        return F.cross_entropy(out.float(), y, reduction="none")

    rule, expected = (Share(0.2, **EVERY_STEP, start=1e-2) for _ in range(2))
    reg, twin = (regularizer(m, "zero", reg1=r, reg2=0.0) for m, r in ((model, rule), (exact, expected)))
    for _ in range(3):
        gradient_of(reg, losses, x, y)
        gradient_of(twin, losses_of(exact), x.double(), y)
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
    grad, report = gradient_of(reg, losses_of(model), x, y)
    plain = plain_gradient(losses_of(model)(x, y), model)
    added = (grad - plain) / report.strengths["reg1"]
    assert rule.value == pytest.approx(0.1 * float(plain.norm() / added.norm()), rel=1e-7)
