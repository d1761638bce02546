"""What goes on around all rules for λ: states, scalers, micro-batches, failures, wrong options."""

import copy
import io
import math

import pytest
import torch
from torch.amp import GradScaler

import bootgrad
from bootgrad import strengths
from bootgrad.strengths import Bound, LookAhead, Rule, Share

from ..methods.steps import CENTERS, data, flat, gradient_of, losses_of, regularizer
from .steps import batches_of, run


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
    assert reg.step == 1 and reg.strengths["reg1"].value is None
    gradient_of(reg, losses_of(model), x, y)
    assert reg.strengths["reg1"].value is not None
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
        (lambda s: s.pop("owed"), "lacks 'owed'"),
    ):
        damaged = copy.deepcopy(before)
        damaged["step"], damaged["strengths"]["reg1"]["value"] = 7, 0.5
        damage(damaged["strengths"])
        with pytest.raises(bootgrad.BootgradError, match=message):
            reg.load_state_dict(damaged)
        assert reg.step == 2 and str(reg.state_dict()["strengths"]) == str(before["strengths"])


@pytest.mark.parametrize("kind", ["share", "look ahead", "bound", "mixed"])
def test_rules_that_a_state_lacks_begin_anew(kind):
    """As those of a new regularizer, although they have been in use."""
    batches = batches_of(6)
    model, twin = data()[0], data()[0]
    numbers = regularizer(model, "ema")
    run(numbers, batches[:2], model)
    used, _ = trained(kind, model)
    run(used, batches[:4], model)
    fresh, _ = trained(kind, twin)
    for reg in (used, fresh):
        reg.load_state_dict(copy.deepcopy(numbers.state_dict()))
    assert str(used.state_dict()) == str(fresh.state_dict()) and used._strengths._owed is None
    assert run(used, batches, model)[0] == run(fresh, batches, twin)[0]


def test_a_rule_is_added_for_the_other_penalty():
    batches = batches_of(4)
    model = data()[0]
    before = regularizer(model, "ema", reg1=Share(), reg2=0.1)
    run(before, batches, model)
    reg = regularizer(model, "ema", reg1=Share(), reg2="auto")
    run(reg, batches, model)
    assert reg.strengths["reg2"].value is not None
    reg.load_state_dict(copy.deepcopy(before.state_dict()))
    assert reg.strengths["reg1"].state_dict() == before.strengths["reg1"].state_dict()
    assert reg.strengths["reg2"].value is None and reg.strengths["reg2"].due(reg.step)


class Raising(Share):
    """Fails when it is shown a step."""

    fails = True

    def after(self, seen):
        if self.fails:
            raise KeyError("own")
        super().after(seen)


