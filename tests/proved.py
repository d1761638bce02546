"""What long tests have shown of files that have not changed since: they need not show it in every run.

A test marked ``every_configuration`` compiles one of many configurations of the GPU kernels. `RECORD` holds a digest of what
they depend on, as it was when all of them passed. Where it still fits, one in `SHARE` of them runs; where anything has
changed, all do. ``make kernels`` runs all, and writes the digest:

    python -m tests.proved
"""

import hashlib
import importlib.metadata
import json
import os
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("proved.json")
MARK, FORCE, SHARE = "every_configuration", "EVERY_CONFIGURATION", 8
SOURCES = ("kernels/**/*.py", "tests/kernels/*.py", "tests/cuda/toolchain.py")


def digest() -> str:
    """Of the kernels, of the tests that compile them, and of the compiler's version."""
    found = hashlib.sha256(_triton().encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def is_current() -> bool:
    """Whether all configurations have passed as everything is now."""
    return RECORD.exists() and json.loads(RECORD.read_text()) == {"digest": digest(), "triton": _triton()}


def select(items: list, forced: bool) -> tuple[list, list]:
    """The collected tests that are to run, and those that are not."""
    if forced or not any(item.get_closest_marker(MARK) for item in items) or not is_current():
        return items, []
    seen: Counter = Counter()
    run, leave = [], []
    for item in items:
        name = item.nodeid.partition("[")[0]
        is_left = item.get_closest_marker(MARK) is not None and seen[name] % SHARE != 0
        (leave if is_left else run).append(item)
        seen[name] += 1
    return run, leave


def is_forced() -> bool:
    """Whether all are asked for."""
    return bool(os.environ.get(FORCE))


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    RECORD.write_text(json.dumps({"digest": digest(), "triton": _triton()}, indent=2) + "\n")
    print(f"{RECORD.relative_to(ROOT)}: all configurations passed with triton {_triton()}")
