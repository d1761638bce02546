"""Cells of recurrent networks, one call each in torch, written out in linear layers and pointwise operations.

    RNN     h' = φ(a + b)                           φ = tanh or ReLU
    LSTM    c' = σ(f) c + σ(i) tanh(g)              h' = σ(o) tanh(c')          (i, f, g, o) = a + b
    GRU     h' = n + σ(z) (h − n)                   n = tanh(a_n + σ(r) b_n)    (r, z) = a_rz + b_rz

with a = W_ih x + b_ih and b = W_hh h + b_hh. Letters: ``B`` samples, ``H`` hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Recorder, rule


def lstm_state(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The next h and c (B, H) from the sum of an LSTM's products, (B, 4H)."""
    i, f, g, o = gates.chunk(4, 1)
    c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
    return o.sigmoid() * c.tanh(), c


def gru_state(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """The next h (B, H) from a GRU's products of x and of h, (B, 3H) each."""
    H = h.size(1)
    (a_rz, a_n), (b_rz, b_n) = (t.split((2 * H, H), 1) for t in (a, b))
    r, z = (a_rz + b_rz).sigmoid().chunk(2, 1)
    n = torch.addcmul(a_n, r, b_n).tanh()
    return torch.addcmul(n, z, h - n)


@rule(torch.rnn_tanh_cell, torch.rnn_relu_cell)
def _rnn_cell(recorder: Recorder, func, args, kwargs):
    a, b, _ = _products(recorder, *args, **kwargs)
    return torch.tanh(a + b) if func is torch.rnn_tanh_cell else torch.relu(a + b)


@rule(torch.lstm_cell)
def _lstm_cell(recorder: Recorder, func, args, kwargs):
    a, b, (_, c) = _products(recorder, *args, **kwargs)
    return lstm_state(a + b, c)


@rule(torch.gru_cell)
def _gru_cell(recorder: Recorder, func, args, kwargs):
    a, b, (h,) = _products(recorder, *args, **kwargs)
    return gru_state(a, b, h)


def _products(
    recorder: Recorder, input, hx, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A cell's products a and b, and the state before; samples' own, all of them."""
    input, *states = (_of_samples(recorder, t) for t in (input, *([hx] if isinstance(hx, Tensor) else hx)))
    return recorder.run(F.linear, input, w_ih, b_ih), recorder.run(F.linear, states[0], w_hh, b_hh), states


def _of_samples(recorder: Recorder, t: Tensor) -> Tensor:
    """``t`` (B, ·), where it may be made of parameters or constants alone, as data with a row for each sample."""
    if t.requires_grad and not recorder.is_tracked(t):
        return t
    return recorder.run(torch.add, t, torch.zeros_like(t))
