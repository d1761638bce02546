"""Each op by each backend, called directly: no dispatcher between that could choose another one."""

import importlib.util
from collections.abc import Callable

import torch

from bootgrad import planning
from bootgrad.ops import library
from bootgrad.ops.backends import eager, gpu, triton
from bootgrad.ops.schema import CUDA_NAMESPACE, SCHEMAS


def of_device(device: str) -> tuple[str, ...]:
    """The backends that a device can have; ``compiled`` are a CPU's, ``triton`` is interpreted there."""
    return ("cuda", "triton", "eager") if device == "cuda" else ("compiled", "triton", "eager")


def implementation(op: str, backend: str, dtype: torch.dtype) -> Callable | None:
    """The op's function on raw arguments, or None where the backend has none for this dtype."""
    if backend == "eager":
        return getattr(eager, op)
    if backend == "compiled":
        loaded = any(info.name == "_C" and info.loaded for info in library.build_info())
        return getattr(torch.ops.bootgrad, op) if loaded else None
    if planning.gpu_backend(op, str(dtype).removeprefix("torch."), backend, (backend,)) != backend:
        return None
    if backend == "triton":
        return getattr(triton, op, None) if importlib.util.find_spec("triton") else None
    return getattr(getattr(torch.ops, CUDA_NAMESPACE), op) if gpu.has_cuda_kernel(CUDA_NAMESPACE, op) else None


def ops() -> tuple[str, ...]:
    """All ops of the schema."""
    return tuple(SCHEMAS)


def environment(backend: str, device: str) -> dict[str, str]:
    """Variables of a process that runs this backend."""
    # Torch's own products by this library are exact in float32, whatever the caller's shell says of TF32.
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
    if device == "cpu" and backend == "triton":
        variables["TRITON_INTERPRET"] = "1"
    return variables
