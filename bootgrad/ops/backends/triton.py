"""Triton implementations of the ops, for GPUs: registered where no compiled library has the op.

``BOOTGRAD_BACKEND`` chooses what GPUs run: ``auto`` (default) is the compiled CUDA library's kernel, else Triton's,
else plain torch; ``eager``, ``triton`` and ``cuda`` force one kind, and an op that has none of it stays in plain torch.
Triton itself is imported by the first call only.
"""

import importlib.util

import torch
from torch import Tensor

from ...errors import ArgumentError
from .. import schema


def register(backend: str) -> tuple[str, ...]:
    """Register the implementations for CUDA devices as ``backend`` asks, once the compiled libraries are loaded.

    Returns:
        The names of the ops that were registered.

    Raises:
        ArgumentError: ``triton`` is forced and cannot be imported.
    """
    if backend not in ("auto", "triton"):
        return ()
    if not all(map(importlib.util.find_spec, ("triton", "bootgrad.kernels"))):
        if backend == "triton":
            raise ArgumentError(
                "BOOTGRAD_BACKEND=triton needs the package triton, which is not installed: "
                "pip install 'bootgrad[triton]', or unset BOOTGRAD_BACKEND"
            )
        return ()
    names = tuple(name for name in IMPLEMENTATIONS if not has_cuda_kernel(name))
    for name in names:
        schema.library.impl(name, IMPLEMENTATIONS[name], "CUDA")
    return names


def has_cuda_kernel(name: str) -> bool:
    """Whether an implementation of the op is registered for CUDA devices alone."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{schema.NAMESPACE}::{name}", "CUDA")


def linear_rank1_sq_norms(x: Tensor, gy: Tensor) -> Tensor:
    """‖x_i‖² ‖gy_i‖²."""
    from ...kernels.linear_rank1_sq_norms import linear_rank1_sq_norms as launch

    torch._check(
        x.dim() == 2 and gy.dim() == 2,
        lambda: f"x and gy must be (B, I) and (B, O); got {tuple(x.shape)} and {tuple(gy.shape)}",
    )
    schema.check_pair(x, gy)
    return launch(x, gy)


IMPLEMENTATIONS = {"linear_rank1_sq_norms": linear_rank1_sq_norms}
