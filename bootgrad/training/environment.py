"""What a run ran on: versions, processor, device."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import bootgrad

_PACKAGES = ("triton", "numpy", "matplotlib", "tqdm", "scikit-learn", "torchvision")


def versions() -> dict[str, str | None]:
    """Versions of Python, of bootgrad and of what it works with; None for what is not installed."""
    found: dict[str, str | None] = {
        "bootgrad": bootgrad.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def device_info(device: torch.device) -> dict[str, Any]:
    """Name of the device, and the threads of the CPU's kernels."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def processor_name() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
