"""Every op by every backend on the layers of real models: time, bytes, operations, share of the ceiling.

Beside each: the ratio to torch's own weight gradient of the same layer, by cuDNN or cuBLAS, which is what a plain step pays
where a step with statistics pays for the op. Results are compared with plain torch's on the same device first, and an op
that comes out wrong is not timed. The path is the cost model's, as in a step.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bootgrad import planning
from bootgrad.ops.backends import eager
from bootgrad.planning import ConvLayer, LinearLayer

from .. import traffic
from ..models import TASKS, TINY_TASKS
from ..traffic import Layer, NormLayer
from . import backends, correctness, examples, timing
from .options import Options
from .worker import device_is_lost, first_line

DTYPE = torch.bfloat16
TINY_BATCHES = {"resnet18-tiny": 2, "transformer-tiny": 2}
# What steps with statistics and with a penalty take most of their time for.
FIRST = ("statistics", "with_grad", "group_norm_backward", "group_norm_double_backward", "rank1_sq_norms")


def shards(options: Options) -> list[str]:
    """One process: nothing else may run beside what is timed."""
    return ["all"]


def environment(shard: str, options: Options) -> dict[str, str]:
    """As for the op's backend; on a CPU Triton is interpreted."""
    return backends.environment("triton", options.device)


def cases(shard: str, options: Options) -> list[tuple[str, Any]]:
    """As `pairs`."""
    return [(f"{op}: {layer}", lambda op=op, layer=layer: time_op(op, layer, options)) for op, layer in pairs(options)]


def pairs(options: Options) -> list[tuple[str, Layer]]:
    """The ops that count most on each model's layers, then the others; on a CPU one layer each."""
    tasks, batches = (TINY_TASKS, TINY_BATCHES) if options.tiny else (TASKS, traffic.OP_BATCHES)
    models = [name for name in batches if not options.models or name in options.models]
    wanted = [op for op in backends.ops() if options.wants(op)]
    found: dict[tuple[str, Layer], None] = {}
    for first in (True, False):
        for model in models:
            for layer in traffic.layers_of(tasks[model], batches[model]):
                found |= {(op, layer): None for op in wanted if op.endswith(FIRST) == first and _takes(op, layer)}
    if options.tiny:
        return list({op: (op, layer) for op, layer in reversed(found)}.values())
    return list(found)


def _takes(op: str, layer: Layer) -> bool:
    """Whether an op is for a layer; those with paths are for several positions."""
    return bool(examples.layers_for(op, [layer])) and not (
        examples.takes(op, "path") and examples.positions(layer) == 1
    )


def time_op(op: str, layer: Layer, options: Options) -> Iterator[dict[str, Any]]:
    """Rows of an op on a layer, one for each backend."""
    dtype = torch.float32 if options.tiny else DTYPE
    path = path_of(op, layer)
    arguments = examples.arguments(op, layer, dtype, options.device, path)
    sets = timing.copies(arguments, timing.set_count(arguments, options.device))
    work = traffic.op_work(op, layer, itemsize=dtype.itemsize)
    limit = limit_seconds(work, dtype, options)
    row = {
        "subject": op,
        "case": f"{layer}, B = {layer.B}",
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": work.bytes,
        "operations": work.operations,
    }
    base = None
    if not isinstance(layer, NormLayer):
        call = weight_gradient(layer)
        pairs = [[s[0], s[1]] for s in sets]
        base = timing.measure(call, pairs, options.device).median
    expected = None
    for backend in options.backends or backends.of_device(options.device):
        run = backends.implementation(op, backend, dtype)
        if run is None:
            continue
        own = row | {"backend": backend}
        try:
            if expected is None:
                expected = correctness.results(getattr(eager, op)(*arguments))
            error = largest_difference(correctness.results(run(*arguments)), expected)
            if not error <= correctness.BOUNDS[DTYPE]:
                yield own | {
                    "status": "failed",
                    "error": error,
                    "detail": f"{path} differs from plain torch: not timed",
                }
                continue
            time = timing.measure(run, sets, options.device)
        except torch.OutOfMemoryError as problem:
            yield own | {"status": "out of memory", "detail": first_line(problem)}
            continue
        except Exception as problem:  # noqa: BLE001 — the other backends have a right to run
            yield own | {"status": "error", "detail": f"{type(problem).__name__}: {first_line(problem)}"}
            if device_is_lost(options):
                return
            continue
        share = 100 * limit * 1e6 / time.median if limit else None
        ratio = time.median / base if base else None
        detail = ", ".join(filter(None, (path, time.how, f"weight gradient {base:.1f} µs" if base else "")))
        yield (
            own | {"status": "ok", "percent": share, "ratio": ratio, "error": error, "detail": detail} | time.columns()
        )


def weight_gradient(layer: LinearLayer | ConvLayer) -> Callable[[Tensor, Tensor], Tensor]:
    """Torch's own weight gradient of (x, gy)."""
    if isinstance(layer, LinearLayer):
        return lambda x, gy: gy.reshape(-1, layer.O).t() @ x.reshape(-1, layer.I)
    geometry = layer.stride, layer.padding, layer.dilation, False, (0,) * len(layer.S), layer.groups

    def call(x: Tensor, gy: Tensor) -> Tensor:
        weight = x.new_empty(1).expand(layer.O, layer.C // layer.groups, *layer.K)  # only its shape is read
        return torch.ops.aten.convolution_backward(gy, x, weight, None, *geometry, (False, True, False))[1]

    return call


def limit_seconds(work: traffic.Work, dtype: torch.dtype, options: Options) -> float:
    """The op's limit by the measured ceilings; 0 where they are not known."""
    bandwidth = options.limits.get("copy")
    rate = options.limits.get("bfloat16" if dtype == torch.bfloat16 else "float32")
    return max(work.bytes / bandwidth, work.operations / rate) if bandwidth and rate else 0.0


def largest_difference(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative error in norm."""
    worst = 0.0
    for a, b in zip(ours, expected, strict=True):
        if b.numel():
            worst = max(worst, float((a.float() - b.float()).norm() / b.float().norm()), key=correctness.nan_is_worst)
    return worst


def path_of(op: str, layer: Layer) -> str:
    """The cost model's path, empty for ops without."""
    if not examples.takes(op, "path"):
        return ""
    centered = examples.takes(op, "center")
    return planning.choose_path(layer, traffic.op_purpose(op), centered, examples.takes(op, "mask"))
