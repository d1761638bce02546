"""What the ops and whole steps must move and compute, and how fast a GPU could be at that: predictions, not measurements.

    limit of an op = max(bytes / bandwidth, operations / rate)        of a step = the sum over its ops

Bytes are those of tensors: each input read once, each output written once, activations of 2 bytes, layer-shaped sums of
4; what a kernel keeps on the chip counts nothing. Operations are two for each multiply-add of `planning`'s cost of the
path that it chooses. A step is the sequence of products that DESIGN's cost table counts, and the passes over activations
between them (`PASSES`), each at the machine's copy rate. Autocast's casts, the optimizer and launches are left out.

    python -m benchmarks.traffic [--check]      writes the tables into docs/gpu.md, or says whether they are in it

Letters: ``B`` samples, ``T`` positions, ``X`` entries of a layer's input, ``Y`` of its output, ``W`` of its weight.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bootgrad import planning
from bootgrad.planning import ConvLayer, LinearLayer

from . import models
from .models import TASKS, Task

PAGE = Path(__file__).parents[1] / "docs/gpu.md"
RESULTS = Path(__file__).parent / "results/gpu"
BEGIN, END = "<!-- traffic: begin -->", "<!-- traffic: end -->"
HALF, SUM = 2, 4  # bytes of an activation, and of a number of a layer-shaped sum


@dataclass(frozen=True)
class Machine:
    """A GPU's rates, bytes and operations per second.

    Attributes:
        name: what it is called here.
        device: what torch calls it, the whole of it: an H100 on a PCI board and a Grace Hopper have other rates.
        datasheet: bandwidth by the datasheet.
        bandwidth: what a copy within its memory reached, counting bytes read and written.
        rate: what a large bf16 matrix product reached.
        float32_rate: of the processors that are no tensor cores, by the datasheet.
    """

    name: str
    device: str
    datasheet: float
    bandwidth: float
    rate: float
    float32_rate: float


MACHINES = (
    Machine("H100", "NVIDIA H100 80GB HBM3", 3.35e12, 3.0e12, 798e12, 67e12),
    Machine("H200", "NVIDIA H200", 4.8e12, 4.3e12, 790e12, 67e12),
)


@dataclass(frozen=True)
class Work:
    """Bytes and operations."""

    bytes: float = 0.0
    operations: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Both together."""
        return Work(self.bytes + other.bytes, self.operations + other.operations)

    def seconds(self, machine: Machine) -> float:
        """The limit."""
        return max(self.bytes / machine.bandwidth, self.operations / machine.rate)


@dataclass(frozen=True)
class NormLayer:
    """A group norm: x (B, C, *S) in G groups."""

    B: int
    C: int
    S: tuple[int, ...]
    G: int

    def __str__(self) -> str:
        """Its shape."""
        return f"group norm {self.C}, {'×'.join(map(str, self.S))}, G = {self.G}"


@dataclass(frozen=True)
class LookUpLayer:
    """T look-ups a sample in a table (V, D)."""

    B: int
    T: int
    V: int
    D: int

    def __str__(self) -> str:
        """The table, and how many look-ups."""
        return f"embedding {self.V}×{self.D}, T = {self.T}"


Layer = LinearLayer | ConvLayer | NormLayer | LookUpLayer


@dataclass(frozen=True)
class Part:
    """Something that a step does, once per model layer.

    Attributes:
        name: of the module.
        kind: ``product``, or a row of `PASSES`.
        layer: the shape, of a product or a group norm.
        entries: that pass through, of anything else.
        operations: of the products within, as attention has them; for one pass forward.
        trained: whether a product's weight gets a gradient.
        first: whether a product's input is the data, which gets none.
    """

    name: str
    kind: str
    layer: Layer | None = None
    entries: int = 0
    operations: float = 0.0
    trained: bool = True
    first: bool = False


