"""Runs a section's cases in child processes under a time budget; both ends of the pipe between them are here.

A section is a module of this package with

    shards(options)         names of parts that may run side by side
    cases(shard, options)   (name, function that yields rows) in order of worth, the same ones in every process

The child says ``begin``, then a case's rows, of which an empty one is a sign of life, then ``end``. A child that dies is
started again behind the case that killed it, which gets a row; so does one that says nothing for too long. What the budget
cuts off is counted in a row.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from . import commands
from .in_place import ROOT
from .options import Options

SILENCE = 60.0  # seconds after which a case counts as hung: ten times what the slowest kernel takes to compile
STARTING = (
    180.0  # the same for the interpreter, torch and the devices' libraries: read from a cold disk by twelve at once
)
MODULE = "benchmarks.gpu_report.worker"


class Child:
    """A process that runs one shard."""

    def __init__(self, section: str, shard: str, options: Options, first: int, environment: dict[str, str]):
        """Start it at the case numbered ``first``."""
        self.section, self.shard, self.options, self.environment = section, shard, options, environment
        self.case: tuple[int, str] | None = None
        self.next, self.total, self.last_word = first, -1, time.time()
        reading, writing = os.pipe()
        command = [sys.executable, "-m", MODULE, section, shard, str(first), str(writing), options.dumps()]
        # Two threads that wait for each other are slow where others want the cores, too.
        threads = {"OMP_NUM_THREADS": "1"} if options.tiny else {}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 — closed with the child
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | threads | environment,
            stdin=subprocess.DEVNULL,
            stdout=self.errors,
            stderr=self.errors,
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        os.set_blocking(reading, False)
        self.pipe, self.rest = reading, b""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Messages that have come, and whether the child is done."""
        try:
            data = os.read(self.pipe, 1 << 16)
        except BlockingIOError:
            return [], False
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.last_word = time.time()
        return [json.loads(line) for line in lines], not data

    def stop(self, patience: float = 0.0) -> int:
        """End the process and what it started, unless it is just ending; returns its exit status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        os.close(self.pipe)
        return commands.stop(self.process)

    def silence(self) -> float:
        """Seconds without a word after which it counts as hung."""
        return STARTING if self.total < 0 else SILENCE

    def last_words(self) -> str:
        """The end of what it printed."""
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - 4000))
        lines = [line.strip() for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        self.errors.close()
        return " | ".join(lines[-3:])[-400:]


def run(section: str, options: Options, seconds: float, add: Callable[..., Any], jobs: int = 1) -> None:
    """Run a section.

    Args:
        section: a module of this package.
        options: what to run on; its ``until`` is set from ``seconds``.
        seconds: the budget.
        add: takes the columns of each row.
        jobs: shards at a time.
    """
    options = dataclasses.replace(options, until=min(options.until, time.time() + seconds))
    module = importlib.import_module(f".{section}", __package__)
    waiting, children = list(module.shards(options)), []
    selector = selectors.DefaultSelector()

    def start(shard: str, first: int = 0) -> None:
        child = Child(section, shard, options, first, module.environment(shard, options))
        children.append(child)
        selector.register(child.pipe, selectors.EVENT_READ, child)

    def end(child: Child, patience: float = 0.0) -> int:
        selector.unregister(child.pipe)
        children.remove(child)
        return child.stop(patience)

    while waiting or children:
        while waiting and len(children) < jobs and options.left() > 0:
            start(waiting.pop(0))
        if options.left() <= 0:
            for child in list(children):
                end(child)
                reached = f"{child.next} of {child.total} cases" if child.total >= 0 else "no case"
                child.last_words()
                add(subject=child.shard, status="cut", detail=f"the section's time was up after {reached}")
            for shard in waiting:
                add(subject=shard, status="cut", detail="the section's time was up before it began")
            return
        for key, _ in selector.select(timeout=min(1.0, max(0.0, options.left()))):
            child = key.data
            messages, done = child.read()
            for message in messages:
                _take(child, message, add)
            if done:
                status = end(child, patience=10.0)
                words = child.last_words()
                if status:
                    _lost(child, "crashed", f"exit status {status}: {words}", add)
                    if child.case is not None:
                        start(child.shard, child.case[0] + 1)
        for child in list(children):
            if time.time() - child.last_word > child.silence():
                limit = child.silence()
                end(child)
                _lost(child, "hung", f"nothing came for {limit:.0f} s: {child.last_words()}", add)
                if child.case is not None:
                    start(child.shard, child.case[0] + 1)


def _take(child: Child, message: dict[str, Any], add: Callable[..., Any]) -> None:
    if "total" in message:
        child.total = message["total"]
    elif "begin" in message:
        child.case = message["begin"], message["name"]
    elif "end" in message:
        child.next, child.case = message["end"] + 1, None
    elif message["row"]:
        add(**message["row"])


def _lost(child: Child, status: str, detail: str, add: Callable[..., Any]) -> None:
    subject, _, case = (child.case[1] if child.case else child.shard).partition(": ")
    add(subject=subject, case=case, backend=child.shard.partition(" ")[0], status=status, detail=detail)


def main() -> None:
    """The child's end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section")
    parser.add_argument("shard")
    parser.add_argument("first", type=int)
    parser.add_argument("pipe", type=int)
    parser.add_argument("options", type=Options.loads)
    arguments = parser.parse_args()
    module = importlib.import_module(f".{arguments.section}", __package__)
    with os.fdopen(arguments.pipe, "w", buffering=1) as pipe:

        def say(**message: Any) -> None:
            pipe.write(json.dumps(message) + "\n")

        cases = list(module.cases(arguments.shard, arguments.options))
        say(total=len(cases))
        for k, (name, function) in enumerate(cases[arguments.first :], start=arguments.first):
            say(begin=k, name=name)
            for row in attempted(name, function):
                say(row=row)
            if device_is_lost(arguments.options):
                raise SystemExit("the device answers every call with an error: a kernel has faulted")
            say(end=k)
    os._exit(0)  # what libraries do at the end of a process is not in question


def attempted(name: str, function: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """A case's rows, and one more if it ends in an exception."""
    import torch

    subject, _, case = name.partition(": ")
    try:
        yield from function()
    except torch.OutOfMemoryError as error:
        yield {"subject": subject, "case": case, "status": "out of memory", "detail": first_line(error)}
    except Exception as error:  # noqa: BLE001 — whatever it is, the next case has a right to run
        traceback.print_exc(file=sys.stderr)
        detail = f"{type(error).__name__}: {first_line(error)}"
        yield {"subject": subject, "case": case, "status": "error", "detail": detail}


def first_line(error: BaseException) -> str:
    """An exception's message, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def device_is_lost(options: Options) -> bool:
    """Whether an earlier kernel has faulted, after which every call fails."""
    if options.device != "cuda":
        return False
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    main()
