"""Whole models in lower precision against the float64 oracle, and where digits are easily lost."""

import copy

import pytest
import torch
from torch import nn

import bootgrad
from bootgrad import centers, reference
from bootgrad.rules.stand_ins import StandIns

from .models import SHAPES, DerivedWeights, Unknown, loss_of, make

pytestmark = pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning", "ignore:Using padding='same' with even")


@pytest.mark.parametrize("kind", [k for k in SHAPES if k not in (DerivedWeights, Unknown)], ids=lambda k: k.__name__)
def test_float32(kind):
    """Relative errors of 1e-5, forward and backward pass of the model included, and of 1e-4 after a double backward pass."""
    model, x, target = make(kind)
    single = copy.deepcopy(model).float()
    torch.manual_seed(7)
    with StandIns():  # torch's own bags of embeddings have no second derivative
        losses = loss_of(model(x), target)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = reference.per_sample_gradients_of(losses, parameters, create_graph=True)
    G = torch.cat([r.reshape(len(x), -1) for r in rows.values()], 1)
    trace = (G - G.mean(0)).square().sum(1).mean()
    expected = torch.autograd.grad(trace, list(parameters.values()), allow_unused=True)
    torch.manual_seed(7)
    with bootgrad.record(single) as rec:
        losses = loss_of(single(x.float() if x.is_floating_point() else x), target.float())
    stats = rec.backward(losses, retain_graph=True)
    torch.testing.assert_close(stats.sq_norms.double(), G.square().sum(1).detach(), rtol=1e-5, atol=0)
    single.zero_grad()
    reg = bootgrad.reg1(rec.per_sample_gradients(losses, create_graph=True))
    torch.testing.assert_close(reg.double(), trace, rtol=1e-5, atol=0, check_dtype=False)
    reg.backward()
    scale = max(float(e.norm()) for e in expected if e is not None)
    for p, e in zip((p for p in single.parameters() if p.requires_grad), expected, strict=True):
        error = 0.0 if e is None else float((p.grad.double() - e).norm())
        assert error <= 1e-4 * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_statistics(dtype):
    """Against plain autograd of the same half-precision model: what is compared is our accumulation, not theirs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 5)).to(dtype)
    x, target = torch.randn(6, 2, 8, 8, dtype=dtype), torch.randn(6, 5, dtype=dtype)
    losses = loss_of(model(x), target)
    rows = reference.per_sample_gradients_of(losses, dict(model.named_parameters()))
    G = torch.cat([r.reshape(6, -1) for r in rows.values()], 1).double()
    with bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    stats = rec.backward(losses)
    assert stats.sq_norms.dtype == torch.float32
    # The oracle's gradients are rounded to 8 bits, which squaring doubles.
    torch.testing.assert_close(stats.sq_norms.double(), G.square().sum(1), rtol=3e-2, atol=0)
    assert all(p.grad.dtype == dtype for p in model.parameters())


class Transposed(nn.Module):
    """y = x W."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(128, 6))

    def forward(self, x):
        return x.flatten(1) @ self.weight


AGREEING = {  # by the direct path, and by rank one
    "convolution": lambda: nn.Conv2d(2, 3, 3, bias=False),
    "perceptron": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 5)),
    "transposed": Transposed,
}


@pytest.mark.parametrize("kind", AGREEING)
def test_samples_that_nearly_agree(kind):
    """Γ is 1e-8 of ‖ḡ‖²: lost in s_i − ‖ḡ‖² in float32, kept about a center."""
    torch.manual_seed(0)
    model = AGREEING[kind]()
    x = torch.randn(1, 2, 8, 8) + 3e-5 * torch.randn(16, 2, 8, 8)
    double = copy.deepcopy(model).double()

    def losses_of(model, x):
        return model(x).square().flatten(1).sum(1)

    rows = reference.per_sample_gradients_of(losses_of(double, x.double()), dict(double.named_parameters()))
    G = reference.matrix(rows)
    exact = (G - G.mean(0)).square().sum(1).mean()
    assert exact < 1e-7 * G.mean(0).square().sum()
    with bootgrad.record(model) as rec:
        losses = losses_of(model, x)
    center = {name: r[0].float() for name, r in rows.items()}
    matrix = rec.per_sample_gradients(losses)
    assert float(matrix.covariance_trace()) == pytest.approx(float(exact), rel=0.05)
    stats = rec.backward(losses, center=center)
    assert float(stats.covariance_trace) == pytest.approx(float(exact), rel=0.05)
    report = bootgrad.GradientRegularizer(model, reg1=0.1, center=center).backward(lambda x: losses_of(model, x), x)
    own = sum((r - r[:1].float().double()).flatten(1).square().sum(1).mean() for r in rows.values())
    assert float(report.reg1) == pytest.approx(float(own), rel=0.05)