# Bytes per entry that passes through: of a plain step, with statistics, and with a penalty's exact derivative. A pass that
# reads two tensors and writes one moves 6 bytes per entry. Forward, backward, derivative of that, backward once more.
PASSES = {
    "ReLU": (4 + 6, 4 + 6, 4 + 6 + 6 + 6),
    # Torch reads twice each way; the library's ops visit once, and the adjoint moves five tensors.
    "GroupNorm": (6 + 10, 6 + 6, 6 + 6 + 10 + 10 + 6),
    # Rows of γ and β are made by plain torch, and torch's double backward pass is a chain of some twelve passes.
    "LayerNorm": (4 + 6 + 4, 4 + 6 + 14, 4 + 6 + 14 + 20 + 12 * 6 + 10 + 6),
    # The same of the derivative of GELU's, some fifteen passes.
    "GELU": (4 + 6, 4 + 6, 4 + 6 + 15 * 6 + 6 + 6),
    # The gradients of both branches are added up where they part.
    "Add": (6 + 6, 6 + 6, 6 + 6 + 6 + 6),
    "MaxPool2d": (9, 9, 18),
    "AdaptiveAvgPool2d": (4, 4, 8),
    # Entries of T×T scores, softmax in float32; the fused kernel's never leave the chip, and what its second derivative has of
    # them in memory at a time is in the second cache.
    "scores": (32 + 36, 32 + 36, 32 + 36 + 100 + 36),
    "fused": (0, 0, 0),
    # Entries of the logits, cross entropy in float32.
    "logits": (14 + 12, 14 + 12, 14 + 12 + 30 + 12),
}
PLAIN, STATISTICS, PENALTY = range(3)
# Products of attention for each forward one; the fused kernel makes the scores again on the way back.
SCORES_OPERATIONS = {"scores": (3, 3, 3 + 6), "fused": (3.5, 3.5, 3.5 + 2.5)}
# The products of the fused kernel's second derivative, which plain torch makes in float32, the future's among them.
FUSED_FLOAT32 = 2 * 6


def parts_of(task: Task) -> list[Part]:
    """Every part of a model's step, from one forward pass without data."""
    parts: list[Part] = []

    def hook(name):
        def record(module, inputs, output):
            part = _part(name, module, inputs[0], output, not any(p.kind == "product" for p in parts))
            if part is not None:
                parts.append(part)

        return record

    with torch.device("meta"), torch.no_grad():
        model = task.build()
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(hook(name))
        dtype = torch.long if len(task.shape) == 1 else None
        logits = model(torch.empty(task.batch_size, *task.shape, dtype=dtype))
    return [*parts, Part("loss", "logits", entries=logits.numel())]


def _part(name: str, module: nn.Module, x: torch.Tensor, y: torch.Tensor, first: bool) -> Part | None:
    kind, B = type(module).__name__, x.size(0)
    if isinstance(module, nn.Conv2d):
        geometry = module.kernel_size, module.stride, module.padding, module.dilation, module.groups
        layer = ConvLayer(B, x.size(1), tuple(x.shape[2:]), y.size(1), *geometry)
        return Part(name, "product", layer, trained=module.weight.requires_grad, first=first)
    if isinstance(module, nn.Linear):
        layer = LinearLayer(B, math.prod(x.shape[1:-1]), x.size(-1), y.size(-1))
        return Part(name, "product", layer, trained=module.weight.requires_grad)
    if isinstance(module, nn.GroupNorm):
        return Part(name, kind, NormLayer(B, x.size(1), tuple(x.shape[2:]), module.num_groups), x.numel())
    if isinstance(module, models.Attention):
        scores, width = B * module.heads * x.size(1) ** 2, x.size(2) // 3 // module.heads
        operations = 2 * 2.0 * scores * width / (2 if module.fused else 1)  # the fused kernel leaves out the future
        return Part(name, "fused" if module.fused else "scores", entries=scores, operations=operations)
    return Part(name, kind, entries=x.numel()) if kind in PASSES else None


def sizes(layer: LinearLayer | ConvLayer) -> tuple[int, int, int]:
    """X, Y, W."""
    inputs = layer.T * layer.I if isinstance(layer, LinearLayer) else layer.C * math.prod(layer.S)
    return layer.B * inputs, layer.B * layer.T * layer.O, layer.weight_entries


def product_work(layer: LinearLayer | ConvLayer) -> Work:
    """The layer itself, its input gradient, or its weight gradient: they move the same tensors and cost the same."""
    return Work(HALF * sum(sizes(layer)), 2.0 * layer.B * layer.forward_operations)


