"""Every op of the schema by every backend against plain torch in float64 on the CPU, and twice for equal bits.

An error is ‖ours − exact‖ over what it is relative to: the exact result's norm, per sample where results are per sample; of
an inner product ⟨G_i, v⟩, which may cancel, ‖G_i‖ ‖v‖. Memory that a kernel leaves unwritten is NaN and so fails.
Bounds are those of the design: rounding of the accumulation dtype, and of the inputs' for half precisions. Torch's own
TF32 is off.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bootgrad.ops.backends import eager
from bootgrad.planning import ConvLayer, LinearLayer

from ..traffic import Layer, LookUpLayer, NormLayer
from . import backends, examples
from .options import Options

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
DTYPES = tuple(
    str(dtype).removeprefix("torch.") for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64)
)
KINDS = ("conv_sq", "conv_st", "conv_d,conv_j,conv_w", "linear", "group", "embedding")

ODD = (
    LinearLayer(3, 1, 127, 65),
    LinearLayer(1, 63, 127, 1),
    LinearLayer(5, 33, 64, 130),
    LinearLayer(2, 127, 1, 63),
    LinearLayer(0, 4, 5, 3),
    ConvLayer(3, 5, (7, 9), 6, (3, 3), (2, 1), (1, 0), (1, 2)),
    ConvLayer(1, 64, (14, 14), 63, (3, 3), (1, 1), (1, 1), (1, 1)),
    ConvLayer(2, 32, (13, 13), 65, (1, 1), (2, 2), (0, 0), (1, 1)),
    ConvLayer(2, 6, (9, 9), 6, (3, 3), (2, 2), (1, 1), (1, 1), 6),
    ConvLayer(2, 8, (17,), 12, (4,), (3,), (2,), (1,), 2),
    ConvLayer(2, 3, (5, 4, 6), 4, (2, 3, 2), (1, 2, 1), (1, 1, 0), (1, 1, 1)),
    NormLayer(3, 12, (7, 9), 4),
    NormLayer(1, 64, (127,), 64),
    NormLayer(2, 6, (63, 65), 1),
    LookUpLayer(3, 127, 50, 63),
    LookUpLayer(1, 1, 1, 1),
    LookUpLayer(2, 0, 5, 3),
)
REAL = (  # of ResNet-18, ResNet-50 and a transformer
    ConvLayer(4, 64, (56, 56), 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    ConvLayer(8, 256, (14, 14), 256, (3, 3), (1, 1), (1, 1), (1, 1)),
    ConvLayer(8, 512, (7, 7), 512, (3, 3), (1, 1), (1, 1), (1, 1)),
    ConvLayer(2, 3, (224, 224), 64, (7, 7), (2, 2), (3, 3), (1, 1)),
    ConvLayer(8, 128, (28, 28), 256, (1, 1), (2, 2), (0, 0), (1, 1)),
    ConvLayer(4, 1024, (14, 14), 256, (1, 1), (1, 1), (0, 0), (1, 1)),
    LinearLayer(2, 1024, 768, 3072),
    LinearLayer(4, 128, 768, 768),
    LinearLayer(256, 1, 2048, 1000),
    NormLayer(8, 64, (56, 56), 32),
    NormLayer(4, 64, (112, 112), 32),
    LookUpLayer(4, 1024, 50257, 768),
)
TINY = (
    LinearLayer(3, 1, 7, 5),
    LinearLayer(2, 3, 7, 5),
    ConvLayer(2, 4, (5, 4), 6, (3, 3), (2, 1), (1, 1), (1, 1), 2),
    NormLayer(2, 6, (3, 5), 2),
    LookUpLayer(2, 7, 5, 3),
)


def shards(options: Options) -> list[str]:
    """A backend with a dtype and a kind of ops each, so that kernels compile side by side; on a CPU, a backend."""
    chosen = options.backends or backends.of_device(options.device)
    if options.tiny:
        # Half precisions are not to be trusted in Triton's interpreter, and it takes its time.
        return [f"{backend} {'float32' if backend == 'triton' else '+'.join(DTYPES)} " for backend in chosen]
    return [f"{backend} {dtype} {kind}" for dtype in DTYPES for backend in chosen for kind in KINDS]


def environment(shard: str, options: Options) -> dict[str, str]:
    """The variables of a shard's process."""
    return backends.environment(shard.partition(" ")[0], options.device)


def cases(shard: str, options: Options) -> list[tuple[str, Any]]:
    """Real sizes before odd ones, and of each size every op."""
    backend, names, kind = shard.split(" ")
    torch.set_num_threads(1 if options.tiny else 2)
    ops = [op for op in backends.ops() if options.wants(op) and op.startswith(tuple(kind.split(",")))]
    return [case for name in names.split("+") for case in _cases(ops, backend, getattr(torch, name), options)]