def test_near_interpolation():
    """Γ ≫ ‖ḡ‖²: the trace is kept, and the noise scale grows without bound instead of failing."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    x = torch.randn(8, 4)
    x = torch.cat([x, -x])  # gradients in pairs that cancel
    with bootgrad.record(model) as rec:
        losses = (model(x) * torch.ones(16, 1)).sum(1)
    stats = rec.backward(losses)
    assert float(stats.covariance_trace) == pytest.approx(float(x.square().sum(1).mean()), rel=1e-5)
    assert float(stats.noise_scale) > 1e6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "kind", [lambda: centers.EmaMean(0.999), lambda: centers.WindowMean(3000)], ids=["ema", "window"]
)
def test_averages_do_not_stagnate(kind, dtype):
    """The mean of 3000 times one is one: in bfloat16, the moving average comes to rest at 0.26."""
    center, ones = kind(), {"w": torch.ones(3, dtype=dtype)}
    for _ in range(3000):
        center.update(ones)
    restored = kind()
    restored.load_state_dict(center.state_dict())
    for c in (center, restored):
        torch.testing.assert_close(c.value(ones)["w"].float(), torch.ones(3), rtol=1e-4, atol=0)


def test_a_full_batch_mean_does_not_stagnate():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    batch = torch.ones(1, 1, dtype=torch.bfloat16)
    center = centers.FullBatchMean([batch] * 1000, lambda x: model(x).sum(1))
    assert float(center.value(dict(model.named_parameters()))["weight"]) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("center", ["ema", "window", "zero"])
def test_half_precision_training_with_centers(center):
    """Centers are float32 about gradients that are not; Reg1 and Reg2 follow, and ``.grad`` keeps its dtype."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5))
    model.to(torch.bfloat16)
    double = copy.deepcopy(model).double()
    reg = bootgrad.GradientRegularizer(model, reg1=0.01, reg2=0.02, center=center)
    exact = bootgrad.GradientRegularizer(double, reg1=0.01, reg2=0.02, center=center)
    for _ in range(3):
        x, target = torch.randn(6, 2, 8, 8).bfloat16(), torch.randn(6, 5).bfloat16()
        report = reg.backward(lambda x, t: loss_of(model(x), t), x, target)
        expected = exact.backward(lambda x, t: loss_of(double(x), t), x.double(), target.double())
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    for name in ("reg1", "reg2", "covariance_trace", "sq_mean_norm"):
        assert float(getattr(report, name)) == pytest.approx(float(getattr(expected, name)), rel=5e-2)


@pytest.mark.parametrize("factor", [1e3, 1e4])
def test_a_far_center_does_not_hide_the_covariance(factor):
    """‖ḡ − c‖² is up to 1e8 times Γ: Γ is taken about zero, where ḡ is nearer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, target = torch.randn(16, 6), torch.randn(16, 3)
    double = copy.deepcopy(model).double()
    rows = reference.per_sample_gradients_of(
        loss_of(double(x.double()), target.double()), dict(double.named_parameters())
    )
    G = torch.cat([r.flatten(1) for r in rows.values()], 1)
    exact = float((G - G.mean(0)).square().sum(1).mean())
    center = {name: (factor * r.mean(0)).float() for name, r in rows.items()}
    with bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    stats = rec.backward(losses, center=center)
    assert float(stats.covariance_trace) == pytest.approx(exact, rel=1e-4)
    assert float(stats.reg1) == pytest.approx(float(stats.reg2), rel=1e-4)
    for name, moments in stats.per_parameter.items():
        own = rows[name].flatten(1)
        expected = float((own - own.mean(0)).square().sum(1).mean())
        assert float(moments.covariance_trace) == pytest.approx(expected, rel=1e-4)
    for reg1 in (0.0, 1e-9):
        reg = bootgrad.GradientRegularizer(model, reg1=reg1, reg2=1e-9, center=center)
        report = reg.backward(lambda: loss_of(model(x), target))
        assert float(report.covariance_trace) == pytest.approx(exact, rel=1e-4)
        assert float(report.mean_sq_norm) == pytest.approx(float(G.square().sum(1).mean()), rel=1e-4)
