"""What runs in place of torch functions on which nothing is recorded: right where torch is wrong, and quicker elsewhere."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from .checkpointed import Returning, comes_back

PLAIN_RULES: dict[Callable, Callable] = {}


def plain_rule(*funcs: Callable):
    """Register a stand-in for torch functions of activations, ``rule(func, args, kwargs)``: no parameter, nothing recorded."""

    def register(function):
        for func in funcs:
            PLAIN_RULES[func] = function
        return function

    return register


WRITTEN_OUT: dict[Callable, Callable] = {}


OF_PARAMETERS: dict[Callable, Callable] = {}


def written_out(func: Callable):
    """Register what to call in place of a torch function whose second derivative is wrong, with the same arguments."""

    def register(function):
        WRITTEN_OUT[func] = OF_PARAMETERS[func] = function
        return function

    return register


def of_parameters(*funcs: Callable):
    """Register ``function(func, *args, **kwargs)`` for torch functions with a wrong second derivative, or none, under ``vmap``.

    It is called where all that they take is parameters, which is where `vmap` takes their first derivative.
    """

    def register(function):
        for func in funcs:
            OF_PARAMETERS[func] = call = functools.partial(function, func)
            call.__name__ = func.__name__  # type: ignore[attr-defined]  # partial objects have attributes
        return function

    return register


def is_in_transform() -> bool:
    """Whether the calls of now are inside of a transform of torch.func, which the Functions here have no rules for."""
    return torch._C._functorch.maybe_current_level() is not None


def run_plain(mode: Returning, func: Callable, args: tuple, kwargs: dict) -> Any:
    """A call without parameters, by its stand-in where there is one and where that can do all that torch's own can."""
    rule = PLAIN_RULES.get(func)
    if rule is None or is_in_transform() or not comes_back(mode):
        return func(*args, **kwargs)
    if any(isinstance(t, Tensor) and t.requires_grad for t in (*args, *kwargs.values())):
        out = rule(func, args, kwargs)
        if out is not NotImplemented:
            return out
    return func(*args, **kwargs)


class StandIns(Returning):
    """Nothing is recorded, but all that has a stand-in runs by it: what torch gets wrong, and what is quicker here.

    Compiled functions do without: they have first derivatives only.
    """

    def run(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run one torch function, or what stands for it."""
        written = WRITTEN_OUT.get(func)
        if written is not None and comes_back(self):
            func = written
        return run_plain(self, func, args, kwargs)

    def again(self) -> AbstractContextManager:
        """The same for a part that is run for the second time."""
        return nullcontext() if self in _get_current_function_mode_stack() else self

    def finder(self) -> Callable[[], "StandIns"]:
        """It holds nothing."""
        return lambda: self
