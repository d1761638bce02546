"""Recordings of models that are checkpointed in parts: the numbers are those of the whole, and what is saved stays saved."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bootgrad

from .layers import Uses, parameter
from .memory import peak_bytes
from .quantities import Case, deviation, finite_differences, norms, products, second_order, transposed_products

QUANTITIES = [norms, deviation, products, transposed_products, second_order, finite_differences]


class Checkpointed(nn.Module):
    """Blocks one after another, each checkpointed, or none."""

    def __init__(self, *blocks, nested=False):
        super().__init__()
        self.blocks, self.nested = nn.ModuleList(blocks), nested

    def plain(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        if self.nested:
            return checkpoint(self._each, x, use_reentrant=False)
        return self._each(x)

    def _each(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
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


@pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")
@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_quantities(make, quantity):
    torch.manual_seed(0)
    model, shape = make()
    model = model.double()
    x = torch.randn(4, *shape, dtype=torch.float64)
    if quantity is finite_differences and make is convolutions:  # kinks: another estimator
        x, model = x[:, :, :1, :1], Checkpointed(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 2, 1)).double()
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
def test_what_is_saved_stays_saved(kind):
    """Activations of one part at a time, in a first-order step."""
    torch.manual_seed(0)
    if kind == "linear":
        make, x = lambda: [nn.Linear(64, 64), nn.Tanh()], torch.randn(256, 64)
    else:
        make, x = lambda: [nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Tanh()], torch.randn(16, 8, 16, 16)
    model = Checkpointed(*(nn.Sequential(*make(), *make(), *make()) for _ in range(8)))

    def step(forward):
        with bootgrad.record(model, check="never") as rec:
            losses = forward(x).flatten(1).square().sum(1)
        rec.backward(losses)
        model.zero_grad()

    plain, ours = (peak_bytes(lambda f=f: step(f)) for f in (model.plain, model))
    torch_s_own = peak_bytes(lambda: model(x).sum().backward())
    assert ours < 0.55 * plain
    assert ours < 1.5 * torch_s_own


def test_a_backward_pass_of_one_s_own():
    """The second run knows the recording wherever it comes from."""
    torch.manual_seed(0)
    model, shape = transformer()
    model, x = model.double(), torch.randn(4, *shape, dtype=torch.float64)

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
