"""Estimators of the penalties' gradient: averages over everything that is drawn equal the exact gradient."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bootgrad
from bootgrad.centers import FullBatchMean, WindowMean

from .models import Convolutions, Dropout, Frozen, Norms, Residual, Tied, Unknown, Unused, loss_of, make

LAMBDA1, LAMBDA2 = 0.3, 0.7
CENTERS = {
    "batch_mean": {"reg1": "batch_mean", "reg2": "zero"},
    "zero": "zero",
    "ema": "ema",
    "window": {"reg1": "window", "reg2": "ema"},
}


class Smooth(nn.Module):
    """Two layers, (B, 3) → (B, 2)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        return self.layers(x)


def data(B=4, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return Smooth().to(dtype), torch.randn(B, 3).to(dtype), torch.randint(0, 2, (B,))


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def regularizer(model, center="batch_mean", **options):
    settings = {"reg1": LAMBDA1, "reg2": LAMBDA2, "center": center} | options
    return bootgrad.GradientRegularizer(model, **settings)


def gradient_of(reg, function, *batch):
    """The gradient that one step adds, (P,), and its report; ``.grad`` is cleared before."""
    reg.model.zero_grad()
    report = reg.backward(function, *batch)
    return flat(reg.model), report


def flat(model):
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


def rewound(reg, state, function, *batch):
    """As `gradient_of`, with the regularizer's state as it was."""
    reg.load_state_dict(copy.deepcopy(state))
    return gradient_of(reg, function, *batch)


def rows_of(losses, parameters):
    """The per-sample gradients, (B, P), with their graph."""
    return torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(ell, parameters, create_graph=True)]) for ell in losses]
    )


def explicit_signs(losses, parameters, weights, c1, c2):
    """∇ of L + λ₁ mean_p (1/B) ‖Σ w_i (g_i − c₁)‖² + λ₂ ‖ḡ − c₂‖², from rows."""
    G = rows_of(losses, parameters)
    estimate = torch.stack([(w @ (G - c1)).square().sum() for w in weights]).mean() / len(losses)
    total = losses.mean() + LAMBDA1 * estimate + LAMBDA2 * (G.mean(0) - c2).square().sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)]), estimate.detach()


def relative(a, b):
    return float((a - b).norm() / b.norm())


def after_one_step(model, x, y, center, **options):
    """An exact regularizer and another, whose moving centers know the same past, and their states."""
    center = CENTERS[center]
    exact, other = regularizer(model, center), regularizer(model, center, **options)
    for reg in (exact, other):
        reg.backward(losses_of(model), x.flip(0), y)
    torch.testing.assert_close(exact.state_dict()["centers"], other.state_dict()["centers"], rtol=1e-9, atol=1e-12)
    return exact, other, (exact.state_dict(), other.state_dict())


# Fractions


@pytest.fixture
def subsets(monkeypatch):
    """The samples that the next step is to take."""
    chosen = []

    def draw(batch, fraction, generator):
        B = len(batch[0])
        return torch.tensor(chosen), torch.tensor([i for i in range(B) if i not in chosen])

    monkeypatch.setattr("bootgrad.regularizers.draw", draw)
    return chosen


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


# Every k-th step


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


# Random signs


@pytest.fixture
def signs(monkeypatch):
    """The signs that the next probes are to take, in turn."""
    given = []
    monkeypatch.setattr("bootgrad.methods.random_signs.draw_signs", lambda m, generator: torch.tensor(given.pop(0)))
    return given


SIGN_OPTIONS = {
    "exact": {"method": "random_signs"},
    "finite_difference": {"method": "random_signs", "derivative": "finite_difference", "epsilon": 1e-6},
}
TOLERANCE = {"exact": 1e-10, "finite_difference": 1e-5}  # of the differences: epsilon, and rounding over it


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
    with pytest.raises(bootgrad.BootgradError, match="not a state_dict.*'seed'"):
        other.load_state_dict(regularizer(model, "ema").state_dict())
    assert other.step == 2


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


