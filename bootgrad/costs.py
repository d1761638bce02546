"""What ops and whole training steps take by the cost model: time of products, and memory of tensors kept between passes.

    time of an op = B · time of its path · loss by groups + TENSOR_TIME · entries moved + CALL_TIME
    time of a step = Σ over uses of layers of its ops          peak memory = that of the plain step + what is kept beyond it

`planning` chooses between the paths of a layer; what is added here is alike for all of them, and makes layers comparable.
A plain step is three forward-sized products of a layer: forward, gradient by the input, gradient by the weight. A penalty's
exact gradient is six, since forward pass and δ are each gone back through, and the products of the penalty itself on top.
Passes that multiply nothing (activations, pooling, normalization) are not counted: where they take a good part of a
plain step, ratios of measured times are others.

Letters: ``B`` samples, ``X`` entries of a layer's input and ``Y`` of its output for all samples, ``O`` channels out, ``g``
groups, ``P`` parameters. Times are in multiply-adds of a large product. No torch here.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .planning import ConvLayer, Layer, LinearLayer, choose_path, cost

# Reading or writing an entry of x, gy or a derivative takes as long as this many multiply-adds: 0.4 ns at 5 · 10¹⁰ a second.
TENSOR_TIME = 20.0
# What a call costs before it computes anything.
CALL_TIME = 1e6
# Groups make products of few rows: a multiply-add takes 1 + GROUP_TIME / √(O/g) times as long.
GROUP_TIME = 3.5

EXAMPLE_FRACTION = 1 / 8
EXAMPLE_EVERY = 8


@dataclass(frozen=True)
class Use:
    """One use of a layer in a forward pass.

    Attributes:
        layer: its shape.
        first: its input needs no gradient, as the data does not, so that the products which would make one are left out.
    """

    layer: Layer
    first: bool = False

    @property
    def kept(self) -> int:
        """Entries of gradients by the input, where they are made, and by the output."""
        X, Y = sizes(self.layer)
        return Y if self.first else X + Y

    @property
    def unit(self) -> float:
        """The time of the forward product, or of the gradient by the weight."""
        return product_time(self.layer)

    @property
    def inward(self) -> float:
        """That of the gradient by the input, and of any product of its size that is there only with it."""
        return 0.0 if self.first else self.unit

    def norms(self, purpose: str, centered: bool = False, summed: bool = False) -> float:
        """That of an op of the norms, by the path that the model chooses; arguments as `planning.cost`."""
        path = choose_path(self.layer, purpose, centered, summed)
        time = op_time(self.layer, path, purpose, centered, summed)
        if self.first and purpose == "grad" and (centered or path == "direct"):  # nor is a derivative by x made
            time -= self.layer.B * self.layer.forward_operations
        return time


@dataclass(frozen=True)
class Step:
    """A way to take a training step, and what it costs beside a plain one.

    Attributes:
        name: as the table calls it.
        time: of a use of a layer.
        kept: entries of tensors kept beyond a plain step's, for a use of a layer.
        copies: tensors of the size of all parameters that are kept, gradients not counted.
        options: of the `GradientRegularizer` that takes the step; None for those that it does not take.
    """

    name: str
    time: Callable[[Use], float]
    kept: Callable[[Use], float] = lambda use: 0.0
    copies: int = 0
    options: dict | None = None


def product_time(layer: Layer) -> float:
    """The time of a layer's forward product, for all samples."""
    return _time(layer, layer.forward_operations, moved_entries(layer))


def op_time(layer: Layer, path: str, purpose: str, centered: bool = False, summed: bool = False) -> float:
    """The time of an op of the norms, for all samples; arguments as `planning.cost`."""
    return _time(layer, cost(layer, path, purpose, centered, summed).time, moved_entries(layer, purpose))


def _time(layer: Layer, multiply_adds: float, entries: int) -> float:
    groups = layer.groups if isinstance(layer, ConvLayer) else 1
    slower = 1 + GROUP_TIME / math.sqrt(layer.O / groups) if groups > 1 else 1.0
    return layer.B * multiply_adds * slower + TENSOR_TIME * entries + CALL_TIME


def sizes(layer: Layer) -> tuple[int, int]:
    """X and Y."""
    inputs = layer.T * layer.I if isinstance(layer, LinearLayer) else layer.C * math.prod(layer.S)
    return layer.B * inputs, layer.B * layer.T * layer.O


