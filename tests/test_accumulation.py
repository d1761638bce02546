"""Batches that come in micro-batches: gradients, statistics and reports are those of the whole batch at once."""

import contextlib
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import GradScaler

import bootgrad
from bootgrad.centers import FullBatchMean, WindowMean

from .methods.conftest import signs  # noqa: F401 — a fixture
from .methods.steps import (
    CENTERS,
    LAMBDA1,
    SIGN_OPTIONS,
    data,
    flat,
    gradient_of,
    losses_of,
    regularizer,
    relative,
    rows_of,
)
from .models import SHAPES, Dropout, Residual, loss_of, make

pytestmark = pytest.mark.filterwarnings("ignore:.*has no rule", "ignore:Using padding='same' with even")

FIELDS = ("loss", "reg1", "reg2", "covariance_trace", "mean_sq_norm", "sq_mean_norm", "batch_size")
SPLITS = [[8], [4, 4], [3, 3, 2], [1, 5, 2], [1] * 8]
PENALTIES = {"both": {}, "reg1": {"reg2": 0.0}, "reg2": {"reg1": 0.0}}
KINDS = [kind for kind in SHAPES if kind is not Dropout]


def parts_of(split, *batch):
    """A batch in micro-batches of these sizes."""
    return list(zip(*(t.split(split) for t in batch), strict=True))


def accumulated(reg, function, split, *batch, **options):
    """As `gradient_of`, of a batch in micro-batches."""
    reg.model.zero_grad()
    with reg.accumulate(**options) as step:
        for part in parts_of(split, *batch):
            reg.backward(function, *part)
    return flat(reg.model), step.report


def assert_same_report(ours, expected, rtol=1e-9, but=()):
    for name in FIELDS:
        value = getattr(expected, name)
        if name in but or (isinstance(value, torch.Tensor) and value.isnan()):
            continue
        torch.testing.assert_close(getattr(ours, name), value, rtol=rtol, atol=1e-12)
    assert ours.method == expected.method and ours.notes == expected.notes


# Exact penalties


@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_steps_are_those_of_the_whole_batch(split, center, penalties):
    model, x, y = data(B=8)
    whole, ours = (regularizer(model, copy.deepcopy(CENTERS[center]), **PENALTIES[penalties]) for _ in range(2))
    for _ in range(3):
        batch = torch.randn_like(x)
        expected, full = gradient_of(whole, losses_of(model), batch, y)
        grad, report = accumulated(ours, losses_of(model), split, batch, y, n=len(split))
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)
        assert_same_report(report, full)
        torch.testing.assert_close(ours.state_dict(), whole.state_dict(), rtol=1e-9, atol=1e-12)
    assert ours.step == 3


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_every_way_of_using_parameters(kind):
    model, x, target = make(kind, batch=6)

    def losses(x, target):
        return loss_of(model(x), target)

    for center in CENTERS.values():
        whole, ours = (regularizer(model, copy.deepcopy(center), reg1=0.03, reg2=0.07) for _ in range(2))
        for _ in range(2):
            expected, full = gradient_of(whole, losses, x, target)
            grad, report = accumulated(ours, losses, [2, 3, 1], x, target)
            torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))
            assert_same_report(report, full, rtol=1e-8)


def test_losses_in_place_of_a_function():
    """In one sweep; each call tells its own mean loss, and no more."""
    model, x, y = data(B=8)
    whole, ours = (regularizer(model, "ema", reg2=0.0) for _ in range(2))
    for reg in (whole, ours):
        reg.backward(losses_of(model), x.flip(0), y)
    expected, full = gradient_of(whole, losses_of(model), x, y)
    model.zero_grad()
    with ours.accumulate() as step:
        for part in parts_of([3, 5], x, y):
            with ours.record():
                losses = losses_of(model)(*part)
            report = ours.backward(losses)
            torch.testing.assert_close(report.loss, losses.detach().mean())
            assert report.batch_size == len(losses) and report.reg1.isnan() and "part of a batch" in report.notes[0]
            assert all(p.grad is None for p in model.parameters())
    assert step.calls == 2
    torch.testing.assert_close(flat(model), expected, rtol=1e-10, atol=1e-12)
    assert_same_report(step.report, full)