# Architectures without per-layer rules


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x.view(len(x), 1, 3).expand(-1, 5, -1) * torch.arange(1, 6).view(5, 1))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 12), nn.Linear(4, 2)

    def forward(self, x):
        q, k, v = self.inner(x.unsqueeze(1) * torch.arange(1, 6).view(5, 1)).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.inner, self.reentrant = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), reentrant
        self.head = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def block(self, x):
        self.calls += 1
        return self.inner(F.dropout(x, 0.3))

    def forward(self, x):
        x = self.first(x)
        x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(x)


def batch_of(model, B=4):
    torch.manual_seed(0)
    return torch.randn(B, 3).double(), torch.randint(0, 2, (B,))


def test_fused_recurrent_layers(signs):
    torch.manual_seed(0)
    model = Recurrent().double()
    x, y = batch_of(model)
    v = [1, 1, -1, 1]
    P = sum(p.numel() for p in model.parameters())
    zero = torch.zeros(P)
    weights = torch.tensor([v], dtype=x.dtype)
    expected, _ = explicit_signs(losses_of(model)(x, y), list(model.parameters()), weights, zero, zero)
    with pytest.raises(bootgrad.BootgradError, match="lstm"):
        regularizer(model, "zero").backward(losses_of(model), x, y)
    for derivative, options in SIGN_OPTIONS.items():
        signs[:] = [v]
        grad, _ = gradient_of(regularizer(model, "zero", **options), losses_of(model), x, y)
        assert relative(grad, expected) < 10 * TOLERANCE[derivative]


def test_fused_attention_by_first_order_passes(signs):
    torch.manual_seed(0)
    model = Attention().double()
    x, y = batch_of(model)
    v = [1, 1, -1, 1]
    weights = torch.tensor([v], dtype=x.dtype)
    zero = torch.zeros(sum(p.numel() for p in model.parameters()))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected, _ = explicit_signs(losses_of(model)(x, y), list(model.parameters()), weights, zero, zero)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        for options in ({}, {"method": "auto"}, {"method": "random_signs"}):
            signs[:] = [v]
            with pytest.raises(bootgrad.BootgradError, match='no second derivative.*derivative="finite_difference"'):
                regularizer(model, "zero", **options).backward(losses_of(model), x, y)
            assert all(p.grad is None for p in model.parameters())
        signs[:] = [v]
        grad, _ = gradient_of(regularizer(model, "zero", **SIGN_OPTIONS["finite_difference"]), losses_of(model), x, y)
    assert relative(grad, expected) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts(signs, reentrant):
    torch.manual_seed(0)
    model, plain = Checkpointed(reentrant).double(), Checkpointed(None).double()
    plain.load_state_dict(model.state_dict())
    x, y = batch_of(model)
    x.requires_grad_()
    vectors = [[1, 1, -1, 1], [1, -1, -1, 1]]
    zero = torch.zeros(sum(p.numel() for p in model.parameters()))
    torch.manual_seed(1)
    weights = torch.tensor(vectors, dtype=x.dtype)
    expected, _ = explicit_signs(losses_of(plain)(x, y), list(plain.parameters()), weights, zero, zero)
    after = torch.get_rng_state()
    options = {"probes": 2} | SIGN_OPTIONS["finite_difference"]
    hooked = []
    model.head.bias.register_post_accumulate_grad_hook(lambda p: hooked.append(p.grad.clone()))
    reg = regularizer(model, "zero", **options)
    signs[:] = copy.deepcopy(vectors)
    torch.manual_seed(1)
    held = torch.ones_like(model.head.bias)
    model.head.bias.grad = held
    reg.backward(losses_of(model), x, y)
    assert torch.equal(torch.get_rng_state(), after)
    assert model.calls == 2  # the forward pass, and the backward pass's own run
    assert model.head.bias.grad is held and len(hooked) == 1 and torch.equal(hooked[0], held)
    held -= 1
    torch.testing.assert_close(flat(model), expected, rtol=1e-5, atol=1e-5)
    assert float(x.grad.norm()) > 0
    signs[:] = copy.deepcopy(vectors)
    exact = regularizer(model, "zero", method="random_signs", probes=2)
    if reentrant:
        before = flat(model)
        with pytest.raises(bootgrad.BootgradError, match="reentrant checkpointing has no second derivative"):
            exact.backward(losses_of(model), x, y)
        assert torch.equal(flat(model), before) and exact.step == 0
    else:
        torch.manual_seed(1)
        grad, _ = gradient_of(exact, losses_of(model), x, y)
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)