def _cases(ops: list[str], backend: str, dtype: torch.dtype, options: Options) -> list[tuple[str, Any]]:
    layers = TINY if options.tiny else ODD if dtype == torch.float64 else (*REAL, *ODD)
    found = []
    for op in ops:
        status, detail = "", ""
        if not examples.layers_for(op, layers):
            status, detail = "error", f"no layer to run it on: add one to {__name__}"
        elif backends.implementation(op, backend, dtype) is None:
            status, detail = "skipped", "not implemented"
        if status:
            row = _row(op, backend, dtype, status, detail)
            found.append((f"{op}: {status}", lambda row=row: iter([row])))
    for layer in layers:
        for op in ops:
            if layer in examples.layers_for(op, layers) and backends.implementation(op, backend, dtype) is not None:
                found.append((f"{op}: {layer}", lambda op=op, layer=layer: compare(op, layer, backend, dtype, options)))
    return found


def _row(op: str, backend: str, dtype: torch.dtype, status: str, detail: str) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    return {"subject": op, "backend": backend, "dtype": name, "status": status, "detail": detail}


def compare(op: str, layer: Layer, backend: str, dtype: torch.dtype, options: Options) -> Iterator[dict[str, Any]]:
    """Rows of an op on a layer, one for each path."""
    run = backends.implementation(op, backend, dtype)
    assert run is not None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    paths = ("direct", "gram") if examples.takes(op, "path") else ("",)
    worst, same = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, True)
    changes = variants(op, layer, options.tiny)
    for change in changes:
        given = examples.arguments(op, layer, dtype, **change)
        exact = results(getattr(eager, op)(*examples.widened(given)))
        scale = inner_scale(op, given)
        for path in paths:
            moved = examples.moved([path if a == "direct" else a for a in given], options.device)
            first, second = (results(run(*moved)) for _ in range(2))
            if options.spoil == op:
                first = second = tuple(1.1 * t for t in first)
            elif options.spoil == f"abort {op}":
                os.abort()
            for ours, again, expected in zip(first, second, exact, strict=True):
                if ours.shape != expected.shape:
                    raise AssertionError(f"a result of shape {tuple(ours.shape)}, not {tuple(expected.shape)}")
                worst[path] = max(worst[path], error(ours, expected, layer.B, scale), key=nan_is_worst)
                same[path] &= same_bits(ours, again)
            yield {}
    for path in paths:
        good = worst[path] <= BOUNDS[dtype]
        yield {
            "subject": op,
            "case": f"{layer}, B = {layer.B}{', ' + path if path else ''}",
            "backend": backend,
            "dtype": str(dtype).removeprefix("torch."),
            "status": "ok" if good and same[path] else "failed",
            "error": worst[path],
            "bound": BOUNDS[dtype],
            "detail": f"{len(changes)} variants, {'same' if same[path] else 'OTHER'} bits twice",
        }


def variants(op: str, layer: Layer, tiny: bool) -> list[dict[str, Any]]:
    """With all optional tensors and without each, strided ones, every result alone, and with channels last."""
    found: list[dict[str, Any]] = [{}, *({"absent": (name,)} for name in examples.optional(op))]
    if any(examples.takes(op, name) for name in ("center", "v", "w", "mean")):
        found.append({"apart": True})
    if tiny:
        return found
    if examples.takes(op, "mask"):
        found += [{"mask": m} for m in ((True, False, False), (False, True, True), (False, False, False))]
    if isinstance(layer, ConvLayer | NormLayer):
        found.append({"channels_last": True})
    return found


def inner_scale(op: str, given: list[Any]) -> Tensor | None:
    """‖x_i‖ ‖gy_i‖ ‖v‖ / √T, an inner product's size for positions that have nothing to do with each other."""
    if not op.endswith("jvp"):
        return None
    x, gy, v = (t.double().cpu() for t in given[:3])
    positions = x.size(1) if x.dim() == 3 and v.dim() == 2 else math.prod(gy.shape[2:])
    return x.flatten(1).norm(dim=1) * gy.flatten(1).norm(dim=1) * v.norm() / math.sqrt(max(1, positions))


def error(ours: Tensor, exact: Tensor, B: int, scale: Tensor | None = None) -> float:
    """The largest relative error, over samples where results are per sample."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    if not exact.numel():
        return 0.0
    rows = B if exact.size(0) == B else 1
    difference = (ours - exact).reshape(rows, -1).norm(dim=1)
    size = exact.reshape(rows, -1).norm(dim=1) if scale is None else scale
    relative = torch.where(difference == 0, 0.0, difference / size)
    return float("nan") if relative.isnan().any() else float(relative.max())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN included."""
    a, b = (t.contiguous().view(-1).view(torch.uint8) if t.numel() else t for t in (a, b))
    return torch.equal(a, b)


def results(returned: Any) -> tuple[Tensor, ...]:
    """What an op returned, always as several."""
    return tuple(returned) if isinstance(returned, tuple | list) else (returned,)


def nan_is_worst(value: float) -> float:
    """A key for `max`."""
    return float("inf") if math.isnan(value) else value
