"""What is left of a step in a model: its gradients. Whatever torch does with models, it does with this one, too."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.overrides import _get_current_function_mode_stack

import bootgrad

B = 6


class Net(nn.Module):
    """Convolutions, norms, dropout, a tied layer, a buffer that counts, a repeated token, attention."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Dropout(0.2)
        self.inner, self.again = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again.weight = self.inner.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 3)
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.register_buffer("mean", torch.randn(8))

    def forward(self, x):
        x = self.drop(F.relu(F.max_pool2d(self.norm(self.conv(x)), 2))).flatten(2).transpose(1, 2)  # (B, 4, 4)
        x = torch.cat([x, x.square()], 2) - self.mean * self.frozen
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.again(self.inner(x).tanh())
        return self.head(x + self.attention(x, x, x, need_weights=False)[0]).mean(1)


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, 2, 4, 4, generator=generator), torch.randint(0, 3, (B,), generator=generator)


def net(dropout=True):
    torch.manual_seed(0)
    model = Net()
    model.drop.p *= dropout
    return model


def losses_of(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def statistics(model, x, y):
    with bootgrad.record(model) as rec:
        losses = losses_of(model, x, y)
    return rec.backward(losses)


def regularized(**options):
    def step(model, x, y):
        reg = bootgrad.GradientRegularizer(model, **({"reg1": 0.1, "reg2": 0.1, "center": "zero"} | options))
        return reg.backward(lambda x, y: losses_of(model, x, y), x, y)

    return step


def micro_batches(model, x, y):
    reg = bootgrad.GradientRegularizer(model, reg1=0.1)
    with reg.accumulate() as block:
        for part in zip(x.split(4), y.split(4), strict=True):
            reg.backward(lambda x, y: losses_of(model, x, y), *part)
    return block.report


STEPS = {
    "statistics": statistics,
    "exact": regularized(),
    "fraction": regularized(fraction=0.5),
    "finite_difference": regularized(method="finite_difference"),
    "random_signs": regularized(method="random_signs"),
    "random_signs_finite": regularized(method="random_signs", derivative="finite_difference"),
    "micro_batches": micro_batches,
}
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())


def inventory(model):
    """All that hangs at a model and can be told apart: classes, attributes, hooks, identities of its tensors."""
    told = {"tensors": [(name, id(t)) for name, t in (*model.named_parameters(), *model.named_buffers())]}
    told["state"] = list(model.state_dict())
    for name, module in model.named_modules():
        told[name] = (
            type(module),
            {
                key: (type(value), list(value.items()) if isinstance(value, dict) else value)
                for key, value in vars(module).items()
            },
        )
    for name, p in model.named_parameters():
        told["tensor", name] = (
            type(p),
            sorted(key for key in vars(p)),
            p.requires_grad,
            p.is_leaf,
            p._backward_hooks,
            getattr(p, "_post_accumulate_grad_hooks", None),
            p.data_ptr(),
            p.stride(),
        )
    return told


@every_step
def test_the_model_is_as_before_but_for_grad(step):
    model, (x, y) = net(), batch()
    before, values, inputs = inventory(model), copy.deepcopy(model.state_dict()), (x.clone(), y.clone())
    names = set(dir(torch.utils.checkpoint)), torch.utils.checkpoint.CheckpointFunction
    step(model, x, y)
    assert inventory(model) == before
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())
    assert torch.equal(x, inputs[0]) and torch.equal(y, inputs[1]) and not vars(x) and x.grad is None
    assert _get_current_function_mode_stack() == []
    assert (set(dir(torch.utils.checkpoint)), torch.utils.checkpoint.CheckpointFunction) == names
    for p in model.parameters():
        assert p.grad is None or (type(p.grad) is torch.Tensor and p.grad.grad_fn is None and not vars(p.grad))
        assert p.grad is None or p.grad.stride() == p.stride()


@pytest.mark.parametrize(
    "step", [statistics, STEPS["exact"], STEPS["random_signs_finite"]], ids=["statistics", "exact", "signs"]
)
def test_it_is_copied_pickled_and_exported_as_if_nothing_had_been(step):
    model, (x, y) = net(), batch()
    untouched = copy.deepcopy(model)
    step(model, x, y)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    expected = untouched.eval()(x)
    for other in (model, *copies):
        assert torch.equal(other.eval()(x), expected)
        assert other.again.weight is other.inner.weight
    exported = [torch.export.export(m, (x,)) for m in (model, untouched)]
    assert str(exported[0].graph) == str(exported[1].graph)
    assert exported[0].graph_signature == exported[1].graph_signature
    torch.testing.assert_close(exported[0].module()(x), expected)
    other = copies[0].train()
    torch.manual_seed(3)
    told = step(other, x, y)
    torch.manual_seed(3)
    again = step(copies[1].train(), x, y)
    loss = "sq_mean_norm" if step is statistics else "loss"
    assert torch.equal(getattr(told, loss), getattr(again, loss))


# Training beside plain torch: λ₁ Reg1 about the batch mean, written out.


@sdpa_kernel(SDPBackend.MATH)
def explicit_objective(model, x, y):
    """Torch's other attention kernels have no second derivative."""
    losses, parameters = losses_of(model, x, y), [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(ell, parameters, create_graph=True, allow_unused=True) for ell in losses]
    rows = torch.stack([torch.cat([g.flatten() for g in row if g is not None]) for row in rows])
    return losses.mean() + 0.1 * (rows - rows.mean(0)).square().sum(1).mean()