def op_work(op: str, layer: Layer, centered: bool = True, itemsize: int = HALF) -> Work:
    """What one op of the schema moves and computes, by the path that the cost model chooses.

    Args:
        op: a name of the schema.
        layer: its layer's shape.
        centered: whether it is given a center.
        itemsize: bytes of an entry of x and gy.
    """
    if isinstance(layer, NormLayer):
        N = layer.B * layer.C * math.prod(layer.S)
        moved = 3 if op == "group_norm_backward" else 5
        return Work(float(itemsize * moved * N), (10.0 if moved == 3 else 25.0) * N)
    X, Y, W = sizes(layer)
    if op.endswith("rank1_sq_norms"):
        return Work(itemsize * (X + Y), 2.0 * (X + Y))
    if op.endswith(("jvp", "weighted_sum")):
        return Work(itemsize * (X + Y) + SUM * W, 2.0 * layer.B * layer.forward_operations)
    purpose, summed = op_purpose(op), op.endswith("with_grad")
    if op.endswith("sq_norms") and "deviation" not in op:
        centered = False
    path = planning.choose_path(layer, purpose, centered, summed)
    operations = 2.0 * layer.B * planning.cost(layer, path, purpose, centered, summed).operations
    moved = itemsize * (X + Y) * (2 if purpose == "grad" else 1)
    layer_shaped = centered + (purpose == "statistics" or summed)
    return Work(moved + SUM * W * layer_shaped, operations)


def op_purpose(op: str) -> str:
    """The cost model's word for what an op is for."""
    return "statistics" if op.endswith("statistics") else "grad" if op.endswith("with_grad") else "norms"


VARIANTS = ("rec.backward", "reg1 batch_mean", "reg1 ema", "reg1 zero", "reg2 ema")


def step_seconds(parts: Iterable[Part], variant: str, machine: Machine) -> float:
    """The limit of a whole step: ``plain`` or one of `VARIANTS`."""
    order = {"plain": PLAIN, "rec.backward": STATISTICS}.get(variant, PENALTY)
    total = 0.0
    for part in parts:
        if part.kind == "product":
            total += sum(work.seconds(machine) for work in _products(part, variant))
        else:
            total += PASSES[part.kind][order] * part.entries / machine.bandwidth
            total += SCORES_OPERATIONS.get(part.kind, (0, 0, 0))[order] * part.operations / machine.rate
            if part.kind == "fused" and order == PENALTY:
                total += FUSED_FLOAT32 * part.operations / machine.float32_rate
    return total


def _products(part: Part, variant: str) -> list[Work]:
    """A layer's products, one after the other."""
    layer = part.layer
    assert isinstance(layer, LinearLayer | ConvLayer)
    unit, (X, Y, _) = product_work(layer), sizes(layer)
    inward = [] if part.first else [unit]  # the gradient by the input, or its derivative
    if not part.trained:
        return [unit, *inward] * (1 if variant in ("plain", "rec.backward") else 2)
    if variant == "plain":
        return [unit, *inward, unit]
    kind = "linear" if isinstance(layer, LinearLayer) else "conv"
    if variant == "rec.backward":
        return [unit, *inward, op_work(f"{kind}_statistics", layer, centered=False)]
    # Forward and δ; the penalty; δ's own derivative by gy and by the weight; backward.
    around = [unit, *inward, *inward, *inward, *inward, unit]
    joins = Work(HALF * (2 + 3) * (X + Y))  # the kept derivatives times α_i, and their sum with what comes from behind
    if variant.startswith("reg2"):
        return [*around, unit, unit, *inward, joins]
    mean = [unit] if variant.endswith("batch_mean") else []
    centered = not variant.endswith("zero")
    return [*around, *mean, op_work(f"{kind}_sq_norms_with_grad", layer, centered), joins]


def tables() -> str:
    """The page's part: predicted ratios of steps, and limits of ops, with what was measured beside them."""
    return "\n\n".join((_steps_table(), _ops_table()))


def _steps_table() -> str:
    names = [m.name for m in MACHINES]
    header = ["model", "step"]
    for name in names:
        header += [f"{name}, ms at the limit", f"{name}, predicted ratio", f"{name}, measured ratio"]
    rows = []
    for task_name, task in TASKS.items():
        parts = parts_of(task)
        for variant in ("plain", *VARIANTS):
            row = [f"{task_name}, B = {task.batch_size}", variant]
            for machine in MACHINES:
                seconds, plain = (step_seconds(parts, v, machine) for v in (variant, "plain"))
                found = measured(machine, "steps", task_name, variant)
                row += [f"{1e3 * seconds:.1f}", f"{seconds / plain:.2f}", found.get("ratio", "")]
            rows.append(row)
    return _markdown(header, rows)


