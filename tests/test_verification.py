"""`verify` agrees where the library is right, and says so where it is not."""

import pytest
import torch
from torch import nn

import bootgrad
from bootgrad import BootgradError
from bootgrad.ops.convolution import ConvProduct

from .models import SHAPES, Convolutions, Residual, Tied, loss_of, make

pytestmark = pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning", "ignore:Using padding='same' with even")


@pytest.mark.parametrize("kind", SHAPES, ids=lambda k: k.__name__)
def test_agreement_on_every_model(kind, capsys):
    model, x, target = make(kind)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    result = bootgrad.verify(model, lambda x, t: loss_of(model(x), t), x, target)
    assert result.ok and result.samples == 4
    assert [r.name for r in result.rows] == [n for n, p in model.named_parameters() if p.requires_grad]
    assert max(max(r.norms, r.mean, r.reg1) for r in result.rows) < 1e-9
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    printed = capsys.readouterr().out
    assert "agrees with plain autograd on 4 samples" in printed and result.rows[0].name in printed


@pytest.mark.parametrize("part", [False, True])
def test_a_compiled_model_is_compared_as_it_was_written(part):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    names = [name for name, _ in model.named_parameters()]
    if part:
        model[0] = torch.compile(model[0], backend="aot_eager")
    else:
        model = torch.compile(model, backend="aot_eager")
    x = torch.randn(5, 3, dtype=torch.float64)
    torch._dynamo.reset()
    try:
        model(x)  # so that there is compiled code to be kept from
        result = bootgrad.verify(model, lambda x: model(x).square().sum(1), x)
        assert result.ok and [r.name for r in result.rows] == names
        assert {r.rule for r in result.rows} == {"linear"}
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_rounding_alone_is_no_difference(dtype):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    model, x = nn.Sequential(*layers).to(dtype), torch.randn(4, 1, 8, 8, dtype=dtype)
    result = bootgrad.verify(model, lambda x: model(x).square().sum(1), x)
    assert result.ok and result.rows[1].name == "0.bias"


def test_rules_are_named():
    model, x, target = make(Tied)
    rows = {r.name: r.rule for r in bootgrad.verify(model, lambda x, t: loss_of(model(x), t), x, target).rows}
    assert rows["conv.weight"] == "conv2d" and rows["conv.bias"] == "conv2d + add" and rows["up.weight"] == "linear"


def test_a_wrong_number_is_seen(monkeypatch, capsys):
    """As where groups are ignored, a known fault elsewhere."""
    model, x, target = make(Convolutions)
    right = ConvProduct.statistics

    def wrong(self, x, gy, center):
        out = right(self, x, gy, center)
        return out._replace(sq_norms=out.sq_norms * 1.5) if self.groups > 1 else out

    monkeypatch.setattr(ConvProduct, "statistics", wrong)
    monkeypatch.setattr(ConvProduct, "visit", _scaled_norms(ConvProduct.visit))
    result = bootgrad.verify(model, lambda x, t: loss_of(model(x), t), x, target)
    assert not result.ok and "DIFFERS" in capsys.readouterr().out
    bad = {r.name for r in result.rows if r.norms > 1e-6}
    assert bad == {"layers.0.weight", "layers.2.weight"}


def _scaled_norms(right):
    def wrong(self, x, gy, centers, mask, scale=1.0):
        out = right(self, x, gy, centers, mask, scale)
        return out._replace(sq_norms=out.sq_norms * 1.5) if self.groups > 1 else out

    return wrong


def test_samples_are_cut_and_checked():
    model, x, target = make(Residual, batch=7)
    seen = []

    def loss_fn(x, t):
        seen.append(len(x))
        return loss_of(model(x), t)

    assert bootgrad.verify(model, loss_fn, x, target, samples=3).samples == 3
    assert seen == [3, 3]
    with pytest.raises(BootgradError, match="at least two"):
        bootgrad.verify(model, loss_fn, x, target, samples=1)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda out: out.square().sum(), r'shape \(B,\).*reduction="none"'),
        (lambda out: out.square(), "one loss per sample"),
        (lambda out: out.square().sum(1).detach(), "requires grad"),
        (lambda out: 3.0, "must be a tensor"),
        (lambda out: out.square().sum(1) * torch.nan, "NaN or infinite"),
    ],
)
def test_losses_are_checked_first(loss_fn, message):
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(BootgradError, match=message):
        bootgrad.verify(model, lambda x: loss_fn(model(x)), x)


def test_frozen_models_are_refused():
    model = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(BootgradError, match="no parameter that requires grad"):
        bootgrad.verify(model, lambda x: model(x).sum(1), torch.randn(4, 3))


class Counting(nn.Module):
    """Two buffers that a forward pass changes: one in place, one by another tensor."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        x = self.linear(x)
        self.calls += 1
        self.mean = x.detach().mean(0)
        return x


def test_buffers_stay_as_they_are():
    model, x = Counting(), torch.randn(4, 3)
    before = dict(model.named_buffers())
    assert bootgrad.verify(model, lambda x: model(x).square().sum(1), x).ok
    assert all(b is before[name] and not b.any() for name, b in model.named_buffers())
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with pytest.raises(BootgradError, match="batch_norm in training mode"):
        bootgrad.verify(model, lambda x: model(x).square().sum(1), x)
    assert torch.equal(model[1].running_mean, torch.zeros(2)) and model[1].num_batches_tracked == 0
