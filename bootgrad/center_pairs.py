"""The centers of Reg1 and Reg2, one for both or one for each: what users give, and what a step does with them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import waiting
from .centers import Center, as_center
from .errors import ArgumentError
from .methods.base import Directions, Gradients
from .per_sample import Zeros
from .wrappers import by_names_as_written

PENALTIES = ("reg1", "reg2")
Centers = Mapping[str, Center]  # by penalty


def parsed(center: Any, parameters: Mapping[str, Tensor]) -> dict[str, Center]:
    """The centers by penalty, from one for both or a mapping by penalty.

    Raises:
        ArgumentError: a mapping with other names than those of the penalties or of parameters; as `as_center`.
    """
    if isinstance(center, Mapping):
        center = by_names_as_written(center)
    by_penalty = isinstance(center, Mapping) and center and set(center) <= set(PENALTIES)
    if by_penalty and not set(center) <= set(parameters):
        return {name: as_center(center.get(name, "batch_mean")) for name in PENALTIES}
    if isinstance(center, Mapping) and not set(center) & set(parameters):
        raise ArgumentError(
            f'a center by name has the names of penalties, "reg1" and "reg2", or of parameters; got {list(center)[:5]}'
        )
    return dict.fromkeys(PENALTIES, as_center(center))


def values_of(centers: Centers, parameters: Mapping[str, Tensor]) -> dict[str, Directions | None]:
    """C by penalty, without a graph, of which a step takes no derivative; an object for both is asked once."""
    values = {key: c.value(parameters) for key, c in _distinct(centers).items()}
    for key, value in values.items():
        if value is not None and not isinstance(value, Zeros):
            values[key] = {name: t.detach() for name, t in value.items()}
    return {name: values[id(c)] for name, c in centers.items()}


def ask_for_mean(centers: Centers) -> bool:
    """Whether one of them asks for the mean gradient, to follow it or to be differentiated."""
    constant = (Center.update, Center.derivative)
    methods = [f for c in _distinct(centers).values() for f in (c.update, c.derivative)]
    return any(getattr(f, "__func__", f) not in constant for f in methods)


def add_derivative(
    outcome: Gradients, parameters: Mapping[str, Tensor], c: Directions, center: Center, strength: float
) -> None:
    """A penalty's derivative by c is −2 λ (ḡ − c); a differentiable center takes it on to θ."""
    if type(center).derivative is Center.derivative:  # a constant
        return
    extra = center.derivative(parameters, {n: g - c[n] for n, g in outcome.mean.items()})
    places = {id(leaf): k for k, leaf in enumerate(outcome.leaves)}
    for name, derivative in (extra or {}).items():
        p = parameters[name]
        step = -2 * strength * derivative
        if id(p) not in places:
            outcome.leaves.append(p)
            outcome.grads.append(step.to(p.dtype))
            continue
        k = places[id(p)]
        grad = outcome.grads[k]
        outcome.grads[k] = (step if grad is None else grad + step).to(p.dtype)


def move(centers: Centers, mean: Mapping[str, Tensor], held: Mapping[str, Directions | None], finite: Tensor) -> None:
    """Let the centers, whose present values are ``held``, take in ḡ where it is finite."""
    at_once = waiting.answers_at_once(finite)
    if at_once and not finite:
        return
    values = {id(c): held[name] for name, c in centers.items()}
    for key, center in _distinct(centers).items():
        value = values[key]
        if at_once:
            center.update(mean)
        else:  # what is not finite is replaced by what the center holds already
            center.update({n: torch.where(finite, g, 0 if value is None else value[n]) for n, g in mean.items()})


def _distinct(centers: Centers) -> dict[int, Center]:
    return {id(c): c for c in centers.values()}
