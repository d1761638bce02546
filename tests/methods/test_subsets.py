"""Penalties on a fraction of the batch: averages over all subsets equal the exact gradient."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import bootgrad
from bootgrad.centers import FullBatchMean

from .steps import (
    CENTERS,
    SIGN_OPTIONS,
    after_one_step,
    data,
    gradient_of,
    losses_of,
    regularizer,
    relative,
    rewound,
    small_model,
)


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("m", [1, 2, 4])
def test_fractions_averaged_over_all_subsets_are_exact(subsets, center, m):
    model, x, y = data(B=5)
    subsets[:] = range(m)
    exact, part, states = after_one_step(model, x, y, center, fraction=m / 5)
    expected, full = rewound(exact, states[0], losses_of(model), x, y)
    grads = []
    for chosen in itertools.combinations(range(5), m):
        subsets[:] = chosen
        grad, report = rewound(part, states[1], losses_of(model), x, y)
        grads.append(grad)
        assert report.method == "exact" and report.notes == (f"the penalties were taken on {m} of 5 samples",)
        for name in ("loss", "reg1", "reg2", "covariance_trace", "mean_sq_norm", "sq_mean_norm", "batch_size"):
            torch.testing.assert_close(getattr(report, name), getattr(full, name), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.stack(grads).mean(0), expected, rtol=1e-10, atol=1e-10)
    assert float(torch.stack(grads).std(0).norm()) > 1e-3 * float(expected.norm())


def test_a_fraction_with_a_differentiable_center(subsets):
    model, x, y = data(B=4)
    loss_fn = losses_of(model)
    center = {"reg1": FullBatchMean([(x, y.flip(0))], loss_fn, differentiable=True)}
    center["reg2"] = center["reg1"]
    expected, _ = gradient_of(regularizer(model, center), loss_fn, x, y)
    part, grads = regularizer(model, center, fraction=0.5), []
    for chosen in itertools.combinations(range(4), 2):
        subsets[:] = chosen
        grads.append(gradient_of(part, loss_fn, x, y)[0])
    torch.testing.assert_close(torch.stack(grads).mean(0), expected, rtol=1e-10, atol=1e-10)


def test_samples_are_drawn_anew_in_each_step_and_alike_from_one_seed():
    model, x, y = data(B=8)
    seen = []

    def function(x, extra, scale):
        seen.append(extra["index"].tolist())
        return F.cross_entropy(model(x) * scale, extra["y"], reduction="none")

    extra = {"y": y, "index": torch.arange(8)}
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        reg, seen = regularizer(model, "zero", fraction=0.3), []
        for _ in range(6):
            reg.backward(function, x, extra, torch.tensor(2.0))
        runs.append(seen)
    assert runs[0] == runs[1]
    for others, chosen in zip(runs[0][::2], runs[0][1::2], strict=True):
        assert len(chosen) == 2 and sorted(others + chosen) == list(range(8))
    assert len({tuple(chosen) for chosen in runs[0][1::2]}) > 2


def test_a_fraction_that_rounds_to_all_is_the_whole_batch():
    model, x, y = data(B=4)
    expected, _ = gradient_of(regularizer(model, "zero"), losses_of(model), x, y)
    grad, report = gradient_of(regularizer(model, "zero", fraction=0.99), losses_of(model), x, y)
    assert torch.equal(grad, expected) and report.notes == ()


def test_fractions_need_batches_that_can_be_taken_apart():
    model, x, y = data(B=4)
    reg = regularizer(model, "zero", fraction=0.5)
    with pytest.raises(bootgrad.BootgradError, match="batch without tensors"):
        reg.backward(lambda: losses_of(model)(x, y))
    with pytest.raises(bootgrad.BootgradError, match=r"losses of 2 samples must have shape \(2,\); got \(4,\)"):
        reg.backward(lambda x_: losses_of(model)(x, y), x)
    with reg.record():
        losses = losses_of(model)(x, y)
    with pytest.raises(bootgrad.BootgradError, match="given the function that computes the losses"):
        reg.backward(losses)
    assert reg.step == 0 and all(p.grad is None for p in model.parameters())


def test_two_samples_are_not_parted():
    """One alone would hide that they are coupled."""
    model, x = small_model(), torch.randn(2, 3, dtype=torch.float64)
    reg = bootgrad.GradientRegularizer(model, reg1=0.1, fraction=0.5)
    with pytest.raises(bootgrad.BootgradError, match="samples are coupled"):
        reg.backward(lambda x: (model(x) - 0.5 * model(x).mean(0)).square().sum(1), x)


def test_inputs_may_be_leaves_and_not_have_graphs():
    model, x, y = data(B=4)
    x.requires_grad_()
    plain = torch.autograd.grad(losses_of(model)(x, y).mean(), x)[0]
    for options in ({"fraction": 0.5}, {"method": "finite_difference"}, SIGN_OPTIONS["finite_difference"]):
        x.grad = None
        reg = regularizer(model, "zero", reg1=1e-9, reg2=0.0, **options)
        reg.backward(losses_of(model), x, y)
        assert relative(x.grad, plain) < 1e-6
        with pytest.raises(bootgrad.BootgradError, match="the result of MulBackward0, whose graph is gone"):
            reg.backward(losses_of(model), x * 2, y)
        assert reg.step == 1


@pytest.mark.parametrize("options", [dict(method="finite_difference"), dict(fraction=0.5)])
def test_a_function_that_changes_its_batch_is_not_run_again(options):
    model, x, scale = small_model(), torch.randn(6, 3, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    reg = bootgrad.GradientRegularizer(model, reg2=0.1, center="zero", **options)
    with pytest.raises(bootgrad.BootgradError, match="changed a tensor of its batch in place"):
        reg.backward(lambda x, s: model(x * s.add_(1)).square().sum(1), x, scale)
    assert all(p.grad is None for p in model.parameters()) and reg.step == 0
