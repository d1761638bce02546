"""Statistics of batches in micro-batches against those of the same batch at once."""

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import bootgrad

from .methods.steps import flat
from .models import SHAPES, Dropout, Unused, loss_of, make
from .test_accumulation import Branches, parts_of

pytestmark = pytest.mark.filterwarnings("ignore:.*has no rule", "ignore:Using padding='same' with even")

MOMENTS = (
    "sq_norms",
    "sq_mean_norm",
    "deviation_sq_norms",
    "sq_mean_deviation",
    "covariance_trace",
    "reg1",
    "reg2",
)


def losses_of(model):
    return lambda x, target: loss_of(model(x), target)


def accumulated(model, losses, parts, **options):
    model.zero_grad()
    with bootgrad.accumulate(model, **options) as batch:
        for part in parts:
            with batch.record():
                values = losses(*part)
            batch.backward(values)
            assert all(p.grad is None for p in model.parameters())
    return batch.statistics


def at_once(model, losses, x, target, center=None):
    """The statistics, and the gradients."""
    model.zero_grad()
    with bootgrad.record(model) as rec:
        values = losses(x, target)
    stats = rec.backward(values, center=center)
    return stats, {name: p.grad for name, p in model.named_parameters()}


def assert_same(ours, expected, rtol, size=None):
    """Equal but for rounding, of numbers of this ``size``."""
    atol = rtol * float((expected if size is None else size).sq_norms.max())
    for name in MOMENTS:
        a, b = getattr(ours, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("about", ["nothing", "a center"])
@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind is not Dropout], ids=lambda k: k.__name__)
def test_statistics_are_those_of_the_whole_batch(kind, about):
    model, x, target = make(kind, batch=6)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    center = None if about == "nothing" else {name: 0.1 * torch.randn_like(p) for name, p in names.items()}
    expected, grads = at_once(model, losses_of(model), x, target, center)
    for split in ([6], [2, 3, 1], [1] * 6):
        stats = accumulated(model, losses_of(model), parts_of(split, x, target), n=len(split), center=center)
        assert stats.batch_size == 6
        assert_same(stats, expected, 1e-9)
        torch.testing.assert_close(stats.noise_scale, expected.noise_scale)
        assert list(stats.per_parameter) == list(expected.per_parameter)
        for name, moments in expected.per_parameter.items():
            assert_same(stats.per_parameter[name], moments, 1e-9, expected)
        for name, p in model.named_parameters():
            assert (p.grad is None) == (grads[name] is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, grads[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("about", ["nothing", "a center"])
def test_parameters_that_a_micro_batch_does_not_reach(about):
    """Against the samples one by one, of which each reaches what it reaches."""
    torch.manual_seed(0)
    model = Branches().double()
    x, target = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs() * torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    center = None if about == "nothing" else {name: torch.randn_like(p) for name, p in model.named_parameters()}
    ours = accumulated(model, losses_of(model), parts_of([2, 3, 1], x, target), center=center)
    grads = flat(model)
    single = accumulated(model, losses_of(model), parts_of([1] * 6, x, target), center=center)
    assert_same(ours, single, 1e-10)
    torch.testing.assert_close(flat(model), grads, rtol=1e-10, atol=1e-12)
    rows = []
    for part in parts_of([1] * 6, x, target):
        model.zero_grad()
        losses_of(model)(*part).sum().backward()
        rows.append(flat(model))
    G = torch.stack(rows)
    torch.testing.assert_close(ours.sq_norms, G.square().sum(1))
    torch.testing.assert_close(ours.covariance_trace, (G - G.mean(0)).square().sum(1).mean())
    torch.testing.assert_close(grads, G.mean(0))
    if center is not None:
        c = torch.cat([t.flatten() for t in center.values()])
        torch.testing.assert_close(ours.deviation_sq_norms, (G - c).square().sum(1))
        torch.testing.assert_close(ours.reg2, (G.mean(0) - c).square().sum())


def test_what_is_in_grad_already_is_added_to():
    model, x, target = make(Unused, batch=4)
    leaf = torch.ones((), dtype=torch.float64, requires_grad=True)
    losses = lambda x, t: loss_of(model(x) * leaf, t)  # noqa: E731
    expected = torch.autograd.grad(losses(x, target).mean(), [*model.used.parameters(), leaf])
    leaves = [*model.used.parameters(), leaf]
    for t in leaves:
        t.grad = torch.ones_like(t)
    held, hooked = leaf.grad, []
    leaf.register_post_accumulate_grad_hook(lambda p: hooked.append(float(p.grad)))
    with bootgrad.accumulate(model) as batch:
        for part in parts_of([3, 1], x, target):
            with batch.record():
                values = losses(*part)
            batch.backward(values)
    for t, e in zip(leaves, expected, strict=True):
        torch.testing.assert_close(t.grad, 1 + e)
    assert leaf.grad is held and hooked == [float(held)]
    assert model.unused.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_with_a_scaler(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, target = torch.randn(10, 6), torch.randn(10, 3)

    def losses(x, target, factor=1.0):
        with torch.autocast("cpu", torch.bfloat16 if dtype is torch.float32 else dtype, enabled=dtype != torch.float32):
            outputs = model(x)
        return loss_of(outputs.float(), target) * factor

    expected, grads = at_once(model, losses, x, target)
    scaler, optimizer = GradScaler("cpu", init_scale=2.0**10), torch.optim.SGD(model.parameters(), lr=0.1)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    stats = accumulated(model, losses, parts_of([4, 4, 2], x, target), scaler=scaler)
    assert_same(stats, expected, tolerance)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad / 2**10, grads[name], rtol=tolerance, atol=tolerance * float(grads[name].norm())
        )
    bad = [(*part, factor) for part, factor in zip(parts_of([4, 4, 2], x, target), (1.0, math.inf, 1.0), strict=True)]
    stats = accumulated(model, losses, bad, scaler=scaler)
    assert stats.covariance_trace.isnan() and not flat(model).isfinite().all()
    before = model[0].weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9 and torch.equal(model[0].weight, before)
    model.zero_grad()
    with pytest.raises(bootgrad.BootgradError, match="NaN or infinite at 4 of 4"):
        accumulated(model, losses, bad)
    assert all(p.grad is None for p in model.parameters())


def test_use_at_the_wrong_time():
    model, x, target = make(Unused, batch=4)
    losses = losses_of(model)
    with pytest.raises(bootgrad.BootgradError, match="lacks"):
        bootgrad.accumulate(model, center={})
    with pytest.raises(bootgrad.BootgradError, match="check must be one of"):
        bootgrad.accumulate(model, check="sometimes")
    with pytest.raises(bootgrad.BootgradError, match="at least one module"):
        bootgrad.accumulate()
    batch = bootgrad.accumulate(model, n=2)
    for use in (batch.record, lambda: batch.backward(torch.zeros(3))):
        with pytest.raises(bootgrad.BootgradError, match="inside of the `with` block"):
            use()
    with pytest.raises(bootgrad.BootgradError, match="nothing was recorded"), batch:
        batch.backward(losses(x, target))
    with pytest.raises(bootgrad.BootgradError, match="there when the block has ended"):
        batch.statistics  # noqa: B018
    for calls, message in ((1, "ended after 1 micro-batches; expected 2"), (3, "one more micro-batch came than the 2")):
        with pytest.raises(bootgrad.BootgradError, match=message), bootgrad.accumulate(model, n=2) as batch:
            for _ in range(calls):
                with batch.record():
                    values = losses(x, target)
                batch.backward(values)
    with pytest.raises(bootgrad.BootgradError, match="step after the block"), bootgrad.accumulate(model) as batch:
        with batch.record():
            values = losses(x, target)
        batch.backward(values)
        nn.init.zeros_(model.used.bias)
    with pytest.raises(bootgrad.BootgradError, match="has failed"), bootgrad.accumulate(model) as batch:
        with batch.record():
            values = losses(x, target)
        with contextlib.suppress(bootgrad.BootgradError):
            batch.backward(values * math.nan)
    assert all(p.grad is None for p in model.parameters())
