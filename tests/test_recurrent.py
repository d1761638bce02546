"""Recurrent layers written out beside torch's own: outputs and derivatives; what `replace_rnn` changes, and what not."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import bootgrad
from bootgrad import recurrent

from .recurrent_layers import (
    EACH_KIND,
    EXACT,
    IN,
    KINDS,
    B,
    H,
    T,
    data,
    layer_of,
    losses_of,
    pack,
    replaced,
    tensors_in,
)

pytestmark = pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")

LAYOUTS = {
    "padded": lambda x, batch_first: x if batch_first else x.transpose(0, 1),
    "one step of one": lambda x, batch_first: x[:1, :1],
    "unbatched": lambda x, batch_first: x[0],
    "packed": lambda x, batch_first: pack(x),
    "packed, sorted": lambda x, batch_first: pack(x, sort=True),
    "packed, alike": lambda x, batch_first: pack_padded_sequence(x, [T] * B, batch_first=True),
}


def first_states(layer, batch):
    count = layer.num_layers * (1 + layer.bidirectional)
    shape = (count,) if batch is None else (count, batch)
    h, c = data(*shape, layer.proj_size or H, seed=2), data(*shape, H, seed=3)
    return (h, c) if isinstance(layer, nn.LSTM) else h


# Layers and dropout; whether bidirectional, batch first, with biases, with given states. Every fifth has all pairs of them.
OPTIONS = [*itertools.product([(1, 0.0), (2, 0.0), (3, 0.4)], *[[False, True]] * 4)]


@EACH_KIND
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [OPTIONS[::5], pytest.param(OPTIONS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_outputs_and_gradients_are_torch_s(kind, layout, options):
    batch = {"unbatched": None, "one step of one": 1}.get(layout, B)
    for (layers, dropout), bidirectional, batch_first, bias, given in options:
        settings = dict(num_layers=layers, dropout=dropout, bidirectional=bidirectional)
        fused = layer_of(kind, bias=bias, batch_first=batch_first, **settings)
        results = []
        for layer in (fused, replaced(fused)):
            x = data(B, T, IN).requires_grad_()
            hx = first_states(layer, batch) if given else None
            torch.manual_seed(7)  # of dropout
            output = layer(LAYOUTS[layout](x, batch_first), hx)
            total = sum(t.sin().sum() for t in tensors_in(output) if t.is_floating_point())
            grads = torch.autograd.grad(total, [x, *layer.parameters()], create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in grads), [x, *layer.parameters()])
            results.append((output, torch.cat([g.flatten() for g in (*grads, *second)])))
        (expected, gradients), (ours, our_gradients) = results
        assert type(ours[0]) is type(expected[0]) and type(ours[1]) is type(expected[1])
        torch.testing.assert_close(tensors_in(ours), tensors_in(expected), rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(our_gradients, gradients, **EXACT)


def test_inputs_that_do_not_fit_are_refused():
    lstm, gru = replaced(layer_of("lstm", batch_first=True)), replaced(layer_of("gru"))
    h = torch.zeros(1, B, H).double()
    for call, message in (
        (lambda: lstm(data(IN)), r"3-D, or 2-D for one sample; got shape \(3,\)"),
        (lambda: lstm(data(B, T, IN), h), r"hx of LSTM must be \(h_0, c_0\); got 1"),
        (lambda: gru(data(T, B, IN), (h, h)), "hx of GRU must be h_0; got 2"),
        (lambda: lstm(data(B, T, IN), (h, h[:, :1])), r"Expected hidden size \(1, 4, 4\), got \[1, 1, 4\]"),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            call()


@EACH_KIND
def test_layers_change_their_class_and_nothing_else(kind):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.ModuleDict({"a": nn.Sequential(nn.Linear(IN, IN), layer_of(kind))})
            self.again = self.first["a"][1]
            self.rnns = [self.again]

    model = Shared()
    fused = model.again
    fused.weight_hh_l0.requires_grad_(False)
    fused.eval()
    calls = []
    fused.register_forward_hook(lambda *_: calls.append("forward"))
    parameters, text, state = dict(model.named_parameters()), repr(model), copy.deepcopy(model.state_dict())
    expected = fused(data(T, B, IN))
    assert bootgrad.replace_rnn(model) is model
    assert type(model.again) is getattr(recurrent, KINDS[kind][0].__name__) and isinstance(model.again, KINDS[kind][0])
    assert model.again is fused and model.first["a"][1] is fused and model.rnns[0] is fused
    assert not fused.training and model.training and repr(model) == text
    assert all(p is parameters[name] for name, p in model.named_parameters())
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    fused.flatten_parameters()
    torch.testing.assert_close(tensors_in(fused(data(T, B, IN))), tensors_in(expected), **EXACT)
    assert calls == ["forward"] * 2
    cls = type(fused)
    bootgrad.replace_rnn(model)
    assert type(fused) is cls and type(model.first["a"][0]) is nn.Linear


@EACH_KIND
def test_copies_files_and_states(kind):
    fused = layer_of(kind, num_layers=2, bidirectional=True)
    ours, x = replaced(fused), data(T, B, IN)
    fresh = type(ours)(IN, H, **KINDS[kind][1], num_layers=2, bidirectional=True).double()
    fresh.load_state_dict(fused.state_dict())
    other = layer_of(kind, seed=3, num_layers=2, bidirectional=True)
    other.load_state_dict(ours.state_dict())
    expected = tensors_in(fused(x))
    for layer in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), fresh, other):
        assert type(layer) is (type(fused) if layer is other else type(ours))
        torch.testing.assert_close(tensors_in(layer(x)), expected, **EXACT)
    single = copy.deepcopy(ours).float()
    assert single(x.float())[0].dtype == torch.float32


def test_reparametrized_weights():
    """By hooks, which come along, and by parametrizations of the layer written out."""
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        hooked = nn.utils.weight_norm(layer_of("lstm", batch_first=True), "weight_hh_l0")
    bootgrad.replace_rnn(hooked)
    parametrized = parametrizations.weight_norm(replaced(layer_of("lstm", batch_first=True)), "weight_hh_l0")
    assert bootgrad.replace_rnn(parametrized) is parametrized
    for layer in (hooked, parametrized):
        assert bootgrad.verify(layer, lambda x, layer=layer: losses_of(lambda x: layer(x)[0], x), data(B, T, IN)).ok
    late = nn.Sequential(nn.LSTM(IN, H), parametrizations.weight_norm(nn.LSTM(IN, H), "weight_hh_l0"))
    with pytest.raises(bootgrad.BootgradError, match="1 is a ParametrizedLSTM, .*parametrize it after replace_rnn"):
        bootgrad.replace_rnn(late)
    assert type(late[0]) is nn.LSTM


def test_derived_classes():
    class Own(nn.GRU):
        pass

    class Written(nn.GRU):
        def forward(self, input, hx=None):
            return input

    with pytest.raises(bootgrad.BootgradError, match="the module is a Own, .*derive it from bootgrad.recurrent.GRU"):
        bootgrad.replace_rnn(Own(IN, H))
    assert type(bootgrad.replace_rnn(Written(IN, H))) is Written


@EACH_KIND
def test_fused_layers_are_refused_with_the_remedy(kind):
    layer = layer_of(kind)
    with pytest.raises(
        bootgrad.BootgradError, match=r"hides how it uses weight_ih_l0.*Call bootgrad.replace_rnn\(model\)"
    ):
        with bootgrad.record(layer):
            layer(data(T, B, IN))
