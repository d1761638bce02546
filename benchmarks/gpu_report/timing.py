"""Time on a device: graph replays or events on a GPU, the clock on a CPU; several input sets take turns.

The sets together are larger than the last cache, so that every call reads from memory, as it does in a training step.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CACHES = 4  # times the L2 that the input sets fill
LARGEST = 6 * 2**30  # bytes of all input sets
REPLAYS = 9
PATIENCE = 1.5  # seconds that all repetitions may take; slow calls run on fewer input sets


class Time(NamedTuple):
    """Microseconds of a call: median, and the second smallest and second largest of the repetitions."""

    median: float
    low: float
    high: float
    how: str

    def columns(self) -> dict[str, Any]:
        """As columns of a row."""
        return {"microseconds": self.median, "low": self.low, "high": self.high}


def set_count(arguments: Sequence[Any], device: str) -> int:
    """How many copies of a call's arguments it takes to overrun the last cache."""
    size = max(1, sum(a.numel() * a.element_size() for a in arguments if isinstance(a, Tensor)))
    if device == "cpu":
        return 1
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 * 2**20)
    return max(1, min(CACHES * cache // size + 1, 64, LARGEST // size))


def copies(arguments: Sequence[Any], count: int) -> list[list[Any]]:
    """The arguments and ``count − 1`` copies of them, strides kept."""
    return [
        list(arguments),
        *([a.clone() if isinstance(a, Tensor) else a for a in arguments] for _ in range(count - 1)),
    ]


def measure(call: Callable, sets: list[list[Any]], device: str) -> Time:
    """The time of ``call(*arguments)``, averaged over the sets in each repetition."""
    call(*sets[0])
    synchronize(device)
    start = time.perf_counter()
    call(*sets[-1])
    synchronize(device)
    sets = sets[: max(1, int(PATIENCE / REPLAYS / (time.perf_counter() - start)))]
    if device == "cpu":
        return _clock(call, sets)
    try:
        once, how = captured(lambda: [call(*arguments) for arguments in sets]).replay, "graph"
    except RuntimeError:  # it synchronizes, or allocates what capture forbids
        torch.cuda.synchronize()
        once, how = (lambda: [call(*arguments) for arguments in sets] and None), "events"
    once()
    times = [t / len(sets) for t in _event_times(once)]
    once = None
    torch.cuda.empty_cache()  # a graph's memory goes back only so
    return Time(*_spread(times), how)


def captured(run: Callable[[], Any]) -> "torch.cuda.CUDAGraph":
    """The graph of what ``run`` launches.

    Raises:
        RuntimeError: ``run`` does what capture forbids. It is the first error: the end of an invalid capture raises another,
            and would leave the process on the stream of the capture.
    """
    graph, stream, cause = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), None
    try:
        with torch.cuda.graph(graph):
            try:
                run()
            except RuntimeError as error:
                cause = error
                raise
    except RuntimeError as error:
        raise cause or error from None
    finally:
        torch.cuda.set_stream(stream)
    return graph


def _event_times(once: Callable[[], None]) -> list[float]:
    """Microseconds of each repetition."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for first, last in events:
        first.record()
        once()
        last.record()
    torch.cuda.synchronize()
    return [1e3 * first.elapsed_time(last) for first, last in events]


def _clock(call: Callable, sets: list[list[Any]]) -> Time:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for arguments in sets:
            call(*arguments)
        times.append(1e6 * (time.perf_counter() - start) / len(sets))
    return Time(*_spread(times), "clock")


def _spread(times: list[float]) -> tuple[float, float, float]:
    ordered = sorted(times)
    return statistics.median(ordered), ordered[1], ordered[-2]


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(
    steps: dict[str, Callable[[], None]], device: str, seconds: float, rounds: int = 11, warmup: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of each step by round; all steps take turns.

    Args:
        steps: what to time.
        device: what to wait for.
        seconds: after which no further round begins; one is always made.
        rounds: how many are wanted.
        warmup: rounds before the first that counts.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    deadline = time.time() + seconds
    for k in range(-warmup, rounds):
        if k > 0 and time.time() > deadline:
            break
        if k < 0 and time.time() > deadline - seconds / 2:
            continue
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if k >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times
