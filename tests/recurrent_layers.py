"""Small recurrent layers of every kind, and what is put into them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import bootgrad

B, T, IN, H = 4, 5, 3, 4  # samples, steps, inputs, hidden
LENGTHS = torch.tensor([2, 5, 5, 3])
KINDS = {
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, {}),
    "projected": (nn.LSTM, {"proj_size": 2}),
    "gru": (nn.GRU, {}),
}
CELLS = {"tanh": nn.RNNCell, "relu": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EXACT = dict(rtol=1e-10, atol=1e-12)


def layer_of(kind, seed=0, **options):
    torch.manual_seed(seed)
    cls, own = KINDS[kind]
    return cls(IN, H, **own, **options).double()


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pack(x, sort=False):
    lengths = LENGTHS.sort(descending=True)[0] if sort else LENGTHS
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=sort)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value if v is not None for t in tensors_in(v)]


def replaced(model):
    return bootgrad.replace_rnn(copy.deepcopy(model))


def losses_of(model, x):
    """(B,)."""
    return model(x).sin().square().sum((1, 2))
