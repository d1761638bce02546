"""Measured times beside a plan's predictions: the ops of each layer on random numbers, and whole steps, all taking turns.

A time is given as the median over rounds of its ratio to a plain step's in the same round. Steps are taken on a copy of the
model, so that gradients and buffers of the user's stay as they are; a step that `GradientRegularizer` refuses is left out.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .costs import EXAMPLE_EVERY, STEPS, Step
from .errors import ArgumentError, BootgradError
from .recording import named_parameters
from .regularizers import GradientRegularizer
from .rules.base import ProductOperation
from .statistics import record

ROUNDS = 7
WARMUP = 3  # a moving center knows nothing before, and batches are checked on the first two steps
Run = Callable[[], Any]


def op_runs(operation: ProductOperation, batch_size: int) -> dict[str, Run]:
    """What computes the norms of a layer on random numbers of its shapes, by purpose."""
    weight = operation.weight
    assert weight is not None
    x, gy = (torch.randn(shape, dtype=weight.dtype, device=weight.device) for shape in operation.shapes)
    product, x, gy, _ = operation.product.factor(x, gy, weight.shape, batch_size)
    return {
        "statistics": lambda: product.statistics(x, gy, None),
        "grad": lambda: product.sq_norms_with_grad(x, gy, None, (True, True, False)),
    }


def step_runs(
    model: nn.Module, example: Sequence[Any], output: Any, batch_size: int
) -> tuple[dict[str, Run], list[str]]:
    """What takes each step of `costs.STEPS`, by name, and why others are left out.

    Raises:
        ArgumentError: the output is no tensor with samples in dimension 0, of which losses can be made, or the model cannot
            be copied.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.shape[:1] != (batch_size,):
        raise ArgumentError(
            f"measure needs a model that puts out a tensor of numbers, {batch_size} samples in dimension 0; got "
            f"{f'shape {tuple(output.shape)}' if isinstance(output, Tensor) else type(output).__name__}"
        )
    try:
        model = copy.deepcopy(model)
    except Exception as error:  # whatever the model's parts say
        raise ArgumentError(f"measure takes steps on a copy of the model, which cannot be made: {error}") from error

    def losses(*batch):
        output = model(*batch)
        return output.reshape(output.size(0), -1).square().mean(1)

    def plain():
        losses(*example).mean().backward()

    def with_statistics(center):
        with record(model, compiled=False) as rec:
            values = losses(*example)
        rec.backward(values, center=center)

    center = {name: torch.zeros_like(p) for name, p in named_parameters(model).items()}
    runs: dict[str, Run] = {
        "plain": plain,
        "rec.backward": lambda: with_statistics(None),
        "rec.backward, center": lambda: with_statistics(center),
    }
    refused = []
    for step in STEPS:
        if step.options is not None:
            try:
                runs[step.name] = _regularized(model, losses, example, step)
                runs[step.name]()
            except BootgradError as error:
                runs.pop(step.name, None)
                refused.append(f"not measured: {step.name}: {error}")
    return runs, refused


def _regularized(model: nn.Module, losses: Callable[..., Tensor], example: Sequence[Any], step: Step) -> Run:
    reg = GradientRegularizer(model, **(step.options or {}))
    return lambda: reg.backward(losses, *example)


def time_ratios(runs: dict[Any, Run], base: Any, repeats: dict[Any, int], device: torch.device) -> dict[Any, float]:
    """Median over rounds of each run's time to that of ``base`` in the same round.

    Args:
        runs: what to time.
        base: a key of ``runs``.
        repeats: how often one is called in a round, once where nothing is said; its time is that of one call.
        device: what to wait for.
    """
    ratios: dict[Any, list[float]] = {key: [] for key in runs}
    for k in range(-WARMUP, ROUNDS):
        times = {}
        for key, run in runs.items():
            count = repeats.get(key, 1)
            _wait(device)
            start = time.perf_counter()
            for _ in range(count):
                run()
            _wait(device)
            times[key] = (time.perf_counter() - start) / count
        if k >= 0:
            for key, seconds in times.items():
                ratios[key].append(seconds / times[base])
    return {key: statistics.median(values) for key, values in ratios.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(
    model: nn.Module,
    example: Sequence[Any],
    output: Any,
    operations: Sequence[ProductOperation],
    batch_size: int,
) -> tuple[dict[tuple[int, str], float], dict[str, float], list[str]]:
    """Ratios to a plain step of each op, by (number of the operation, purpose), and of each step, by name, and remarks."""
    steps, refused = step_runs(model, example, output, batch_size)
    ops = {(k, p): run for k, o in enumerate(operations) for p, run in op_runs(o, batch_size).items()}
    repeats = {step.name: EXAMPLE_EVERY for step in STEPS if step.options and "every" in step.options}
    device = next(iter(named_parameters(model).values())).device
    ratios = time_ratios({**ops, **steps}, "plain", repeats, device)
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    remark = (
        f"measured: median of {ROUNDS} rounds in turns, on {device}{threads}; losses are mean squares of the output"
    )
    return {key: ratios[key] for key in ops}, {name: ratios[name] for name in steps}, [remark, *refused]