def test_compiled_models(signs):
    model, x, y = data(B=4)
    compiled = torch.compile(model, backend="aot_eager")
    vectors = [[1, 1, -1, 1], [1, -1, -1, 1]]
    zero = torch.zeros(sum(p.numel() for p in model.parameters()))
    weights = torch.tensor(vectors, dtype=x.dtype)
    expected, _ = explicit_signs(losses_of(model)(x, y), list(model.parameters()), weights, zero, zero)
    signs[:] = copy.deepcopy(vectors)
    options = {"probes": 2} | SIGN_OPTIONS["finite_difference"]
    reg = regularizer(compiled, "zero", **options)
    grad, _ = gradient_of(reg, losses_of(compiled), x, y)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
    signs[:] = copy.deepcopy(vectors)
    model.zero_grad()
    with pytest.raises(bootgrad.BootgradError, match="a compiled model has no second derivative"):
        regularizer(compiled, "zero", method="random_signs").backward(losses_of(compiled), x, y)
    assert all(p.grad is None for p in model.parameters())


# Finite differences


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


def test_steps_without_a_penalty_are_plain():
    """On the first step a moving center knows nothing, and Reg2 alone is left out."""
    model, x, y = data(B=4)
    plain = torch.autograd.grad(losses_of(model)(x, y).mean(), list(model.parameters()))
    for options in ({"method": "finite_difference"}, *SIGN_OPTIONS.values()):
        reg = regularizer(model, "ema", reg1=0.0, **options)
        grad, report = gradient_of(reg, losses_of(model), x, y)
        torch.testing.assert_close(grad, torch.cat([g.flatten() for g in plain]), rtol=1e-10, atol=1e-12)
        assert report.reg2 is None and "reg2 was left out" in report.notes[0]


def test_the_default_step_is_good_in_float32():
    double, x, y = data(B=32)
    model = copy.deepcopy(double).float()
    options = {"reg2": 0.0, "method": "random_signs"}
    torch.manual_seed(0)
    expected, _ = gradient_of(regularizer(double, "zero", **options), losses_of(double), x, y)
    torch.manual_seed(0)
    reg = regularizer(model, "zero", derivative="finite_difference", **options)
    assert relative(gradient_of(reg, losses_of(model), x.float(), y)[0].double(), expected) < 3e-3


# All methods

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
    monkeypatch.setattr("bootgrad.graph.answers_at_once", lambda tensor: False)
    monkeypatch.setattr("bootgrad.regularizers.answers_at_once", lambda tensor: False)
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
    monkeypatch.setattr("bootgrad.graph.is_capturing", lambda: True)
    for options in ({"fraction": 0.5}, {"method": "random_signs"}, {"method": "finite_difference"}):
        with pytest.raises(bootgrad.BootgradError, match="a captured graph of kernels would repeat"):
            regularizer(model, "zero", **options).backward(losses_of(model), x, y)


def test_auto_is_exact():
    model, x, y = data(B=6)
    reg = regularizer(model, "zero", method="auto")
    grad, report = gradient_of(reg, losses_of(model), x, y)
    expected, _ = gradient_of(regularizer(model, "zero"), losses_of(model), x, y)
    assert reg.method == report.method == "exact" and torch.equal(grad, expected)


def test_gradient_hooks_and_losses_of_nothing_are_refused():
    model, x, y = data(B=4)
    reg = regularizer(model, "zero", method="random_signs")
    with pytest.raises(bootgrad.BootgradError, match="do not depend on any parameter"):
        reg.backward(lambda: torch.zeros(4, requires_grad=True) * 1)
    handle = model.layers[0].bias.register_hook(lambda g: 2 * g)
    with pytest.raises(bootgrad.BootgradError, match="layers.0.bias has a gradient hook"):
        reg.backward(losses_of(model), x, y)
    handle.remove()
    assert reg.step == 0 and all(p.grad is None for p in model.parameters())


