"""Random signs: averages over all vectors equal the exact gradient, with the documented variance and price."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bootgrad

from ..models import Dropout, Residual, Tied, Unused, loss_of, make
from .steps import (
    CENTERS,
    LAMBDA1,
    LAMBDA2,
    SIGN_OPTIONS,
    TOLERANCE,
    Once,
    after_one_step,
    data,
    explicit_signs,
    gradient_of,
    losses_of,
    regularizer,
    rewound,
    rows_of,
    small_model,
)


@pytest.mark.parametrize("derivative", SIGN_OPTIONS)
@pytest.mark.parametrize("center", CENTERS)
def test_signs_averaged_over_all_vectors_are_exact(signs, center, derivative):
    model, x, y = data(B=4)
    signs[:] = [[1, 1, -1, 1]]
    exact, ours, states = after_one_step(model, x, y, center, **SIGN_OPTIONS[derivative])
    expected, full = rewound(exact, states[0], losses_of(model), x, y)
    results = []
    for v in itertools.product([1, -1], repeat=4):
        signs[:] = [list(v)]
        results.append(rewound(ours, states[1], losses_of(model), x, y))
    mean = torch.stack([grad for grad, _ in results]).mean(0)
    torch.testing.assert_close(mean, expected, rtol=TOLERANCE[derivative], atol=TOLERANCE[derivative])
    for name in ("reg1", "covariance_trace", "mean_sq_norm"):
        values = torch.stack([getattr(report, name) for _, report in results])
        torch.testing.assert_close(values.mean(), getattr(full, name), rtol=1e-10, atol=1e-12)
        assert float(values.std()) > 1e-3
    for _, report in results:
        assert report.method == "random_signs" and "estimates from 1 random sign" in report.notes[0]
        torch.testing.assert_close(
            [report.loss, report.reg2, report.sq_mean_norm], [full.loss, full.reg2, full.sq_mean_norm]
        )


@pytest.mark.parametrize("derivative", SIGN_OPTIONS)
@pytest.mark.parametrize("center", ["batch_mean", "ema"])
def test_signs_on_a_fraction_averaged_over_all_of_both_are_exact(subsets, signs, center, derivative):
    model, x, y = data(B=4)
    subsets[:], signs[:] = [0, 1], [[1, -1]]
    exact, ours, states = after_one_step(model, x, y, center, fraction=0.5, **SIGN_OPTIONS[derivative])
    expected, full = rewound(exact, states[0], losses_of(model), x, y)
    results = []
    for chosen in itertools.combinations(range(4), 2):
        for v in itertools.product([1, -1], repeat=2):
            subsets[:], signs[:] = chosen, [list(v)]
            results.append(rewound(ours, states[1], losses_of(model), x, y))
    mean = torch.stack([grad for grad, _ in results]).mean(0)
    torch.testing.assert_close(mean, expected, rtol=TOLERANCE[derivative], atol=TOLERANCE[derivative])
    for name in ("reg1", "covariance_trace"):
        values = torch.stack([getattr(report, name) for _, report in results])
        torch.testing.assert_close(values.mean(), getattr(full, name), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("derivative", SIGN_OPTIONS)
@pytest.mark.parametrize("kind", [Residual, Tied, Unused, Dropout])
def test_two_probes_against_the_formula(signs, kind, derivative):
    """On the models of the other tests; dropout's masks are those of one pass."""
    model, x, target = make(kind)
    parameters = [p for name, p in model.named_parameters() if not name.startswith("unused")]
    vectors = [[1, -1, -1, 1], [-1, -1, 1, -1]]
    torch.manual_seed(1)
    losses = loss_of(model(x), target)
    P = sum(p.numel() for p in parameters)
    weights = torch.tensor(vectors, dtype=x.dtype)
    expected, estimate = explicit_signs(losses, parameters, weights, torch.zeros(P), torch.zeros(P))
    signs[:] = copy.deepcopy(vectors)
    reg = regularizer(model, "zero", probes=2, **SIGN_OPTIONS[derivative])
    torch.manual_seed(1)
    report = reg.backward(lambda x: loss_of(model(x), target), x)
    grad = torch.cat([p.grad.flatten() for p in parameters])
    error = float((grad - expected).norm() / expected.norm())
    assert error < (1e-10 if derivative == "exact" else 1e-5)
    torch.testing.assert_close(report.reg1, estimate, rtol=1e-10, atol=1e-12)


def test_signs_are_unbiased_through_the_public_interface():
    """z-tests of Reg1, Γ and the gradient along the exact one; all three pass with probability 1 − 10⁻⁶.

    Two-sided, a normal deviate of 5.1 has 3.4·10⁻⁷; means of 600 steps are normal enough for that.
    """
    model, x, y = data(B=8)
    options = {"reg2": 0.0, "reg1": 1.0}
    exact, full = gradient_of(regularizer(model, "zero", **options), losses_of(model), x, y)
    plain, _ = gradient_of(regularizer(model, "zero", reg1=1e-300), losses_of(model), x, y)
    torch.manual_seed(11)
    reg = regularizer(model, "zero", method="random_signs", **options)
    direction = (exact - plain) / (exact - plain).norm()
    samples = []
    for _ in range(600):
        grad, report = gradient_of(reg, losses_of(model), x, y)
        samples.append(torch.stack([report.reg1, report.covariance_trace, (grad - plain) @ direction]))
    samples = torch.stack(samples)
    expected = torch.stack([full.reg1, full.covariance_trace, (exact - plain).norm()])
    z = (samples.mean(0) - expected) / (samples.std(0) / 600**0.5)
    assert float(z.abs().max()) < 5.1
    assert float((samples.std(0) / expected).min()) > 0.05