@pytest.mark.parametrize("every", [1, 2])
def test_strengths_are_asked_and_centers_moved_once(every):
    model, x, y = data(B=6)
    asked = []

    def strength(step):
        asked.append(step)
        return 0.1 * (1 + step)

    class Watched(WindowMean):
        updates = 0

        def update(self, mean):
            Watched.updates += 1
            super().update(mean)

    ours = regularizer(model, Watched(2), reg1=strength, every=every)
    whole = regularizer(model, WindowMean(2), reg1=lambda step: 0.1 * (1 + step), every=every)
    for step in range(3):
        expected, full = gradient_of(whole, losses_of(model), x, y)
        grad, report = accumulated(ours, losses_of(model), [2, 2, 2], x, y)
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)
        assert_same_report(report, full)
        assert asked == list(range(step + 1)) and Watched.updates == step + 1


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_full_batch_center_is_made_once(differentiable):
    model, x, y = data(B=6)
    calls = []

    def loss_fn(x, y):
        calls.append(len(x))
        return losses_of(model)(x, y)

    def reg():
        center = FullBatchMean([(x.flip(0), y)], loss_fn, differentiable=differentiable)
        return regularizer(model, {"reg1": "zero", "reg2": center})

    expected, _ = gradient_of(reg(), losses_of(model), x, y)
    calls.clear()
    grad, _ = accumulated(reg(), losses_of(model), [4, 2], x, y)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)
    assert calls == [6] * (1 + differentiable)


def test_what_is_in_grad_already_and_leaves_outside_of_the_model():
    torch.manual_seed(0)
    model, x, target = make(Residual, batch=6)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def losses(x, t):
        return loss_of(model(x) * scale, t)

    leaves = [*model.parameters(), scale]
    for reg1, reg2 in ((0.3, 0.0), (0.3, 0.2), (0.0, 0.0)):
        with pytest.warns(bootgrad.BootgradWarning, match="both 0") if not reg1 else pytest.MonkeyPatch.context():
            whole, ours = (bootgrad.GradientRegularizer(model, reg1=reg1, reg2=reg2, center="zero") for _ in range(2))
        for leaf in leaves:
            leaf.grad = None
        whole.backward(losses, x, target)
        expected = [leaf.grad for leaf in leaves]
        hooked = []
        for leaf in leaves:
            leaf.grad = torch.ones_like(leaf)
        handle = scale.register_post_accumulate_grad_hook(lambda p, seen=hooked: seen.append(p.grad.clone()))
        with ours.accumulate():
            for part in parts_of([2, 4], x, target):
                ours.backward(losses, *part)
        handle.remove()
        for leaf, e in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, 1 + e, rtol=1e-9, atol=1e-10)
        assert len(hooked) == 1 and torch.equal(hooked[0], scale.grad)


