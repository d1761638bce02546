"""Penalties and the training object against explicit formulas, and what they refuse."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bootgrad
from bootgrad import centers

from .models import Residual, loss_of, make


@pytest.fixture
def setting():
    return make(Residual, batch=6)


def explicit(model, x, target):
    """Losses, and the rows (B, P) with their graph."""
    losses = loss_of(model(x), target)
    parameters = list(model.parameters())
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(ell, parameters, create_graph=True)]) for ell in losses]
    return losses, torch.stack(rows)


def flat_grad(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def expected_gradient(model, x, target, lambda1, lambda2, c1, c2):
    losses, G = explicit(model, x, target)
    total = losses.mean()
    mean = G.mean(0)
    total = total + lambda1 * (G - (mean if c1 is None else c1)).square().sum(1).mean()
    if c2 is not None:
        total = total + lambda2 * (mean - c2).square().sum()
    grads = torch.autograd.grad(total, list(model.parameters()))
    return torch.cat([g.flatten() for g in grads]), losses.detach(), G.detach()


def estimate(center, past, P):
    """The center after the mini-batch gradients ``past``, written out."""
    if center == "zero":
        return torch.zeros(P, dtype=torch.float64)
    if center == "batch_mean" or not past:
        return None
    if center == "ema":
        weights = torch.tensor([0.1 * 0.9 ** (len(past) - 1 - k) for k in range(len(past))], dtype=torch.float64)
        return (weights[:, None] * torch.stack(past)).sum(0) / (1 - 0.9 ** len(past))
    return torch.stack(past[-2:]).mean(0)


@pytest.mark.parametrize("form", ["closure", "record"])
@pytest.mark.parametrize("center", ["batch_mean", "zero", "ema", "window"])
def test_trains_as_the_formulas_say(setting, center, form):
    model, x, target = setting
    chosen = centers.WindowMean(2) if center == "window" else center
    spec = {"reg1": chosen, "reg2": "zero"} if center == "batch_mean" else chosen
    reg = bootgrad.GradientRegularizer(model, reg1=lambda step: 0.1 + 0.01 * step, reg2=0.2, center=spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    past = []
    P = sum(p.numel() for p in model.parameters())
    for step in range(4):
        x = torch.randn_like(x)
        c1 = estimate(center, past, P)
        c2 = torch.zeros(P, dtype=torch.float64) if center == "batch_mean" else c1
        expected, losses, G = expected_gradient(model, x, target, 0.1 + 0.01 * step, 0.2, c1, c2)
        optimizer.zero_grad()
        if form == "closure":
            report = reg.backward(lambda x, t: loss_of(model(x), t), x, target)
        else:
            with reg.record():
                losses_ = loss_of(model(x), target)
            report = reg.backward(losses_)
        torch.testing.assert_close(flat_grad(model), expected, rtol=1e-9, atol=1e-10)
        mean = G.mean(0)
        torch.testing.assert_close(report.loss, losses.mean())
        around = mean if c1 is None else c1
        torch.testing.assert_close(report.reg1, (G - around).square().sum(1).mean(), rtol=1e-10, atol=1e-12)
        if c2 is None:
            assert report.reg2 is None and any("reg2 was left out" in note for note in report.notes)
            assert any("reg1 was taken about the batch mean" in note for note in report.notes)
        else:
            torch.testing.assert_close(report.reg2, (mean - c2).square().sum(), rtol=1e-10, atol=1e-12)
            assert report.notes == ()
        gamma = (G - mean).square().sum(1).mean()
        torch.testing.assert_close(report.covariance_trace, gamma, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(report.noise_scale, gamma / mean.square().sum(), rtol=1e-9, atol=1e-12)
        assert not any(t.requires_grad for t in (report.loss, report.reg1, report.covariance_trace))
        optimizer.step()
        past.append(mean)


def test_gradients_accumulate_and_leaves_outside_the_model_get_theirs(setting):
    model, x, target = setting
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    x = x.requires_grad_()
    reg = bootgrad.GradientRegularizer(model, reg1=0.3, center="zero")

    def losses(x, t):
        return loss_of(model(x) * scale, t)

    values, G = losses(x, target), None
    parameters = list(model.parameters())
    G = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(v, parameters, create_graph=True)]) for v in values]
    )
    leaves = [*parameters, scale, x]
    expected = torch.autograd.grad(values.mean() + 0.3 * G.square().sum(1).mean(), leaves)
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    reg.backward(losses, x, target)
    for leaf, e in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 1 + e, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("differentiable", [False, True])
def test_full_batch_center_averaged_over_batches(differentiable):
    """Over all mini-batches of a small set, Reg2 about ∇L(S): what the constant center drops has zero mean.

    The derivative of ‖ḡ − ∇L‖² is 2 (H̄ − H) (ḡ − ∇L). A constant center leaves out the part with H, whose mean over all
    batches vanishes, as that of ḡ − ∇L does.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 2, (6,))
    parameters = list(model.parameters())

    def loss_fn(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    def gradient(index, create_graph=True):
        grads = torch.autograd.grad(loss_fn(x[index], y[index]).mean(), parameters, create_graph=create_graph)
        return torch.cat([g.flatten() for g in grads])

    everything = list(range(6))
    batches = [[i, j, k] for i in range(6) for j in range(i) for k in range(j)]
    ours, exact, gaps = [], [], []
    for index in batches:
        center = centers.FullBatchMean([(x[:4], y[:4]), (x[4:], y[4:])], loss_fn, differentiable=differentiable)
        reg = bootgrad.GradientRegularizer(model, reg2=1.0, reg1=0.5, center={"reg1": "zero", "reg2": center})
        model.zero_grad()
        reg.backward(loss_fn, x[index], y[index])
        rows = [gradient([i]) for i in index]
        mean_norm = sum(g.square().sum() for g in rows) / 3
        penalty = (gradient(index) - gradient(everything)).square().sum()
        grads = torch.autograd.grad(loss_fn(x[index], y[index]).mean() + 0.5 * mean_norm + penalty, parameters)
        ours.append(flat_grad(model))
        exact.append(torch.cat([g.flatten() for g in grads]))
        gaps.append(float((ours[-1] - exact[-1]).norm() / exact[-1].norm()))
    if differentiable:
        assert max(gaps) < 1e-10
    else:
        assert max(gaps) > 0.05
    torch.testing.assert_close(torch.stack(ours).mean(0), torch.stack(exact).mean(0), rtol=1e-10, atol=1e-12)


def test_full_batch_center_is_kept_between_refreshes(setting):
    model, x, target = setting
    calls = []

    def loss_fn(x, t):
        calls.append(len(x))
        return loss_of(model(x), t)

    center = centers.FullBatchMean([(x[:2], target[:2]), (x[2:], target[2:])], loss_fn, refresh_every=3)
    reg = bootgrad.GradientRegularizer(model, reg1=0.1, center=center)
    for _ in range(4):
        reg.backward(lambda x, t: loss_of(model(x), t), x, target)
    assert calls == [2, 4, 2, 4]


@pytest.mark.parametrize("center", ["ema", "window"])
def test_state_goes_on_where_it_was(setting, center):
    model, x, target = setting
    make_reg = lambda m: bootgrad.GradientRegularizer(m, reg1=0.1, reg2=0.3, center=center)  # noqa: E731
    reg = make_reg(model)
    batches = [torch.randn_like(x) for _ in range(5)]
    for batch in batches[:3]:
        reg.backward(lambda x: loss_of(model(x), target), batch)
    model.zero_grad()
    twin = copy.deepcopy(model)
    twin_reg = make_reg(twin)
    twin_reg.load_state_dict(copy.deepcopy(reg.state_dict()))
    assert twin_reg.step == 3
    for batch in batches[3:]:
        reg.backward(lambda x: loss_of(model(x), target), batch)
        twin_reg.backward(lambda x: loss_of(twin(x), target), batch)
        assert torch.equal(flat_grad(model), flat_grad(twin))


def test_window_mean_does_not_drift():
    window = centers.WindowMean(3)
    parameters = {"w": torch.zeros(5)}
    torch.manual_seed(0)
    past = [{"w": torch.randn(5) * 10.0 ** (k % 7)} for k in range(200)]
    for k, g in enumerate(past):
        window.update(g)
        expected = torch.stack([h["w"].double() for h in past[max(0, k - 2) : k + 1]]).mean(0)
        torch.testing.assert_close(window.value(parameters)["w"].double(), expected, rtol=1e-5, atol=1.0)


def test_a_failed_step_changes_nothing(setting):
    model, x, target = setting
    reg = bootgrad.GradientRegularizer(model, reg1=0.1, reg2=0.1, center="ema")
    reg.backward(lambda x: loss_of(model(x), target), x)
    before = copy.deepcopy((reg.state_dict(), [p.grad for p in model.parameters()]))

    class Own(Exception):
        pass

    def fails(x):
        raise Own

    with pytest.raises(Own):
        reg.backward(fails, x)
    with pytest.raises(bootgrad.BootgradError, match="samples: 0, 1, 2"):
        reg.backward(lambda x: loss_of(model(x), target) * math.nan, x)
    with pytest.raises(bootgrad.BootgradError, match="nothing was recorded"):
        reg.backward(loss_of(model(x), target))
    after = (reg.state_dict(), [p.grad for p in model.parameters()])
    assert before[0]["step"] == after[0]["step"] == 1
    for name, t in before[0]["centers"]["reg1"]["mean"].items():
        assert torch.equal(t, after[0]["centers"]["reg1"]["mean"][name])
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))


