"""Parts under torch.utils.checkpoint, which are run again in the backward pass: a mode that was there comes back for it.

Where a mode runs something in the place of a torch function, the second run has to do the same, for what it saves takes the
place of what the first one would have saved, one by one.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint

from .reentrant import NotReentrant

# What ends a second run as soon as all is there that was saved in the first.
StopRecomputation = torch.utils.checkpoint._StopRecomputationError


class Returning(NotReentrant, ABC):
    """A mode that can come back."""

    @abstractmethod
    def again(self) -> AbstractContextManager:
        """The context in which a part is run for the second time."""

    @abstractmethod
    def finder(self) -> "Callable[[], Returning]":
        """What finds the mode, or another like it, later; a graph will hold it."""


def saved_tensors_hooks() -> tuple | None:
    """What packs and unpacks the tensors that nodes save now, if anything."""
    return getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)(True)


def is_in_checkpoint() -> bool:
    """Whether the calls of now are inside of torch.utils.checkpoint, and will be run again, or are so now."""
    hooks = saved_tensors_hooks()
    return getattr(hooks[0] if hooks else None, "__module__", "") == "torch.utils.checkpoint"


@contextmanager
def without_hooks() -> Iterator[list[tuple]]:
    """For transforms of torch.func, which refuse to run where there are hooks, on what no graph saves; the hooks, top first."""
    taken = []
    while (hooks := saved_tensors_hooks()) is not None:
        taken.append(hooks)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield taken
    finally:
        for pack, unpack in reversed(taken):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def comes_back(mode: Returning) -> bool:
    """Have the checkpointed parts that are run now, if any, run under ``mode`` again; False where that cannot be."""
    if not is_in_checkpoint():
        return True
    hooks = saved_tensors_hooks()
    assert hooks is not None
    if id(mode) in _modes(_frame(hooks)):
        return True
    with without_hooks() as all_hooks:
        frames = [frame for hooks in all_hooks if (frame := _frame(hooks)) is not _NO_FRAME]
    for frame in frames:
        if frame is None:
            return False
        if id(mode) not in _modes(frame):
            _modes(frame).add(id(mode))
            frame.recompute_fn = _under(mode.finder(), frame.recompute_fn)
    return True


_NO_FRAME = object()


def _frame(hooks: tuple) -> Any:
    """What torch remembers of a part, from its hooks in the first run; those of the second and other hooks have none."""
    pack = inspect.unwrap(hooks[0])
    if pack.__module__ != "torch.utils.checkpoint":
        return _NO_FRAME
    held = dict(zip(pack.__code__.co_freevars, (c.cell_contents for c in pack.__closure__ or ()), strict=True))
    if "target_frame_ref" in held:
        return _NO_FRAME
    return held["frame"] if callable(getattr(held.get("frame"), "recompute_fn", None)) else None


def _modes(frame: Any) -> set[int]:
    """The modes that come back for a part, by id."""
    return getattr(frame, "__dict__", {}).setdefault("_bootgrad_modes", set())


def _under(find: Callable[[], Returning], run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` under a mode."""

    def run_again(*args: Any) -> Any:
        with find().again():
            return run(*args)

    return run_again
