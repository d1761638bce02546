"""What torch can only be told for all threads at once: set by the first that needs it, put back when the last one is done.

One after the other in each thread, as contexts are wont to be, they would put back what the other had set in between.
"""

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch


class Shared(AbstractContextManager):
    """A context that any number of threads may be in at a time; what it makes is entered once.

    Args:
        make: makes the context, or None where there is nothing to set yet.
    """

    def __init__(self, make: Callable[[], AbstractContextManager | None]):
        """Nothing is made yet."""
        self._make, self._lock, self._inside = make, threading.RLock(), 0
        self._context: AbstractContextManager | None = None

    def __enter__(self) -> None:
        """Set it, if nobody has."""
        with self._lock:
            if self._context is None:
                context = self._make()
                if context is not None:
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


def _force_eager() -> AbstractContextManager | None:
    """Nothing is compiled where dynamo was never imported."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else None


eager = Shared(_force_eager)  # compiled code would run what the rules did once