def test_the_model_is_left_alone(setting):
    model, x, target = setting
    before = (
        type(model),
        list(model.state_dict()),
        model.forward,
        dict(model._forward_hooks),
        dict(model._backward_hooks),
    )
    reg = bootgrad.GradientRegularizer(model, reg1=0.1)
    reg.backward(lambda x: loss_of(model(x), target), x)
    assert before == (
        type(model),
        list(model.state_dict()),
        model.forward,
        dict(model._forward_hooks),
        dict(model._backward_hooks),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reg2": 0.1}, "identically zero"),
        ({"reg2": lambda step: 0.1}, "identically zero"),
        ({"reg1": -0.1}, "not negative"),
        ({"reg1": math.nan}, "finite"),
        ({"reg1": math.inf}, "finite"),
        ({"reg1": "much"}, "number"),
        ({"reg1": 0.1, "center": "mean"}, "center must be one of batch_mean, zero, ema, window"),
        ({"reg1": 0.1, "center": 3}, "center must be a name"),
        ({"reg1": 0.1, "method": "guess"}, "method must be one of exact"),
        *(({"reg1": 0.1, "fraction": f}, "fraction must be a number in") for f in (0, 1.5, math.nan, True, "half")),
        *(({"reg1": 0.1, "every": k}, "every must be a whole number") for k in (0, 1.5, True)),
        ({"reg1": 0.1, "probes": 2}, 'options of method="random_signs"'),
        ({"reg1": 0.1, "derivative": "finite_difference"}, 'options of method="random_signs"'),
        ({"reg1": 0.1, "method": "random_signs", "probes": 0}, "probes must be a whole number"),
        ({"reg1": 0.1, "method": "random_signs", "derivative": "none"}, "derivative must be one of exact, finite"),
        ({"reg1": 0.1, "epsilon": 0.1}, "takes none: leave it out"),
        *(
            (
                {"reg2": 0.1, "center": "zero", "method": "finite_difference", "epsilon": e},
                "epsilon must be a number in",
            )
            for e in (0, 1, -0.1, math.nan, True, "small")
        ),
    ],
)
def test_bad_options(setting, options, message):
    with pytest.raises(bootgrad.BootgradError, match=message):
        bootgrad.GradientRegularizer(setting[0], **options)