def trained(model, make, ours, steps=4, after=lambda: None):
    """Parameters after some steps, by the regularizer or by the formula."""
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps + 1, cycle_momentum=False)
    reg = bootgrad.GradientRegularizer(model, reg1=0.1) if ours else None
    for k in range(steps):
        x, y = (t.double() if t.is_floating_point() else t for t in batch(k))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            if reg is not None:
                return reg.backward(lambda x, y: losses_of(model, x, y), x, y).loss
            objective = explicit_objective(model, x, y)
            objective.backward()
            return objective.detach()

        optimizer.step(closure)
        scheduler.step()
        after()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.02, fused=True),
    "foreach SGD": lambda p: torch.optim.SGD(p, lr=0.02, foreach=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.02, max_iter=3),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_optimizers_and_schedulers(make):
    model = net(dropout=False).double()
    other = copy.deepcopy(model)
    torch.testing.assert_close(trained(model, make, True), trained(other, make, False), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_weights(use_buffers):
    results = []
    for ours in (True, False):
        model = net(dropout=False).double()
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
        trained(model, OPTIMIZERS["SGD"], ours, after=lambda a=averaged, m=model: a.update_parameters(m))
        results.append(averaged)
    for (name, ours), theirs in zip(results[0].state_dict().items(), results[1].state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    # Its copy is a model like others, and so is the whole.
    x, y = batch()
    for recorded in (results[0], results[0].module):
        results[0].zero_grad()
        with bootgrad.record(recorded) as rec:
            losses = losses_of(results[0], x.double(), y)
        stats = rec.backward(losses)
        expected = statistics(results[1].module, x.double(), y)
        torch.testing.assert_close(stats.sq_norms, expected.sq_norms, rtol=1e-6, atol=1e-8)
    results[0].update_parameters(model)


@every_step
@sdpa_kernel(SDPBackend.MATH)
def test_transforms_of_functions_afterwards(step):
    model, (x, y) = net(dropout=False), batch()
    untouched = copy.deepcopy(model)
    step(model, x, y)

    def per_sample(m):
        parameters = {name: p.detach() for name, p in m.named_parameters()}

        def loss(parameters, x, y):
            out = torch.func.functional_call(m, parameters, (x.unsqueeze(0),))
            return F.cross_entropy(out, y.unsqueeze(0))

        return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)

    ours, expected = per_sample(model), per_sample(untouched)
    for name, g in expected.items():
        assert torch.equal(ours[name], g), name
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if step is statistics:
        for name, g in grads.items():
            torch.testing.assert_close(g, ours[name].mean(0), rtol=1e-4, atol=1e-6)


def test_functional_calls_are_recorded_where_the_parameters_are_the_model_s():
    """Of the model's own parameters; others are another model's, of which nothing is known."""
    model, (x, y) = net(dropout=False), batch()
    expected = statistics(model, x, y)
    model.zero_grad()
    with bootgrad.record(model) as rec:
        out = torch.func.functional_call(model, dict(model.named_parameters()), (x,))
        losses = F.cross_entropy(out, y, reduction="none")
    torch.testing.assert_close(rec.backward(losses).sq_norms, expected.sq_norms)
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with bootgrad.record(model) as rec:
        losses = F.cross_entropy(torch.func.functional_call(model, others, (x,)), y, reduction="none")
    with pytest.raises(bootgrad.BootgradError, match="do not depend on any recorded parameter"):
        rec.backward(losses)


@every_step
@pytest.mark.parametrize("channels_last", ["model", "input", "both"])
def test_channels_last(step, channels_last):
    """Numbers are those of the other layout, and gradients are laid out as those of a plain backward pass."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model, (x, y) = net(dropout=False).double(), batch()
        x = x.double()
        if channels_last != "input":
            model = model.to(memory_format=layout)
        if channels_last != "model":
            x = x.to(memory_format=layout)
        plain = copy.deepcopy(model)
        losses_of(plain, x, y).mean().backward()
        torch.manual_seed(5)
        step(model, x, y)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or p.grad.stride() == q.grad.stride()
        assert model.conv.weight.is_contiguous(memory_format=layout) or channels_last == "input"
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    tolerance = 1e-4 if step in (STEPS["finite_difference"], STEPS["random_signs_finite"]) else 1e-9
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("step", [statistics, STEPS["exact"]], ids=["statistics", "exact"])
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations(kind, step):
    """They stay, and can be removed; gradients are torch's, but for the second derivative of weight norm, in which it errs."""

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
        getattr(parametrizations, kind)(model[0])
        return model

    x, y = torch.randn(B, 4, dtype=torch.float64), torch.randint(0, 3, (B,))
    model, other = make(), make()
    before = inventory(model)
    step(model, x, y)
    assert inventory(model) == before
    losses_of(other, x, y).mean().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert step is not statistics or torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-11)
        q.grad = p.grad.clone()
    for m in (model, other):
        torch.optim.SGD(m.parameters(), lr=0.1).step()
        nn.utils.parametrize.remove_parametrizations(m[0], "weight")
    assert list(model.state_dict()) == list(other.state_dict()) == ["0.bias", "0.weight", "2.weight", "2.bias"]
    assert torch.equal(model(x), other(x))
