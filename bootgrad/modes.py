"""Modes that see torch functions, beside a compiler: it captures torch's own functions, and leaves alone what a mode does.

A compiler that captures a graph under a mode traces the mode's ``__torch_function__`` for every call. Behind a graph break,
where code runs uncompiled, it would compile frames of the mode itself, one by one.
"""

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Mode(TorchFunctionMode):
    """A mode whose `run` is called for every torch function outside of captured graphs."""

    def __enter__(self):
        """Begin to see torch functions."""
        self._run = type(self).run
        if _is_compiler_there():
            self._run = _left_alone(self._run)
            # Of the code alone, by a function that is not this one, which graphs that are captured go through.
            torch._dynamo.decorators.skip(types.FunctionType(Mode.__torch_function__.__code__, globals()))
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run one torch function, or what the mode does in its place."""
        if torch.compiler.is_dynamo_compiling():
            if func is torch.Tensor.unflatten:  # its own call of the superclass's is not captured, that by a tensor is
                return args[0].unflatten(*args[1:], **(kwargs or {}))
            return func(*args, **(kwargs or {}))
        return self._run(self, func, *args, **(kwargs or {}))

    def run(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call ``func``, or what the mode does in its place."""
        return func(*args, **kwargs)


def _is_compiler_there() -> bool:
    """Whether anything can be compiled: the compiler's import takes seconds."""
    return "torch._dynamo" in sys.modules


@functools.cache
def _left_alone(function: Callable) -> Callable:
    """``function``, which no compiler looks into."""
    return torch.compiler.disable(function)