@pytest.mark.parametrize("center", [{"Reg1": "ema"}, {"reg3": torch.zeros(1)}])
def test_a_center_by_unknown_names(setting, center):
    with pytest.raises(bootgrad.BootgradError, match='names of penalties, "reg1" and "reg2"'):
        bootgrad.GradientRegularizer(setting[0], reg1=0.1, center=center)


def test_bad_strength_of_a_later_step_and_bad_centers(setting):
    model, x, target = setting
    reg = bootgrad.GradientRegularizer(model, reg1=lambda step: -1.0)
    with pytest.raises(bootgrad.BootgradError, match="not negative"):
        reg.backward(lambda x: loss_of(model(x), target), x)
    good = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    first = next(iter(good))
    for center, message in (
        ({k: v for k, v in good.items() if k != first}, f"lacks {first}"),
        (good | {"other": torch.zeros(1)}, "unknown other"),
        (good | {first: torch.zeros(3)}, f"for {first}"),
        (good | {first: 0.0}, "must hold tensors"),
        (torch.zeros(3), "must be flat"),
    ):
        reg = bootgrad.GradientRegularizer(model, reg1=0.1, center=center)
        with pytest.raises(bootgrad.BootgradError, match=message):
            reg.backward(lambda x: loss_of(model(x), target), x)
    assert all(p.grad is None for p in model.parameters())


