"""Compiled models: the same statistics out of compiled backward passes, or an error, or the model as it was written."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import bootgrad
from bootgrad import BootgradError, BootgradWarning, reference
from bootgrad.compiled import is_compiled
from bootgrad.errors import ArgumentError, UnsupportedError

from . import models
from .compiling import IGNORED, check_step, compiled_calls, cross_entropy, fresh_compiler, oracle  # noqa: F401

pytestmark = [*IGNORED, pytest.mark.usefixtures("fresh_compiler")]


class Block(nn.Module):
    """A transformer block in functions, and the mean over positions."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads = heads
        shapes = {
            "qkv": (3 * width, width),
            "out": (width, width),
            "up": (2 * width, width),
            "down": (width, 2 * width),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / shape[1] ** 0.5))
        for name in ("scale1", "shift1", "scale2", "shift2"):
            self.register_parameter(name, nn.Parameter(torch.randn(width)))
        self.bias = nn.Parameter(torch.randn(2 * width))

    def forward(self, x):  # (B, T, D)
        B, T, D = x.shape
        y = F.layer_norm(x, (D,), self.scale1, self.shift1)
        q, k, v = F.linear(y, self.qkv).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D)
        x = x + F.linear(y, self.out)
        y = F.layer_norm(x, (D,), self.scale2, self.shift2)
        return (x + F.linear(F.gelu(F.linear(y, self.up, self.bias)), self.down)).mean(1)


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def images_and_labels(B, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(B)
    return torch.randn(B, *shape, generator=generator, dtype=dtype), torch.randint(0, 3, (B,), generator=generator)


# Of bags torch itself makes other sizes in tensors without values.
WITH_RULES = [kind for kind in models.SHAPES if kind not in (models.Unknown, models.Bags)]


@pytest.mark.parametrize("kind", WITH_RULES)
def test_every_rule_is_compiled(kind):
    model, x, y = models.make(kind)

    def losses(x, y):
        return models.loss_of(model(x), y)

    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert check_step(model, losses, compiled, x, y) == [True]
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


class Shared(nn.Module):
    """A table that is the output layer's, too, a weight used twice, a masked and a repeated parameter, in any batch."""

    def __init__(self):
        super().__init__()
        self.table, self.inner = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.weight, self.token = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(1, 1, 4))
        self.register_buffer("mask", torch.ones(4, 4).tril())
        self.double()

    def forward(self, x):  # (B, T) of numbers, whose signs are tokens
        y = self.table((x > 0).long() + 2)
        y = torch.cat([self.token.expand(len(x), -1, -1), y], 1)
        y = torch.tanh(self.inner(torch.tanh(self.inner(y)))) + F.linear(y, self.weight * self.mask)
        return F.linear(y, self.table.weight).mean(1)[:, :3]


def transformer():
    return nn.Sequential(Block(), nn.Linear(8, 3)).double()


SLOW_INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "make, backend, loss_inside",
    [
        (mlp, "eager", False),
        (mlp, "aot_eager", True),
        (mlp, "aot_eager", False),
        (transformer, "aot_eager", True),
        (Shared, "aot_eager", False),
        (Shared, "eager", False),
        pytest.param(mlp, "inductor", False, marks=pytest.mark.slow),
        pytest.param(transformer, "inductor", True, marks=pytest.mark.slow),
    ],
)
def test_batches_of_any_size_are_compiled_twice(make, backend, loss_inside):
    torch.manual_seed(0)
    model = make()
    losses = cross_entropy(model)
    options = dict(backend=backend, fullgraph=True)
    compiled = torch.compile(losses, **options) if loss_inside else cross_entropy(torch.compile(model, **options))
    for B in (5, 5, 6, 7, 9, 5):
        batch = images_and_labels(B, *((5, 8) if make is transformer else (4,)))
        assert check_step(model, losses, compiled, *batch) == [True]
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_a_batch_of_one():
    model = mlp()
    compiled = cross_entropy(torch.compile(model, backend="aot_eager", fullgraph=True))
    for B in (1, 3, 1):
        assert check_step(model, cross_entropy(model), compiled, *images_and_labels(B, 4)) == [True]


