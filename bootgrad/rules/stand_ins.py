"""What runs in place of torch functions on which nothing is recorded: right where torch is wrong, and quicker elsewhere."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedError

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
    """Register ``function(func, *args, **kwargs)`` for torch functions whose second derivative is wrong under ``vmap`` only.

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


def is_in_checkpoint() -> bool:
    """Whether the calls of now are inside of torch.utils.checkpoint, and run again in the backward pass.

    The mode of now will be gone by then, and what the calls save must be the same.
    """
    hooks = saved_tensors_hooks()
    return getattr(hooks[0] if hooks else None, "__module__", "") == "torch.utils.checkpoint"


def saved_tensors_hooks() -> tuple | None:
    """What packs and unpacks the tensors that nodes save now, if anything."""
    return getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)(True)


def run_plain(func: Callable, args: tuple, kwargs: dict) -> Any:
    """A call without parameters, by its stand-in where there is one and where that can do all that torch's own can."""
    rule = PLAIN_RULES.get(func)
    if rule is None or is_in_transform() or is_in_checkpoint():
        return func(*args, **kwargs)
    if any(isinstance(t, Tensor) and t.requires_grad for t in (*args, *kwargs.values())):
        out = rule(func, args, kwargs)
        if out is not NotImplemented:
            return out
    return func(*args, **kwargs)


class StandIns(TorchFunctionMode):
    """Nothing is recorded, but all that has a stand-in runs by it: what torch gets wrong, and what is quicker here."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run one torch function, or what stands for it."""
        if func in WRITTEN_OUT and is_in_checkpoint():
            return _first_order(func, func(*args, **(kwargs or {})))
        return run_plain(WRITTEN_OUT.get(func, func), args, kwargs or {})


def _first_order(func: Callable, y: Tensor) -> Tensor:
    """``y``, from torch's own ``func``, whose derivative refuses to be differentiated, for that would come out wrong."""
    name = getattr(func, "__name__", str(func)).strip("_")

    def refuse(_):
        if torch.is_grad_enabled():
            raise UnsupportedError(
                f"{name} inside of torch.utils.checkpoint has a wrong second derivative in torch: leave the layer out of "
                'checkpointing, or take derivative="finite_difference"'
            )

    if y.grad_fn is not None:
        y.grad_fn.register_prehook(refuse)  # it saves nothing, so that the call that is made again saves as much
    return y