def test_penalties_that_would_do_nothing(setting):
    model, x, target = setting
    with pytest.warns(bootgrad.BootgradWarning, match="both 0"):
        reg = bootgrad.GradientRegularizer(model)
    reg.backward(lambda x: loss_of(model(x), target), x)
    plain = torch.autograd.grad(loss_of(model(x), target).mean(), list(model.parameters()))
    torch.testing.assert_close(flat_grad(model), torch.cat([g.flatten() for g in plain]))
    with bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    G = rec.per_sample_gradients(losses)
    with pytest.raises(bootgrad.BootgradError, match="create_graph=True"):
        bootgrad.reg1(G)
    with pytest.raises(bootgrad.BootgradError, match="create_graph=True"):
        bootgrad.reg2(G, center=torch.zeros(G.shape[1]))
    with pytest.raises(bootgrad.BootgradError, match="identically zero"):
        bootgrad.reg2(rec.per_sample_gradients(losses, create_graph=True), center=None)
    model.requires_grad_(False)
    with pytest.raises(bootgrad.BootgradError, match="no parameter that requires grad"):
        bootgrad.GradientRegularizer(model, reg1=0.1)


def test_noise_scale_is_unbiased_where_the_plug_in_ratio_saturates():
    """Gradients of known mean and covariance: true noise scale 1000, batches of 32."""
    torch.manual_seed(0)
    P, B = 1000, 32
    true = torch.zeros(P)
    true[0] = 1.0
    average = bootgrad.NoiseScale(decay=1)
    plug_in = []
    for _ in range(2000):
        G = true + torch.randn(B, P)
        mean = G.mean(0)
        moments = bootgrad.statistics.Moments(G.square().sum(1), mean.square().sum())
        average.update(moments)
        plug_in.append(float(moments.noise_scale))
    assert average.value == pytest.approx(1000, rel=0.1)
    assert sum(plug_in) / len(plug_in) < 40
    assert average.reason is None and average.covariance_trace == pytest.approx(1000, rel=0.01)
    restored = bootgrad.NoiseScale()
    restored.load_state_dict(average.state_dict())
    assert restored.value == average.value


def test_noise_scale_says_why_it_has_no_value():
    average = bootgrad.NoiseScale()
    assert math.isnan(average.value) and average.reason == "no step has been taken in"
    average.update(bootgrad.statistics.Moments(torch.zeros(4), torch.tensor(0.0)))
    assert math.isnan(average.value) and "zero" in average.reason
    average.update(bootgrad.statistics.Moments(torch.ones(4), torch.tensor(0.0)))
    assert average.value == math.inf and "lost in the noise" in average.reason
    with pytest.raises(bootgrad.BootgradError, match="at least two"):
        average.update(bootgrad.statistics.Moments(torch.ones(1), torch.tensor(1.0)))
    with pytest.raises(bootgrad.BootgradError, match="decay"):
        bootgrad.NoiseScale(decay=0)


