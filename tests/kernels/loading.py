"""`bootgrad.kernels` for the tests: the installed package, or the checkout's folder ``kernels`` if none is."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load_kernels() -> ModuleType:
    """Import `bootgrad.kernels`."""
    try:
        return importlib.import_module("bootgrad.kernels")
    except ModuleNotFoundError as error:
        if error.name not in ("bootgrad", "bootgrad.kernels"):
            raise
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "bootgrad.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_kernel(stem: str) -> ModuleType:
    """Import `bootgrad.kernels.<stem>`."""
    load_kernels()
    return importlib.import_module(f"bootgrad.kernels.{stem}")
