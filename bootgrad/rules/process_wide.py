"""What torch can only be told for all threads at once: set by the first that needs it, put back when the last one is done.

One after the other in each thread, as contexts are wont to be, they would put back what the other had set in between.
"""

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch


class Shared(AbstractContextManager):
    """A context that any number of threads may be in at a time; what it makes is entered once.

    Args:
        make: makes the context.
    """

    def __init__(self, make: Callable[[], AbstractContextManager]):
        """Nothing is made yet."""
        self._make, self._lock, self._inside = make, threading.RLock(), 0
        self._context: AbstractContextManager | None = None

    def __enter__(self) -> None:
        """Set it, if nobody has."""
        with self._lock:
            if self._context is None:
                context = self._make()
                context.__enter__()
                self._context = context
            self._inside += 1

    def __exit__(self, *_) -> None:
        """Put it back, if nobody else is inside."""
        with self._lock:
            self._inside -= 1
            if not self._inside and self._context is not None:
                context, self._context = self._context, None
                context.__exit__(None, None, None)


class Stance(AbstractContextManager):
    """What becomes of compiled functions while any thread is in it; torch is told the first made of those that some are in.

    Args:
        make: makes the context that tells torch, no function of Python's own, which would be compiled where torch refuses it.
            Nothing is told where dynamo was never imported.
    """

    _lock = threading.RLock()
    _all: "list[Stance]" = []
    _told: "Stance | None" = None
    _context: AbstractContextManager | None = None

    def __init__(self, make: Callable[[], AbstractContextManager]):
        """Nobody is in it."""
        self._make, self._inside = make, 0
        self._all.append(self)

    def __enter__(self) -> None:
        """Tell torch, unless another stance goes before."""
        with self._lock:
            self._inside += 1
            try:
                self._tell()
            except BaseException:  # torch refuses to be told by compiled code
                self._inside -= 1
                raise

    def __exit__(self, *_) -> None:
        """Tell torch what is left, if that is another one."""
        with self._lock:
            self._inside -= 1
            self._tell()

    @classmethod
    def _tell(cls) -> None:
        wanted = next((stance for stance in cls._all if stance._inside), None)
        if "torch._dynamo" not in sys.modules or wanted is cls._told:
            return
        if Stance._context is not None:  # first, so that what each puts back is the user's own
            Stance._context.__exit__(None, None, None)  # which compiled code is refused: then it is for the next to do
        Stance._told = Stance._context = None
        if wanted is not None:
            Stance._context = wanted._make()
            Stance._context.__enter__()
            Stance._told = wanted


# Compiled code would run what the rules did once.
eager = Stance(partial(torch.compiler.set_stance, "force_eager"))