class SmallCNN(nn.Module):
    """Convolutions, group norm, pooling and a linear layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU()
        )
        self.head = nn.Linear(8 * 9, 3)

    def forward(self, x):
        return self.head(self.layers(x).flatten(1))


@pytest.mark.parametrize("backend", ["aot_eager", SLOW_INDUCTOR])
def test_convolutions_in_float32(backend):
    torch.manual_seed(0)
    model = SmallCNN()
    compiled = cross_entropy(torch.compile(model, backend=backend, fullgraph=True))
    for B in (4, 20, 21):
        batch = images_and_labels(B, 1, 10, 10, dtype=torch.float32)
        assert check_step(model, cross_entropy(model), compiled, *batch, tolerance=2e-5) == [True]


@pytest.mark.parametrize("backend", ["aot_eager", SLOW_INDUCTOR])
def test_autocast(backend):
    model = nn.Sequential(Block(), nn.Linear(8, 3))
    losses = cross_entropy(model)
    compiled = cross_entropy(torch.compile(model, backend=backend, fullgraph=True))
    found = []
    for f in (compiled, losses):
        with torch.autocast("cpu", torch.bfloat16), bootgrad.record(model) as rec:
            values = f(*images_and_labels(6, 5, 8, dtype=torch.float32))
        found.append(rec.backward(values).sq_norms)
    torch.testing.assert_close(*found, rtol=3e-2, atol=1e-3)


def test_the_users_backend_compiles():
    model, seen = mlp(), []

    def backend(graph, example_inputs):
        seen.append(len(example_inputs))
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = cross_entropy(torch.compile(model, backend=backend))
    check_step(model, cross_entropy(model), compiled, *images_and_labels(5, 4))
    assert seen == [6]  # x, four parameters and the probe
    compiled(*images_and_labels(5, 4))  # outside of recordings
    assert seen == [6, 5]


def test_operations_without_a_rule_run_as_written_with_a_warning_that_names_them():
    model, x, y = models.make(models.Unknown)

    def losses(x, y):
        return models.loss_of(model(x), y)

    compiled = torch.compile(losses, backend="aot_eager")
    with pytest.warns(BootgradWarning) as warned:
        calls = check_step(model, losses, compiled, x, y)
        check_step(model, losses, compiled, x, y)
    assert not any(calls)
    (message,) = [str(w.message) for w in warned if "as it was written" in str(w.message)]
    assert "einsum on form has no rule" in message


def test_large_parameters_that_are_used_twice_run_as_written(monkeypatch):
    model, x, y = models.make(models.Tied)

    def losses(x, y):
        return models.loss_of(model(x), y)

    monkeypatch.setattr("bootgrad.traced.CHUNK_BYTES", 100)
    with pytest.warns(BootgradWarning, match="as it was written.* of several uses, would not fit memory"):
        assert not any(check_step(model, losses, torch.compile(losses, backend="aot_eager"), x, y))


class Interrupted(nn.Module):
    """Graphs, an uncompiled function of a parameter, a loop that Dynamo gives up on, and a part without parameters."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.double()

    @torch.compiler.disable
    def weight(self):
        return self.w.t() * 2

    def forward(self, x):
        x = torch.tanh(self.a(x))
        for k in range(2):
            try:
                x = torch.tanh(F.linear(x, self.weight()) if k else self.b(x))
                torch._dynamo.graph_break()
            finally:
                x = x + 1
        torch._dynamo.graph_break()
        x = x.sin() * 2
        torch._dynamo.graph_break()
        return self.c(x)


@pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")
def test_graph_breaks():
    model = Interrupted()
    compiled = cross_entropy(torch.compile(model, backend="aot_eager"))
    for B in (4, 4, 5):
        calls = check_step(model, cross_entropy(model), compiled, *images_and_labels(B, 4))
    assert any(calls) and len(calls) > 1


def test_parts_that_are_compiled_in_place_share_what_is_compiled():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return torch.tanh(self.linear(x))

    model = nn.Sequential(Part(), Part(), Part(), nn.Linear(4, 3)).double()
    x, y = images_and_labels(5, 4)
    G = oracle(cross_entropy(model)(x, y), model)
    for part in model[:3]:
        part.compile(backend="aot_eager", fullgraph=True)
    with bootgrad.record(model) as rec:
        losses = cross_entropy(model)(x, y)
    assert compiled_calls(rec) == [True, True, True, False]
    torch.testing.assert_close(rec.backward(losses).sq_norms, reference.sq_norms(G))
    assert counters["stats"]["unique_graphs"] == 2  # inputs that require grad, and that do not


@pytest.mark.parametrize("where", ["whole", "part", "both"])
def test_parameters_have_the_names_that_they_have_uncompiled(where):
    plain, model = mlp(), mlp()
    if where != "whole":
        model[0] = torch.compile(model[0], backend="aot_eager")
    if where != "part":
        model = torch.compile(model, backend="aot_eager")
    assert is_compiled(model) and not is_compiled(plain)
    batch, center = images_and_labels(5, 4), {name: torch.randn_like(p) for name, p in plain.named_parameters()}
    found = []
    for m in (plain, model):
        with bootgrad.record(m, compiled=False) as rec:
            losses = cross_entropy(m)(*batch)
        found.append(rec.backward(losses, center=center))
    assert list(found[1].per_parameter) == list(rec.parameters) == list(center)
    torch.testing.assert_close(found[1].deviation_sq_norms, found[0].deviation_sq_norms)
    own = dict(zip(dict(model.named_parameters()), center.values(), strict=True))  # as torch names them
    assert list(own) != list(center)
    for other in (own, torch.cat([c.flatten() for c in center.values()])):
        with bootgrad.record(model, compiled=False) as rec:
            losses = cross_entropy(model)(*batch)
        sq_norms = rec.backward(losses, center=other).deviation_sq_norms
        torch.testing.assert_close(sq_norms, found[0].deviation_sq_norms)

    for moving in ("ema", "window"):
        regs = [bootgrad.GradientRegularizer(m, reg1=0.1, center=moving) for m in (plain, model, model)]
        regs[0].backward(cross_entropy(plain), *batch)
        state = regs[0].state_dict()
        regs[1].load_state_dict(state)
        torchs = state["centers"]["reg1"]  # a state in which names are torch's
        for key in {"mean", "window", "sum"} & set(torchs):
            torchs[key] = {name: torchs[key][written] for name, written in zip(own, center, strict=True)}
        regs[2].load_state_dict(state)
        for _ in range(2):
            reports = [r.backward(cross_entropy(m), *batch) for r, m in zip(regs, (plain, model, model), strict=True)]
            for report in reports[1:]:
                torch.testing.assert_close(report.reg1, reports[0].reg1)
    fixed = bootgrad.GradientRegularizer(model, reg1=0.1, center=own)
    report = fixed.backward(cross_entropy(model), *batch)
    torch.testing.assert_close(report.reg1, found[0].deviation_sq_norms.mean())


def test_names_that_are_one_without_a_wrapper_are_refused():
    model = nn.Linear(2, 2, bias=False)
    model.add_module("_orig_mod", nn.Linear(2, 2, bias=False))
    with pytest.raises(UnsupportedError, match="two parameters are called weight"):
        bootgrad.record(model)
    names = {"weight": torch.zeros(2, 2), "_orig_mod.weight": torch.zeros(2, 2)}
    with pytest.raises(ArgumentError, match="by two names"):
        bootgrad.GradientRegularizer(nn.Linear(2, 2, bias=False), reg1=0.1, center=names)


