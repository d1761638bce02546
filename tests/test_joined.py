"""Group norms and the ReLUs behind them, joined in the record: where gradients pass both at once, and where they must not."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bootgrad


class Net(nn.Module):
    """A convolution, a norm and what is behind it by ``call(model, hidden)``, (B, 4, H, W) both, and a linear layer."""

    def __init__(self, call):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Linear(4, 3)
        self.call = call
        self.seen = []
        self.double()
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return self.head(self.call(self, self.conv(x)).tanh().mean((2, 3)))


def keep(m, x):
    m.seen.append(m.norm(x))
    return F.relu(m.seen[-1])


def hook(m, x):
    y = m.norm(x)
    y.register_hook(lambda g: m.seen.append(g.abs().sum()))
    return F.relu(y)


def late_hook(m, x):
    y = m.norm(x)
    z = F.relu(y)
    y.register_hook(lambda g: 3 * g)
    return z


def node_hook(m, x):
    y = m.norm(x)
    y.grad_fn.register_prehook(lambda gs: tuple(None if g is None else 2 * g for g in gs))  # torch's node has three
    return F.relu(y)


def frozen_between(m, x):
    y = m.norm(x)
    m.norm.bias.requires_grad_(False)
    z = F.relu(y)
    m.norm.bias.requires_grad_(True)
    return z


def bias_changed_between(m, x):
    bias = m.norm.bias.clone()
    y = F.group_norm(x, 2, m.norm.weight, bias)
    bias.mul_(2)
    return F.relu(y)


def saved_elsewhere(m, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return F.relu(m.norm(x))


def norm_saved_elsewhere(m, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        y = m.norm(x)
    return F.relu(y)


def hook_before_in_place(m, x):
    y = m.norm(x)
    y.register_hook(lambda g: 3 * g)
    return F.relu_(y)


def changed(m, x):
    y = m.norm(x)
    with torch.no_grad():
        y += 1
    return F.relu(y)


def two_norms(m, x):
    return F.relu(m.norm(F.relu(m.norm(x))))


def frozen_bias(m, x):
    return F.relu(F.group_norm(x, 2, m.norm.weight, m.norm.bias.detach() + 1))


def both(m, x):
    y = m.norm(x)
    return F.relu(y) + 0.5 * F.relu(y).square()


def residual(m, x):
    y = m.norm(x)
    return F.relu(y) + y


def instance(m, x):
    x = x.sin()  # so that the bias of the convolution counts
    return torch.relu(F.instance_norm(x, weight=m.norm.weight, bias=m.norm.bias))


JOINED = {
    "module": lambda m, x: F.relu(m.norm(x)),
    "in place": lambda m, x: F.relu_(m.norm(x)),
    "method": lambda m, x: m.norm(x).relu(),
    "method in place": lambda m, x: m.norm(x).relu_(),
    "pooled": lambda m, x: F.max_pool2d(F.relu(m.norm(x)), 2),
    "weight made of parameters": lambda m, x: F.relu(F.group_norm(x, 2, m.norm.weight.exp(), m.norm.bias)),
    "frozen bias": frozen_bias,
    "instance norm": instance,
    "used twice": two_norms,
    "channels last": lambda m, x: F.relu(m.norm(x.contiguous(memory_format=torch.channels_last))),
}
APART = {
    "kept": keep,
    "hook": hook,
    "late hook": late_hook,
    "node hook": node_hook,
    "frozen between": frozen_between,
    "bias changed between": bias_changed_between,
    "saved elsewhere": saved_elsewhere,
    "norm saved elsewhere": norm_saved_elsewhere,
    "hook before it is changed in place": hook_before_in_place,
    "changed without a graph": changed,
    "two ReLUs": both,
    "residual": residual,
    "part of it": lambda m, x: F.relu(m.norm(x)[:, 1:]).repeat(1, 2, 1, 1)[:, :4],
    "nothing of it": lambda m, x: m.norm(x) + F.relu(m.norm(x)).detach(),
}


def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(5, 2, 4, 6, generator=g, dtype=torch.float64), torch.arange(5) % 3


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def is_joined(rec):
    return any(o.covers_all for o in rec.operations)


@pytest.mark.parametrize("case", [*JOINED, *APART])
def test_everything_agrees_with_plain_autograd(case):
    model = Net((JOINED | APART)[case])
    x, y = data()
    with bootgrad.record(model) as rec:
        losses = losses_of(model)(x, y)
    rec.backward(losses, retain_graph=True)
    assert is_joined(rec) == (case in JOINED)
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    losses_of(model)(x, y).mean().backward()
    for ours, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad)
    model.zero_grad()
    losses.mean().backward()  # the graph of the record, by torch's own pass
    for ours, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad)
    if "hook" not in case:  # verify's own passes would run them, too
        assert bootgrad.verify(model, losses_of(model), x, y).ok


@pytest.mark.parametrize("case", [case for case in APART if "hook" in case])
def test_hooks_between_see_what_torch_shows_them(case):
    x, y = data()
    seen = []
    for recorded in (True, False):
        model = Net(APART[case])
        if recorded:
            with bootgrad.record(model, check="never") as rec:
                losses = losses_of(model)(x, y)
            rec.backward(losses)
        else:
            losses_of(model)(x, y).mean().backward()
        seen.append([*model.seen, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*seen)


def test_a_gradient_that_is_retained_between_is_there():
    model = Net(keep)
    x, y = data()
    with bootgrad.record(model) as rec:
        losses = losses_of(model)(x, y)
    model.seen[0].retain_grad()
    rec.backward(losses)
    assert model.seen[0].grad is not None and not is_joined(rec)


def test_the_decision_follows_what_is_still_alive():
    model = Net(keep)
    x, y = data()
    with bootgrad.record(model) as rec:
        losses = losses_of(model)(x, y)
    first = rec.backward(losses, retain_graph=True).sq_norms
    assert not is_joined(rec)
    model.seen.clear()
    second = rec.backward(losses, retain_graph=True).sq_norms
    assert is_joined(rec)
    torch.testing.assert_close(first, second)
    hidden = rec.per_sample_gradients(losses)
    torch.testing.assert_close(hidden.sq_norms(), first)


def test_a_relu_after_the_graph_was_freed_or_the_record_is_gone():
    model = Net(keep)
    x, y = data()
    with bootgrad.record(model) as rec:
        losses = losses_of(model)(x, y)
    rec.backward(losses)
    between = model.seen[0]
    with bootgrad.record(model):
        torch.testing.assert_close(F.relu(between), between.clamp(min=0))
    del rec, losses
    with bootgrad.record(model):
        torch.testing.assert_close(F.relu(between), between.clamp(min=0))


def test_no_graph_outlives_its_step():
    model = Net(JOINED["module"])
    x, y = data()
    gc.disable()
    try:
        with bootgrad.record(model) as rec:
            z = model.conv(x)
            alive = weakref.ref(z.grad_fn)
            losses = F.cross_entropy(model.head(F.relu(model.norm(z)).mean((2, 3))), y, reduction="none")
        rec.backward(losses)
        del rec, losses, z
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_penalties_of_a_network_with_and_without_a_reader_between(dtype):
    x, y = data()
    results = []
    for call in (JOINED["module"], keep):
        model = Net(call).to(dtype)
        reg = bootgrad.GradientRegularizer(model, reg1=0.3, reg2=0.2, center="ema")
        for _ in range(2):
            report = reg.backward(losses_of(model), x.to(dtype), y)
        results.append([report.reg1, report.covariance_trace, *(p.grad for p in model.parameters())])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # bfloat16 has 8 bits
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 10)