class Branches(nn.Module):
    """Two layers of which a batch goes through one, by the sign of its first entry; a third is never reached."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return torch.tanh((self.a if x[0, 0] > 0 else self.b)(x))


@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("center", CENTERS)
def test_parameters_that_a_micro_batch_does_not_reach(center, penalties):
    """Their gradients are zero there: against rows written out."""
    torch.manual_seed(0)
    model = Branches().double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 2, (6,))
    x[:, 0] = x[:, 0].abs() * torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    used = [*model.a.parameters(), *model.b.parameters()]
    settings = {"reg1": 0.3, "reg2": 0.7} | PENALTIES[penalties]
    reg, means = regularizer(model, copy.deepcopy(CENTERS[center]), **settings), []
    for _ in range(2):
        rows, losses = [], []
        for part in parts_of([2, 3, 1], x, y):
            values = losses_of(model)(*part)
            losses.append(values)
            rows += [torch.autograd.grad(v, used, create_graph=True, materialize_grads=True) for v in values]
        G, losses = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]), torch.cat(losses)
        zero = torch.zeros(G.size(1), dtype=torch.float64)
        past = means[-1] if means else None  # one step's mean, by moving average and by window
        c1 = {"batch_mean": None, "zero": zero}.get(center, past)
        c2 = {"batch_mean": zero, "zero": zero}.get(center, past)
        mean = G.mean(0)
        total = losses.mean() + settings["reg1"] * (G - (mean if c1 is None else c1)).square().sum(1).mean()
        if c2 is not None:
            total = total + settings["reg2"] * (mean - c2).square().sum()
        expected = torch.autograd.grad(total, used)
        model.zero_grad()
        with reg.accumulate(3) as step:
            for part in parts_of([2, 3, 1], x, y):
                reg.backward(losses_of(model), *part)
        for p, e in zip(used, expected, strict=True):
            torch.testing.assert_close(p.grad, e, rtol=1e-9, atol=1e-12)
        gamma = (G - mean).square().sum(1).mean().detach()
        torch.testing.assert_close(step.report.covariance_trace, gamma, rtol=1e-9, atol=1e-12)
        means.append(mean.detach())
    assert model.c.weight.grad is None


@pytest.mark.parametrize("spread", ["within", "across"])
def test_gamma_keeps_its_digits_where_samples_nearly_agree(spread):
    """Γ is 1e-8 of ‖ḡ‖², in float32: the second sweep takes it about the mean."""
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 3, bias=False)
    step = torch.arange(4.0).repeat_interleave(4).view(16, 1, 1, 1) if spread == "across" else torch.randn(16, 2, 8, 8)
    x = torch.randn(1, 2, 8, 8) + 3e-5 * step
    double = copy.deepcopy(model).double()

    def losses(model):
        return lambda x: model(x).square().flatten(1).sum(1)

    with bootgrad.record(double) as rec:
        values = losses(double)(x.double())
    exact = float(rec.backward(values).covariance_trace)
    reg = bootgrad.GradientRegularizer(model, reg1=1e-3)
    report = accumulated(reg, losses(model), [4] * 4, x)[1]
    assert exact < 1e-6 * float(report.sq_mean_norm)
    assert float(report.covariance_trace) == pytest.approx(exact, rel=1e-3)
    assert float(report.reg1) == pytest.approx(exact, rel=1e-3)


def test_sums_in_half_precision_keep_their_digits():
    """Of 64 micro-batches in bfloat16: added up in that, they would come to rest after the first ones."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(torch.bfloat16)
    x = (1 + 0.1 * torch.randn(64, 4)).to(torch.bfloat16)

    def losses(x):
        return model(x).float().sum(1)

    reg = bootgrad.GradientRegularizer(model, reg1=1e-30, center="ema")
    for _ in range(2):
        model.zero_grad()
        report = accumulated(reg, losses, [1] * 64, x)[1]
    torch.testing.assert_close(model.weight.grad[0], x.double().mean(0).bfloat16(), rtol=2**-8, atol=0)
    rows = torch.cat([x, x, x, torch.ones(64, 3)], 1).double()
    gamma = float((rows - rows.mean(0)).square().sum(1).mean())
    assert float(report.covariance_trace) == pytest.approx(gamma, rel=2e-2)
    assert model.weight.grad.dtype == torch.bfloat16


