"""Which method runs, by its name and options; one that is wrong or would do nothing is refused."""

from typing import Any

from ..errors import ArgumentError
from .base import Method
from .exact import Exact
from .finite_difference import FiniteDifference
from .random_signs import RandomSigns

METHODS = ("exact", "finite_difference", "random_signs", "auto")
DERIVATIVES = ("exact", "finite_difference")
EPSILON = 1e-4


def choose(name: str, probes: int, derivative: str, epsilon: float | None, compiled: bool = False) -> Method:
    """The method with its options, for a model that is ``compiled`` or not.

    Raises:
        ArgumentError: an unknown name, an option out of range, or one that the method does not take.
    """
    if name not in METHODS:
        raise ArgumentError(f"method must be one of {', '.join(METHODS)}; got {name!r}")
    if derivative not in DERIVATIVES:
        raise ArgumentError(f"derivative must be one of {', '.join(DERIVATIVES)}; got {derivative!r}")
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ArgumentError(f"probes must be a whole number of at least 1; got {probes!r}")
    if name != "random_signs" and (probes != 1 or derivative != "exact"):
        raise ArgumentError(f'probes and derivative are options of method="random_signs"; got method={name!r}')
    if epsilon is not None and "finite_difference" not in (name, derivative):
        raise ArgumentError("epsilon is the step of finite differences, and this method takes none: leave it out")
    if epsilon is not None and (not is_number(epsilon) or not 0 < epsilon < 1):
        raise ArgumentError(f"epsilon must be a number in (0, 1), relative to the parameters' size; got {epsilon!r}")
    step = EPSILON if epsilon is None else epsilon
    if name == "auto" and compiled:  # first derivatives only, of passes of which nothing is recorded
        return RandomSigns(probes, False, step)
    if name == "finite_difference":
        return FiniteDifference(step)
    return RandomSigns(probes, derivative == "exact", step) if name == "random_signs" else Exact()


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)
