"""`bootgrad.kernels` from a checkout that is not installed: the folder kernels/, as setup.py maps it."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class KernelsFinder:
    """The first finder that Python asks: the checkout's kernels go with the checkout's package, whatever is installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """The package alone; its modules lie in its folder."""
        if name != "bootgrad.kernels":
            return None
        folder = ROOT / "kernels"
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def install() -> None:
    """Make `import bootgrad.kernels` work, once."""
    if KernelsFinder not in sys.meta_path:
        sys.meta_path.insert(0, KernelsFinder)
