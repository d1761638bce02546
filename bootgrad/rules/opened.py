"""Functions of torch that are written in Python: what they do is recorded, operation by operation."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

_DISPATCHES = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def opened(func: Callable) -> Callable[..., Any] | None:
    """The body of a torch function that hands itself to a mode as a whole; None where it is not written in Python."""
    if not isinstance(func, FunctionType) or not set(_DISPATCHES) & set(func.__code__.co_names):
        return None
    names = func.__globals__ | dict.fromkeys(_DISPATCHES, _no)
    body = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def _no(*_: Any) -> bool:
    return False
