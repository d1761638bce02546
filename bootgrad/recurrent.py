"""Recurrent layers written out: torch's fused kernels hide how they use their parameters, so that no recording sees them.

W_ih x of all steps is one product, W_hh h one for each step; what lies between them is pointwise, see `rules.recurrent`.

Letters: ``B`` samples, ``T`` steps, ``N`` rows of a packed sequence, ``I`` in, ``H`` hidden, ``L`` layers,
``D`` directions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .errors import ArgumentError, ArgumentTypeError
from .rules.recurrent import gru_state, lstm_state

_State = tuple[Tensor, ...]  # h, and of an LSTM c
_Masks = list[Tensor | None]  # which samples take part in a step, (B, 1); None for all of them


def replace_rnn(module: nn.Module) -> nn.Module:
    """Write out every ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` in a module, so that a recording sees what they do.

    The layers themselves change their class, to one that is derived from torch's: parameters, ``state_dict``, hooks, flags and
    outputs stay as they are. Step by step they are slower than the kernels, the more so on GPUs. Cells (``nn.LSTMCell`` and the
    like) are recorded without this.

    Args:
        module: changed in place. Layers of derived classes with a ``forward`` of their own are left alone.

    Returns:
        ``module``.

    Raises:
        ArgumentError: a layer of a derived class, parametrized ones among them, that would run torch's kernel. Nothing has
            changed then.
    """
    layers = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.RNNBase)]
    for name, layer in layers:
        kind = next((cls for cls in _WRITTEN_OUT if type(layer).forward is cls.forward), None)
        if kind is not None and type(layer) is not kind:
            raise ArgumentError(
                f"{name or 'the module'} is a {type(layer).__name__}, which is derived from nn.{kind.__name__} and runs its "
                f"kernel: derive it from bootgrad.recurrent.{kind.__name__} instead, or parametrize it after replace_rnn"
            )
    for _, layer in layers:
        layer.__class__ = _WRITTEN_OUT.get(type(layer), type(layer))
    return module


class _WrittenOut(nn.RNNBase):
    """What the layers have in common."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As torch's own layer, step by step."""
        layout = _Packed(input) if isinstance(input, PackedSequence) else _Padded(input, self.batch_first)
        x = layout.samples(layout.data)  # (B, T, I)
        states = self._first_states(x, hx, layout.is_batched)
        weights, directions = self.all_weights, 1 + self.bidirectional
        for first in range(0, len(states), directions):
            ys = []
            for k in range(first, first + directions):
                y, states[k] = self._run(x, states[k], weights[k], layout.masks, backwards=k > first)
                ys.append(y)
            x = ys[0] if directions == 1 else torch.cat(ys, 2)
            if self.dropout and self.training and first + directions < len(states):
                x = layout.dropout(x, self.dropout)
        last = [torch.stack(parts) for parts in zip(*states, strict=True)]  # (L · D, B, ·)
        if not layout.is_batched:
            last = [t.squeeze(1) for t in last]
        return layout.result(x), last[0] if len(last) == 1 else tuple(last)

    def _first_states(self, x: Tensor, hx: Any, is_batched: bool) -> list[_State]:
        """The state (B, ·) that each layer and direction begins with."""
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 1 + (self.mode == "LSTM")]
        zeros = tuple(x.new_zeros(x.size(0), size) for size in sizes)
        count = self.num_layers * (1 + self.bidirectional)
        if hx is None:
            return [zeros] * count
        given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if len(given) != len(zeros):
            raise ArgumentTypeError(
                f"hx of {type(self).__name__} must be {('h_0', '(h_0, c_0)')[len(zeros) - 1]}; got {len(given)} tensors"
            )
        if not is_batched:
            given = tuple(t.unsqueeze(1) for t in given)
        for zero, t in zip(zeros, given, strict=True):
            self.check_hidden_size(t, (count, *zero.shape))
        # What is made of parameters alone, a learned first state, becomes the samples' own when it is added to their zeros.
        return [tuple(zero + t[k] for zero, t in zip(zeros, given, strict=True)) for k in range(count)]

    def _run(
        self, x: Tensor, state: _State, weights: Sequence[Tensor], masks: _Masks, backwards: bool
    ) -> tuple[Tensor, _State]:
        """A layer's outputs in one direction, (B, T, H), and its last state."""
        w_ih, w_hh, *rest = weights
        b_ih, b_hh = rest[:2] if self.bias else (None, None)
        a = F.linear(x, w_ih, b_ih)  # (B, T, gates · H)
        if b_hh is not None and self.mode != "GRU":  # a GRU's is within its reset gate
            a, b_hh = a + b_hh, None
        projection = rest[-1] if self.proj_size else None
        steps = list(zip(a.unbind(1), masks, strict=True))
        ys = []
        for a_t, mask in reversed(steps) if backwards else steps:
            b = F.linear(state[0], w_hh, b_hh)
            after = self._next(a_t, b, state)
            if projection is not None:
                after = (F.linear(after[0], projection), *after[1:])
            if mask is not None:
                after = tuple(torch.where(mask, new, old) for new, old in zip(after, state, strict=True))
            state = after
            ys.append(state[0])
        return torch.stack(ys[::-1] if backwards else ys, 1), state

    def _next(self, a: Tensor, b: Tensor, state: _State) -> _State:
        """The state after a step with the products ``a`` of its input and ``b`` of the state before, (B, gates · H)."""
        if self.mode == "LSTM":
            return lstm_state(a + b, state[1])
        if self.mode == "GRU":
            return (gru_state(a, b, state[0]),)
        return ((a + b).tanh() if self.mode == "RNN_TANH" else (a + b).relu(),)


class RNN(_WrittenOut, nn.RNN):
    """`torch.nn.RNN`, written out."""


class LSTM(_WrittenOut, nn.LSTM):
    """`torch.nn.LSTM`, written out."""


class GRU(_WrittenOut, nn.GRU):
    """`torch.nn.GRU`, written out."""


_WRITTEN_OUT: dict[type[nn.RNNBase], type[nn.RNNBase]] = {nn.RNN: RNN, nn.LSTM: LSTM, nn.GRU: GRU}


class _Padded:
    """The layout of one tensor, (B, T, ·), (T, B, ·), or (T, ·) of one sample."""

    def __init__(self, data: Tensor, batch_first: bool):
        """Take in the layer's input."""
        if data.dim() not in (2, 3):
            raise ArgumentError(f"input must be 3-D, or 2-D for one sample; got shape {tuple(data.shape)}")
        self.batch_first, self.is_batched = batch_first, data.dim() == 3
        self.data = data if self.is_batched else data.unsqueeze(1 - batch_first)
        self.masks: _Masks = [None] * self.data.size(int(batch_first))

    def samples(self, data: Tensor) -> Tensor:
        """(B, T, ·)."""
        return data if self.batch_first else data.transpose(0, 1)

    def dropout(self, y: Tensor, p: float) -> Tensor:
        """Dropout of ``y`` (B, T, ·), by the random numbers that torch's kernel takes."""
        return F.dropout(y.transpose(0, 1).contiguous(), p).transpose(0, 1)

    def result(self, y: Tensor) -> Tensor:
        """The layer's output from ``y`` (B, T, ·)."""
        y = self.samples(y)
        return y if self.is_batched else y.squeeze(1 - self.batch_first)


class _Packed:
    """The layout of a packed sequence, (N, ·): step by step those samples that are long enough."""

    is_batched = True

    def __init__(self, packed: PackedSequence):
        """Find the place of each of the N rows among B · T, in the caller's order of samples."""
        self.packed, self.data = packed, packed.data
        sizes, device = packed.batch_sizes, packed.data.device
        T, B = len(sizes), int(sizes[0])
        steps = torch.arange(T, device="cpu").repeat_interleave(sizes)
        samples = torch.arange(len(steps), device="cpu") - (sizes.cumsum(0) - sizes)[steps]
        steps, samples = steps.to(device), samples.to(device)
        if packed.sorted_indices is not None:
            samples = packed.sorted_indices[samples]
        self.shape, self.places = (B, T), samples * T + steps  # (N,)
        goes_on = torch.zeros(B * T, dtype=torch.bool, device=device).index_fill(0, self.places, True).view(B, T, 1)
        self.masks: _Masks = [None if n == B else goes_on[:, t] for t, n in enumerate(sizes.tolist())]  # (B, 1)

    def samples(self, data: Tensor) -> Tensor:
        """(B, T, ·), zero behind a sample's end."""
        B, T = self.shape
        return data.new_zeros(B * T, data.size(1)).index_copy(0, self.places, data).view(B, T, -1)

    def dropout(self, y: Tensor, p: float) -> Tensor:
        """Dropout of ``y`` (B, T, ·), by the random numbers that torch's kernel takes."""
        return self.samples(F.dropout(self._rows(y), p))

    def result(self, y: Tensor) -> PackedSequence:
        """The layer's output from ``y`` (B, T, ·)."""
        packed = self.packed
        return PackedSequence(self._rows(y), packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)

    def _rows(self, y: Tensor) -> Tensor:
        """(N, ·) of (B, T, ·)."""
        return y.flatten(0, 1).index_select(0, self.places)
