"""Operations without a rule: their vector-Jacobian product, one sample at a time under ``vmap``.

Right wherever the operation treats samples alike; slow, and its rows are made in full, in chunks of samples.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import RecordingError, UnsupportedError
from .base import Operation, Recorder, autocast_now, is_in_place
from .samples import SAMPLES_ELSEWHERE, Reading
from .terms import ComputedTerm, Term, vmap

# The mode sees these as one opaque call, and their kernels have no rule under vmap, or a wrong one; and what to do instead.
_PLAIN = "Write the operation with plain ones"
_REFUSED = {
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), "Call bootgrad.replace_rnn(model) first"),
    **dict.fromkeys((F.instance_norm, torch.instance_norm), _PLAIN),
    torch.Tensor.__setitem__: _PLAIN,
}


class FallbackOperation(Operation):
    """Any call with one tensor out. Tensors whose rows' dimensions are the output's are cut into samples, others are shared."""

    reads_samples = True

    def __init__(self, recorder: Recorder, func, args, kwargs, tracked: Sequence[Tensor]):
        """Keep the call; run it with ``__call__``."""
        super().__init__(recorder, getattr(func, "__name__", str(func)), tracked)
        self.func = func
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))

    def __call__(self, names: str) -> Tensor:
        """The call's result, in the record if it is one tensor that requires grad."""
        if self.func in _REFUSED:
            raise UnsupportedError(
                f"{self.name} hides how it uses {names}: its per-sample gradients cannot be had. "
                f"{_REFUSED[self.func]}, or freeze these parameters (requires_grad_(False))"
            )
        if is_in_place(self.func):
            raise UnsupportedError(
                f"{self.name} uses {names} in place, and has no rule: write it as a call that returns a new tensor"
            )
        self.autocast = autocast_now(self.tracked[0].device)
        position = {id(t): k for k, t in enumerate(self.tracked)}
        self.slots = [position.get(id(t)) if isinstance(t, Tensor) else None for t in self.leaves]
        aliases = [self.recorder.alias(t) for t in self.tracked]
        leaves = [t if k is None else aliases[k] for t, k in zip(self.leaves, self.slots, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        y = self.func(*args, **kwargs)
        if not isinstance(y, Tensor) or not y.requires_grad:
            outputs = [t for t in pytree.tree_leaves(y) if isinstance(t, Tensor) and t.requires_grad]
            if outputs:
                raise UnsupportedError(
                    f"{self.name} on {names} puts out several tensors and has no rule: freeze these parameters, or write the "
                    "operation with plain ones"
                )
            return y
        if any(y is t for t in leaves):
            y = y.view_as(y)
        elif y._is_view() and not any(_base(y) is _base(t) for t in leaves if isinstance(t, Tensor)):
            y = y.clone()  # of what was made on the way: a change in place would leave its node beside the graph
        self.versions = [t._version if isinstance(t, Tensor) else None for t in self.leaves]
        self.count_rows(y.shape)
        return self.attach(y)

    def terms(self, gy, batch_size):  # noqa: D102
        for t, version in zip(self.leaves, self.versions, strict=True):
            if isinstance(t, Tensor) and t._version != version:
                raise RecordingError(f"an input of {self.name} was changed in place after the call; clone it first")
        index = torch.arange(batch_size, device=gy.device)
        call = _Call(
            self.name, self.func, self.spec, self.slots, self.output_shape[: self.row_dims], self.reading, self.autocast
        )
        terms: list[Term] = [
            ComputedTerm(partial(call.rows, batch_size, k), index, t.shape, [gy, *self.leaves])
            for k, t in enumerate(self.tracked)
        ]
        with torch.no_grad():
            call.check_sums(gy.detach(), self.leaves, self.tracked, terms)
        return terms


def _base(t: Tensor) -> Tensor:
    """What ``t`` is a view of, or itself."""
    return t if t._base is None else t._base


@dataclass(frozen=True)
class _Call:
    """A call without its tensors: terms hold it, and must not hold the graph of the tensors."""

    name: str
    func: Callable
    spec: Any
    slots: Sequence[int | None]  # of each flat argument, which tracked tensor it is
    leading: torch.Size  # the dimensions of the output's rows
    reading: Reading | None
    autocast: Callable[[], AbstractContextManager]

    def __call__(self, leaves: Sequence[Any], parameters: Mapping[int, Tensor]) -> Tensor:
        """The call on flat arguments, with ``parameters`` in place of tracked tensors."""
        filled = [t if slot is None else parameters.get(slot, t) for t, slot in zip(leaves, self.slots, strict=True)]
        args, kwargs = pytree.tree_unflatten(filled, self.spec)
        with self.autocast():
            return self.func(*args, **kwargs)

    @property
    def _remedy(self) -> str:
        """What may help besides, where nobody has said where samples are."""
        return SAMPLES_ELSEWHERE if self.reading is None else ""

    def check_sums(self, gy: Tensor, leaves: Sequence[Any], tracked: Sequence[Tensor], terms: Sequence[Term]) -> None:
        """Raise unless the rows add up to what the whole call's derivative is: a shared tensor may look like samples."""
        pull = torch.func.vjp(lambda *parameters: self(leaves, dict(enumerate(parameters))), *tracked)[1]
        tolerance = 1e-3 if gy.dtype in (torch.float32, torch.float64) else 2e-2
        for term, expected in zip(terms, pull(gy), strict=True):
            error = (term.weighted_sum(None) - expected).norm()
            if not error <= tolerance * expected.norm() + 1e-3 * tolerance * gy.norm():
                raise UnsupportedError(
                    f"{self.name} has no rule, and run one sample at a time it does something else than on the batch: its "
                    "parameter's per-sample gradients cannot be had. Freeze the parameter, or write the operation with plain "
                    f"ones{self._remedy}"
                )

    def rows(self, batch_size: int, k: int, index: Tensor, gy: Tensor, *values: Any) -> Tensor:
        """Rows ``index`` of tracked tensor ``k``, from gy and the flat arguments."""
        cut = [
            isinstance(t, Tensor) and slot is None and t.dim() > 0 and t.shape[: len(self.leading)] == self.leading
            for t, slot in zip(values, self.slots, strict=True)
        ]
        own = values[self.slots.index(k)]

        def of_samples(t: Tensor, is_gradient: bool = False) -> Tensor:
            reading = self.reading
            if reading is None:
                return t.unflatten(0, (batch_size, t.size(0) // batch_size))[index]
            return reading.restored(reading.gradients(t) if is_gradient else reading.data(t))[index]

        def one(gy_i, *samples):
            samples = iter(samples)
            leaves = [next(samples) if c else t for t, c in zip(values, cut, strict=True)]
            y, pull = torch.func.vjp(lambda parameter: self(leaves, {k: parameter}), own)
            if y.shape != gy_i.shape:
                raise UnsupportedError(
                    f"puts out {tuple(y.shape)} for one sample where {tuple(gy_i.shape)} was expected"
                )
            return pull(gy_i)[0]

        try:
            return vmap(one, of_samples(gy, True), *(of_samples(t) for t, c in zip(values, cut, strict=True) if c))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedError(
                f"{self.name} has no rule and cannot be run one sample at a time: its parameter's per-sample gradients "
                f"cannot be had ({error}). Freeze the parameter, or write the operation with supported ones{self._remedy}"
            ) from error
