"""What a report is measured on, as far as the machine tells."""

import datetime
import importlib.metadata
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any


def require(device: str) -> None:
    """Look for the device, before anything is built for it.

    Raises:
        SystemExit: a GPU is asked for, and torch sees none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: use make gpu-report DEVICE=cpu to try the report without one")


def describe(device: str) -> dict[str, Any]:
    """Device, driver, versions; what cannot be had is said in words. Loads the library, so it comes after the build."""
    import torch

    import bootgrad
    from bootgrad.training.environment import processor_name

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "bootgrad": bootgrad.__version__,
        "cuda of torch": torch.version.cuda or "none",
        "nvcc": version_of_nvcc(),
        "processor": processor_name(),
    }
    if device == "cpu":
        return {"device": f"CPU {processor_name()}"} | found
    p = torch.cuda.get_device_properties(0)
    return {
        "device": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory": f"{p.total_memory / 2**30:.0f} GiB",
        "L2": f"{getattr(p, 'L2_cache_size', 0) / 2**20:.0f} MiB",
        "driver": _smi("driver_version"),
        "clocks of SM and memory": _smi("clocks.sm,clocks.mem"),
        "cudnn": torch.backends.cudnn.version() or "none",
    } | found


def setting(machine: dict[str, Any]) -> dict[str, str]:
    """The columns that every row begins with."""
    now = datetime.datetime.now()
    return {
        "date": now.date().isoformat(),
        "time": now.strftime("%H:%M"),
        **{name: str(machine[name]) for name in ("device", "torch", "triton", "bootgrad")},
    }


def stem(device: str, setting: dict[str, str]) -> str:
    """Name of the report's files: ``<device>-<date>``; a CPU's begins with ``cpu`` whatever it is called."""
    name = re.sub(r"[^a-z0-9]+", "-", setting["device"].lower()).strip("-")
    name = f"cpu-{name.removeprefix('cpu-')}" if device == "cpu" else name
    return f"{name}-{setting['date']}"


def nvcc() -> str | None:
    """CUDA's compiler."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def version_of_nvcc() -> str:
    """Its last words about itself."""
    return _last_line(nvcc(), "--version") if nvcc() else "not found"


def compute_sanitizer() -> str | None:
    """CUDA's memory checker."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def is_below(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder."""
    return path.resolve().is_relative_to(folder.resolve())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _smi(query: str) -> str:
    return _last_line("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def _last_line(*command: str | None) -> str:
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "unknown"
