"""Compiles the extension libraries into the checkout, without pip and without a network.

In order of speed: nothing, where the libraries are newer than their sources; ``setup.py build_ext --inplace``; the same
without CUDA, where that fails. Without either everything runs on Triton and plain torch, and the report says why.
"""

import os
import re
import subprocess
import sys
import time

from . import machine
from .in_place import ROOT

LIBRARIES = ("_C", "_C_cuda")


def build(device: str, seconds: float) -> dict[str, str]:
    """What became of each library, in words.

    Args:
        device: ``cuda``, or ``cpu``, which needs no CUDA library.
        seconds: after which compilers are stopped.
    """
    wanted = LIBRARIES if device == "cuda" and machine.nvcc() else LIBRARIES[:1]
    said = {} if machine.nvcc() or device == "cpu" else {"_C_cuda": "nvcc is not found: its ops run on Triton"}
    # A CPU's report runs in CI, in the environment that the tests run in: what is there has been built for it.
    stale = [name for name in wanted if _is_stale(name, device == "cuda")]
    if not stale:
        return said | dict.fromkeys(wanted, "up to date")
    deadline, failure = time.time() + seconds, ""
    for cuda in ("1", "0") if "_C_cuda" in stale else ("0",):
        start = time.time()
        error = _compile({"BOOTGRAD_CUDA": cuda} | _architecture(device), max(60.0, deadline - start))
        if not error:
            built = wanted if cuda == "1" else LIBRARIES[:1]
            said |= {name: f"built in {time.time() - start:.0f} s" for name in built}
            return said | ({"_C_cuda": failure} if failure else {})
        failure = failure or error
    return said | dict.fromkeys(stale, failure)


def _is_stale(name: str, by_date: bool) -> bool:
    library = ROOT / "bootgrad" / f"{name}.so"
    if not by_date:
        return not library.exists()
    sources = [ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    return not library.exists() or library.stat().st_mtime < max(p.stat().st_mtime for p in sources)


def _compile(variables: dict[str, str], seconds: float) -> str:
    """Why it failed; nothing where it did not."""
    # setup.py itself asks for CUDA's compiler on the PATH.
    path = os.pathsep.join(filter(None, (os.environ.get("PATH"), "/usr/local/cuda/bin")))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"BOOTGRAD_REQUIRE_EXT": "1", "PATH": path} | variables
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"compiling took longer than {seconds:.0f} s"
    if done.returncode == 0:
        return ""
    print(done.stdout[-4000:] + done.stderr[-8000:], file=sys.stderr)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if re.search(r"\berror\b", line, re.I)]
    return (lines[0] if lines else f"exit status {done.returncode}")[-300:]


def _architecture(device: str) -> dict[str, str]:
    """The device's own, unless the environment names others: half the time to compile."""
    if device != "cuda" or os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return {}
    import torch

    major, minor = torch.cuda.get_device_capability()
    return {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
