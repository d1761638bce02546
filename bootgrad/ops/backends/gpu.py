"""What GPUs run: for each op the compiled CUDA library, Triton or plain torch, chosen anew for every dtype and machine.

Each op has one implementation for CUDA devices, registered here. It asks `planning.gpu_backend`, with what this machine
has, and hands its arguments on:

    cuda      the op of the same name in the namespace ``bootgrad_cuda``, whose kernels `_C_cuda` registers
    triton    the function of the same name in `backends.triton`
    eager     that in `backends.eager`

``BOOTGRAD_BACKEND=auto`` (default) takes the first that there is in the order of `planning`, ``triton`` and ``cuda`` take
one kind where it has the op and plain torch elsewhere, ``eager`` leaves GPUs to plain torch and registers nothing. A Triton
that cannot be used, or a card too old for either, is warned of once, by the first call that would have taken it.
"""

import functools
import importlib.util
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import planning
from ...errors import ArgumentError, BootgradWarning, warn
from .. import schema
from . import eager, triton

OLDEST_CAPABILITY = (8, 0)  # Ampere: bfloat16 and TF32 on tensor cores, asynchronous copies
OLDEST_TRITON = (3, 6)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_warned: set[str] = set()


def register(backend: str) -> tuple[str, ...]:
    """Register the implementations for CUDA devices, once the compiled libraries are loaded.

    Args:
        backend: what ``BOOTGRAD_BACKEND`` asks for.

    Returns:
        The names of the ops that were registered.

    Raises:
        ArgumentError: ``triton`` is forced and not installed.
    """
    if backend == "eager":
        return ()
    if backend == "triton" and not importlib.util.find_spec("triton"):
        raise ArgumentError(
            "BOOTGRAD_BACKEND=triton needs the package triton, which is not installed: "
            "pip install 'bootgrad[triton]', or unset BOOTGRAD_BACKEND"
        )
    names = tuple(name for name in schema.SCHEMAS if not has_cuda_kernel(schema.NAMESPACE, name))
    for name in names:
        schema.library.impl(name, implementation(name, backend), "CUDA")
    return names


def has_cuda_kernel(namespace: str, name: str) -> bool:
    """Whether an implementation of the op is registered for CUDA devices alone."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", "CUDA")


def implementation(name: str, backend: str) -> Callable[..., Any]:
    """The function that runs an op on a GPU by whichever backend is the one for its arguments."""
    takes_path = "str path" in schema.SCHEMAS[name]

    @functools.wraps(getattr(eager, name))
    def run(*arguments):
        tensor = next(a for a in arguments if isinstance(a, Tensor))
        path = next((a for a in arguments if isinstance(a, str)), "") if takes_path else ""
        return _function(name, tensor.dtype, path, backend, tensor.device)(*arguments)

    return run


def choose(name: str, dtype: torch.dtype, path: str, backend: str, device: torch.device) -> str:
    """The backend that runs an op: "cuda", "triton" or "eager"; warns where another would be next but cannot be used.

    Raises:
        ArgumentError: the compiled CUDA library is forced on a card that is too old for it.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    usable = ["cuda"] if has_cuda_kernel(schema.CUDA_NAMESPACE, name) else []
    if _has_launcher(name, path):
        usable.append("triton")
    reason, chosen = "", planning.gpu_backend(name, dtype_name, backend, usable)
    while chosen != "eager" and (problem := card_reason(device) or (triton_reason() if chosen == "triton" else "")):
        if backend == "cuda":
            raise ArgumentError(f"BOOTGRAD_BACKEND=cuda cannot run {name}: {problem}; unset it to run on plain torch")
        reason = reason or problem
        usable.remove(chosen)
        chosen = planning.gpu_backend(name, dtype_name, backend, usable)
    if reason and reason not in _warned:
        _warned.add(reason)
        unused, runs = ("Triton kernels", "the compiled CUDA library")
        if chosen == "eager":
            unused, runs = ("kernels", "plain torch, slower")
        warn(f"bootgrad's {unused} are not used, so {name} and its like run on {runs}: {reason}")
    return chosen


def describe(path: str = "direct") -> dict[str, dict[str, str]]:
    """What the current CUDA device runs, {op: {dtype: backend}}; without a device, plain torch for everything.

    Args:
        path: of the ops that have the choice.
    """
    from .. import library

    backend = library.backend()
    if backend == "eager" or not torch.cuda.is_available():
        return {name: {str(d).removeprefix("torch."): "eager" for d in _DTYPES} for name in schema.SCHEMAS}
    device = torch.device("cuda", torch.cuda.current_device())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BootgradWarning)
        before = set(_warned)
        found = {
            name: {str(d).removeprefix("torch."): choose(name, d, path, backend, device) for d in _DTYPES}
            for name in schema.SCHEMAS
        }
        _warned.intersection_update(before)
    return found


@functools.cache
def card_reason(device: torch.device) -> str:
    """Why no kernel of ours runs on a CUDA device; empty if it is new enough."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return ""
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {capability[0]}.{capability[1]}, and they need 8.0 (Ampere) or newer"


@functools.cache
def triton_reason() -> str:
    """Why Triton's kernels cannot be used, on whichever card; empty if they can."""
    oldest = ".".join(map(str, OLDEST_TRITON))
    try:
        from ...kernels import start_triton, triton_version

        version = triton_version()
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TRITON:
            return f"they need Triton {oldest} or newer, and {version} is installed: pip install -U triton"
        start_triton()
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install 'bootgrad[triton]'"
    except Exception as error:  # whatever its driver's compiler says
        return f"Triton does not start ({type(error).__name__}: {error})"
    return ""


@functools.lru_cache(maxsize=1024)
def _function(name: str, dtype: torch.dtype, path: str, backend: str, device: torch.device) -> Callable[..., Any]:
    chosen = choose(name, dtype, path, backend, device)
    if chosen == "cuda":
        return getattr(getattr(torch.ops, schema.CUDA_NAMESPACE), name).default
    return getattr(triton if chosen == "triton" else eager, name)


@functools.cache
def _has_launcher(name: str, path: str) -> bool:
    """Whether Triton's kernels know the op; of the modules that may be missing, whether they are there."""
    of_its_own = next((m for m in ("group_norm", "embedding_sq_norms") if name.startswith(m)), "")
    module = f".{of_its_own}" if of_its_own else ".gram" if path == "gram" else ""
    package = "bootgrad.kernels"
    return bool(
        hasattr(triton, name) and importlib.util.find_spec(package) and importlib.util.find_spec(package + module)
    )
