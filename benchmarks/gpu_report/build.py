"""Compiles the extension libraries into the checkout, without pip and without a network.

In order of speed: nothing, where the libraries were built from these sources for this card and torch;
``setup.py build_ext --inplace``; the same without CUDA, where that fails. Without either everything runs on Triton and
plain torch, and the report says why. Without ninja one file is compiled after the other, which may take longer than there
is time: some four minutes for a card, a third of that with it.
"""

import json
import os
import re
import shutil
import sys
import time

from . import commands, machine
from .in_place import ROOT

LIBRARIES = ("_C", "_C_cuda")
STAMP = ROOT / "build/gpu_report.json"  # what the CUDA library was built for, and when


def build(device: str, seconds: float) -> dict[str, str]:
    """What became of each library, in words.

    Args:
        device: ``cuda``, or ``cpu``, which needs no CUDA library.
        seconds: after which compilers are stopped.
    """
    wanted = LIBRARIES if device == "cuda" and machine.nvcc() else LIBRARIES[:1]
    said = {} if machine.nvcc() or device == "cpu" else {"_C_cuda": "nvcc is not found: its ops run on Triton"}
    # A CPU's report runs in CI, in the environment that the tests run in: what is there has been built for it.
    stale = [name for name in wanted if is_stale(name, device)]
    if not stale:
        return said | dict.fromkeys(wanted, "up to date")
    if "_C_cuda" in stale:  # which setup.py would leave as it is where it is no older than its sources
        (ROOT / "bootgrad/_C_cuda.so").unlink(missing_ok=True)
    deadline, failure = time.time() + seconds, ""
    for cuda in ("1", "0") if "_C_cuda" in stale else ("0",):
        start = time.time()
        error = _compile({"BOOTGRAD_CUDA": cuda} | _architecture(device), max(60.0, deadline - start))
        if not error:
            built = wanted if cuda == "1" else LIBRARIES[:1]
            if cuda == "1":
                note(device)
            said |= {name: f"built in {time.time() - start:.0f} s" for name in built}
            return said | ({"_C_cuda": failure} if failure else {})
        failure = failure or error
    return said | dict.fromkeys(stale, failure)


def is_stale(name: str, device: str) -> bool:
    """Whether a library is older than its sources, or made for another card or torch; on a CPU, whether there is none."""
    library = ROOT / "bootgrad" / f"{name}.so"
    if device != "cuda" or not library.exists():
        return not library.exists()
    sources = [ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    if library.stat().st_mtime < max(p.stat().st_mtime for p in sources):
        return True
    return name == "_C_cuda" and not (STAMP.exists() and STAMP.read_text(encoding="utf-8") == _purpose(device))


def note(device: str) -> None:
    """Write down what the CUDA library has just been built for."""
    STAMP.parent.mkdir(exist_ok=True)
    STAMP.write_text(_purpose(device), encoding="utf-8")


def _purpose(device: str) -> str:
    import torch

    built = (ROOT / "bootgrad/_C_cuda.so").stat().st_mtime_ns
    architectures = (_architecture(device) or os.environ).get("TORCH_CUDA_ARCH_LIST")
    return json.dumps([built, architectures, torch.__version__, machine.version_of_nvcc()])


def _compile(variables: dict[str, str], seconds: float) -> str:
    """Why it failed; nothing where it did not."""
    # setup.py itself asks for CUDA's compiler on the PATH.
    path = os.pathsep.join(filter(None, (os.environ.get("PATH"), "/usr/local/cuda/bin")))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status, output = commands.run(command, seconds, {"BOOTGRAD_REQUIRE_EXT": "1", "PATH": path} | variables)
    if status is None:
        slow = "" if shutil.which("ninja") else ", one file after the other, for ninja is not found"
        return f"compiling took longer than {seconds:.0f} s{slow}"
    if status == 0:
        return ""
    print(output[-12000:], file=sys.stderr)
    return reason_in(output) or f"exit status {status}"


def reason_in(output: str) -> str:
    """The line that says why a build failed: a compiler's first error, or the last of any other kind."""
    lines = output.splitlines()
    compilers = [line for line in lines if re.search(r"\S: (fatal )?error\b", line)]
    others = [line for line in lines if re.search(r"error\b", line, re.I)]
    return (compilers[:1] or others[-1:] or [""])[0][-300:]


def _architecture(device: str) -> dict[str, str]:
    """The device's own, unless the environment names others: half the time to compile."""
    if device != "cuda" or os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return {}
    import torch

    major, minor = torch.cuda.get_device_capability()
    return {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
