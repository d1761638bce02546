"""What a plan says, as data and as tables: per layer the path and why, then whole steps. No torch here.

share of an op = its predicted time / that of a plain step's products
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .planning import Layer

PURPOSES = ("statistics", "grad")
_WORDS = ("layer", "shape", "path", "backend", "step")
_TITLES = {
    "statistics": "norms with the weight gradient, as rec.backward takes them",
    "grad": "norms with their derivatives, as penalties take them",
}


@dataclass(frozen=True)
class LayerPlan:
    """How the norms of one use of a layer are computed, and what that is predicted to cost.

    Attributes:
        name: of the layer's weight.
        layer: the shape.
        purpose: ``"statistics"``, ‖G_i‖² and Σ G_i, or ``"grad"``, ‖G_i‖² and its derivatives.
        path: the path that is taken, the first of ``units``.
        units: predicted time of each path over that of the layer's forward product, the quickest first.
        operations: multiply-adds for one sample.
        bytes: what all samples' tensors move, each read or written once.
        workspace: bytes of working memory: for one sample on a CPU, for all that are worked on at a time on a GPU.
        share: predicted time over that of a plain step's products.
        backend: what runs the op on a GPU; None on a CPU.
        measured: the op's time over that of a plain step, measured; None where nothing was.
    """

    name: str
    layer: Layer
    purpose: str
    path: str
    units: dict[str, float]
    operations: float
    bytes: int
    workspace: float
    share: float
    backend: str | None = None
    measured: float | None = None


@dataclass(frozen=True)
class OtherPlan:
    """An operation on parameters that is no product: its per-sample gradients are held, and its time is not predicted.

    Attributes:
        name: of the operation.
        parameters: the names of its parameters.
        bytes: of all samples' gradients.
    """

    name: str
    parameters: str
    bytes: int


@dataclass(frozen=True)
class StepPlan:
    """What a way to take a step is predicted to cost, and what it was measured to.

    Attributes:
        name: of the step.
        units: predicted time over that of all layers' forward products.
        ratio: predicted time over that of a plain step, products alone.
        memory: predicted peak memory over that of a plain step, parameters not counted.
        measured: time over that of a plain step, measured; None where nothing was.
    """

    name: str
    units: float
    ratio: float
    memory: float
    measured: float | None = None


@dataclass(frozen=True)
class Plan:
    """The outcome of `plan`; prints as tables.

    Attributes:
        batch_size: B.
        parameters: P, those that require grad.
        plain_bytes: predicted peak memory of a plain step: what its forward pass saved, the gradients, and the largest pair
            of gradients by a layer's output and input.
        layers: one row per use of a layer and purpose.
        others: operations that are no products.
        steps: one row per way to take a step.
        device: ``"cpu"``, or the GPU that backends were asked for.
        precision: the dtype of x and gy that backends were asked for.
        notes: what was left out, and why.
    """

    batch_size: int
    parameters: int
    plain_bytes: int
    layers: tuple[LayerPlan, ...]
    others: tuple[OtherPlan, ...]
    steps: tuple[StepPlan, ...]
    device: str
    precision: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """The tables."""
        layers = (f"{_TITLES[purpose]}\n{self._layer_table(purpose)}" for purpose in PURPOSES)
        steps = f"steps, as ratios to the plain one\n{self._step_table()}"
        return "\n\n".join([*layers, steps, "\n".join(self._remarks())])

    def _layer_table(self, purpose: str) -> str:
        table = [
            ["layer", "shape", "path", "backend", "units", "instead", "multiply-adds", "bytes", "workspace", "share"]
            + ["measured"]
        ]
        for row in self.layers:
            if row.purpose == purpose:
                (_, units), *rest = row.units.items()
                instead = ", ".join(f"{path} {_number(u)}" for path, u in rest)
                memory = (_scaled(v, 1024, "B") for v in (row.bytes, row.workspace))
                cells = [row.name, str(row.layer), row.path, row.backend or "", _number(units), instead]
                cells += [_scaled(row.operations, 1000), *memory, _number(row.share), _number(row.measured)]
                table.append(cells)
        return _aligned(table)

    def _step_table(self) -> str:
        table = [["step", "units", "time", "measured", "memory"]]
        table += [[s.name, *map(_number, (s.units, s.ratio, s.measured, s.memory))] for s in self.steps]
        return _aligned(table)

    def _remarks(self) -> Iterator[str]:
        yield "units: predicted time over that of the forward product; share: over that of a plain step; products alone"
        yield "time, memory: predicted ratios to a plain step; multiply-adds are for one sample, bytes for all"
        for name in dict.fromkeys(other.name for other in self.others):
            sizes = [other.bytes for other in self.others if other.name == name]
            yield f"not predicted: {name}, {len(sizes)} times, rows of {_scaled(sum(sizes), 1024, 'B')} together"
        yield from self.notes


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """Lines of a table, words to the left and numbers to the right; columns with nothing below the header are left out."""
    columns = [column for column in zip(*table, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    signs = ["<" if column[0] in _WORDS else ">" for column in columns]
    lines = (
        "  ".join(f"{v:{sign}{w}}" for v, sign, w in zip(row, signs, widths, strict=True))
        for row in zip(*columns, strict=True)
    )
    return "\n".join(line.rstrip() for line in lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.1g}"


def _scaled(value: float, step: int, unit: str = "") -> str:
    prefixes = ["", "k", "M", "G", "T"] if step == 1000 else ["", "Ki", "Mi", "Gi", "Ti"]
    power = min(int(math.log(value, step)), len(prefixes) - 1) if value >= 1 else 0
    return f"{value / step**power:.3g} {prefixes[power]}{unit}".rstrip()
