"""Triton kernels and their launchers, on plain tensors: no autograd, no registration, no choice of path.

Installed as ``bootgrad.kernels``; `bootgrad.ops.backends.triton` registers the launchers. `linear_rank1_sq_norms` is
the model to copy. The rules:

1.  One stem in five places: op ``bootgrad::<op>``, launcher ``<op>`` and kernel ``<op>_kernel`` in
    ``kernels/<op>.py``, the CUDA twin ``csrc/include/bootgrad/<op>.cuh``, tests ``tests/kernels/test_<op>.py`` and
    ``tests/cuda/test_<op>.py``.
2.  Import triton, torch and the standard library, nothing of bootgrad.
3.  Configurations are a table in Python, picked by shape: no ``@triton.autotune``, which times kernels (another
    choice, other bits) and does not run in the interpreter. The pick does not depend on ``B``, so a sample's result
    does not depend on the batch around it.
4.  Addresses in int64. Every load is masked in each dimension that can overrun, with ``other=``; every output is
    stored.
5.  Cast right after the load; accumulate in float32, in float64 for float64 (`accumulation_dtype` below).
6.  Reduce in a fixed order: no atomics on floats. Partials go to a buffer, and a second kernel adds them up.
7.  Any size including 0, any stride; the inner stride 1 is what is fast. Never ``.contiguous()`` on an input.
8.  Launchers take checked tensors, allocate with ``torch.empty`` what the op's fake allocates, and enter the tensor's
    device.

Each kernel is proved without a GPU (``tests/kernels``): interpreted against float64, and cross-compiled for sm_80,
sm_90 and sm_100 in every configuration (no spills, shared memory, width of loads); and on a GPU where there is one.
"""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over inputs of ``dtype`` are kept: float32 for half precisions, else ``dtype``."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