def test_other_models_in_the_same_function():
    first, second = mlp(), mlp()

    def losses(x, y):
        return cross_entropy(second)(torch.cat([torch.tanh(first(x)), x[:, :1]], 1), y)

    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    batch = images_and_labels(5, 4)
    for model in (first, second, first):
        with bootgrad.record(model) as rec:
            values = compiled(*batch)
        assert compiled_calls(rec) == [True]
        first.zero_grad(), second.zero_grad()
        sq_norms = rec.backward(values).sq_norms
        torch.testing.assert_close(sq_norms, reference.sq_norms(oracle(losses(*batch), model)))
        plain = torch.autograd.grad(losses(*batch).mean(), [*first.parameters(), *second.parameters()])
        torch.testing.assert_close([p.grad for p in (*first.parameters(), *second.parameters())], list(plain))
    assert counters["stats"]["unique_graphs"] == 1


def test_two_recordings_at_once_see_it_as_written():
    first, second = mlp(), mlp()

    def losses(x, y):
        return cross_entropy(second)(torch.cat([torch.tanh(first(x)), x[:, :1]], 1), y)

    compiled = torch.compile(losses, backend="aot_eager")
    with pytest.warns(BootgradWarning, match="as it was written"):
        with bootgrad.record(first) as a, bootgrad.record(second) as b:
            values = compiled(*images_and_labels(5, 4))
    norms = a.backward(values, retain_graph=True).sq_norms, b.backward(values).sq_norms
    expected = [reference.sq_norms(oracle(losses(*images_and_labels(5, 4)), m)) for m in (first, second)]
    torch.testing.assert_close(list(norms), expected)


def test_a_frozen_part_and_a_part_without_gradients():
    model = mlp()
    model[0].requires_grad_(False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def losses(module):
        def of(x, y):
            with torch.no_grad():
                target = module(x)
            return cross_entropy(module)(x, y) + (module(x) - target.tanh()).square().sum(1)

        return of

    with bootgrad.record(model) as rec:
        values = losses(compiled)(*images_and_labels(5, 4))
    with pytest.raises(BootgradError, match="2.weight, 2.bias, which several operations use"):  # of two calls
        rec.backward(values)

    def once(module):
        def of(x, y):
            with torch.no_grad():
                target = module(x)
            return (module(x) - target.tanh()).square().sum(1)

        return of

    assert check_step(model, once(model), once(compiled), *images_and_labels(5, 4)) == [True]


def test_weights_scales_and_kept_graphs():
    model = mlp()
    x, y = images_and_labels(5, 4)
    compiled = cross_entropy(torch.compile(model, backend="aot_eager"))
    weights = torch.tensor([1.0, 2.0, 0.0, -1.0, 0.5], dtype=torch.float64)
    with bootgrad.record(model, check="always") as rec:
        losses = compiled(x, y)
    first = rec.backward(losses, reduction=weights, retain_graph=True)
    expected = torch.autograd.grad((weights * cross_entropy(model)(x, y)).sum(), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))
    second = rec.backward(losses, reduction="sum")
    torch.testing.assert_close(first.sq_norms, second.sq_norms)
    with pytest.raises(BootgradError, match="freed"):
        rec.backward(losses)


REFUSED = {
    "coupled samples": (lambda m: lambda x: (m(x) - m(x).mean(0)).square().sum(1), "coupled after a compiled function"),
    "batch norm": (
        lambda m: lambda x: m[1:](F.batch_norm(m[0](x), None, None, training=True)).sum(1),
        "batch_norm in training mode",
    ),
    "random weights": (lambda m: lambda x: F.linear(x, F.dropout(m[0].weight)).sum(1), "comes out differently"),
    "unseen": (lambda m: lambda x: m(x).sum(1) + torch.cumsum(m[0].weight, 0)[0, 0], None),
    "other rows": (lambda m: lambda x: m(x.flatten(0, 1)).view(len(x), -1).sum(1), None),
}


@pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_right_or_refused(name):
    make, message = REFUSED[name]
    model = mlp()
    function = make(model)
    compiled = torch.compile(function, backend="aot_eager")
    x = images_and_labels(5, 6, 4)[0] if name == "other rows" else images_and_labels(5, 4)[0]
    if message is None:
        check_step(model, function, compiled, x)
        return
    with pytest.raises(BootgradError, match=message):
        with bootgrad.record(model) as rec:
            losses = compiled(x)
        rec.backward(losses)
    assert all(p.grad is None for p in model.parameters())


def test_what_compiled_functions_do_not_have():
    model = mlp()
    x, y = images_and_labels(6, 4)
    compiled = torch.compile(model, backend="aot_eager")

    def recorded(losses_of, **options):
        with bootgrad.record(model, **options) as rec:
            losses = losses_of(compiled(x))
        return rec, losses

    def loss(output):
        return F.cross_entropy(output, y, reduction="none")

    for act in (
        lambda rec, losses: rec.per_sample_gradients(losses),
        lambda rec, losses: rec.per_sample_gradients(losses, create_graph=True),
        lambda rec, losses: rec.backward(losses, center={n: torch.zeros_like(p) for n, p in model.named_parameters()}),
    ):
        with pytest.raises(BootgradError, match=r"cannot be had: .*record\(model, compiled=False\)"):
            act(*recorded(loss))
        act(*recorded(loss, compiled=False))
        model.zero_grad()
    with pytest.raises(BootgradError, match="norms of 0.weight, which several operations use"):
        rec, losses = recorded(lambda output: loss(output) + F.linear(torch.tanh(x), model[0].weight).sum(1))
        rec.backward(losses)
    with pytest.raises(BootgradError, match="6 rows in dimension 0 for 3 losses.*compiled=False"):
        rec, losses = recorded(lambda output: loss(output).view(3, 2).sum(1))
        rec.backward(losses)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("used", [True, False])
def test_nothing_stays_behind(backend, used):
    model = mlp()
    compiled = cross_entropy(torch.compile(model, backend=backend))
    batch = images_and_labels(5, 4)
    for _ in range(2):
        with bootgrad.record(model) as rec:
            losses = compiled(*batch)
        kept = weakref.ref(rec), weakref.ref(rec.operations[0])
        gc.collect()
        gc.disable()
        try:
            if used:
                rec.backward(losses)
            del rec, losses
            assert not any(r() for r in kept)
        finally:
            gc.enable()


def test_a_regularizer_takes_first_order_passes_of_a_compiled_model():
    model = mlp()
    x, y = images_and_labels(8, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    reg = bootgrad.GradientRegularizer(compiled, reg1=0.1, reg2=0.1, center="ema", method="auto")
    assert reg.method == "random_signs"
    for _ in range(3):
        report = reg.backward(cross_entropy(compiled), x, y)
    assert report.method == "random_signs" and counters["stats"]["unique_graphs"] == 1
    assert bootgrad.GradientRegularizer(model, reg1=0.1, method="auto").method == "exact"


@pytest.mark.parametrize("options", [{}, {"method": "finite_difference"}, {"fraction": 0.5}])
@pytest.mark.parametrize("penalty", [{"reg1": 0.1}, {"reg2": 0.1, "center": "ema"}])
def test_other_methods_run_it_as_written_and_plain_steps_compiled(options, penalty):
    model = mlp()
    batch = images_and_labels(8, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for module in (compiled, model):
        torch.manual_seed(0)
        reg = bootgrad.GradientRegularizer(module, every=2, **options, **penalty)
        methods = []
        for _ in range(3):
            model.zero_grad()
            report = reg.backward(cross_entropy(module), *batch)
            methods.append(report.method)
        assert methods[1:] == ["plain", reg.method] and counters["stats"]["unique_graphs"]
        found.append([report.covariance_trace, *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*found)
