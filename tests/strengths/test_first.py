"""The first λ of rules, and one after a measurement that was lost: found on the step itself, whatever the unit of the loss."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import GradScaler

from bootgrad.seen import Added
from bootgrad.strengths import LookAhead, Share, measuring

from ..methods.steps import CENTERS, data, flat, gradient_of, losses_of, regularizer
from .steps import START, batches_of, penalty_gradients, plain_gradient
from .test_share import WAYS

UNITS = [1e-6, 1e-3, 1e3, 1e6]


def wide(factor):
    """A classifier in float32, and its losses in a unit of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, lambda x, y: factor * F.cross_entropy(model(x), y, reduction="none")


def wide_batches(count):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(32, 10, generator=generator), torch.randint(0, 3, (32,), generator=generator))
        for _ in range(count)
    ]


def trained(factor, rules, center, **options):
    """Shares that were taken of the gradient, λ in units of one, and parameters, after steps that no unit changes either."""
    model, losses = wide(factor)
    torch.manual_seed(4)
    reg = regularizer(model, center, **rules(), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5 / factor)
    shares, found = [], []
    for batch in wide_batches(6):
        plain = plain_gradient(losses(*batch), model)
        grad, report = gradient_of(reg, losses, *batch)
        shares.append(float((grad - plain).norm() / plain.norm()))
        found.append([strength * factor for strength in report.strengths.values()])
        optimizer.step()
    return shares, found, [p.detach() for p in model.parameters()]


RULES = {
    "share": ("batch_mean", lambda: {"reg1": Share(0.1, 3), "reg2": 0.0}),
    "auto": ("ema", lambda: {"reg1": "auto", "reg2": "auto"}),
    "look ahead": ("batch_mean", lambda: {"reg1": LookAhead(every=2), "reg2": 0.0}),
    "turns": (CENTERS["batch_mean"], lambda: {"reg1": Share(0.1, 2), "reg2": LookAhead(every=2)}),
}


@pytest.mark.parametrize("options", [{}, {"method": "finite_difference"}, {"method": "random_signs"}], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_no_unit_of_the_loss_changes_what_is_trained(name, options):
    center, rules = RULES[name]
    expected = trained(1.0, rules, center, **options)
    first = {"share": [0.1], "auto": [0.0, 0.2, 0.2], "look ahead": [0.01], "turns": [0.2, 0.02]}[name]
    assert expected[0][: len(first)] == pytest.approx(first, rel=1e-3, abs=1e-5)
    for factor in UNITS:
        found = trained(factor, rules, center, **options)
        torch.testing.assert_close(found, expected, rtol=2e-2 if "method" in options else 2e-3, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("name", ["reg1", "reg2"])
def test_the_gradient_is_that_of_the_lambda_that_is_reported(way, center, name):
    """As of a regularizer that was given it as a number, beforehand."""
    model, twin = data()[0], data()[0]
    found = {}

    def made(model, strength):
        torch.manual_seed(2)
        return regularizer(model, CENTERS[center], **{"reg1": 0.0, "reg2": 0.0, name: strength}, **WAYS[way])

    rule = Share(0.3, 100)
    reg, other = made(model, rule), made(twin, lambda step: found[step])
    for step, (x, y) in enumerate(batches_of(4)):
        grad, report = gradient_of(reg, losses_of(model), x, y)
        found[step] = report.strengths[name]
        expected, told = gradient_of(other, losses_of(twin), x, y)
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)
        assert float(report.loss) == float(told.loss)
        left_out = any(f"{name} was left out" in note for note in report.notes)
        assert left_out is not bool(found[step]) or step % WAYS[way].get("every", 1)
    assert found[3] == rule.value


@pytest.mark.parametrize("sweeps", ["batch_mean", "zero"])
def test_in_a_block_of_micro_batches_with_a_scaler(sweeps):
    model, twin = data()[0], data()[0]
    center = {"reg1": sweeps, "reg2": "zero"}
    ours, whole = (regularizer(m, center, reg1=Share(0.1), reg2=0.0) for m in (model, twin))
    (x, y), *_ = batches_of(1)
    scaler = GradScaler("cpu", init_scale=2.0**8)
    with ours.accumulate(scaler=scaler) as block:
        for part in zip(x.split([3, 1, 2]), y.split([3, 1, 2]), strict=True):
            ours.backward(losses_of(model), *part)
    grad, report = gradient_of(whole, losses_of(twin), x, y)
    torch.testing.assert_close(flat(model) / 2**8, grad, rtol=1e-9, atol=1e-12)
    assert block.report.strengths == pytest.approx(report.strengths, rel=1e-9)
    model.zero_grad()
    for call in range(2):  # of which each adds its own
        ours.load_state_dict({**ours.state_dict(), "step": 0, "strengths": {}})
        ours.backward(losses_of(model), x, y)
        torch.testing.assert_close(flat(model), (call + 1) * grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 0.1, 1e-2, 3e-3, 1e-4, 1e-6])
