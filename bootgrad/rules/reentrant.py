"""Parts under ``torch.utils.checkpoint(..., use_reentrant=True)``: in a mode of ours the other kind runs in place of this one.

The reentrant kind runs a part without gradients, and in the backward pass again, by a backward pass of its own that writes to
``.grad``: nothing could be recorded, nothing differentiated twice. The other one has the same values and gradients, and saves
the same memory. Where the reentrant kind has no gradients, this has none, either: in parts no input of which requires grad, and
of tensors in containers that a part returns.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from ..modes import Mode
from .process_wide import Shared

_Reentrant: Any = torch.utils.checkpoint.CheckpointFunction


class NotReentrant(Mode):
    """A mode in which reentrant checkpoints are of the other kind."""

    def __enter__(self):
        """Begin."""
        not_reentrant.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        """End."""
        not_reentrant.__exit__(*exc)
        return super().__exit__(*exc)


class _InPlaceOfReentrant(_Reentrant):
    """What `checkpoint` finds for the reentrant kind, in all threads, while one of them is in such a mode."""

    @staticmethod
    def apply(function: Callable, preserve_rng_state: bool, *args: Any) -> Any:
        has_gradient = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)
        if not has_gradient or not any(isinstance(mode, NotReentrant) for mode in _get_current_function_mode_stack()):
            return _Reentrant.apply(function, preserve_rng_state, *args)
        run = torch.utils.checkpoint.checkpoint
        return _outputs(run(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state))


@contextmanager
def _in_place() -> Iterator[None]:
    before = torch.utils.checkpoint.CheckpointFunction
    torch.utils.checkpoint.CheckpointFunction = _InPlaceOfReentrant  # type: ignore[misc]  # where `checkpoint` looks for it
    try:
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = before  # type: ignore[misc]


not_reentrant = Shared(_in_place)


def _outputs(result: Any) -> Any:
    """Tensors, alone or in a tuple, as they are; those that an autograd.Function does not see as its outputs, detached."""
    if isinstance(result, tuple):
        return tuple(t if isinstance(t, Tensor) else _detached(t) for t in result)
    return result if isinstance(result, Tensor) else _detached(result)


def _detached(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.detach, value)
