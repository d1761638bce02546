"""Whether a whole step can be captured as a CUDA graph, its replay gives the same gradient, and what that saves."""

from collections.abc import Iterator
from typing import Any

import torch

from . import steps, timing
from .options import Options
from .worker import first_line

WARMUP = 2  # steps that may synchronize: centers, workspaces
BOUND = 2e-2  # torch's own bfloat16 gradients differ from run to run
MODELS = ("resnet18-cifar", "transformer-124m")
VARIANTS = ("plain", "rec.backward", "reg1 batch_mean", "reg1 ema")


def shards(options: Options) -> list[str]:
    """A process for each model and way: a failed capture may leave the context unusable."""
    names = [name for name in steps.tasks(options) if options.tiny or name in MODELS]
    return [f"{name} {variant}" for name in names for variant in (("plain",) if options.tiny else VARIANTS)]


def environment(shard: str, options: Options) -> dict[str, str]:
    """As for `steps`."""
    return {}


def cases(shard: str, options: Options) -> list[tuple[str, Any]]:
    """One."""
    name, _, variant = shard.partition(" ")
    return [(f"{name}: {variant}", lambda: capture(name, variant, options))]


def capture(name: str, variant: str, options: Options) -> Iterator[dict[str, Any]]:
    """Capture, replay, compare, time."""
    row = {"subject": name, "case": variant}
    if options.device != "cuda":
        yield row | {"status": "skipped", "detail": "needs a GPU"}
        return
    model, x, y = steps.build(steps.tasks(options)[name], options.device)
    centers: dict[str, Any] = {}
    ways = {"plain": steps.plain_step(model, x, y, "cuda")} | steps.own_steps(model, x, y, "cuda", centers=centers)
    step, center = ways[variant], centers.get(variant)

    def fresh():
        model.zero_grad()
        step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            fresh()
        before = None if center is None else center.state_dict()
        fresh()
    torch.cuda.current_stream().wait_stream(side)
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    if center is not None:  # where the expected step found it: the graph reads and moves what is there now
        center.load_state_dict(before)
    model.zero_grad()
    try:
        graph = timing.captured(step)
    except RuntimeError as error:
        yield row | {"status": "error", "detail": f"does not capture: {first_line(error)}"}
        return
    graph.replay()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    error = steps.difference(found, expected)
    row |= {"error": error, "bound": BOUND}
    if not error <= BOUND:
        yield row | {"status": "failed", "detail": "the replayed gradient differs"}
        return

    times = timing.interleave({"eager": fresh, "replay": graph.replay}, "cuda", min(8.0, options.left() / 2))
    eager, replay = (sorted(times[key])[len(times[key]) // 2] for key in ("eager", "replay"))
    row |= {"status": "ok", "microseconds": 1e3 * replay, "ratio": replay / eager}
    yield row | {"detail": f"captures; eager step {eager:.2f} ms"}