def test_a_share_is_found_in_bfloat16_whatever_is_lost(factor):
    """Of parameters in bfloat16; without the λ that were read out of rounding, within its digits of the one in float64."""
    model, x, y = data(B=32, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()
    mean, penalty, _ = penalty_gradients(exact, x.double(), y)
    expected = 0.1 * float(mean.norm() / penalty.norm())
    rule = Share(0.1, 3)
    reg = regularizer(model, "batch_mean", reg1=rule, reg2=0.0)

    def losses(x, y):
        return factor * F.cross_entropy(model(x).float(), y, reduction="none")

    found = [gradient_of(reg, losses, x, y)[1].strengths["reg1"] * factor for _ in range(6)]
    assert found[2:] == pytest.approx([expected] * 4, rel=0.05)
    assert found[0] == pytest.approx(0.0 if factor < 1e-5 else expected, rel=0.05)


def test_a_small_share_in_bfloat16():
    """Its λ ∇R is itself lost in the rounding of ḡ, so that it is measured in trials."""
    model, x, y = data(B=32, dtype=torch.bfloat16)
    mean, penalty, _ = penalty_gradients(copy.deepcopy(model).double(), x.double(), y)
    expected = 1e-3 * float(mean.norm() / penalty.norm())
    rule, found = Share(1e-3, 2), []
    reg = regularizer(model, "batch_mean", reg1=rule, reg2=0.0)
    for _ in range(8):
        grad, report = gradient_of(reg, losses_of(model), x, y)
        found.append(report.strengths["reg1"])
        assert relative_share(grad, mean) < 0.02
    assert found == pytest.approx([expected] * 8, rel=0.05)
    assert rule._log_ratio.weight == pytest.approx(1 - 0.8**3)  # steps 0, 3 and 6, each after one that was lost


def relative_share(grad, mean):
    return float((grad.double() - mean).norm() / mean.norm())


@pytest.mark.parametrize(("start", "factor"), [(None, 1e-9), (START, 1e-9), (START, 1e-7)])
def test_what_is_lost_in_single_precision_is_measured_on_the_next_steps(start, factor):
    (x, y), *_ = wide_batches(1)
    found = {}
    for unit in (1.0, factor):
        model, losses = wide(unit)
        rule = Share(0.1, 10, start=start)
        reg = regularizer(model, "batch_mean", reg1=rule, reg2=0.0)
        for _ in range(5):
            gradient_of(reg, losses, x, y)
        found[unit] = rule.value * unit
        assert rule._log_ratio.weight == pytest.approx(0.2) and not rule.due(5)
    assert found[factor] == pytest.approx(found[1.0], rel=1e-2)


def test_a_trial_that_overflows_takes_nothing_and_the_next_one_is_smaller(monkeypatch):
    (x, y), *_ = wide_batches(1)
    expected = trained(1.0, RULES["share"][1], "batch_mean")[1][0][0]
    monkeypatch.setattr(measuring, "TRIAL", 1e6)
    model, losses = wide(1e10)
    rule, found = Share(0.1), []
    reg = regularizer(model, "batch_mean", reg1=rule, reg2=0.0)
    for _ in range(7):
        plain = plain_gradient(losses(x, y), model)
        grad, report = gradient_of(reg, losses, x, y)
        found.append(report.strengths["reg1"] * 1e10)
        if not found[-1]:
            torch.testing.assert_close(grad, plain)
            assert report.notes == ("reg1 was left out: its gradient is zero, or was lost in rounding or overflow",)
    assert found[0] == 0.0 and found[-1] == pytest.approx(expected, rel=1e-4)


def test_a_penalty_without_gradient_is_not_tried_for_ever():
    """Of losses linear in θ, whose Reg1 is a constant other than zero."""
    model = nn.Linear(3, 1).double()
    rule = Share(0.1, 4)
    reg = regularizer(model, "batch_mean", reg1=rule, reg2=0.0)
    x, notes = torch.arange(12.0, dtype=torch.float64).reshape(4, 3), []
    for _ in range(12):
        grad, report = gradient_of(reg, lambda x: model(x)[:, 0], x)
        torch.testing.assert_close(grad, torch.tensor([4.5, 5.5, 6.5, 1.0], dtype=torch.float64))
        notes.append(report.notes[-1].split(": ")[1].split(",")[0])
        assert report.strengths["reg1"] == 0.0 and rule.value is None and report.reg1 > 1.0
    tried, waited = "its gradient is zero", "its rule has measured no λ yet"
    assert notes == [*[tried] * 5, *[waited] * 3, *[tried] * 4]


ALIKE = {
    **WAYS,
    "differences, no statistics": WAYS["differences"] | {"statistics": False},
    "half, no statistics": WAYS["differences"] | {"statistics": False, "fraction": 0.5},
}


# Finite differences take float32 or wider.
ALIKE_IN = [(way, dtype) for way in ALIKE for dtype in (torch.float32, torch.float64)]
ALIKE_IN += [(way, torch.bfloat16) for way, options in ALIKE.items() if "epsilon" not in options]


@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize(("way", "dtype"), ALIKE_IN, ids=str)
def test_of_samples_that_are_alike_no_lambda_is_found(way, in_block, dtype):
    """And the next batch has the λ that it would have had as the first."""
    options = ALIKE[way]
    if "epsilon" in options:
        options = options | {"epsilon": 1e-4}
    (x, y), batch = wide_batches(2)
    found = []
    for is_first in (False, True):
        model, losses = wide(1.0)
        model.to(dtype)
        torch.manual_seed(7)
        rule = Share(0.1, 20)
        reg = regularizer(model, "batch_mean", reg1=rule, reg2=0.0, **options)
        alike = [t[:1].repeat(32, *(1 for _ in t.shape[1:])) for t in (x, y)]
        every = options.get("every", 1)
        reg.step = every * is_first

        def step(x, y, reg=reg, losses=losses, model=model):
            model.zero_grad()
            with reg.accumulate() as block:
                for part in zip(x.split(16 if in_block else 32), y.split(16 if in_block else 32), strict=True):
                    reg.backward(lambda x, y: losses(x.to(dtype), y).float(), *part)
            return block.report

        for k in range(0 if is_first else every):
            report = step(*alike)
            plain = plain_gradient(losses(alike[0].to(dtype), alike[1]), model)
            torch.testing.assert_close(flat(model), plain, rtol=2e-2, atol=1e-2 if dtype is torch.bfloat16 else 1e-6)
            assert report.strengths["reg1"] == 0.0 and rule.value is None
            assert k or "reg1 was left out: " in report.notes[0]
        found.append(step(*batch).strengths["reg1"])
    assert found[0] == pytest.approx(found[1], rel=1e-6) and 0 < found[0] < 1e3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["reg1", "reg2"])
