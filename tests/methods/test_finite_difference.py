"""Finite differences: their error falls with the step's length, where the model is smooth."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bootgrad

from ..layers import Uses, normal, parameter
from ..models import Convolutions, Dropout, Frozen, Norms, Residual, Tied, Unknown, Unused, loss_of, make
from .steps import CENTERS, SIGN_OPTIONS, after_one_step, data, gradient_of, losses_of, regularizer, relative, rewound

DIFFERENCES = {
    "reg1": {"reg2": 0.0},
    "reg2": {"reg1": 0.0},
    "both": {},
}


@pytest.mark.parametrize("penalties", DIFFERENCES)
@pytest.mark.parametrize("center", CENTERS)
def test_differences_tend_to_the_exact_gradient_linearly(center, penalties):
    model, x, y = data(B=6)
    options = {"center": CENTERS[center]} | DIFFERENCES[penalties]
    regs = [regularizer(model, **options)]
    epsilons = (1e-2, 1e-3, 1e-4)
    regs += [regularizer(model, method="finite_difference", epsilon=e, **options) for e in epsilons]
    for reg in regs:
        reg.backward(losses_of(model), x.flip(0), y)
    (expected, full), *others = [gradient_of(reg, losses_of(model), x, y) for reg in regs]
    errors = [relative(grad, expected) for grad, _ in others]
    assert errors[0] < 0.2
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(10, rel=0.2)
    for _, report in others:
        assert report.method == "finite_difference" and report.notes == ()
        for name in ("loss", "reg1", "reg2", "covariance_trace", "mean_sq_norm", "sq_mean_norm"):
            torch.testing.assert_close(getattr(report, name), getattr(full, name), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning", "ignore:Using padding='same'")
@pytest.mark.parametrize("kind", [Convolutions, Norms, Tied, Unknown, Frozen, Unused, Dropout])
def test_differences_on_the_models_of_the_other_tests(kind):
    model, x, target = make(kind)
    center = {"reg1": "batch_mean", "reg2": "zero"}
    grads = []
    for options in ({}, {"method": "finite_difference", "epsilon": 1e-6}):
        torch.manual_seed(1)
        model.zero_grad()
        regularizer(model, center, **options).backward(lambda x: loss_of(model(x), target), x)
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        if expected is None or name.startswith("unused"):
            assert grads[1][name] is None or not grads[1][name].any()
        else:
            assert float((grads[1][name] - expected).norm()) < 1e-3 * float(expected.norm()) + 1e-9


@pytest.mark.parametrize("center", ["batch_mean", "zero"])
def test_differences_of_one_sample(center):
    """Whose shape alone does not tell positions from the data that they are added to."""
    model, x = (
        Uses(lambda m, x: m.head(x + m.positions), positions=parameter(1, 3, 4), head=nn.Linear(4, 2)),
        normal(3, 4),
    )
    model, x = model.double(), x()[:1]

    def losses():
        return model(x).sin().sum((1, 2))

    grads = []
    for options in ({}, {"method": "finite_difference", "epsilon": 1e-6}):
        model.zero_grad()
        bootgrad.GradientRegularizer(model, reg1=0.3, center=center, **options).backward(losses)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(grads[1], grads[0]) < 1e-4


def test_differences_see_kinks_that_derivatives_do_not():
    """ReLU: a unit that changes sides in a step of 10⁻³ outweighs all else; in one of 10⁻⁴ none does."""
    model, x, target = make(Residual)
    errors = []
    for epsilon in (None, 1e-3, 1e-4):
        options = {} if epsilon is None else {"method": "finite_difference", "epsilon": epsilon}
        grad, _ = gradient_of(regularizer(model, "zero", **options), lambda x: loss_of(model(x), target), x)
        errors.append(grad)
    assert relative(errors[1], errors[0]) > 1
    assert relative(errors[2], errors[0]) < 1e-3


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("center", CENTERS)
def test_differences_on_a_fraction(subsets, center, m):
    model, x, y = data(B=4)
    subsets[:] = range(m)
    options = {"method": "finite_difference", "epsilon": 1e-6, "fraction": m / 4}
    exact, ours, states = after_one_step(model, x, y, center, **options)
    expected, full = rewound(exact, states[0], losses_of(model), x, y)
    grads = []
    for chosen in itertools.combinations(range(4), m):
        subsets[:] = chosen
        grad, report = rewound(ours, states[1], losses_of(model), x, y)
        grads.append(grad)
        for name in ("loss", "reg1", "reg2", "covariance_trace"):
            torch.testing.assert_close(getattr(report, name), getattr(full, name), rtol=1e-9, atol=1e-12)
    assert relative(torch.stack(grads).mean(0), expected) < 1e-5


def test_differences_by_leaves_outside_of_the_model():
    model, x, y = data(B=4)
    scale = torch.tensor(1.5, dtype=x.dtype, requires_grad=True)
    x.requires_grad_()
    grads = []
    for options in ({}, {"method": "finite_difference", "epsilon": 1e-6}):
        scale.grad = x.grad = None
        regularizer(model, "zero", **options).backward(
            lambda x, y: F.cross_entropy(model(x) * scale, y, reduction="none"), x, y
        )
        grads.append((scale.grad, x.grad))
    for expected, ours in zip(*grads, strict=True):
        assert relative(ours, expected) < 1e-4


def test_differences_need_the_function_and_parameters_that_can_be_moved_a_little():
    model, x, y = data(B=4)
    reg = regularizer(model, "zero", method="finite_difference")
    with reg.record():
        losses = losses_of(model)(x, y)
    with pytest.raises(bootgrad.BootgradError, match='which method="finite_difference" with fraction=1.0 runs more'):
        reg.backward(losses)
    model.half()
    for options in ({"method": "finite_difference"}, SIGN_OPTIONS["finite_difference"]):
        with pytest.raises(bootgrad.BootgradError, match="float16 for layers.0.weight, which rounds small steps away"):
            regularizer(model, "zero", **options).backward(losses_of(model), x.half(), y)
    assert reg.step == 0 and all(p.grad is None for p in model.parameters())


def test_the_default_step_is_good_in_float32():
    double, x, y = data(B=32)
    model = copy.deepcopy(double).float()
    options = {"reg2": 0.0, "method": "random_signs"}
    torch.manual_seed(0)
    expected, _ = gradient_of(regularizer(double, "zero", **options), losses_of(double), x, y)
    torch.manual_seed(0)
    reg = regularizer(model, "zero", derivative="finite_difference", **options)
    assert relative(gradient_of(reg, losses_of(model), x.float(), y)[0].double(), expected) < 3e-3


@pytest.mark.parametrize("options", [{"reg1": 0.1}, {"reg2": 0.1}], ids=str)
@pytest.mark.parametrize("method", ["finite_difference", "random_signs"])
def test_a_scalar_parameter_in_float32(method, options):
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.linear, model.scale = torch.nn.Linear(4, 3), torch.nn.Parameter(torch.tensor(1.5))
    derivative = {} if method == "finite_difference" else {"derivative": "finite_difference"}
    reg = bootgrad.GradientRegularizer(model, method=method, center="zero", **options, **derivative)
    x = torch.randn(5, 4)
    reg.backward(lambda x: (torch.tanh(model.linear(x)) * model.scale).square().sum(1), x)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
