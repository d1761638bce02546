"""Triton kernels and their launchers, on plain tensors: no autograd, no registration, no choice of path.

Installed as ``bootgrad.kernels``; `bootgrad.ops.backends.triton` makes the ops of the launchers, and `backends.gpu`
registers them. `linear_rank1_sq_norms` is the model to copy. Linear layers and convolutions share their kernels:

    layer            the form in which launchers take them
    conv_direct      G_i tile by tile: norms, deviations, weighted sums; and `conv_narrow`, for groups of few channels
    conv_grads       ⟨G_i, v⟩, and the direct path's derivatives, by the linear maps in `conv_products`
    conv_index       index arithmetic; conv_reduce: how work is divided and put together; conv_configs: tiles by shape
    gram             ‖G_i‖² and its derivatives without G_i; its kernels in `gram_kernels`

The rules:

1.  An op with a kernel of its own, as `linear_rank1_sq_norms` is, has one stem in five places: op ``bootgrad::<op>``,
    launcher ``<op>`` and kernel ``<op>_kernel`` in ``kernels/<op>.py``, the CUDA twin ``csrc/include/bootgrad/<op>.cuh``,
    tests ``tests/kernels/test_<op>.py`` and ``tests/cuda/test_<op>.py``. Kernels that serve many ops, all of layers, have
    the stem of what they compute: the ops' own names are in `bootgrad.ops.backends.triton` alone.
2.  Import triton, torch and the standard library, nothing of bootgrad.
3.  Configurations are a table in Python, picked by shape: no ``@triton.autotune``, which times kernels (another
    choice, other bits) and does not run in the interpreter. The pick does not depend on ``B``, so a sample's result
    does not depend on the batch around it.
4.  Addresses in int64, and so are offsets within a sample if its numbers may lie 2³¹ apart. Every load is masked in each
    dimension that can overrun, with ``other=``; every output is stored.
5.  Cast right after the load; accumulate in float32, in float64 for float64 (`accumulation_dtype` below).
6.  Reduce in a fixed order: no atomics on floats. Partials go to a buffer, and a second kernel adds them up.
7.  Any size including 0, any stride of x and gy; the inner stride 1 is what is fast. They are not copied, but by group
    norm, where their space is not one dimension to its strides. Centers, directions and w are asked for contiguous: they
    are no larger than a layer, and the caller copies.
8.  Launchers take checked tensors, allocate with ``torch.empty`` what the op's fake allocates, and enter the tensor's
    device.

Each kernel is proved without a GPU (``tests/kernels``): interpreted against float64, and cross-compiled for sm_80,
sm_90 and sm_100 in every configuration (no spills, shared memory, width of loads, tensor cores); and on a GPU where there
is one.
"""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over inputs of ``dtype`` are kept: float32 for half precisions, else ``dtype``."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def allows_tf32(dtype: torch.dtype) -> bool:
    """Whether torch may round factors of matrix products of ``dtype`` to TF32: never but for float32.

    Of torch's own two settings, ``allow_tf32`` raises once the newer ``fp32_precision`` has been set, which reads what
    either of them, or `torch.set_float32_matmul_precision`, has said.
    """
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def triton_version() -> str:
    """The version of the installed Triton."""
    import triton

    return triton.__version__


def start_triton() -> None:
    """Raise what goes wrong where Triton cannot be imported, or cannot build its launcher for want of a C compiler."""
    import triton

    triton.runtime.driver.active.get_current_device()
