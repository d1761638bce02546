"""Finds and loads the compiled libraries; without them every op runs on plain torch, which is slower.

``_C`` holds the CPU kernels, ``_C_cuda`` the CUDA kernels. Loading a library registers its kernels; there is nothing to
import from it. ``BOOTGRAD_BACKEND=eager`` in the environment leaves both alone, ``triton`` the
CUDA library (see `backends.gpu`), ``cuda`` insists on it where torch sees a GPU.
"""

import ctypes
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ArgumentError, BootgradWarning

BACKENDS = ("auto", "eager", "triton", "cuda")
_FOLDER = Path(__file__).parent.parent
_loaded: set[str] = set()
_failures: dict[str, str] = {}


@dataclass(frozen=True)
class LibraryInfo:
    """What became of one compiled library.

    Attributes:
        name: ``_C`` or ``_C_cuda``.
        path: its file, whether it exists or not.
        built: the file exists.
        loaded: its kernels are registered, so they are what runs on its device.
        isa: the instruction set that the CPU kernels run with; empty for CUDA and where nothing is loaded.
        reason: why it is not loaded; empty if it is.
    """

    name: str
    path: Path
    built: bool
    loaded: bool
    isa: str
    reason: str


def load() -> None:
    """Load the libraries that this machine can use, once; warn if the CPU library is missing.

    Raises:
        ArgumentError: ``BOOTGRAD_BACKEND`` is unknown, or "cuda" where `_C_cuda` cannot be used.
    """
    if backend() == "eager" or "_C" in _loaded | _failures.keys():
        return
    _load("_C")
    if torch.cuda.is_available() and backend() != "triton" and (_path("_C_cuda").exists() or backend() == "cuda"):
        _load("_C_cuda")
    if backend() == "cuda" and "_C_cuda" not in _loaded:
        raise ArgumentError(f"BOOTGRAD_BACKEND=cuda, but _C_cuda is not used: {_reason('_C_cuda')}")
    for name, reason in _failures.items():
        warnings.warn(
            f"bootgrad's compiled library {name} is not used, so its ops run on plain torch, slower: {reason}. "
            "Install a C++ compiler (GCC 12 or newer, or clang) and run `pip install --no-build-isolation .` again, or set "
            "BOOTGRAD_BACKEND=eager to silence this",
            BootgradWarning,
            stacklevel=2,
        )


def is_loaded(name: str) -> bool:
    """Whether a library's kernels run."""
    return name in _loaded


def build_info() -> list[LibraryInfo]:
    """What is built, loaded and used, and why not, for each library."""
    return [_info("_C"), _info("_C_cuda")]


def backend() -> str:
    """What ``BOOTGRAD_BACKEND`` asks for."""
    backend = os.environ.get("BOOTGRAD_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ArgumentError(f"BOOTGRAD_BACKEND must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def _path(name: str) -> Path:
    return _FOLDER / f"{name}.so"


def _load(name: str) -> None:
    if not _path(name).exists():
        _failures[name] = "it was not built"
        return
    try:
        torch.ops.load_library(_path(name))
    except (OSError, RuntimeError) as error:
        _failures[name] = f"it does not load with torch {torch.__version__} ({error})"
    else:
        _loaded.add(name)


def _info(name: str) -> LibraryInfo:
    path, loaded = _path(name), name in _loaded
    isa = ""
    if loaded and name == "_C":
        function = ctypes.CDLL(str(path)).bootgrad_isa
        function.restype = ctypes.c_char_p
        isa = function().decode()
    return LibraryInfo(name, path, path.exists(), loaded, isa, "" if loaded else _reason(name))


def _reason(name: str) -> str:
    if not _path(name).exists():
        return "not built"
    if backend() == "eager" or (name == "_C_cuda" and backend() == "triton"):
        return f"BOOTGRAD_BACKEND={backend()}"
    if name == "_C_cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _failures.get(name, "not loaded yet")
