"""What holds for the steps of all methods, and for steps between penalties."""

import copy
import math

import pytest
import torch

import bootgrad
from bootgrad.centers import Center, WindowMean

from .steps import LAMBDA2, SIGN_OPTIONS, Once, data, flat, gradient_of, losses_of, regularizer, small_model

METHODS = {
    "exact": {},
    "fraction": {"fraction": 0.5},
    "every": {"every": 2},
    "signs": {"method": "random_signs"},
    "signs by differences": {"method": "random_signs", "derivative": "finite_difference"},
    "differences": {"method": "finite_difference"},
    "differences of reg2": {"method": "finite_difference", "reg1": 0.0},
}


@pytest.mark.parametrize("method", METHODS)
def test_centers_move_as_with_the_exact_method(method):
    model, x, y = data(B=6)
    center = {"reg1": WindowMean(2), "reg2": "ema"}
    exact, ours = regularizer(model, copy.deepcopy(center)), regularizer(model, center, **METHODS[method])
    for _ in range(3):
        batch = torch.randn(6, 3, dtype=x.dtype)
        for reg in (exact, ours):
            reg.backward(losses_of(model), batch, y)
        torch.testing.assert_close(ours.state_dict()["centers"], exact.state_dict()["centers"], rtol=1e-9, atol=1e-12)


class Half(Center):
    """c = θ/2, with a graph or without, which no step is to differentiate."""

    def __init__(self, detached):
        self.detached = detached

    def value(self, parameters):
        return {name: (p.detach() if self.detached else p) / 2 for name, p in parameters.items()}


@pytest.mark.parametrize("method", [m for m in METHODS if m != "every"])
def test_a_center_with_a_graph_is_constant(method):
    model, x, y = data(B=6)
    model.unreached = torch.nn.Parameter(torch.ones(3, dtype=x.dtype))
    grads = []
    for detached in (True, False):
        torch.manual_seed(0)
        grads.append(gradient_of(regularizer(model, Half(detached), **METHODS[method]), losses_of(model), x, y)[0])
    assert torch.equal(*grads)


class Own(Exception):
    pass


@pytest.mark.parametrize("failure", ["raises", "is not finite", "changes its length"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("exact", "every", "signs")])
def test_a_step_that_fails_in_its_second_pass_changes_nothing(method, failure):
    model, x, y = data(B=6)
    calls = []

    def function(x, y):
        calls.append(len(x))
        losses = losses_of(model)(x, y)
        if len(calls) == 2:
            if failure == "raises":
                raise Own
            return losses * math.nan if failure == "is not finite" else losses[1:]
        return losses

    reg = regularizer(model, {"reg1": "window", "reg2": "ema"}, **METHODS[method])
    reg.backward(losses_of(model), x, y)
    before = copy.deepcopy((reg.state_dict(), flat(model), model.state_dict(), torch.get_rng_state()))
    with pytest.raises(Own if failure == "raises" else bootgrad.BootgradError):
        reg.backward(function, x, y)
    assert len(calls) == 2
    after = (reg.state_dict(), flat(model), model.state_dict(), torch.get_rng_state())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    first = gradient_of(reg, losses_of(model), x, y)[0]  # the step that failed, taken again
    reg.load_state_dict(before[0])
    assert torch.equal(gradient_of(reg, losses_of(model), x, y)[0], first)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_leaves_all_alone_where_nobody_waits(method, monkeypatch):
    """As on an accelerator; no step asks for a number there, and the report raises when it is read."""
    monkeypatch.setattr("bootgrad.waiting.answers_at_once", lambda tensor: False)
    asked = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                asked.append(func)
            return func(*args, **(kwargs or {}))

    model, x, y = data(B=6)
    reg = regularizer(model, "ema", **METHODS[method])
    for step in range(3):
        if step == 2:
            with Watch():
                reg.backward(losses_of(model), x, y)
        else:
            reg.backward(losses_of(model), x, y)
    assert len(asked) == (method == "differences")  # which needs its step's length as a number
    centers, before = copy.deepcopy(reg.centers["reg1"].value(dict(model.named_parameters()))), flat(model)
    report = reg.backward(lambda x, y: losses_of(model)(x, y) * math.inf, x, y)
    assert torch.equal(flat(model), before)
    torch.testing.assert_close(reg.centers["reg1"].value(dict(model.named_parameters())), centers)
    with pytest.raises(bootgrad.BootgradError, match="NaN or infinite at 6 of 6 samples"):
        report.loss  # noqa: B018


