"""`bootgrad.kernels` for the tests: this checkout's folder ``kernels``, installed or not."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load_kernels() -> ModuleType:
    """`bootgrad.kernels`, imported once."""
    name, folder = "bootgrad.kernels", ROOT / "kernels"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def load_kernel(stem: str) -> ModuleType:
    """`bootgrad.kernels.<stem>`."""
    return importlib.import_module(f"{load_kernels().__name__}.{stem}")
