"""Recordings of models that are checkpointed in parts: the numbers are those of the whole, and what is saved stays saved."""

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import bootgrad

from .layers import Uses, parameter
from .memory import peak_bytes
from .quantities import Case, deviation, finite_differences, norms, products, second_order, transposed_products

QUANTITIES = [norms, deviation, products, transposed_products, second_order, finite_differences]


class Checkpointed(nn.Module):
    """Blocks one after another, each checkpointed, or none."""

    def __init__(self, *blocks, nested=False):
        super().__init__()
        self.blocks, self.nested, self.reentrant = nn.ModuleList(blocks), nested, False

    def plain(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        if self.nested:
            return checkpoint(self._each, x, use_reentrant=self.reentrant)
        return self._each(x)

    def _each(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def tied():
    inner = nn.Linear(5, 5)
    return Checkpointed(inner, nn.Tanh(), inner, nn.Sequential(nn.Tanh(), inner)), (5,)


def derived():
    w = parameter(5, 5)
    first = Uses(lambda m, x: F.linear(x, m.w * torch.eye(5) + m.w.T).tanh(), w=w)
    return Checkpointed(first, Uses(lambda m, x: F.linear(x, m.w[:3]), w=w)), (5,)


def convolutions():
    blocks = [
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        nn.Sequential(nn.ConvTranspose2d(4, 2, 2), nn.InstanceNorm2d(2, affine=True), nn.PReLU()),
    ]
    return Checkpointed(*blocks), (2, 8, 8)


def dropout():
    return Checkpointed(nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.4), nn.Tanh()), nn.Linear(8, 3)), (5,)


def transformer():
    layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)]
    return Checkpointed(*layers), (5, 8)


def nested():
    model, shape = transformer()
    model.nested = True
    return model, shape


def without_rules():
    return Checkpointed(nn.Linear(5, 4), Uses(lambda m, x: torch.outer(x.sum(1), m.w), w=parameter(3))), (5,)


MODELS = [tied, derived, convolutions, dropout, transformer, nested, without_rules]
either_kind = pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])


@pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")
@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
@either_kind
def test_quantities(make, quantity, reentrant):
    torch.manual_seed(0)
    model, shape = make()
    model = model.double()
    x = torch.randn(4, *shape, dtype=torch.float64)
    if quantity is finite_differences and make is convolutions:  # kinks: another estimator
        x, model = x[:, :, :1, :1], Checkpointed(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 2, 1)).double()
    model.reentrant = reentrant
    x.requires_grad_(reentrant)  # else the first part would have no gradients
    quantity(Case(model, [x], plain=model.plain, seed=5))


def test_each_part_runs_twice_in_a_step_without_checks():
    calls = []
    block = nn.Sequential(nn.Linear(5, 5), Uses(lambda m, x: calls.append(0) or x.tanh()), nn.Linear(5, 5))
    model = Checkpointed(block)
    with bootgrad.record(model, check="never") as rec:
        losses = model(torch.randn(4, 5)).sum(1)
    rec.backward(losses)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@either_kind
def test_what_is_saved_stays_saved(kind, reentrant):
    """Activations of one part at a time, in a first-order step."""
    torch.manual_seed(0)
    if kind == "linear":
        make, x = lambda: [nn.Linear(64, 64), nn.Tanh()], torch.randn(256, 64)
    else:
        make, x = lambda: [nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Tanh()], torch.randn(16, 8, 16, 16)
    model = Checkpointed(*(nn.Sequential(*make(), *make(), *make()) for _ in range(8)))

    model.reentrant = reentrant
    x.requires_grad_()

    def step(forward):
        with bootgrad.record(model, check="never") as rec:
            losses = forward(x).flatten(1).square().sum(1)
        rec.backward(losses)
        model.zero_grad()

    plain, ours = (peak_bytes(lambda f=f: step(f)) for f in (model.plain, model))
    torch_s_own = peak_bytes(lambda: model(x).sum().backward())
    assert ours < 0.55 * plain
    assert ours < 1.5 * torch_s_own


