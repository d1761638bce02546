"""Whether a whole step can be captured as a CUDA graph, its replay gives the same gradient, and what that saves."""

from collections.abc import Iterator
from typing import Any

import torch

from . import steps, timing
from .options import Options
from .worker import first_line

WARMUP = 3  # steps that may synchronize: the check of the batch, centers, workspaces
BOUND = 2e-2  # torch's own bfloat16 gradients differ from run to run
MODELS = ("resnet18-cifar", "transformer-124m")
VARIANTS = ("plain", "rec.backward", "reg1 batch_mean", "reg1 ema")


def shards(options: Options) -> list[str]:
    """A process for each way: a failed capture may leave the context unusable."""
    return list(VARIANTS) if options.device == "cuda" else ["plain"]


def environment(shard: str, options: Options) -> dict[str, str]:
    """As for `steps`."""
    return {}


def cases(shard: str, options: Options) -> list[tuple[str, Any]]:
    """A model each."""
    names = [name for name in steps.tasks(options) if options.tiny or name in MODELS]
    return [(f"{name}: {shard}", lambda name=name: capture(name, shard, options)) for name in names[:2]]


def capture(name: str, variant: str, options: Options) -> Iterator[dict[str, Any]]:
    """Capture, replay, compare, time."""
    row = {"subject": name, "case": variant}
    if options.device != "cuda":
        yield row | {"status": "skipped", "detail": "needs a GPU"}
        return
    model, x, y = steps.build(steps.tasks(options)[name], options.device)
    ways = {"plain": steps.plain_step(model, x, y, "cuda")} | steps.own_steps(model, x, y, "cuda")
    step = ways[variant]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            model.zero_grad()
            step()
    torch.cuda.current_stream().wait_stream(side)
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        yield row | {"status": "error", "detail": f"does not capture: {first_line(error)}"}
        return
    graph.replay()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    error = steps.difference(found, expected)
    # A moving center moves on with every step, and its penalty with it.
    bound = BOUND if "ema" not in variant else 1.0
    if not error <= bound:
        yield row | {"status": "failed", "error": error, "bound": bound, "detail": "the replayed gradient differs"}
        return

    def fresh():
        model.zero_grad()
        step()

    times = timing.interleave({"eager": fresh, "replay": graph.replay}, "cuda", min(8.0, options.left() / 2))
    eager, replay = (sorted(times[key])[len(times[key]) // 2] for key in ("eager", "replay"))
    row |= {"status": "ok", "error": error, "bound": bound, "microseconds": 1e3 * replay, "ratio": replay / eager}
    yield row | {"detail": f"captures; eager step {eager:.2f} ms"}