@pytest.mark.parametrize("in_block", [False, True])
def test_a_rule_that_raises_leaves_all_as_it_was(in_block):
    """And the step that is taken again has its gradient once."""
    model, twin = data()[0], data()[0]
    reg, other = (regularizer(m, "ema", reg1=0.1, reg2=rule) for m, rule in ((model, Raising()), (twin, Share())))
    batches = batches_of(2)
    reg.strengths["reg2"].fails = False
    for r, m in ((reg, model), (other, twin)):
        run(r, batches[:1], m)
    reg.strengths["reg2"].fails = True
    grads = [p.grad.clone() for p in model.parameters()]
    before = str(reg.state_dict())
    with pytest.raises(KeyError, match="own"):
        if in_block:
            with reg.accumulate():
                reg.backward(losses_of(model), *batches[1])
        else:
            reg.backward(losses_of(model), *batches[1])
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert str(reg.state_dict()) == before
    reg.strengths["reg2"].fails = False
    found, expected = (run(r, batches[1:], m) for r, m in ((reg, model), (other, twin)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


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
        assert block.report.strengths == pytest.approx(report.strengths, rel=1e-9)
        assert all(
            a in (0.0, b) for a, b in zip(of_call.strengths.values(), block.report.strengths.values(), strict=True)
        )


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
    assert found[0][-1]["reg1"] > 0 < found[0][-1]["reg2"]


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


class Own(Rule):
    """A rule of a user's."""

    def __init__(self, trial, found):
        super().__init__(0.0, 1e20)
        self.given, self.first = trial, found

    def strength(self, penalty, step):
        return 0.0

    def due(self, step):
        return True

    @property
    def trial(self):
        return self.given

    def found(self, added):
        return self.first

    def after(self, seen):
        raise AssertionError("shown a step that has failed")

    def reset(self):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(
    ("trial", "found", "message"),
    [
        *((1.0, v, "reg1 must be finite and not negative; got") for v in (math.nan, math.inf, -3.0)),
        *((v, 1.0, "the trial of reg1 must be finite and not negative; got") for v in (math.nan, math.inf, -3.0)),
        (1.0, "much", "reg1 must be a number"),
        ("much", 1.0, "the trial of reg1 must be a number"),
        (0.0, 1.0, "the trial of reg1 must be above zero"),
        (1e-300, 1e20, r"reg1 must be found with a trial that is not so far from it; got 1e\+20 with 1e-300"),
    ],
)
@pytest.mark.parametrize("in_block", [False, True])
def test_what_a_rule_tries_and_finds_is_checked_before_anything_is_written(trial, found, message, in_block):
    model, x, y = data(B=6)
    reg = regularizer(model, {"reg1": "zero", "reg2": "ema"}, reg1=Own(trial, found), reg2=0.0)
    before = str(reg.state_dict())
    with pytest.raises(bootgrad.BootgradError, match=message):
        if in_block:
            with reg.accumulate():
                reg.backward(losses_of(model), x, y)
        else:
            reg.backward(losses_of(model), x, y)
    assert all(p.grad is None for p in model.parameters()) and str(reg.state_dict()) == before


def test_finding_changes_nothing():
    class Added:
        def log_ratio(self):
            return -1000.0

    for rule in (Share(high=1.0), LookAhead(high=1.0)):
        before = copy.deepcopy(vars(rule)) | {"_log_ratio": None}
        assert rule.found(Added()) == 1.0
        assert vars(rule) | {"_log_ratio": None} == before and not rule.is_bounded


def test_auto_is_the_default_rule():
    model = data()[0]
    reg = bootgrad.GradientRegularizer(model, reg1="auto", reg2="auto", center="ema")
    rules = reg.strengths.values()
    assert [type(rule) for rule in rules] == [strengths.AUTO] * 2 and len(set(map(id, rules))) == 2


def test_a_report_tells_the_rules_strengths():
    model, x, y = data()
    reg = bootgrad.GradientRegularizer(
        model, reg1="auto", reg2=strengths.LookAhead(), center={"reg1": "batch_mean", "reg2": "ema"}
    )
    report = reg.backward(losses_of(model), x, y)
    assert report.strengths == {"reg1": reg.strengths["reg1"].value, "reg2": 0.0}


def test_a_captured_graph_is_refused(monkeypatch):
    model, x, y = data(B=6)
    reg = regularizer(model, "zero", reg1=Share(), reg2=0.0)
    monkeypatch.setattr("bootgrad.waiting.is_capturing", lambda: True)
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
        (lambda m: {"reg1": Bound(m)}, "rate must be an optimizer, a number or a function of the step; got "),
        (lambda m: {"reg1": Bound(torch.optim.SGD)}, "of the step; got the class SGD"),
        (lambda m: {"reg1": Bound(0.1, scale=0.0)}, "scale must be a finite number above zero"),
        (lambda m: {"reg1": Bound(0.1, batch_size=0)}, "batch_size must be a whole number"),
    ],
)  # fmt: skip
def test_bad_options(make, message):
    with pytest.raises(bootgrad.BootgradError, match=message):
        bootgrad.GradientRegularizer(data()[0], **make(None))


@pytest.mark.parametrize("kind", ["share", "look-ahead", "bound"])
def test_a_rule_is_of_one_regularizer(kind):
    model = data()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = {"share": Share, "look-ahead": LookAhead, "bound": lambda: Bound(optimizer)}[kind]()
    with pytest.raises(bootgrad.errors.ArgumentError, match="identically zero"):
        bootgrad.GradientRegularizer(model, reg2=rule)
    bootgrad.GradientRegularizer(model, reg1=rule)  # which the one before did not take
    with pytest.raises(bootgrad.errors.ArgumentError, match="reg1 is a rule that another regularizer has"):
        bootgrad.GradientRegularizer(data()[0], reg1=rule)