class Once(torch.autograd.Function):
    """Marked as differentiable once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("options", [dict(reg1=0.1), dict(reg2=0.1, center="zero")])
def test_signs_refuse_what_ends_a_derivative(options):
    model, x = small_model(), torch.randn(5, 3, dtype=torch.float64)
    reg = bootgrad.GradientRegularizer(model, method="random_signs", **options)
    with pytest.raises(bootgrad.BootgradError, match="once_differentiable"):
        reg.backward(lambda x: Once.apply(model(x)).sum(1), x)
    assert all(p.grad is None for p in model.parameters())


def test_a_center_s_derivative_refuses_what_ends_it():
    model, x = small_model(), torch.randn(5, 3, dtype=torch.float64)
    losses = lambda x: Once.apply(model(x)).sum(1)  # noqa: E731
    center = bootgrad.centers.FullBatchMean([x], losses, differentiable=True)
    reg = bootgrad.GradientRegularizer(model, reg2=0.5, center=center, method="finite_difference")
    with pytest.raises(bootgrad.BootgradError, match="once_differentiable"):
        reg.backward(losses, x[:3])


@pytest.mark.parametrize("options", [dict(method="finite_difference"), dict(fraction=0.5)])
def test_a_function_that_changes_its_batch_is_not_run_again(options):
    model, x, scale = small_model(), torch.randn(6, 3, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    reg = bootgrad.GradientRegularizer(model, reg2=0.1, center="zero", **options)
    with pytest.raises(bootgrad.BootgradError, match="changed a tensor of its batch in place"):
        reg.backward(lambda x, s: model(x * s.add_(1)).square().sum(1), x, scale)
    assert all(p.grad is None for p in model.parameters()) and reg.step == 0


def test_two_samples_are_not_parted():
    """One alone would hide that they are coupled."""
    model, x = small_model(), torch.randn(2, 3, dtype=torch.float64)
    reg = bootgrad.GradientRegularizer(model, reg1=0.1, fraction=0.5)
    with pytest.raises(bootgrad.BootgradError, match="samples are coupled"):
        reg.backward(lambda x: (model(x) - 0.5 * model(x).mean(0)).square().sum(1), x)


def test_parameters_that_share_memory_are_not_moved_twice():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double(), torch.randn(4, 3).double()
    model[2].weight = nn.Parameter(model[0].weight.data)
    reg = bootgrad.GradientRegularizer(model, reg2=0.1, center="zero", method="finite_difference")
    with pytest.raises(bootgrad.BootgradError, match="0.weight and 2.weight share memory"):
        reg.backward(lambda x: model(x).square().sum(1), x)


def test_a_strength_of_zero_makes_a_plain_step():
    model, x = small_model(), torch.randn(5, 3, dtype=torch.float64)
    reg = bootgrad.GradientRegularizer(model, reg1=lambda step: 0.0 if step == 0 else 0.1)
    losses = lambda x: model(x).square().sum(1)  # noqa: E731
    assert [reg.backward(losses, x).method for _ in range(2)] == ["plain", "exact"]


def test_an_unknown_trace_is_left_out_of_the_noise_scale():
    model, x = small_model(), torch.randn(5, 3, dtype=torch.float64)
    reg = bootgrad.GradientRegularizer(model, reg1=0.1, method="random_signs", every=2)
    scale = bootgrad.NoiseScale()
    for _ in range(4):
        scale.update(reg.backward(lambda x: model(x).square().sum(1), x))
    assert scale.steps == 2 and scale.value == scale.value


def test_expanded_buffers_are_left_as_they_are():
    model, x = small_model(), torch.randn(5, 3, dtype=torch.float64)
    model.register_buffer("mask", torch.ones(1, dtype=torch.float64).expand(2))
    reg = bootgrad.GradientRegularizer(model, reg2=0.1, center="zero", method="finite_difference")
    reg.backward(lambda x: (model(x) * model.mask).square().sum(1), x)
    assert model.mask.tolist() == [1, 1]