@either_kind
def test_a_backward_pass_of_one_s_own(reentrant):
    """The second run knows the recording wherever it comes from."""
    torch.manual_seed(0)
    model, shape = transformer()
    model, x = model.double(), torch.randn(4, *shape, dtype=torch.float64, requires_grad=True)
    model.reentrant = reentrant

    def losses(forward):
        return forward(x).square().flatten(1).sum(1)

    grads = []
    for forward in (model.plain, model):
        model.zero_grad()
        with bootgrad.record(model) as rec:
            values = losses(forward)
        G = rec.per_sample_gradients(values, create_graph=True)
        (values.mean() + 0.1 * bootgrad.reg1(G)).backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


reentrant_checkpoint = functools.partial(checkpoint, use_reentrant=True)


class Parts(nn.Module):
    """Parts of the reentrant kind and of the other, one in another, with outputs and inputs of all sorts."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.outer, self.last = (nn.Linear(4, 4) for _ in range(4))

    def part(self, run, x, factor, more):
        y = run(lambda x: self.inner(x).tanh(), x)
        aside = self.outer(x).tanh()
        return y * factor, None, {"aside": aside.sum(1), "list": [aside]}, (aside + more["y"]).tanh()

    def forward(self, x, run=reentrant_checkpoint, cut=lambda t: t):
        x = self.first(x)
        y, none, extra, z = run(self.part, run, x, 2.0, {"y": x.detach().sin()})
        assert none is None
        z = checkpoint(lambda z: run(self.outer, z).sin(), z, use_reentrant=False)
        losses = self.last(y + z).square().sum(1) + cut(extra["aside"]) * cut(extra["list"][0]).sum(1)
        unseen = cut(run(self.first, torch.ones(len(x), 4, dtype=x.dtype)))
        return losses * (1 + unseen.sum(1).square())

    def plain(self, x):
        """The same without checkpoints, cut where torch's have no gradient."""
        return self(x, lambda function, *args: function(*args), torch.Tensor.detach)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("quantity", [norms, second_order], ids=lambda f: f.__name__)
def test_gradients_are_those_of_the_reentrant_kind(quantity):
    """Of a plain backward pass, whatever that leaves out."""
    torch.manual_seed(0)
    model, x = Parts().double(), torch.randn(4, 4, dtype=torch.float64)
    grads = []
    for forward in (model, model.plain):
        model.zero_grad()
        forward(x).mean().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)
    model.zero_grad()
    quantity(Case(model, [x], plain=model.plain, losses_of=lambda losses: losses))
    assert torch.utils.checkpoint.CheckpointFunction is CheckpointFunction


def test_nobody_else_s_checkpoints_are_changed():
    """Of another thread, and of a time without a recording: their graph has torch's own node."""
    layer, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    names = []

    def run():
        names.append(checkpoint(layer, x, use_reentrant=True).grad_fn.name())

    with bootgrad.record(layer):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        run()
        with torch.no_grad():
            assert checkpoint(layer, x, use_reentrant=True).requires_grad is False
    run()
    reentrant = "CheckpointFunctionBackward"
    assert names[0] == names[2] == reentrant != names[1]
    assert torch.utils.checkpoint.CheckpointFunction is CheckpointFunction


def test_a_reentrant_function_of_somebody_s_own_is_refused_by_name():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    with bootgrad.record(layer) as rec:
        losses = layer(CheckpointFunction.apply(torch.sin, True, layer.weight.sum() + x)).sum(1)
    with pytest.raises(bootgrad.BootgradError, match="reentrant.*call torch.utils.checkpoint.checkpoint"):
        rec.backward(losses)


@pytest.mark.filterwarnings("ignore::UserWarning")
@either_kind
def test_compiled_parts_are_run_as_written_when_they_run_again(reentrant):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4), torch.randn(5, 4, requires_grad=True)
    compiled = torch.compile(lambda x: model(x).tanh(), backend="eager")
    norms = []
    for part in (compiled, lambda x: model(x).tanh()):
        with bootgrad.record(model) as rec:
            losses = checkpoint(part, x, use_reentrant=reentrant).square().sum(1)
        norms.append(rec.backward(losses).sq_norms)
    torch.testing.assert_close(*norms)
    torch._dynamo.reset()