class Branches(nn.Module):
    """Two layers of which a batch goes through one, by the sign of its first entry."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return torch.tanh((self.a if x[0, 0] > 0 else self.b)(x))


def test_a_differentiable_center_reaches_what_the_batch_does_not():
    torch.manual_seed(0)
    model = Branches().double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 2, (8,))
    x[:, 0] = x[:, 0].abs() * torch.tensor([1.0, -1.0]).repeat_interleave(4)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]

    def loss_fn(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    center = centers.FullBatchMean(batches, loss_fn, differentiable=True)
    reg = bootgrad.GradientRegularizer(model, reg2=0.7, reg1=0.2, center={"reg1": "zero", "reg2": center})
    reg.backward(loss_fn, *batches[0])
    used = [p for name, p in model.named_parameters() if not name.startswith("c.")]

    def mean_gradient(losses):
        grads = torch.autograd.grad(losses.mean(), used, create_graph=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in grads])

    losses = loss_fn(*batches[0])
    rows = torch.stack([mean_gradient(loss) for loss in losses])
    distance = mean_gradient(losses) - mean_gradient(torch.cat([loss_fn(*b) for b in batches]))
    total = losses.mean() + 0.2 * rows.square().sum(1).mean() + 0.7 * distance.square().sum()
    for p, expected in zip(used, torch.autograd.grad(total, used), strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-12)
    assert float(model.b.weight.grad.norm()) > 1e-3
    assert model.c.weight.grad is None  # neither the batch nor the data set reaches it


def snapshot(reg, model):
    grads = [None if p.grad is None else p.grad.to_dense().clone() for p in model.parameters()]
    return copy.deepcopy(reg.state_dict()), grads


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_gradient_that_cannot_be_added_leaves_all_as_it_was(setting, monkeypatch):
    """As where memory runs out for the last parameter's ``.grad``."""
    model, x, target = setting
    reg = bootgrad.GradientRegularizer(model, reg1=0.1, reg2=0.1, center="ema")
    reg.backward(lambda x: loss_of(model(x), target), x)
    model.head.bias.grad = None
    expanded = model.head.bias.detach()[:1].expand(3)
    monkeypatch.setattr(model.head, "bias", nn.Parameter(expanded))  # its strides are no gradient's: a copy is made
    original = torch.Tensor.copy_

    def fails(self, *args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    before = snapshot(reg, model)
    monkeypatch.setattr(torch.Tensor, "copy_", fails)
    with pytest.raises(torch.OutOfMemoryError):
        reg.backward(lambda x: loss_of(model(x), target), x)
    with bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    with pytest.raises(torch.OutOfMemoryError):
        rec.backward(losses)
    monkeypatch.setattr(torch.Tensor, "copy_", original)
    same(snapshot(reg, model), before)


def test_sparse_grads_are_added_to(setting):
    model, x, target = setting
    reg = bootgrad.GradientRegularizer(model, reg1=0.1, center="zero")
    reg.backward(lambda x: loss_of(model(x), target), x)
    expected = [2 * p.grad for p in model.parameters()]
    model.second.weight.grad = model.second.weight.grad.to_sparse()
    reg.backward(lambda x: loss_of(model(x), target), x)
    same([p.grad for p in model.parameters()], expected)


def test_sparse_gradients_of_leaves_outside_the_model_are_theirs():
    torch.manual_seed(0)
    model, table, tokens = nn.Linear(3, 2), nn.Embedding(5, 3, sparse=True), torch.tensor([0, 3, 3, 1])
    twin = copy.deepcopy(table)
    for _ in range(2):
        model(twin(tokens)).square().sum(1).mean().backward()
        with bootgrad.record(model) as rec:
            losses = model(table(tokens)).square().sum(1)
        rec.backward(losses)
        assert table.weight.grad.is_sparse
        torch.testing.assert_close(table.weight.grad.to_dense(), twin.weight.grad.to_dense())


def test_hooks_that_wait_for_grad_may_step(setting):
    """As from torch: without a graph, and after ``.grad`` is there."""
    model, x, target = setting
    expected = model.first.weight.detach().clone()

    def step(p):
        p.sub_(0.1 * p.grad)

    model.first.weight.register_post_accumulate_grad_hook(step)
    bootgrad.GradientRegularizer(model, reg1=0.1).backward(lambda x: loss_of(model(x), target), x)
    with bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    expected -= 0.1 * model.first.weight.grad
    model.first.weight.grad = None
    rec.backward(losses)
    expected -= 0.1 * model.first.weight.grad
    same(model.first.weight.detach(), expected)


def test_a_step_whose_hook_fails_is_a_whole_step(setting):
    model, x, target = setting
    twin = copy.deepcopy(model)
    reg, whole = (bootgrad.GradientRegularizer(m, reg1=0.1, reg2=0.1, center="ema") for m in (model, twin))

    def fails(p):
        raise RuntimeError("the hook's own")

    model.first.weight.register_post_accumulate_grad_hook(fails)
    with pytest.raises(RuntimeError, match="the hook's own"):
        reg.backward(lambda x: loss_of(model(x), target), x)
    whole.backward(lambda x: loss_of(twin(x), target), x)
    same(snapshot(reg, model), snapshot(whole, twin))
    assert reg.step == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("step"), "it lacks 'step'"),
        (lambda s: s["centers"].pop("reg2"), "it lacks 'reg2'"),
        (lambda s: s["centers"]["reg2"].pop("sum"), "it lacks 'sum'"),
        (lambda s: s["centers"]["reg2"].update(window=[{"first.weight": None}]), "AttributeError"),
        (lambda s: s["centers"]["reg1"].update(mean=None), "AttributeError"),
        (lambda s: s["centers"]["reg1"].pop("mean"), "it lacks 'mean'"),
        (lambda s: s.update(centers=None), "TypeError"),
    ],
)
def test_a_state_that_cannot_be_taken_over_changes_nothing(setting, damage, message):
    model, x, target = setting

    def trained(steps):
        reg = bootgrad.GradientRegularizer(model, reg1=0.1, reg2=0.1, center={"reg1": "ema", "reg2": "window"})
        for _ in range(steps):
            reg.backward(lambda x: loss_of(model(x), target), x)
        return reg

    reg, state = trained(1), copy.deepcopy(trained(2).state_dict())
    before = copy.deepcopy(reg.state_dict())
    damage(state)
    with pytest.raises(bootgrad.BootgradError, match=f"not a state_dict.*: {message}"):
        reg.load_state_dict(state)
    same(reg.state_dict(), before)


