"""Whole training steps: time and peak memory of each way to a gradient, as ratios to the plain step.

All ways take turns in one process. Before that, in float32 on a few samples, each way's gradient is compared with what
plain autograd makes of the definition, one backward pass per sample; a wrong one is not timed. On a GPU the forward pass
runs under bfloat16 autocast. Memory is the rise of the allocator's peak over what is held between steps. The check of the
batch's dimension, which comes on steps 1, 2, 4, 8, … of a model, is left out: what is left is what every step costs.
"""

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import bootgrad

from ..models import TASKS, TINY_TASKS, Task, losses
from . import peers, timing
from .options import Options
from .worker import first_line

STRENGTH = 0.1
VARIANTS = {  # penalties, and the center
    "reg1 batch_mean": ("reg1", "batch_mean"),
    "reg1 ema": ("reg1", "ema"),
    "reg1 zero": ("reg1", "zero"),
    "reg2 ema": ("reg2", "ema"),
}
SAMPLES = 3  # that gradients are compared on
POSITIONS = 128
BOUND = 1e-3  # of their relative error, in float32
HALF_BOUND = 0.3  # of a whole bfloat16 step against the plain one: rounding of every layer, not ours alone
SECONDS = 25.0  # for a model, at most
Step = Callable[[], Any]


def shards(options: Options) -> list[str]:
    """Ours, then others' libraries."""
    return ["own", "peers"]


def environment(shard: str, options: Options) -> dict[str, str]:
    """Nothing special: the backend is the one that users get."""
    return {}


def cases(shard: str, options: Options) -> list[tuple[str, Any]]:
    """A model each."""
    return [
        (f"{name}: {shard}", lambda name=name, task=task: time_model(name, task, shard, options))
        for name, task in tasks(options).items()
        if shard == "own" or not name.endswith("fused")
    ]


def tasks(options: Options) -> dict[str, Task]:
    """The models that are asked for."""
    every = TINY_TASKS if options.tiny else TASKS
    return {name: task for name, task in every.items() if not options.models or name in options.models}


