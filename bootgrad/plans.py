"""What a model's steps will cost, predicted from the shapes in one recorded forward pass of it.

The numbers are those of `planning` and `costs`; here they meet a model, and the backends that a GPU would take.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from . import planning
from .costs import STEPS, Use, extra_bytes, moved_entries, op_time, sizes, step_time
from .errors import ArgumentError, RecordingError, UnsupportedError
from .ops import library
from .ops.backends import gpu
from .plan_tables import PURPOSES, LayerPlan, OtherPlan, Plan, StepPlan
from .plan_timing import measured
from .planning import Layer
from .recording import named_parameters
from .rules.base import Operation, ProductOperation
from .statistics import record

DEVICES = ("cpu", "cuda")
PRECISIONS = ("float32", "bfloat16", "float16", "float64")
_OPS = {"statistics": "statistics", "grad": "sq_norms_with_grad"}


def plan(
    model: nn.Module,
    *example: Any,
    device: str = "cpu",
    precision: str = "float32",
    measure: bool = False,
) -> Plan:
    """Predict what per-sample norms and penalties cost on a model, from the shapes in one forward pass of it.

    Args:
        model: the module; parameters that do not require grad are left out.
        example: what the model is called with, samples in dimension 0 of the first tensor. Its values are not looked at, and
            nothing is computed, unless the model asks for values or times are measured.
        device: ``"cpu"``, or ``"cuda"`` for what would run each op on a GPU: this machine's, or one with every backend.
        precision: the dtype of the layers' inputs on that GPU, ``"bfloat16"`` under autocast.
        measure: also time each op and step, for some seconds to minutes, on a copy of the model where the example is. The
            losses are then the mean squares of each sample's output.

    Returns:
        A `Plan`, whose ``str`` is a table.

    Raises:
        ArgumentError: an unknown device or precision; no tensor among the arguments; a model to measure that is on another
            device, cannot be copied, or puts out no tensor of numbers with samples in dimension 0.
        UnsupportedError: samples are not in dimension 0 of every operation on a parameter.
        RecordingError: no layer with a weight that requires grad was recorded.
    """
    for name, value, allowed in (("device", device, DEVICES), ("precision", precision, PRECISIONS)):
        if value not in allowed:
            raise ArgumentError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    batch_size = _batch_size(example)
    if measure and any(p.device.type != device for p in named_parameters(model).values()):
        raise ArgumentError(
            f"measure times the model where it is, which must be {device}: move model and example there"
        )
    recording, output, saved_bytes = _recorded(model, example, measure)
    products = _products(recording, batch_size)
    if not products:
        raise RecordingError(
            "no linear or convolution layer with a weight that requires grad was recorded: nothing to plan"
        )
    uses = [use for *_, use in products]
    itemsize = next(iter(recording.parameters.values())).element_size()
    of_entry = itemsize if device == "cpu" else getattr(torch, precision).itemsize
    parameters = sum(p.numel() for p in recording.parameters.values())
    forward, plain = sum(use.unit for use in uses), step_time(STEPS[0], uses)
    others, notes = _others(recording, batch_size), _notes(device, precision)
    of_op: dict[tuple[int, str], float] = {}
    of_step: dict[str, float] = {}
    if measure:
        of_op, of_step, found = measured(
            model, example, output, [operation for _, operation, _ in products], batch_size
        )
        notes += found
    where = device, precision, of_entry
    layers = [
        _layer(name, use, purpose, plain, where, of_op.get((k, purpose)))
        for purpose in PURPOSES
        for k, (name, _, use) in enumerate(products)
    ]
    plain_bytes = saved_bytes + itemsize * (parameters + max(sum(sizes(use.layer)) for use in uses))
    steps = []
    for step in STEPS:
        time, memory = step_time(step, uses), 1 + extra_bytes(step, uses, parameters, itemsize) / plain_bytes
        steps.append(StepPlan(step.name, time / forward, time / plain, memory, of_step.get(step.name)))
    sums = batch_size, parameters, plain_bytes
    return Plan(*sums, tuple(layers), others, tuple(steps), device, precision, tuple(notes))


def _batch_size(example: Sequence[Any]) -> int:
    for t in example:
        if isinstance(t, Tensor) and t.dim() and t.size(0):
            return t.size(0)
    got = [f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__ for t in example]
    raise ArgumentError(
        "plan needs an example of the model's input, a tensor with one sample or more in dimension 0; got "
        f"{', '.join(got) or 'nothing'}: pass one, for example torch.zeros(128, 3, 32, 32)"
    )


def _recorded(model: nn.Module, example: Sequence[Any], really: bool) -> tuple[record, Any, int]:
    """The record of a forward pass, its output, and the bytes that it saved beside what was there before.

    Shapes are all that is needed, so that nothing is computed, but where a model asks for values, or the output is wanted.
    """
    if not really:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with mode:
                return _run(model, example, mode.from_tensor)
        except Exception:  # whatever cannot be done with shapes alone: what is wrong with the model itself shows again
            pass
    return _run(model, example, lambda t: t)


def _run(model: nn.Module, example: Sequence[Any], as_seen: Callable[[Tensor], Tensor]) -> tuple[record, Any, int]:
    recording, saved = record(model, compiled=False), {}
    example = [as_seen(t) if isinstance(t, Tensor) else t for t in example]
    before = [*model.parameters(), *model.buffers()]
    # Saved for gradients are weights as they are seen, or, where they are frozen, as they are.
    there = [*before, *map(as_seen, before), *(t for t in example if isinstance(t, Tensor))]

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        saved[storage._cdata] = storage
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), recording:
        output = model(*example)
    for t in there:
        saved.pop(t.untyped_storage()._cdata, None)
    return recording, output, sum(storage.nbytes() for storage in saved.values())


def _products(recording: record, batch_size: int) -> list[tuple[str, ProductOperation, Use]]:
    products: list[tuple[str, ProductOperation, Use]] = []
    for operation in recording.operations:
        if operation.output_rows % batch_size:
            raise UnsupportedError(
                f"{operation.name} ({_names(recording, operation)}) puts out {operation.output_rows} rows in dimension 0 for "
                f"{batch_size} samples: samples must be dimension 0 of every operation on a parameter"
            )
        if isinstance(operation, ProductOperation) and operation.weight is not None:
            layer = operation.layer(batch_size)
            assert layer is not None
            # The arguments of `RecordedProduct`: operation, probe, x, weight, bias.
            first = not operation.edge.node.needs_input_grad[2]  # type: ignore[attr-defined]
            products.append((recording.name_of(operation.weight), operation, Use(layer, first)))
    return products


def _layer(
    name: str, use: Use, purpose: str, plain: float, where: tuple[str, str, int], measured: float | None
) -> LayerPlan:
    device, precision, itemsize = where
    layer, path = use.layer, planning.choose_path(use.layer, purpose)
    times = {other: op_time(layer, other, purpose) for other in sorted(layer.paths, key=lambda p: p != path)}
    on_cpu, of_path = device == "cpu", planning.cost(layer, path, purpose, itemsize=max(itemsize, 4))
    return LayerPlan(
        name,
        layer,
        purpose,
        path,
        {other: time / use.unit for other, time in times.items()},
        of_path.operations,
        itemsize * moved_entries(layer, purpose) + max(itemsize, 4) * (purpose == "statistics") * layer.weight_entries,
        of_path.bytes if on_cpu else _gpu_workspace(layer, path, purpose, precision),
        times[path] / plain,
        None if on_cpu else _gpu_backend(layer, path, purpose, precision),
        measured,
    )


def _gpu_backend(layer: Layer, path: str, purpose: str, precision: str) -> str:
    if path == "rank1" and purpose == "grad":  # one product of matrices, which is plain torch everywhere
        return "eager"
    kind = "linear" if isinstance(layer, planning.LinearLayer) else "conv"
    op = "linear_rank1_sq_norms" if path == "rank1" else f"{kind}_{_OPS[purpose]}"
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        return gpu.choose(op, getattr(torch, precision), path, library.backend(), device)
    return planning.gpu_backend(op, precision, library.backend())


def _gpu_workspace(layer: Layer, path: str, purpose: str, precision: str) -> float:
    if path == "direct":
        return planning.gpu_workspace(layer, purpose, precision)
    sample = planning.cost(layer, path, purpose).bytes
    return min(layer.B, max(1, planning.GPU_WORKSPACE_BYTES // sample)) * sample if sample else 0


def _others(recording: record, batch_size: int) -> tuple[OtherPlan, ...]:
    found = []
    for operation in recording.operations:
        if operation.covers is None and not (isinstance(operation, ProductOperation) and operation.weight is not None):
            found.append(OtherPlan(operation.name, _names(recording, operation), operation.held_bytes(batch_size)))
    return tuple(found)


def _notes(device: str, precision: str) -> list[str]:
    if device == "cpu":
        return []
    fitted = "units and shares have constants of a CPU"
    if torch.cuda.is_available():
        return [f"backends of {torch.cuda.get_device_name()}, {precision}; {fitted}"]
    return [f"backends of a machine with every one of them, {precision}: torch sees no GPU here; {fitted}"]


def _names(recording: record, operation: Operation) -> str:
    return ", ".join(map(recording.name_of, operation.tracked))
