"""Training in half precision by autocast, with a GradScaler and without: against the same in float32 and float64."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import GradScaler

import bootgrad
from bootgrad.scaling import Scaling

from .methods.steps import SIGN_OPTIONS, flat

B = 8
METHODS = {
    "exact": {},
    "fraction": {"fraction": 0.5},
    "signs": SIGN_OPTIONS["exact"],
    "signs by differences": {"method": "random_signs", "derivative": "finite_difference"},
    "differences": {"method": "finite_difference"},
    "differences of reg2": {"method": "finite_difference", "reg1": 0.0},
}


class Net(nn.Module):
    """Convolution, group norm, linear layers; smooth, (B, 2, 6, 6) → (B, 5)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x):
        return self.head(self.features(x))


def setting(batch=B):
    torch.manual_seed(0)
    return Net(), torch.randn(batch, 2, 6, 6), torch.randint(0, 5, (batch,))


def losses_of(model, dtype=None, factor=1.0):
    """Losses (B,) in float32, of a model under autocast to ``dtype``."""

    def losses(x, y):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            outputs = model(x)
        return factor * F.cross_entropy(
            outputs.to(torch.promote_types(outputs.dtype, torch.float32)), y, reduction="none"
        )

    return losses


class Products(nn.Module):
    """The ways to write a linear layer."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        w, b = self.weight, self.bias
        return [
            F.linear(x, w, b),
            x @ w,
            torch.addmm(b, x, w),
            torch.addmm(b, x, w, beta=2),
            torch.einsum("bi,io->bo", x, w),
        ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recorded_products_have_the_dtype_that_autocast_gives_them(dtype):
    model, x = Products(), torch.randn(B, 4)
    with torch.autocast("cpu", dtype):
        plain = model(x)
        with bootgrad.record(model):
            recorded = model(x)
    assert [y.dtype for y in recorded] == [y.dtype for y in plain] == [dtype] * 5
    for y, z in zip(recorded, plain, strict=True):
        assert relative(y.detach(), z.detach()) < torch.finfo(dtype).eps


def relative(a, b):
    distance = float((a.double() - b.double()).norm())
    return distance / float(b.double().norm()) if distance else 0.0


def make_scaler(factor=2.0**12, **options):
    return GradScaler("cpu", init_scale=factor, **options)


def regularizer(model, center="zero", **options):
    torch.manual_seed(3)
    return bootgrad.GradientRegularizer(model, **{"reg1": 0.1, "reg2": 0.05, "center": center} | options)


def penalty_gradient(model, losses, x, y, scaler=None, **options):
    """What the penalties add to ``.grad``, unscaled, and the report."""
    grads, reports = [], []
    for strengths in ({}, {"reg1": 1e-30, "reg2": 0.0}):
        model.zero_grad()
        reports.append(regularizer(model, **options | strengths).backward(losses, x, y, scaler=scaler))
        grads.append(flat(model) / (1.0 if scaler is None else scaler.get_scale()))
    return grads[0] - grads[1], reports[0]


# Statistics


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 1e-4])
def test_norms_do_not_underflow_by_the_batch_size(dtype, factor):
    """With 1/B before the backward pass, the smaller gradients are zero in float16: torch's own are."""
    model, x, y = setting(batch=512)
    exact = copy.deepcopy(model).double()
    with bootgrad.record(exact) as rec:
        values = losses_of(exact, factor=factor)(x.double(), y)
    expected = rec.backward(values)
    with bootgrad.record(model) as rec:
        values = losses_of(model, dtype, factor)(x, y)
    stats = rec.backward(values)
    tolerance = 2e-2 if dtype is torch.bfloat16 or factor < 1 else 5e-3
    assert relative(stats.sq_norms, expected.sq_norms) < tolerance
    assert float(stats.covariance_trace) == pytest.approx(float(expected.covariance_trace), rel=tolerance)
    assert relative(flat(model), flat(exact)) < tolerance
    report = regularizer(model, reg2=0.0).backward(losses_of(model, dtype, factor), x, y)
    assert float(report.covariance_trace) == pytest.approx(float(expected.covariance_trace), rel=tolerance)
    if dtype is torch.float16 and factor < 1:
        plain = torch.autograd.grad(losses_of(model, dtype, factor)(x, y).mean(), list(model.parameters()))
        assert relative(torch.cat([g.flatten() for g in plain]), flat(exact)) > 0.5


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "uniform", "weights"])
def test_a_scaler_scales_grad_and_nothing_else(dtype, reduction):
    model, x, y = setting()
    weights = {"uniform": torch.full((B,), 0.3), "weights": torch.linspace(-0.2, 1, B)}
    wanted = weights.get(reduction, reduction)
    exact = copy.deepcopy(model).double()
    center = {name: 0.1 * torch.ones_like(p) for name, p in model.named_parameters()}
    with bootgrad.record(exact) as rec:
        values = losses_of(exact)(x.double(), y)
    double = {name: c.double() for name, c in center.items()}
    expected = rec.backward(values, wanted, double)
    tolerance = {None: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for scaler in (None, make_scaler(), make_scaler(enabled=False)):
        model.zero_grad()
        with bootgrad.record(model) as rec:
            values = losses_of(model, dtype)(x, y)
        stats = rec.backward(values, wanted, center, scaler=scaler)
        factor = 1.0 if scaler is None else scaler.get_scale()
        assert relative(flat(model), factor * flat(exact)) < tolerance
        for name in ("sq_norms", "deviation_sq_norms", "covariance_trace", "sq_mean_norm", "reg1", "reg2"):
            assert relative(getattr(stats, name), getattr(expected, name)) < 3 * tolerance
        for name, moments in stats.per_parameter.items():
            assert relative(moments.sq_norms, expected.per_parameter[name].sq_norms) < 4 * tolerance


@pytest.mark.parametrize("losses_dtype", [torch.float16, torch.bfloat16])
def test_losses_in_half_precision(losses_dtype):
    """1/B is no number of eight bits."""
    model, x, y = setting(batch=100)
    exact = copy.deepcopy(model).double()
    function = losses_of(model, losses_dtype)
    with bootgrad.record(exact) as rec:
        values = losses_of(exact)(x.double(), y)
    expected = rec.backward(values)
    with bootgrad.record(model) as rec:
        values = function(x, y).to(losses_dtype)
    stats = rec.backward(values)
    assert float(stats.sq_norms.sum()) == pytest.approx(float(expected.sq_norms.sum()), rel=4e-3)
    report = regularizer(model).backward(lambda x, y: function(x, y).to(losses_dtype), x, y)
    assert report.covariance_trace.dtype == report.loss.dtype == torch.float32


# Penalties


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("center", ["ema", "batch_mean"])
@pytest.mark.parametrize("method", METHODS)
def test_steps_with_a_scaler_are_those_without(method, center, dtype):
    """Their gradients times its factor, with the same reports and centers."""
    center = {"reg1": center, "reg2": "ema"}
    options = METHODS[method] | ({"epsilon": 0.02} if "differences" in method else {})
    if center["reg1"] == "batch_mean" and "reg1" in options:
        return  # reg1 is not taken: the row above has it
    model, x, y = setting()
    scaler, runs = make_scaler(), []
    for given in (None, scaler):
        reg, out = regularizer(model, copy.deepcopy(center), **options), []
        for _ in range(2):
            model.zero_grad()
            report = reg.backward(losses_of(model, dtype), x, y, scaler=given)
            out.append((flat(model) / (1.0 if given is None else scaler.get_scale()), report))
        runs.append((out, reg.state_dict()["centers"]["reg2"]["mean"]))
    tolerance = {None: 2e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for (expected, full), (ours, report) in zip(runs[0][0], runs[1][0], strict=True):
        assert relative(ours, expected) < tolerance
        assert report.finite and full.finite is None and full.notes == report.notes
        for name in ("loss", "reg1", "reg2", "covariance_trace", "sq_mean_norm"):
            if getattr(full, name) is not None and not getattr(full, name).isnan():
                assert relative(getattr(report, name), getattr(full, name)) < tolerance
    for name, mean in runs[0][1].items():
        assert relative(runs[1][1][name], mean) < tolerance


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("options", [{}, {"center": "batch_mean", "reg2": 0.0}, {"method": "random_signs"}], ids=str)
def test_penalties_that_vanish_in_float16_are_kept_by_a_scaler(options, waits, monkeypatch):
    """Of losses of 1e-7 the backward pass is zero in float16; scaled, the penalty's gradient is within 2e-2 of float32's."""
    if not waits:  # as on an accelerator
        monkeypatch.setattr("bootgrad.waiting.answers_at_once", lambda tensor: False)
    model, x, y = setting()
    strengths = {"reg1": 3e6, "reg2": 3e6} | options
    expected, full = penalty_gradient(model, losses_of(model, factor=1e-7), x, y, **strengths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bootgrad.BootgradWarning)
        without, _ = penalty_gradient(model, losses_of(model, torch.float16, 1e-7), x, y, **strengths)
    assert relative(without, expected) > 0.5
    scaler, optimizer = make_scaler(2.0**32), torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(8):  # its own search for a factor
        reg = regularizer(model, **strengths)
        optimizer.zero_grad()
        reg.backward(losses_of(model, torch.float16, 1e-7), x, y, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    ours, report = penalty_gradient(model, losses_of(model, torch.float16, 1e-7), x, y, scaler, **strengths)
    assert 2.0**24 < scaler.get_scale() < 2.0**31
    assert relative(ours, expected) < 2e-2
    assert relative(report.reg1, full.reg1) < 2e-2


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("center", ["zero", "batch_mean"])
def test_what_overflows_in_the_second_pass_answers_to_the_scaler(center, waits, monkeypatch):
    """The cotangents that a strong penalty sends back are beyond float16 at first; lower factors bring them into it."""
    if not waits:
        monkeypatch.setattr("bootgrad.waiting.answers_at_once", lambda tensor: False)
    model, x, y = setting()
    strengths = {"reg1": 3e3, "reg2": 0.0, "center": center}
    expected, _ = penalty_gradient(model, losses_of(model), x, y, **strengths)
    scaler, optimizer = make_scaler(2.0**16), torch.optim.SGD(model.parameters(), lr=0.0)
    reg, factors = regularizer(model, **strengths), []
    for _ in range(40):
        optimizer.zero_grad()
        report = reg.backward(losses_of(model, torch.float16), x, y, scaler=scaler)
        factors.append(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        if report.finite:
            break
    assert 2 < len(factors) < 20 and factors[-1] == 2.0 ** (17 - len(factors))
    penalty = flat(model) - torch.cat([p.grad.flatten() for p in plain_of(model, x, y)])
    assert relative(penalty, expected) < 2e-2


def plain_of(model, x, y):
    """A copy's parameters with the plain gradient in ``.grad``."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    losses_of(twin)(x, y).mean().backward()
    return list(twin.parameters())


@pytest.mark.parametrize("center", ["zero", "batch_mean", "ema"])
def test_penalties_of_models_in_bfloat16(center):
    """Parameters, too: the gradient of the penalties is within 3e-2 of float64's on the same rounded numbers."""
    model, x, y = setting()
    model.to(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    center = {"reg1": center, "reg2": "zero"}
    x = x.bfloat16()
    expected, full = penalty_gradient(exact, losses_of(exact), x.double(), y, reg1=10.0, reg2=5.0, center=center)
    ours, report = penalty_gradient(model, losses_of(model), x, y, reg1=10.0, reg2=5.0, center=copy.deepcopy(center))
    assert relative(ours, expected) < 3e-2
    for name in ("reg1", "reg2", "covariance_trace", "sq_mean_norm"):
        assert relative(getattr(report, name), getattr(full, name)) < 3e-2
    with pytest.raises(bootgrad.BootgradError, match="finite differences need parameters in float32 or float64"):
        regularizer(model, method="finite_difference").backward(losses_of(model), x, y)


def test_only_the_forward_pass_is_cast():
    """Called inside of autocast, all comes out as it does outside, bit for bit."""
    model, x, y = setting()

    def casts(x, y):
        return F.cross_entropy(model(x).float(), y, reduction="none")

    functions = {False: losses_of(model, torch.bfloat16), True: casts}
    for options in ({"center": "ema"}, {"center": "ema", "method": "finite_difference", "epsilon": 0.02}):
        grads = []
        for inside, function in functions.items():
            reg = regularizer(model, **options)
            model.zero_grad()
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                    reg.backward(function, x, y)
            grads.append(flat(model))
        assert torch.equal(*grads)
    norms = []
    for inside in functions:
        with bootgrad.record(model) as rec:
            values = losses_of(model, torch.bfloat16)(x, y)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            norms.append(rec.per_sample_gradients(values).sq_norms())
            norms.append(rec.backward(values).sq_norms)
    assert torch.equal(norms[0], norms[2]) and torch.equal(norms[1], norms[3])


# What is not finite


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("failure", ["losses are nan", "losses are inf", "gradients overflow"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_the_scaler_skips_poisons_nothing(method, failure, waits, monkeypatch):
    if not waits:  # as on an accelerator
        monkeypatch.setattr("bootgrad.waiting.answers_at_once", lambda tensor: False)
    options = METHODS[method] | ({"epsilon": 0.02} if "differences" in method else {})
    model, x, y = setting()
    scaler, optimizer = make_scaler(), torch.optim.SGD(model.parameters(), lr=0.1)
    reg, scale = regularizer(model, {"reg1": "window", "reg2": "ema"}, **options), bootgrad.NoiseScale()
    for _ in range(2):
        optimizer.zero_grad()
        scale.update(reg.backward(losses_of(model, torch.float16), x, y, scaler=scaler))
        scaler.step(optimizer)
        scaler.update()
    before = copy.deepcopy((model.state_dict(), values_of(reg, model), scale.state_dict()))
    bad = {"losses are nan": math.nan, "losses are inf": math.inf, "gradients overflow": 1e6}[failure]

    def function(x, y):
        losses = losses_of(model, torch.float16)(x, y)
        if failure == "losses are inf":
            return losses + torch.tensor([bad] + [0.0] * (len(losses) - 1))  # their gradients are as they were
        return losses * torch.tensor([bad] + [1.0] * (len(losses) - 1))

    optimizer.zero_grad()
    report = reg.backward(function, x, y, scaler=scaler)
    assert not report.finite and not flat(model).isfinite().all()
    assert not waits or report.notes[-1] == (
        "the centers were left alone: the gradient is not finite, and the scaler skips the step"
    )
    scale.update(report)
    factor = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == factor / 2
    torch.testing.assert_close((model.state_dict(), values_of(reg, model), scale.state_dict()), before, rtol=0, atol=0)
    optimizer.zero_grad()
    report = reg.backward(losses_of(model, torch.float16), x, y, scaler=scaler)
    assert report.finite and not any("left alone" in note for note in report.notes)
    assert flat(model).isfinite().all() and reg.step == 4


def values_of(reg, model):
    parameters = dict(model.named_parameters())
    return {name: dict(c.value(parameters) or {}) for name, c in reg.centers.items()}


def test_statistics_of_losses_that_the_scaler_skips():
    model, x, y = setting()
    scaler, optimizer, average = make_scaler(), torch.optim.SGD(model.parameters(), lr=0.1), bootgrad.NoiseScale()
    for failing in (True, False):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        with bootgrad.record(model) as rec:
            values = losses_of(model, torch.float16)(x, y)
        stats = rec.backward(values * (math.inf if failing else 1.0), scaler=scaler)
        average.update(stats)
        assert bool(flat(model).isfinite().all()) is not failing
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(before[name], t) for name, t in model.state_dict().items())
        assert moved is not failing and average.steps == (not failing)
    with bootgrad.record(model) as rec:
        values = losses_of(model)(x, y) * math.nan
    with pytest.raises(bootgrad.BootgradError, match="NaN or infinite at 8 of 8"):
        rec.backward(values, scaler=make_scaler(enabled=False))


def test_nobody_waits_for_the_factor(monkeypatch):
    monkeypatch.setattr("bootgrad.waiting.answers_at_once", lambda tensor: False)
    asked = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                asked.append(func)
            return func(*args, **(kwargs or {}))

    model, x, y = setting()
    scaler, reg = make_scaler(), regularizer(model, "ema")
    for step in range(3):
        with bootgrad.record(model, check="never") as rec:
            values = losses_of(model, torch.float16)(x, y)
        if step < 2:
            reg.backward(losses_of(model, torch.float16), x, y, scaler=scaler)
            rec.backward(values, scaler=scaler)
        else:
            with Watch():
                reg.backward(losses_of(model, torch.float16), x, y, scaler=scaler)
                rec.backward(values, scaler=scaler)
    assert asked == []


# Training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_in_half_precision_follows_float32(dtype):
    """The scaler begins far too high, and skips until it fits; after as many steps taken the models are near each other."""
    model, x, y = setting(batch=32)
    twin = copy.deepcopy(model)
    scaler = make_scaler(2.0**20) if dtype is torch.float16 else None
    runs = []
    for net, precision, given in ((model, dtype, scaler), (twin, None, None)):
        optimizer, taken, skipped = torch.optim.SGD(net.parameters(), lr=0.1), 0, 0
        reg = regularizer(net, "ema", reg1=0.05)
        while taken < 12:
            optimizer.zero_grad()
            report = reg.backward(losses_of(net, precision), x, y, scaler=given)
            skipped += given is not None and not report.finite
            taken += given is None or bool(report.finite)
            if given is None:
                optimizer.step()
            else:
                given.step(optimizer)
                given.update()
        runs.append((report, skipped))
    assert runs[0][1] > 0 or scaler is None
    start = Net()
    start.load_state_dict(setting()[0].state_dict())
    moved = torch.cat([(p - q).flatten() for p, q in zip(twin.parameters(), start.parameters(), strict=True)]).detach()
    apart = torch.cat([(p - q).flatten() for p, q in zip(twin.parameters(), model.parameters(), strict=True)]).detach()
    assert float(apart.norm()) < 0.02 * float(moved.norm())
    assert relative(runs[0][0].reg1, runs[1][0].reg1) < 0.05


# What is refused, and what is warned of


def test_gradients_below_float16_are_warned_of_and_not_taken_for_coupled_samples():
    model, x, y = setting()
    reg = regularizer(model)
    with pytest.warns(bootgrad.BootgradWarning, match="so small that float16 rounds them away") as caught:
        reg.backward(losses_of(model, torch.float16, 1e-7), x, y)
    assert "linear (parameter head.0.weight, head.0.bias)" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg.backward(losses_of(model, torch.float16, 1e-7), x, y)


@pytest.mark.parametrize("call", ["record", "rows", "regularizer", "verify"])
def test_what_is_warned_of_is_warned_of_where_it_was_called(call):
    model, x, y = setting()
    loss_fn = losses_of(model, torch.float16, 1e-7)
    with bootgrad.record(model) as rec:
        losses = loss_fn(x, y)
    calls = {
        "record": lambda: rec.backward(losses),
        "rows": lambda: rec.per_sample_gradients(losses),
        "regularizer": lambda: regularizer(model).backward(loss_fn, x, y),
        "verify": lambda: bootgrad.verify(model, loss_fn, x, y),
    }
    with pytest.warns(bootgrad.BootgradWarning, match="so small that float16 rounds them away") as caught:
        calls[call]()
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("scaler", [None, make_scaler()])
def test_coupled_samples_are_found_in_float16(scaler):
    model, x, y = setting()

    def losses(x, y):
        with torch.autocast("cpu", torch.float16):
            outputs = model(x)
            outputs = outputs - outputs.mean(0)
        return F.cross_entropy(outputs.float(), y, reduction="none")

    with pytest.raises(bootgrad.BootgradError, match="samples are coupled"):
        regularizer(model).backward(losses, x, y, scaler=scaler)


def test_a_check_that_meets_no_finite_losses_is_made_up_for():
    model, x, y = setting()
    scaler, reg = make_scaler(), regularizer(model)
    reg.backward(lambda x, y: losses_of(model)(x, y) * math.nan, x, y, scaler=scaler)

    def losses(x, y):
        outputs = model(x)
        return F.cross_entropy(outputs - outputs.mean(0), y, reduction="none")

    with pytest.raises(bootgrad.BootgradError, match="samples are coupled"):
        reg.backward(losses, x, y, scaler=scaler)


def test_a_scaler_that_is_none_and_one_that_is_spent():
    model, x, y = setting()
    for scaler in (2.0, "dynamic", torch.optim.SGD(model.parameters())):
        with pytest.raises(bootgrad.BootgradError, match=r"scaler must be a torch.amp.GradScaler; got"):
            regularizer(model).backward(losses_of(model), x, y, scaler=scaler)
    with pytest.raises(bootgrad.BootgradError, match="the scaler's factor is 0.0"):
        regularizer(model).backward(losses_of(model), x, y, scaler=make_scaler(0.0))
    assert all(p.grad is None for p in model.parameters())


def test_the_shares_of_the_factor():
    """S = 2¹⁶ over 100 samples is 655.36, whose root is nearest to 32 among the powers of two."""
    scale = Scaling(make_scaler(2.0**16), torch.device("cpu")).of(torch.float16, 100)
    assert (scale.sample, scale.first, scale.to_mean, scale.to_grad) == (655.36, 32.0, 2.0**-16, 1.0)
    assert Scaling(make_scaler(8.0), torch.device("cpu")).of(torch.bfloat16, 4) == (1.0, 1.0, 0.25, 2.0)
    assert Scaling(make_scaler(8.0), torch.device("cpu")).of(None, 4) == (0.25, 1.0, 1.0, 8.0)
    assert Scaling().of(torch.float16, 4) == (1.0, 1.0, 0.25, 0.25)