def time_model(name: str, task: Task, shard: str, options: Options) -> Iterator[dict[str, Any]]:
    """Rows of a model's ways to a gradient."""
    model, x, y = build(task, options.device)
    steps = {"plain": plain_step(model, x, y, options.device)}
    others = own_steps(model, x, y, options.device)
    if shard == "peers":
        others = peers.steps(task, model, x, y, autocast(options.device))
    backend, errors = ("auto" if shard == "own" else "peer"), {}
    if shard == "own":
        few = build(task, options.device, 2 * SAMPLES)
        for variant in list(others):
            row, errors[variant] = _checked(name, few, variant, options)
            if row is not None:
                yield row
                del others[variant]
            yield {}
        del few
        _free(model, options.device)
    memory: dict[str, float] = {}
    for variant, step in (steps | others).items():
        model.zero_grad()
        try:
            memory[variant] = peak(step, options.device)
        except Exception as error:  # noqa: BLE001 — another library's way may fail in any way
            # The exception's frames hold the step's tensors.
            detail, short_of_memory = first_line(error), isinstance(error, torch.OutOfMemoryError)
            del error
            status = "out of memory" if short_of_memory else "error"
            yield {"subject": name, "case": variant, "backend": backend, "status": status, "detail": detail}
            others.pop(variant, None)
            if variant == "plain":
                return
        _free(model, options.device)
        yield {}
    steps |= others
    if shard == "peers":
        for variant, error in _norm_errors(model, x, y, others, options.device).items():
            errors[variant] = error
            if not error <= HALF_BOUND:
                row = {"subject": name, "case": variant, "backend": backend, "status": "error", "error": error}
                yield row | {"bound": HALF_BOUND, "detail": "its norms are not ours: not timed"}
                del steps[variant]
    if shard == "own" and "rec.backward" in steps and options.device == "cuda":
        errors["rec.backward"] = difference(_gradient(model, steps["rec.backward"]), _gradient(model, steps["plain"]))
        if not errors["rec.backward"] <= HALF_BOUND:
            row = {"subject": name, "case": "rec.backward", "backend": "auto", "status": "failed"}
            yield row | {"error": errors["rec.backward"], "bound": HALF_BOUND, "detail": "against plain, bfloat16"}
            del steps["rec.backward"]
    seconds = min(1.0 if options.tiny else SECONDS, options.left() / 2)
    times = timing.interleave({n: _fresh(model, s) for n, s in steps.items()}, options.device, seconds)
    for variant, values in times.items():
        ratios = sorted(t / p for t, p in zip(values, times["plain"], strict=True))
        yield {
            "subject": name,
            "case": variant if shard == "own" else f"{variant}{' beside peers' if variant == 'plain' else ''}",
            "backend": backend,
            "dtype": "autocast bfloat16" if options.device == "cuda" else "float32",
            "status": "ok",
            "error": errors.get(variant),
            "microseconds": 1e3 * statistics.median(values),
            "low": 1e3 * min(values),
            "high": 1e3 * max(values),
            "ratio": statistics.median(ratios),
            "ratio_low": ratios[len(ratios) // 10],
            "ratio_high": ratios[-1 - len(ratios) // 10],
            "memory_mib": memory[variant] / 2**20 if options.device == "cuda" else None,
            "memory_ratio": memory[variant] / memory["plain"] if memory["plain"] else None,
            "detail": f"B = {x.size(0)}, {len(values)} rounds",
        }


def build(task: Task, device: str, samples: int | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    """The model and its batch."""
    torch.manual_seed(0)
    with torch.device(device):
        model = task.build()
    return model, *task.batch(device, samples)


def autocast(device: str) -> Callable[[], contextlib.AbstractContextManager]:
    """What a forward pass runs in."""
    return (lambda: torch.autocast("cuda", torch.bfloat16)) if device == "cuda" else contextlib.nullcontext


def plain_step(model: nn.Module, x: Tensor, y: Tensor, device: str) -> Step:
    """The mean loss, backward."""
    context = autocast(device)

    def step():
        with context():
            values = losses(model, x, y)
        values.mean().backward()

    return step


def own_steps(
    model: nn.Module, x: Tensor, y: Tensor, device: str, centers: dict[str, Any] | None = None
) -> dict[str, Step]:
    """The library's ways; ``centers`` gets those of the penalties."""
    context = autocast(device)

    def forward(x, y):
        with context():
            return losses(model, x, y)

    def statistics_of_backward():
        with bootgrad.record(model, check="never") as rec:
            values = forward(x, y)
        rec.backward(values)

    def regularized(name):
        reg = regularizer(model, name)
        if centers is not None:
            centers[name] = reg.centers[VARIANTS[name][0]]

        def step():
            with reg.record() as rec:
                rec.check = "never"
                values = forward(x, y)
            reg.backward(values)

        return step

    return {"rec.backward": statistics_of_backward} | {name: regularized(name) for name in VARIANTS}


def regularizer(model: nn.Module, name: str) -> bootgrad.GradientRegularizer:
    """The object that makes the steps of a variant with a penalty."""
    kind, center = VARIANTS[name]
    return bootgrad.GradientRegularizer(model, **{kind: STRENGTH}, center=center)


def peak(step: Step, device: str) -> float:
    """Bytes that a step's peak lies above what is held before it; the second step's, since a center's first is cheaper."""
    step()
    if device == "cpu":
        return 0.0
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def _checked(name: str, few: tuple, variant: str, options: Options) -> tuple[dict[str, Any] | None, float]:
    """A row where a way's gradient is wrong on a few samples, and the error."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    row = {"subject": name, "case": variant, "backend": "auto", "dtype": "float32", "bound": BOUND}
    try:
        error = gradient_error(*few, variant)
    except torch.OutOfMemoryError as problem:
        return row | {"status": "out of memory", "detail": f"in the check: {first_line(problem)}"}, float("nan")
    except Exception as problem:  # noqa: BLE001 — the other ways have a right to run
        return row | {"status": "error", "detail": f"{type(problem).__name__}: {first_line(problem)}"}, float("nan")
    finally:
        torch.backends.cudnn.allow_tf32 = True
        gc.collect()
    if error <= BOUND:
        return None, error
    return row | {"status": "failed", "error": error, "detail": "the gradient is wrong: not timed"}, error


def gradient_error(model: nn.Module, x: Tensor, y: Tensor, variant: str) -> float:
    """Relative error of a way's gradient against the definition's, in float32 on a few samples."""
    model.zero_grad()
    if x.dim() == 2:  # tokens: one graph for each sample is large
        x, y = x[:, :POSITIONS], y[:, :POSITIONS]
    parameters = [p for p in model.parameters() if p.requires_grad]
    now, before = slice(None, SAMPLES), slice(SAMPLES, None)
    kind, center = VARIANTS.get(variant, ("", ""))
    if not kind:
        with bootgrad.record(model) as rec:
            values = losses(model, x[now], y[now])
        rec.backward(values)
        expected = torch.autograd.grad(losses(model, x[now], y[now]).mean(), parameters)
        return difference([p.grad for p in parameters], expected)

    def forward(x, y):
        return losses(model, x, y)

    reg = regularizer(model, variant)
    reg.backward(forward, x[before], y[before])  # a moving center then is these samples' mean gradient
    model.zero_grad()
    reg.backward(forward, x[now], y[now])
    with sdpa_kernel(SDPBackend.MATH):  # of torch's kernels for attention the only one with a second derivative
        values = losses(model, x[now], y[now])
    rows = [torch.autograd.grad(value, parameters, create_graph=True) for value in values]
    mean = [sum(parts) / SAMPLES for parts in zip(*rows, strict=True)]
    c = mean
    if center == "zero":
        c = [torch.zeros_like(p) for p in parameters]
    elif center == "ema":
        c = torch.autograd.grad(losses(model, x[before], y[before]).mean(), parameters)
    about = [mean] if kind == "reg2" else rows
    penalty = sum((g - m).square().sum() for row in about for g, m in zip(row, c, strict=True)) / len(about)
    expected = torch.autograd.grad(values.mean() + STRENGTH * penalty, parameters)
    return difference([p.grad for p in parameters], expected)


def difference(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖ours − expected‖ / ‖expected‖ of two gradients."""
    squares = [
        ((a - b).double().square().sum(), b.double().square().sum()) for a, b in zip(ours, expected, strict=True)
    ]
    difference, size = (float(sum(parts)) for parts in zip(*squares, strict=True))
    return (difference / size) ** 0.5


def _norm_errors(model: nn.Module, x: Tensor, y: Tensor, others: dict[str, Step], device: str) -> dict[str, float]:
    """How far other libraries' norms are from ours."""
    model.zero_grad()
    with bootgrad.record(model) as rec, autocast(device)():
        values = losses(model, x, y)
    ours = rec.backward(values).sq_norms
    return {name: difference([step()], [ours]) for name, step in others.items()}


def _gradient(model: nn.Module, step: Step) -> list[Tensor]:
    model.zero_grad()
    step()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _fresh(model: nn.Module, step: Step) -> Step:
    def run():
        model.zero_grad()
        step()

    return run


def _free(model: nn.Module, device: str) -> None:
    model.zero_grad()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
