"""Right or wrong: every quantity and every gradient against plain autograd in float64, one sample at a time.

A way is asked on a few samples, in the dtype in which it will be timed. It is right, wrong by a relative error, or refuses,
with the first line of its own exception.
"""

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bootgrad import reference

from ..models import losses
from .ways import QUANTITIES, STRENGTH, Way, center, trainable

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
ROUNDING = 2  # times plain autograd's own error in the model's type: at a kink, rounding may choose the other side


@dataclass(frozen=True)
class Expected:
    """What plain autograd says: the quantities; ḡ plus each one's penalty, flat; and the length that errors are measured by.

    Attributes:
        values: by quantity.
        grads: what ``.grad`` should be, (P,), by quantity.
        scales: ‖ḡ‖, or of a penalty the norm of its own part, which ḡ would hide.
        tolerances: largest relative errors that are right.
    """

    values: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]
    scales: Mapping[str, float]
    tolerances: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """What came of a way's quantity.

    Attributes:
        status: ``right``, ``wrong`` or ``refuses``.
        error: relative, the larger of the value's and the gradient's.
        why: of a refusal: the exception's class and the first line of its message.
    """

    status: str
    error: float | None = None
    why: str = ""


def expect(model: nn.Module, x: Tensor, y: Tensor) -> Expected:
    """All quantities by one backward pass per sample.

    Args:
        model: of one floating type; stays as it is.
        x: inputs of at least two samples, (B, …).
        y: labels, (B,).
    """
    c = torch.cat([t.flatten() for t in center(trainable(model)).values()])
    expected = _expect(model, x, y, c, torch.float64)
    plain = _expect(model, x, y, c, c.dtype)
    errors = {q: _error(plain.values[q], plain.grads[q], expected, q) for q in QUANTITIES}
    tolerances = {q: TOLERANCE[c.dtype] + ROUNDING * error for q, error in errors.items()}
    return replace(expected, tolerances=tolerances)


def _expect(model: nn.Module, x: Tensor, y: Tensor, c: Tensor, dtype: torch.dtype) -> Expected:
    model = copy.deepcopy(model).to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    parameters = trainable(model)
    alone = torch.cat([losses(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    G = reference.matrix(reference.per_sample_gradients_of(alone, parameters, create_graph=True))
    mean, norms = G.mean(0).detach(), reference.sq_norms(G).detach()
    penalties = {"reg1": reference.reg1(G), "reg2": reference.reg2(G, c.to(dtype))}
    values = {"norms": norms, "variance": penalties["reg1"].detach()}
    grads, scales = dict.fromkeys(values, mean), dict.fromkeys(values, float(mean.norm()))
    for name, penalty in penalties.items():
        parts = torch.autograd.grad(
            STRENGTH * penalty, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        part = torch.cat([p.flatten() for p in parts])
        values[name], grads[name], scales[name] = penalty.detach(), mean + part, float(part.norm())
    return Expected(values, grads, scales, {})


def examine(way: Way, model: nn.Module, x: Tensor, y: Tensor, expected: Expected) -> dict[str, Outcome]:
    """Take one step and compare.

    Args:
        way: what to ask.
        model: copied first, for ways change what they are given.
        x: as `expect` had.
        y: likewise.
        expected: of these samples.

    Returns:
        An outcome for each of the way's quantities.
    """
    model = copy.deepcopy(model)
    parameters = trainable(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = way.make(model, x, y)()
            grad = torch.cat(
                [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters.values()]
            )
            return {quantity: _compare(quantity, found[quantity], grad, expected) for quantity in way.quantities}
        except Exception as error:  # a peer's failure is its entry, whatever it is
            return dict.fromkeys(way.quantities, Outcome("refuses", why=first_line(error)))


def first_line(error: BaseException) -> str:
    """The class and the first line of an exception's message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")


def _compare(quantity: str, value: Tensor, grad: Tensor, expected: Expected) -> Outcome:
    error = _error(value, grad, expected, quantity)
    return Outcome("right" if error <= expected.tolerances[quantity] else "wrong", error)  # NaN is wrong


def _error(value: Tensor, grad: Tensor, expected: Expected, quantity: str) -> float:
    wanted = expected.values[quantity]
    if value.shape != wanted.shape:
        return math.inf
    of_value = (value.double() - wanted).norm() / wanted.norm()
    of_grad = (grad.double() - expected.grads[quantity]).norm() / expected.scales[quantity]
    return float(torch.maximum(of_value, of_grad))  # which is NaN where one is
