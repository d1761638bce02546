"""`verify` agrees where the library is right, and says so where it is not."""

import pytest
import torch

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
    monkeypatch.setattr(ConvProduct, "sq_norms_with_grad", _scaled_norms(ConvProduct.sq_norms_with_grad))
    result = bootgrad.verify(model, lambda x, t: loss_of(model(x), t), x, target)
    assert not result.ok and "DIFFERS" in capsys.readouterr().out
    bad = {r.name for r in result.rows if r.norms > 1e-6}
    assert bad == {"layers.0.weight", "layers.2.weight"}


def _scaled_norms(right):
    def wrong(self, x, gy, center, mask):
        s, *rest = right(self, x, gy, center, mask)
        return (s * 1.5 if self.groups > 1 else s), *rest

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
