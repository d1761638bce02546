"""Sweeps the configurations of the Triton kernels by shape, and says what beats the tables in kernels/.

A chooser is a function of a kernels module that returns a NamedTuple with ``num_warps``. In its place one is put whose
answer is changed in one field at a time, doubled or halved (stages: one more or less); the best change is kept and its
neighbours are tried, for `ROUNDS` rounds. A configuration counts only if the op's results stay right. What is too large for
the chip is skipped. Nothing is changed in the tables: the JSON beside the report, and the rows, say what to write there.
"""

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from bootgrad.ops.backends import eager

from .. import traffic
from . import backends, correctness, examples, ops, timing
from .options import Options

ROUNDS = 2
WORTH = 0.97  # of the table's time: less of a gain is noise
Change = dict[str, Any]


class Chooser(NamedTuple):
    """A function that chooses configurations, and where it is looked up."""

    name: str
    function: Callable
    places: tuple[tuple[Any, str], ...]


def shards(options: Options) -> list[str]:
    """One process."""
    return ["all"]


def environment(shard: str, options: Options) -> dict[str, str]:
    """Triton's."""
    return backends.environment("triton", options.device)


def cases(shard: str, options: Options) -> list[tuple[str, Any]]:
    """The ops on the layers of the models, in order of worth."""
    return [(f"{op}: {layer}", lambda op=op, layer=layer: tune(op, layer, options)) for op, layer in ops.pairs(options)]


def tune(op: str, layer: traffic.Layer, options: Options) -> Iterator[dict[str, Any]]:
    """A row for each chooser that the op asks: the table's configuration, and a better one."""
    dtype = torch.float32 if options.tiny else ops.DTYPE
    run = backends.implementation(op, "triton", dtype)
    if run is None:
        return
    arguments = examples.arguments(op, layer, dtype, options.device, ops.path_of(op, layer))
    sets = timing.copies(arguments, timing.set_count(arguments, options.device))
    expected = correctness.results(getattr(eager, op)(*arguments))

    def microseconds() -> float:
        found = correctness.results(run(*arguments))
        if not ops.largest_difference(found, expected) <= correctness.BOUNDS[ops.DTYPE]:
            return float("inf")
        return timing.measure(run, sets, options.device).median

    for chooser in choosers():
        asked: list[Any] = []
        with replaced(chooser, {}, asked):
            base = microseconds()
        if not asked:
            continue
        start, best, change = asked[0], base, {}
        for _ in range(1 if options.tiny else ROUNDS):
            tried = {}
            for neighbour in neighbours(start._replace(**change))[: 2 if options.tiny else None]:
                candidate = {k: v for k, v in neighbour.items() if v != getattr(start, k)}
                # A kernel that is too large for the chip, or no configuration that it was written for.
                with contextlib.suppress(Exception), replaced(chooser, candidate, []):
                    tried[microseconds()] = candidate
                if options.left() <= 0:
                    break
            if not tried or min(tried) >= best * (1.0 if change else WORTH):
                break
            best = min(tried)
            change = tried[best]
        yield {
            "subject": op,
            "case": f"{layer}, B = {layer.B}",
            "backend": "triton",
            "dtype": str(dtype).removeprefix("torch."),
            "status": "ok",
            "microseconds": best,
            "ratio": best / base,
            "detail": f"{chooser.name}: {start}" + (f" better with {change}" if change else " stays"),
        }


def choosers() -> list[Chooser]:
    """All choosers of the kernels, with every module that has them under a name of its own."""
    import bootgrad.kernels

    names = [info.name for info in pkgutil.iter_modules(bootgrad.kernels.__path__)]
    modules = [importlib.import_module(f"bootgrad.kernels.{name}") for name in names]
    found: dict[int, tuple[Callable, list[tuple[Any, str]]]] = {}
    for module in modules:
        for name, value in vars(module).items():
            if _chooses(value):
                found.setdefault(id(value), (value, []))[1].append((module, name))
    return [
        Chooser(f"{f.__module__.rpartition('.')[2]}.{f.__name__}", f, tuple(places)) for f, places in found.values()
    ]


def _chooses(value: Any) -> bool:
    inner = getattr(value, "__wrapped__", value)
    returned = getattr(inner, "__annotations__", {}).get("return")
    if not callable(value) or isinstance(value, type) or not getattr(inner, "__module__", "").startswith("bootgrad"):
        return False
    return returned is NamedTuple or "num_warps" in getattr(returned, "_fields", ())


@contextlib.contextmanager
def replaced(chooser: Chooser, change: Change, asked: list[Any]) -> Iterator[None]:
    """The chooser's answers changed, and noted."""

    def choose(*args, **kwargs):
        config = chooser.function(*args, **kwargs)
        if not hasattr(config, "num_warps"):
            return config
        asked.append(config)
        return config._replace(**change)

    for module, name in chooser.places:
        setattr(module, name, choose)
    try:
        yield
    finally:
        for module, name in chooser.places:
            setattr(module, name, chooser.function)


def neighbours(config: Any) -> list[Change]:
    """All fields of the configurations that differ in one field."""
    found = []
    for name, value in config._asdict().items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        changed = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        smallest = 16 if name.startswith("BLOCK") else 1
        found += [config._asdict() | {name: other} for other in changed if other >= smallest]
    return found


def winners(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows that say that a table can be bettered, for the JSON file."""
    columns = ("device", "triton", "subject", "case", "dtype", "microseconds", "ratio", "detail")
    own = [row for row in rows if row["section"] == "tune" and "better with" in row["detail"]]
    return [{name: row[name] for name in columns} for row in own]