def moved_entries(layer: Layer, purpose: str = "norms") -> int:
    """Entries that an op reads and writes, each once: x and gy, and with ``"grad"`` their derivatives."""
    return sum(sizes(layer)) * (2 if purpose == "grad" else 1)


def step_time(step: Step, uses: Iterable[Use]) -> float:
    """The time of the step's products."""
    return sum(step.time(use) for use in uses)


def extra_bytes(step: Step, uses: Iterable[Use], parameters: int, itemsize: int = 4) -> float:
    """What the step keeps beyond a plain step.

    Args:
        step: the step.
        uses: the layers' uses.
        parameters: P.
        itemsize: bytes of a number.
    """
    return itemsize * (sum(step.kept(use) for use in uses) + step.copies * parameters)


def _plain(use: Use) -> float:
    return 2 * use.unit + use.inward


def _statistics(use: Use, centered: bool = False) -> float:
    return use.unit + use.inward + use.norms("statistics", centered)


def _twice(use: Use) -> float:
    """Forward and δ, each gone back through: by gy and by the weight for δ, by x and by the weight for the forward pass."""
    return 2 * use.unit + 4 * use.inward


def _batch_mean(use: Use) -> float:
    return _twice(use) + use.unit + use.norms("grad", centered=True)


def _reg1(use: Use) -> float:
    return _twice(use) + use.norms("grad", centered=True, summed=True)


def _about_zero(use: Use) -> float:
    return _twice(use) + use.norms("grad", summed=True)


def _reg2(use: Use) -> float:
    """Γ for the report with ḡ in one visit, and the derivatives of a function of ḡ by x and by gy."""
    return _twice(use) + use.norms("statistics") + use.unit + use.inward


def _shifted(use: Use) -> float:
    """A step with statistics and one at θ + ε (g_i − ḡ), where G_i is applied in the forward and the backward pass."""
    return _statistics(use) + _plain(use) + (1 if use.first else 2) * use.norms("applied")


def _kept_by_norms(use: Use) -> float:
    """Each gy for the second pass, and derivatives by x and gy."""
    return use.kept + sizes(use.layer)[1]


def _part(time: Callable[[Use], float], share: float) -> Callable[[Use], float]:
    return lambda use: _plain(use) + share * (time(use) - _plain(use))


STEPS = (
    Step("plain", _plain),
    Step("rec.backward", _statistics),
    Step("rec.backward, center", lambda use: _statistics(use, centered=True), copies=1),
    Step("reg1 batch_mean", _batch_mean, _kept_by_norms, 1, {"reg1": 0.1}),
    Step("reg1 ema", _reg1, _kept_by_norms, 2, {"reg1": 0.1, "center": "ema"}),
    Step("reg1 zero", _about_zero, _kept_by_norms, 1, {"reg1": 0.1, "center": "zero"}),
    Step("reg2 ema", _reg2, _kept_by_norms, 2, {"reg2": 0.1, "center": "ema"}),
    # One Reg1, about a center that is made from the mean.
    Step("reg1 + reg2, ema", _batch_mean, _kept_by_norms, 3, {"reg1": 0.1, "reg2": 0.1, "center": "ema"}),
    # Nothing is recorded for these, so that each gradient is one of its own: of the mean, and of the signed sum.
    Step(
        "random signs",
        lambda use: _twice(use) + 3 * use.unit + 2 * use.inward,
        _kept_by_norms,
        1,
        {"reg1": 0.1, "method": "random_signs"},
    ),
    Step(
        "random signs, finite difference",
        lambda use: 5 * use.unit + 3 * use.inward,
        copies=2,
        options={"reg1": 0.1, "method": "random_signs", "derivative": "finite_difference"},
    ),
    Step(
        "reg1 finite difference",
        _shifted,
        lambda use: use.kept,
        2,
        {"reg1": 0.1, "method": "finite_difference"},
    ),
    Step(
        "reg2 finite difference",
        lambda use: 2 * _plain(use),
        copies=3,
        options={"reg2": 0.1, "center": "ema", "method": "finite_difference"},
    ),
    Step(
        "reg1 batch_mean, fraction 1/8",
        _part(_batch_mean, EXAMPLE_FRACTION),
        lambda use: EXAMPLE_FRACTION * _kept_by_norms(use),
        1,
        {"reg1": 0.1, "fraction": EXAMPLE_FRACTION},
    ),
    Step(
        "reg1 batch_mean, every 8",
        _part(_batch_mean, 1 / EXAMPLE_EVERY),
        _kept_by_norms,
        1,
        {"reg1": 0.1, "every": EXAMPLE_EVERY},
    ),
)