def test_where_the_mean_is_the_center_no_lambda_is_found(name, dtype):
    """Of one batch, of samples that are alike, and a center that has it from the step before."""
    model, losses = wide(1.0)
    model.to(dtype)
    x, y = (t[:1].repeat(8, *(1 for _ in t.shape[1:])) for t in wide_batches(1)[0])
    rule = Share(0.1)
    reg = regularizer(model, "ema", **{"reg1": 0.0, "reg2": 0.0, name: rule})
    for _ in range(3):
        assert gradient_of(reg, losses, x.to(dtype), y)[1].strengths[name] == 0.0
    assert rule.value is None
    (x, y), *_ = wide_batches(1)
    assert 0 < gradient_of(reg, losses, x.to(dtype), y)[1].strengths[name] < 1e3


@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize("way", ALIKE)
@pytest.mark.parametrize("center", CENTERS)
def test_leaves_outside_of_the_model_keep_the_plain_gradient_on_a_trial(way, in_block, center):
    """Of all samples, whatever the penalty is taken on; on other steps they have the penalty's, too."""
    model, twin = data()[0], data()[0]
    ours, other, bare = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rule, found = Share(0.1, 100), {}

    def made(model, strength):
        torch.manual_seed(2)
        return regularizer(model, CENTERS[center], reg1=strength, reg2=0.0, **ALIKE[way])

    reg, numbers = made(model, rule), made(twin, lambda step: found[step])

    def take(reg, model, leaf, x, y):
        model.zero_grad()
        leaf.grad = None
        with reg.accumulate() as block:
            for part in zip(x.split(3 if in_block else 6), y.split(3 if in_block else 6), strict=True):
                reg.backward(lambda x, y: losses_of(model)(x + leaf, y), *part)
        return block.report

    had_trial, differs = False, False
    for step, (x, y) in enumerate(batches_of(5)):
        is_trial = rule.value is None and step % reg.every == 0
        found[step] = take(reg, model, ours, x, y).strengths["reg1"]
        take(numbers, twin, other, x, y)
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-6, atol=1e-9)
        bare.grad = None
        losses_of(model)(x + bare, y).mean().backward()
        torch.testing.assert_close(ours.grad, bare.grad if is_trial else other.grad, rtol=1e-6, atol=1e-9)
        had_trial |= is_trial and found[step] > 0
        differs |= had_trial and not is_trial and float((ours.grad - bare.grad).norm()) > 1e-4
    assert had_trial and differs