def _ops_table() -> str:
    header = ["layer", "op", "path", "MB", "Gflop"]
    for machine in MACHINES:
        header += [f"{machine.name}, µs at the limit", f"{machine.name}, µs measured"]
    header.append("to the weight gradient, predicted")
    rows = []
    for layer, op in op_cases():
        work = op_work(op, layer)
        row = [f"{layer}, B = {layer.B}", op, "", f"{work.bytes / 1e6:.0f}", f"{work.operations / 1e9:.0f}"]
        if not isinstance(layer, NormLayer) and not op.endswith(("jvp", "weighted_sum", "rank1_sq_norms")):
            row[2] = planning.choose_path(layer, op_purpose(op), True, op.endswith("with_grad"))
        for machine in MACHINES:
            found = measured(machine, "ops", op, f"{layer}, B = {layer.B}")
            shown = f"{float(found['microseconds']):.0f} ({found['backend']})" if found else ""
            row += [f"{1e6 * work.seconds(machine):.0f}", shown]
        base = None if isinstance(layer, NormLayer) else product_work(layer).seconds(MACHINES[-1])
        row.append("" if base is None else f"{work.seconds(MACHINES[-1]) / base:.2f}")
        rows.append(row)
    return _markdown(header, rows)


# Models whose layers the ops are looked at on, with the batch of each.
OP_BATCHES = {"resnet18-imagenet": 64, "transformer-124m": 8, "resnet18-cifar": 256, "resnet50-imagenet": 64}


def op_cases() -> Iterator[tuple[Layer, str]]:
    """(layer, op) of the page: each layer of two models once, by the ops that its steps need most."""
    for name in ("resnet18-imagenet", "transformer-124m"):
        for layer in layers_of(TASKS[name], OP_BATCHES[name]):
            for op in ops_of(layer):
                yield layer, op


@functools.cache
def layers_of(task: Task, B: int) -> tuple[Layer, ...]:
    """Each trained layer of a model once, for batches of B."""
    layers = (part.layer for part in parts_of(task) if part.layer is not None and part.trained)
    return tuple(dict.fromkeys(dataclasses.replace(layer, B=B) for layer in layers))


def ops_of(layer: Layer) -> tuple[str, ...]:
    """The ops that dominate a layer's steps: with statistics, and with a penalty."""
    if isinstance(layer, NormLayer):
        return "group_norm_backward", "group_norm_double_backward"
    if isinstance(layer, LinearLayer) and layer.T == 1:
        return ("linear_rank1_sq_norms",)
    kind = "linear" if isinstance(layer, LinearLayer) else "conv"
    return f"{kind}_statistics", f"{kind}_sq_norms_with_grad"


def measured(machine: Machine, section: str, subject: str, case: str) -> dict[str, str]:
    """The newest stored row of a GPU report on such a machine, or nothing; of several backends the quickest of ours."""

    def fits(row):
        same = (row["section"], row["subject"], row["case"]) == (section, subject, case)
        ours = row["status"] == "ok" and row["backend"] not in ("eager", "peer")
        return same and ours and row["device"] == machine.device

    rows = [row for row in _stored() if fits(row)]
    newest = [row for row in rows if (row["date"], row["time"]) == (rows[-1]["date"], rows[-1]["time"])]
    return min(newest, key=lambda row: float(row["microseconds"]), default={})


@functools.cache
def _stored() -> list[dict[str, str]]:
    """Rows of all stored reports, the oldest first."""
    paths = [path for path in sorted(RESULTS.glob("*.json")) if not path.stem.endswith("-tuned")]
    rows = [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    return sorted(rows, key=lambda row: (row["date"], row["time"]))


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(text: str, make: Callable[[], str] = tables) -> str:
    """The page with fresh tables between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{make()}\n\n{END}{after}"


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the page is not up to date")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    fresh = page(text)
    if options.check:
        sys.exit(None if fresh == text else f"{PAGE} is out of date: run python -m benchmarks.traffic")
    PAGE.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