def test_a_noise_scale_takes_over_a_whole_state_or_nothing():
    average = bootgrad.NoiseScale()
    before = average.state_dict()
    with pytest.raises(bootgrad.BootgradError, match="not a state_dict"):
        average.load_state_dict({"decay": 0.5, "steps": 3, "parts": [1.0]})
    assert average.state_dict() == before


@pytest.mark.parametrize("lambda1", [1.0, 0.1, 1e-3, 1e-20, 1e-40])
@pytest.mark.parametrize("center", ["zero", {"reg1": "batch_mean", "reg2": "zero"}], ids=["zero", "batch mean"])
def test_one_penalty_may_be_much_the_stronger(lambda1, center):
    """In one visit or in two, the gradient is right, and so is the report."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x, target = torch.randn(8, 5), torch.randint(3, (8,))

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    def step(**options):
        model.zero_grad()
        report = bootgrad.GradientRegularizer(model, center=center, **options).backward(losses, x, target)
        return flat_grad(model), report

    plain = step(reg1=1e-45)[0]
    only_1, only_2, (both, report) = step(reg1=1.0), step(reg2=1.0)[0], step(reg1=lambda1, reg2=1.0)
    torch.testing.assert_close(both, only_2 + lambda1 * (only_1[0] - plain), rtol=1e-4, atol=1e-6)
    for name in ("reg1", "covariance_trace", "sq_mean_norm", "reg2"):
        torch.testing.assert_close(getattr(report, name), getattr(only_1[1], name), rtol=1e-3, atol=1e-6)
    assert report.notes == ()


def test_losses_that_were_recorded_and_forgotten_are_told():
    """As where a loop's ``losses.mean().backward()`` was left in its place."""
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    reg = bootgrad.GradientRegularizer(model, reg1=0.1)

    def recorded():
        with reg.record():
            return model(x).square().sum(1)

    reg.backward(recorded())
    with pytest.raises(ZeroDivisionError), reg.record():
        raise ZeroDivisionError
    reg.backward(recorded())  # no word of a pass that an error ended
    recorded().mean().backward()
    with pytest.warns(bootgrad.BootgradWarning, match="no penalty was taken of them"):
        losses = recorded()
    reg.backward(losses)
    reg.backward(recorded())
