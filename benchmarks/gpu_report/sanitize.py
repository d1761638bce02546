"""Every op on small shapes under compute-sanitizer: accesses out of bounds (memcheck), races in shared memory (racecheck).

The memory allocator of torch is told not to keep blocks, so that a tensor's end is a block's end.
"""

import re
import sys
from collections.abc import Iterator
from typing import Any

import torch

from . import backends, commands, correctness, examples, machine
from .options import Options

TOOLS = ("memcheck", "racecheck")
SECONDS = 45  # for a tool and a backend: it is over before the worker takes it for hung, or its section is cut


def shards(options: Options) -> list[str]:
    """A tool on a backend each, side by side."""
    chosen = [b for b in options.backends or backends.of_device(options.device) if b in ("cuda", "triton")]
    return [f"{backend} {tool}" for tool in TOOLS for backend in chosen]


def environment(shard: str, options: Options) -> dict[str, str]:
    """The allocator without blocks of its own."""
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def cases(shard: str, options: Options) -> list[tuple[str, Any]]:
    """All ops in one process, since it takes the tool long to begin."""
    backend, _, tool = shard.partition(" ")
    return [(f"{tool}: {backend}", lambda: check(tool, backend, options))]


def check(tool: str, backend: str, options: Options) -> Iterator[dict[str, Any]]:
    """The tool's verdict."""
    row = {"subject": tool, "backend": backend}
    program = machine.compute_sanitizer()
    if options.device != "cuda" or program is None:
        reason = "needs a GPU" if options.device != "cuda" else "compute-sanitizer is not found"
        yield row | {"status": "skipped", "detail": reason}
        return
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", __name__, backend]
    seconds = max(1.0, min(SECONDS, options.left() - 2))
    returned, text = commands.run(command, seconds)
    if returned is None:
        yield row | {"status": "cut", "detail": f"not done after {seconds:.0f} s"}
        return
    yield row | verdict(tool, returned, text)


def verdict(tool: str, returned: int, text: str) -> dict[str, str]:
    """Status and detail of what a tool has said."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY:.*", text)
    detail = summary[-1] if summary else (text.strip().splitlines() or ["said nothing"])[-1][:300]
    if returned == 0 and summary:
        status = "ok"
    elif returned == 9 and summary:
        # Of barriers in shared memory and asynchronous copies racecheck knows little: a person must tell.
        status = "to look at" if tool == "racecheck" else "failed"
        first = next((line for line in text.splitlines() if re.search(r"Invalid|hazard|Race", line)), "")
        detail = f"{detail}; {first.strip('= ')}"[:400]
    else:
        status = "error"  # the tool does not run on this machine, or the program fails under it
    return {"status": status, "detail": detail}


def main(backend: str) -> None:
    """Run each op once on tiny and odd layers."""
    for dtype in (torch.bfloat16, torch.float32):
        for layer in (*correctness.TINY, correctness.ODD[3], correctness.ODD[5]):
            for op in backends.ops():
                run = backends.implementation(op, backend, dtype)
                if run is None or layer not in examples.layers_for(op, [layer]):
                    continue
                for path in ("direct", "gram") if examples.takes(op, "path") else ("direct",):
                    given = examples.arguments(op, layer, dtype, path=path)
                    run(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in given))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