def test_a_captured_graph_would_repeat_what_was_drawn(monkeypatch):
    model, x, y = data(B=6)
    monkeypatch.setattr("bootgrad.waiting.is_capturing", lambda: True)
    for options in ({"fraction": 0.5}, {"method": "random_signs"}, {"method": "finite_difference"}):
        with pytest.raises(bootgrad.BootgradError, match="a captured graph of kernels would repeat"):
            regularizer(model, "zero", **options).backward(losses_of(model), x, y)


def test_a_center_s_derivative_refuses_what_ends_it():
    model, x = small_model(), torch.randn(5, 3, dtype=torch.float64)
    losses = lambda x: Once.apply(model(x)).sum(1)  # noqa: E731
    center = bootgrad.centers.FullBatchMean([x], losses, differentiable=True)
    reg = bootgrad.GradientRegularizer(model, reg2=0.5, center=center, method="finite_difference")
    with pytest.raises(bootgrad.BootgradError, match="once_differentiable"):
        reg.backward(losses, x[:3])


def test_steps_without_a_penalty_are_plain():
    """On the first step a moving center knows nothing, and Reg2 alone is left out."""
    model, x, y = data(B=4)
    plain = torch.autograd.grad(losses_of(model)(x, y).mean(), list(model.parameters()))
    for options in ({"method": "finite_difference"}, *SIGN_OPTIONS.values()):
        reg = regularizer(model, "ema", reg1=0.0, **options)
        grad, report = gradient_of(reg, losses_of(model), x, y)
        torch.testing.assert_close(grad, torch.cat([g.flatten() for g in plain]), rtol=1e-10, atol=1e-12)
        assert report.reg2 is None and "reg2 was left out" in report.notes[0]


def test_a_strength_of_zero_makes_a_plain_step():
    model, x = small_model(), torch.randn(5, 3, dtype=torch.float64)
    reg = bootgrad.GradientRegularizer(model, reg1=lambda step: 0.0 if step == 0 else 0.1)
    losses = lambda x: model(x).square().sum(1)  # noqa: E731
    assert [reg.backward(losses, x).method for _ in range(2)] == ["plain", "exact"]


@pytest.mark.parametrize("method", ["exact", "random_signs"])
def test_penalties_on_every_third_step(method):
    model, x, y = data(B=6)
    asked = []

    def strength(step):
        asked.append(step)
        return 0.1 * (1 + step)

    reg = regularizer(model, "ema", reg1=strength, every=3, method=method)
    twin = regularizer(model, "ema", reg1=lambda step: 3 * 0.1 * (1 + step), reg2=3 * LAMBDA2, method=method)
    if method == "random_signs":
        twin.load_state_dict(reg.state_dict())
    for step in range(5):
        batch = torch.randn(6, 3, dtype=x.dtype)
        expected, full = gradient_of(twin, losses_of(model), batch, y)
        grad, report = gradient_of(reg, losses_of(model), batch, y)
        torch.testing.assert_close(report.loss, full.loss)
        torch.testing.assert_close(report.reg2, full.reg2)
        if step % 3:
            assert report.method == "plain" and asked[-1] == step
            plain = torch.autograd.grad(losses_of(model)(batch, y).mean(), list(model.parameters()))
            torch.testing.assert_close(grad, torch.cat([g.flatten() for g in plain]), rtol=1e-10, atol=1e-12)
        else:
            assert report.method == method
            torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)
        if method == "exact":
            torch.testing.assert_close(report.reg1, full.reg1, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(report.covariance_trace, full.covariance_trace, rtol=1e-9, atol=1e-12)
        elif step % 3:
            assert math.isnan(report.reg1) and math.isnan(report.noise_scale)
        torch.testing.assert_close(reg.state_dict()["centers"], twin.state_dict()["centers"], rtol=1e-9, atol=1e-12)
    assert reg.step == 5


def test_an_unknown_trace_is_left_out_of_the_noise_scale():
    model, x = small_model(), torch.randn(5, 3, dtype=torch.float64)
    reg = bootgrad.GradientRegularizer(model, reg1=0.1, method="random_signs", every=2)
    scale = bootgrad.NoiseScale()
    for _ in range(4):
        scale.update(reg.backward(lambda x: model(x).square().sum(1), x))
    assert scale.steps == 2 and scale.value == scale.value