def test_sparse_gradients_stay_sparse():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Tanh(), nn.Linear(8, 2)).double()
    x, y = torch.randint(0, 9, (6, 2)), torch.randint(0, 2, (6,))
    reg = regularizer(model, "zero", reg1=Share(0.1), reg2=0.0, method="random_signs", derivative="finite_difference")
    reg.backward(losses_of(model), x, y)
    first = [p.grad for p in model.parameters()]
    model.zero_grad()
    reg.backward(losses_of(model), x, y)
    assert [g.layout for g in first] == [p.grad.layout for p in model.parameters()]


def test_look_ahead_begins_at_a_hundredth():
    model, x, y = data(B=6)
    rule = LookAhead(0.5, every=1)
    reg = regularizer(model, "zero", reg1=rule, reg2=0.0)
    mean, penalty, _ = penalty_gradients(model, x, y, 0.0)
    grad, report = gradient_of(reg, losses_of(model), x, y)
    assert rule.value == report.strengths["reg1"] == pytest.approx(0.01 * float(mean.norm() / penalty.norm()), rel=1e-9)
    torch.testing.assert_close(grad, mean + rule.value * penalty, rtol=1e-9, atol=1e-12)
    held = torch.cat([t.flatten() for t in rule._held.values()])
    torch.testing.assert_close(held, penalty, rtol=1e-9, atol=1e-12)
    first = rule.value
    gradient_of(reg, losses_of(model), x, y)
    cosine = F.cosine_similarity(mean, penalty, dim=0)
    assert rule.value == pytest.approx(float(first * (0.5 * cosine).exp()), rel=1e-9)


def test_a_step_that_a_scaler_skips_leaves_the_trial():
    model, x, y = data(B=6)
    rule = Share(0.1)
    reg = regularizer(model, "zero", reg1=rule, reg2=0.0)
    scaler = GradScaler("cpu", init_scale=2.0**8)
    before = rule.state_dict()
    report = reg.backward(lambda x, y: losses_of(model)(x, y) * torch.inf, x, y, scaler=scaler)
    assert not report.finite and report.strengths["reg1"] == 0.0 and rule.state_dict() == before


def test_a_skipped_first_trial_leaves_no_bound_behind():
    """Of a λ that was found at ``high``, on a step of which only ``.grad`` overflows."""
    model, x, y = data(B=6, dtype=torch.float32)
    rule = Share(0.1, high=1e-9)
    reg = regularizer(model, "zero", reg1=rule, reg2=0.0)
    bound = "the λ of reg1 is held at 1e-09, a bound of its rule"
    for scale in (2.0**127, 1.0):
        scaler = GradScaler("cpu", init_scale=scale)
        report = reg.backward(lambda x, y: 1e3 * losses_of(model)(x, y), x, y, scaler=scaler)
        assert bool(report.finite) is (scale == 1.0) is rule.is_bounded
        assert report.notes[0] == bound and ("held" in "".join(report.notes[1:])) is False


def test_no_other_step_has_a_trial(monkeypatch):
    """Whose gradient is put together from two; all others are written as they come."""
    calls = []
    rescale = Added.rescale
    monkeypatch.setattr(Added, "rescale", lambda self, f: (calls.append(f), rescale(self, f)))
    model = data()[0]
    reg = regularizer(model, "zero", reg1=Share(0.2, 2), reg2=LookAhead(every=2))
    for count, batch in zip([1, 2, 2, 2, 2, 2], batches_of(6), strict=True):
        gradient_of(reg, losses_of(model), *batch)
        assert len(calls) == count


@pytest.mark.parametrize("unit", [1.0, 100.0])
def test_in_float16_a_scaler_skips_no_more_steps_than_without_a_trial(unit):
    """Where 100 overflows, and λ in the end is that in float32."""
    skipped, found = [], []
    for half, rule in ((True, 0.01 / unit), (True, Share(0.1, 3)), (False, Share(0.1, 3))):
        model, losses = wide(unit)
        reg = regularizer(model, "batch_mean", reg1=rule, reg2=0.0)
        scaler = GradScaler("cpu", init_scale=2.0**16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

        def function(x, y, model=model, half=half):
            with torch.autocast("cpu", torch.float16, enabled=half):
                out = model(x)
            return unit * F.cross_entropy(out.float(), y, reduction="none")

        reports = []
        for x, y in wide_batches(1) * 24:
            reports.append(reg.backward(function, x, y, scaler=scaler))
            scaler.step(optimizer)
            scaler.update()
        skipped.append(sum(not report.finite for report in reports))
        found.append(reports[-1].strengths["reg1"])
    assert skipped[1] <= skipped[0] and found[1] == pytest.approx(found[2], rel=0.1)