# The estimators


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("penalties", PENALTIES)
def test_finite_differences(center, penalties):
    model, x, y = data(B=8)
    options = {"method": "finite_difference", "epsilon": 1e-6} | PENALTIES[penalties]
    exact = regularizer(model, copy.deepcopy(CENTERS[center]), **PENALTIES[penalties])
    ours = regularizer(model, copy.deepcopy(CENTERS[center]), **options)
    for _ in range(2):
        expected, full = gradient_of(exact, losses_of(model), x, y)
        grad, report = accumulated(ours, losses_of(model), [3, 5], x, y)
        assert relative(grad, expected) < 1e-5
        assert report.method in ("finite_difference", "plain")
        for name in FIELDS:
            torch.testing.assert_close(getattr(report, name), getattr(full, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("derivative", SIGN_OPTIONS)
@pytest.mark.parametrize("center", CENTERS)
def test_random_signs_averaged_over_all_signs(signs, center, derivative):  # noqa: F811
    """Of two micro-batches of two: over all signs of both, gradient, Reg1 and Γ are the exact ones."""
    model, x, y = data(B=4)
    exact = regularizer(model, copy.deepcopy(CENTERS[center]))
    ours = regularizer(model, copy.deepcopy(CENTERS[center]), **SIGN_OPTIONS[derivative])
    signs[:] = [[1, 1, 1, 1]]
    for reg in (exact, ours):
        reg.backward(losses_of(model), x.flip(0), y)
    states = [copy.deepcopy(reg.state_dict()) for reg in (exact, ours)]
    expected, full = gradient_of(exact, losses_of(model), x, y)
    grads, reports = [], []
    for vector in itertools.product([1, -1], repeat=4):
        ours.load_state_dict(copy.deepcopy(states[1]))
        signs[:] = [list(vector[:2]), list(vector[2:])]
        grad, report = accumulated(ours, losses_of(model), [2, 2], x, y)
        grads.append(grad)
        reports.append(report)
        assert report.notes == ("reg1 and the covariance trace are estimates from 1 random sign vectors",)
    assert relative(torch.stack(grads).mean(0), expected) < {"exact": 1e-9, "finite_difference": 1e-4}[derivative]
    for name in ("reg1", "covariance_trace"):
        mean = torch.stack([getattr(report, name) for report in reports]).mean()
        torch.testing.assert_close(mean, getattr(full, name), rtol=1e-9, atol=1e-12)
    for name in ("reg2", "sq_mean_norm", "loss"):
        torch.testing.assert_close(getattr(reports[0], name), getattr(full, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("statistics", [True, False])
def test_fractions_averaged_over_all_subsets(monkeypatch, center, statistics):
    """Of a micro-batch of two one sample, of one of three two: over all choices the gradient is the exact one."""
    model, x, y = data(B=6)
    chosen = []

    def draw(batch, fraction, generator):
        own = chosen.pop(0)
        return torch.tensor(own), torch.tensor([i for i in range(len(batch[0])) if i not in own])

    monkeypatch.setattr("bootgrad.steps.draw", draw)
    exact = regularizer(model, copy.deepcopy(CENTERS[center]))
    ours = regularizer(model, copy.deepcopy(CENTERS[center]), fraction=0.5, statistics=statistics)
    chosen[:] = [[0, 1, 2]]
    for reg in (exact, ours):
        reg.backward(losses_of(model), x.flip(0), y)
    states = [copy.deepcopy(reg.state_dict()) for reg in (exact, ours)]
    expected, full = gradient_of(exact, losses_of(model), x, y)
    grads = []
    for first, second in itertools.product([[0], [1]], itertools.combinations(range(4), 2)):
        ours.load_state_dict(copy.deepcopy(states[1]))
        chosen[:] = [list(first), list(second)]
        grad, report = accumulated(ours, losses_of(model), [2, 4], x, y)
        grads.append(grad)
        assert report.notes == ("the penalties were taken on 3 of 6 samples",) and report.batch_size == 6
        for name in ("loss", "reg2", "sq_mean_norm", *(["reg1", "covariance_trace"] if statistics else [])):
            torch.testing.assert_close(getattr(report, name), getattr(full, name), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours.state_dict()["centers"], exact.state_dict()["centers"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack(grads).mean(0), expected, rtol=1e-9, atol=1e-12)


# Two sweeps


class Stateful(nn.Module):
    """Dropout, and a count of calls."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(3, 8), nn.Linear(8, 2), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return self.last(self.dropout(torch.tanh(self.first(x)))) * (1 + self.calls)


@pytest.mark.parametrize("options", [{}, {"method": "finite_difference", "epsilon": 1e-6}], ids=str)
def test_the_second_sweep_repeats_random_numbers_and_buffers(options):
    torch.manual_seed(0)
    model = Stateful().double()
    _, x, y = data(B=8)
    parameters = list(model.parameters())
    before = torch.get_rng_state()
    values = torch.cat([losses_of(model)(*part) for part in parts_of([3, 3, 2], x, y)])
    after = torch.get_rng_state()
    G = rows_of(values, parameters)
    total = values.mean() + LAMBDA1 * (G - G.mean(0)).square().sum(1).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])
    model.calls.zero_()
    torch.set_rng_state(before)
    reg = regularizer(model, "batch_mean", reg2=0.0, **options)
    grad, report = accumulated(reg, losses_of(model), [3, 3, 2], x, y)
    assert relative(grad, expected) < (1e-4 if options else 1e-10)
    assert model.calls == 3 and torch.equal(torch.get_rng_state(), after)
    gamma = (G - G.mean(0)).square().sum(1).mean().detach()
    torch.testing.assert_close(report.covariance_trace, gamma, rtol=1e-9, atol=1e-12)


def test_one_sweep_where_nothing_depends_on_the_batch_mean():
    model, x, y = data(B=8)
    calls = []

    def function(x, y):
        calls.append(len(x))
        return losses_of(model)(x, y)

    for options, expected in (
        ({"center": "zero", "reg2": 0.0}, [3, 3, 2]),
        ({"center": "zero"}, [3, 3, 2] * 2),
        ({"center": "batch_mean", "reg2": 0.0}, [3, 3, 2] * 2),
        ({"center": "ema", "reg1": 0.0}, [3, 3, 2]),  # on the first step there is no center to measure Reg2 from
    ):
        calls.clear()
        accumulated(regularizer(model, **options), function, [3, 3, 2], x, y)
        assert calls == expected
    calls.clear()
    accumulated(regularizer(model, center="batch_mean", reg2=0.0), function, [8], x, y, n=1)
    assert calls == [8]  # one micro-batch that is known to be the batch


@pytest.mark.parametrize("options", [{}, {"method": "finite_difference"}, SIGN_OPTIONS["exact"]], ids=str)
def test_functions_that_see_the_variables_of_a_loop_are_found(options):
    """At the end of the block all of them see the last micro-batch."""
    model, x, y = data(B=8)
    reg = regularizer(model, "zero", **options)
    for split, message in (([4, 4], "gave other losses when it was run again"), ([5, 3], "3 losses .* expected 5")):
        before = copy.deepcopy(reg.state_dict())
        with pytest.raises(bootgrad.BootgradError, match=message), reg.accumulate():
            for a, b in parts_of(split, x, y):
                reg.backward(lambda: losses_of(model)(a, b))  # noqa: B023 — what is to be found
        torch.testing.assert_close(reg.state_dict(), before)
        assert all(p.grad is None for p in model.parameters())


def test_batches_that_are_written_to_after_their_call():
    model, x, y = data(B=8)
    buffer = torch.empty(4, 3, dtype=torch.float64)
    reg = regularizer(model, "zero")
    with (
        pytest.raises(bootgrad.BootgradError, match="changed in place after its call.*memory of its own"),
        reg.accumulate(),
    ):
        for a, b in parts_of([4, 4], x, y):
            buffer.copy_(a)
            reg.backward(losses_of(model), buffer, b)
    one_sweep = regularizer(model, "zero", reg2=0.0)
    expected, _ = gradient_of(regularizer(model, "zero", reg2=0.0), losses_of(model), x, y)
    model.zero_grad()
    with one_sweep.accumulate():
        for a, b in parts_of([4, 4], x, y):
            buffer.copy_(a)
            one_sweep.backward(losses_of(model), buffer, b)
    torch.testing.assert_close(flat(model), expected, rtol=1e-10, atol=1e-12)


# Blocks that fail


class Own(Exception):
    pass


class Open:
    """An open block, and what can be done in it."""

    def __init__(self, reg, step, batch):
        self.reg, self.step, self.batch, self.function = reg, step, batch, losses_of(reg.model)

    def call(self, **options):
        self.reg.backward(self.function, *self.batch, **options)

    def fail(self, *_):
        raise Own

    def call_with(self, function):
        self.reg.backward(function, *self.batch)

    def catch(self):
        with contextlib.suppress(Own):
            self.call_with(self.fail)

    def move(self):
        nn.init.zeros_(self.reg.model.layers[0].bias)


FAILURES = {
    "an error of the user": (lambda b: (b.call(), b.fail()), None),
    "an error in a function": (lambda b: (b.call(), b.call_with(b.fail)), None),
    "an error that is caught": (lambda b: (b.call(), b.catch()), "a micro-batch of the block has failed"),
    "an error that is caught before another": (
        lambda b: (b.catch(), b.call()),
        "a micro-batch of the block has failed",
    ),
    "losses that are not finite": (
        lambda b: (b.call(), b.call_with(lambda x, y: b.function(x, y) * math.nan)),
        "NaN or infinite at 8 of 8",
    ),
    "too few": (lambda b: b.call(), "ended after 1 micro-batches; expected 2"),
    "too many": (lambda b: (b.call(), b.call(), b.call()), "one more micro-batch came than the 2"),
    "a step inside": (lambda b: (b.call(), b.move(), b.call()), "parameters were changed between the micro-batches"),
    "a step at the end": (
        lambda b: (b.call(), b.call(), b.move()),
        "parameters were changed between the micro-batches",
    ),
    "a block inside": (lambda b: b.reg.accumulate().__enter__(), "is open already"),
    "a scaler inside": (lambda b: b.call(scaler=GradScaler("cpu")), r"reg.accumulate\(n, scaler=scaler\)"),
    "the report inside": (lambda b: b.step.report, "there when the block has ended"),
    "the same block inside": (lambda b: b.step.__enter__(), "used already"),
}


@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("name", FAILURES)
def test_a_block_that_fails_changes_nothing(name, penalties):
    model, x, y = data(B=8)
    center = {"reg1": "window", "reg2": "ema"}
    reg, twin = (regularizer(model, copy.deepcopy(center), **PENALTIES[penalties]) for _ in range(2))
    for each in (reg, twin):
        model.zero_grad()
        each.backward(losses_of(model), x, y)
    before = copy.deepcopy((reg.state_dict(), flat(model)))
    act, message = FAILURES[name]
    state = copy.deepcopy(model.state_dict())
    error = Own if message is None else bootgrad.BootgradError
    with pytest.raises(error, match=message), reg.accumulate(2) as step:
        act(Open(reg, step, (x, y)))
    torch.testing.assert_close((reg.state_dict(), flat(model)), before, rtol=0, atol=0)
    model.load_state_dict(state)
    with pytest.raises(bootgrad.BootgradError, match="there when the block has ended"):
        step.report  # noqa: B018
    expected, full = gradient_of(twin, losses_of(model), x, y)
    grad, report = accumulated(reg, losses_of(model), [2, 6], x, y)  # the next block is as any other
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)
    assert_same_report(report, full)


def test_what_is_refused():
    model, x, y = data(B=4)
    reg = regularizer(model, "zero")
    for n in (0, -1, 1.5, True, "two"):
        with pytest.raises(bootgrad.BootgradError, match="n must be a whole number of at least 1"):
            reg.accumulate(n)
    with pytest.raises(bootgrad.BootgradError, match="after 0 micro-batches; expected one or more"), reg.accumulate():
        pass
    for options, message in (
        ({}, "the mean gradient of all micro-batches"),
        ({"method": "finite_difference"}, "runs more"),
    ):
        other = regularizer(model, "zero", **options)
        with pytest.raises(bootgrad.BootgradError, match=message), other.accumulate():
            with other.record():
                losses = losses_of(model)(x, y)
            other.backward(losses)
    with (
        pytest.raises(bootgrad.BootgradError, match="the result of MulBackward0, whose graph is gone"),
        reg.accumulate(),
    ):
        reg.backward(losses_of(model), x.requires_grad_() * 2, y)
    assert reg.step == 0 and all(p.grad is None for p in model.parameters())


def test_a_captured_graph_takes_no_second_sweep(monkeypatch):
    model, x, y = data(B=6)
    monkeypatch.setattr("bootgrad.waiting.is_capturing", lambda: True)
    with pytest.raises(bootgrad.BootgradError, match="a captured graph of kernels would repeat"):
        accumulated(regularizer(model, "zero"), losses_of(model), [3, 3], x, y)


# In half precision


@pytest.mark.parametrize("center", ["zero", "batch_mean"])
def test_micro_batches_with_a_scaler(center):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(12, 6), torch.randint(0, 3, (12,))

    def losses(x, y):
        with torch.autocast("cpu", torch.float16):
            return F.cross_entropy(model(x).float(), y, reduction="none")

    center = {"reg1": center, "reg2": "ema"}
    scaler, optimizer = GradScaler("cpu", init_scale=2.0**12), torch.optim.SGD(model.parameters(), lr=0.1)
    whole, ours = (regularizer(model, copy.deepcopy(center)) for _ in range(2))
    for _ in range(2):
        expected, full = gradient_of(whole, losses, x, y)
        grad, report = accumulated(ours, losses, [5, 4, 3], x, y, scaler=scaler)
        assert relative(grad / scaler.get_scale(), expected) < 1e-2
        assert report.finite and relative(report.covariance_trace, full.covariance_trace) < 1e-2
    before = copy.deepcopy((ours.state_dict()["centers"], model.state_dict()))
    optimizer.zero_grad()
    with ours.accumulate(scaler=scaler) as step:
        for factor, part in zip((1.0, math.inf, 1.0), parts_of([5, 4, 3], x, y), strict=True):
            ours.backward(lambda x, y, f: losses(x, y) * f, *part, factor)
    assert not step.report.finite and not flat(model).isfinite().all() and "the scaler skips" in step.report.notes[-1]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    torch.testing.assert_close((ours.state_dict()["centers"], model.state_dict()), before, rtol=0, atol=0)


def test_nobody_waits_but_for_the_comparison_of_two_sweeps(monkeypatch):
    monkeypatch.setattr("bootgrad.waiting.answers_at_once", lambda tensor: False)
    asked = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                asked.append(func)
            return func(*args, **(kwargs or {}))

    model, x, y = data(B=9)
    for options, waits in (({"reg2": 0.0}, 0), ({}, 1)):
        reg = regularizer(model, "ema", **options)
        for _ in range(4):  # shapes whose samples are checked are waited for
            accumulated(reg, losses_of(model), [3, 3, 3], x, y)
        for _ in range(8):
            asked.clear()
            with Watch():
                accumulated(reg, losses_of(model), [3, 3, 3], x, y)
            if len(asked) <= 1:
                break
        assert len(asked) == waits
    before = flat(model)
    with reg.accumulate() as step:
        for factor in (1.0, math.nan, 1.0):
            reg.backward(lambda x, y, f: losses_of(model)(x, y) * f, x, y, factor)
    assert torch.equal(flat(model), before)
    with pytest.raises(bootgrad.BootgradError, match="NaN or infinite at 9 of 27 samples: 9, 10"):
        step.report.loss  # noqa: B018