def test_the_variance_of_reg1_is_the_documented_one(signs):
    model, x, y = data(B=4)
    G = rows_of(losses_of(model)(x, y), list(model.parameters())).detach()
    inner = (G @ G.T).fill_diagonal_(0)
    reg, values = regularizer(model, "zero", method="random_signs"), []
    for v in itertools.product([1, -1], repeat=4):
        signs[:] = [list(v)]
        values.append(reg.backward(losses_of(model), x, y).reg1)
    expected = 2 / 16 * inner.square().sum()
    torch.testing.assert_close(torch.stack(values).var(unbiased=False), expected, rtol=1e-10, atol=1e-12)


def test_signs_go_on_from_a_state_and_are_alike_from_one_seed():
    model, x, y = data(B=6)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        reg = regularizer(model, "ema", method="random_signs", fraction=0.7)
        runs.append([gradient_of(reg, losses_of(model), x, y)[0] for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)) and not torch.equal(runs[0][1], runs[0][2])
    torch.manual_seed(3)
    reg = regularizer(model, "ema", method="random_signs", fraction=0.7)
    reg.backward(losses_of(model), x, y)
    torch.manual_seed(4)
    other = regularizer(model, "ema", method="random_signs", fraction=0.7)
    other.load_state_dict(copy.deepcopy(reg.state_dict()))
    assert torch.equal(gradient_of(other, losses_of(model), x, y)[0], runs[0][1])
    without = regularizer(model, "ema").state_dict()
    with pytest.raises(bootgrad.BootgradError, match="not a state_dict.*: it lacks 'seed', the whole number that"):
        other.load_state_dict(without)
    assert other.step == 2
    drawn = []
    for seed in (reg.state_dict()["seed"], 0):
        other.load_state_dict(without | {"seed": seed})
        drawn.append(gradient_of(other, losses_of(model), x, y)[0])
    assert torch.equal(drawn[0], runs[0][0]) and not torch.equal(drawn[0], drawn[1])


def test_losses_that_were_computed_already_and_leaves_outside_of_the_model(signs):
    model, x, y = data(B=4)
    scale = torch.tensor(1.5, dtype=x.dtype, requires_grad=True)
    leaves = [*model.parameters(), scale]
    v = [1, -1, 1, 1]

    def function(x, y):
        return F.cross_entropy(model(x) * scale, y, reduction="none")

    losses = function(x, y)
    G = rows_of(losses, list(model.parameters()))
    d = torch.tensor(v, dtype=x.dtype) @ G
    total = losses.mean() + LAMBDA1 * d.square().sum() / 4 + LAMBDA2 * G.mean(0).square().sum()
    expected = torch.autograd.grad(total, leaves)
    for options, tolerance in ((SIGN_OPTIONS["exact"], 1e-10), (SIGN_OPTIONS["finite_difference"], 1e-5)):
        for form in ("closure", "record") if tolerance == 1e-10 else ("closure",):
            reg = regularizer(model, "zero", **options)
            signs[:] = [v]
            for leaf in leaves:
                leaf.grad = torch.ones_like(leaf)
            if form == "closure":
                reg.backward(function, x, y)
            else:
                with reg.record():
                    losses = function(x, y)
                reg.backward(losses)
                with pytest.raises(bootgrad.BootgradError, match="nothing was recorded"):
                    reg.backward(losses)
            for leaf, e in zip(leaves, expected, strict=True):
                torch.testing.assert_close(leaf.grad, 1 + e, rtol=tolerance, atol=tolerance)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts products of matrices, in entries of their left factor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.count += args[-2].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "units"),
    [
        ({"reg2": 0.0}, 8),
        ({"reg2": 0.0, "probes": 3}, 18),
        ({"reg2": 0.0, "fraction": 0.25}, 3 + (8 - 3) / 4),
        ({"reg1": 0.0}, 6),
        ({}, 11),
        ({"reg2": 0.0, "derivative": "exact"}, 11),
    ],
)
def test_the_price_is_the_documented_one(options, units):
    """In forward-sized products; by double backward at most, for the last layers' first derivatives are not differentiated."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.Tanh())))
    x, y = torch.randn(16, 16, requires_grad=True), torch.randn(16, 16)

    def function(x, y):
        return (model(x) - y).square().sum(1)

    reg = regularizer(model, "zero", **{"method": "random_signs", "derivative": "finite_difference"} | options)
    with Products() as plain:
        function(x, y).mean().backward()
    with Products() as ours:
        reg.backward(function, x, y)
    ratio = 3 * ours.count / plain.count
    assert units - 0.5 < ratio <= units if options.get("derivative") else ratio == pytest.approx(units)


@pytest.mark.parametrize("options", [dict(reg1=0.1), dict(reg2=0.1, center="zero")])
def test_signs_refuse_what_ends_a_derivative(options):
    model, x = small_model(), torch.randn(5, 3, dtype=torch.float64)
    reg = bootgrad.GradientRegularizer(model, method="random_signs", **options)
    with pytest.raises(bootgrad.BootgradError, match="once_differentiable"):
        reg.backward(lambda x: Once.apply(model(x)).sum(1), x)
    assert all(p.grad is None for p in model.parameters())
