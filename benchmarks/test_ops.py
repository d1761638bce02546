"""Every op on the layers that count, beside torch's own weight gradient of the same layer.

Stored beside the times: multiply-adds of the op's path, the rate that they imply, and the bytes of x and gy. Results are
compared with torch's before anything is timed.

    pytest benchmarks --benchmark-only
"""

import pytest
import torch

from bootgrad import planning
from bootgrad.ops.convolution import ConvProduct
from bootgrad.ops.linear import LinearProduct

from .results import setting

B = 128
CONVOLUTIONS = {  # channels in, out, image, kernel, stride, padding, groups
    "1-32 28x28 3x3": (1, 32, 28, 3, 1, 1, 1),
    "32-64 14x14 3x3": (32, 64, 14, 3, 1, 1, 1),
    "64-64 7x7 3x3": (64, 64, 7, 3, 1, 1, 1),
    "64-64 56x56 3x3": (64, 64, 56, 3, 1, 1, 1),
    "128-128 28x28 3x3": (128, 128, 28, 3, 1, 1, 1),
    "256-256 14x14 3x3": (256, 256, 14, 3, 1, 1, 1),
    "512-512 7x7 3x3": (512, 512, 7, 3, 1, 1, 1),
    "32 28x28 depthwise": (32, 32, 28, 3, 2, 1, 32),
    "64-64 14x14 grouped": (64, 64, 14, 3, 1, 1, 4),
    "64-128 7x7 1x1": (64, 128, 7, 1, 1, 0, 1),
}
LINEARS = {"3136-128": (1, 3136, 128), "768-768, T = 128": (128, 768, 768)}
OPS = ("torch weight gradient", "weighted_sum", "statistics", "norms", "derivatives", "centered derivatives", "jvp")


def case(name: str):
    """(product, x, gy, weight) on random numbers; ResNet-sized layers get a smaller batch."""
    torch.manual_seed(0)
    if name in LINEARS:
        T, inputs, outputs = LINEARS[name]
        size = B if T == 1 else 8
        return (
            LinearProduct(),
            torch.randn(size, T, inputs),
            torch.randn(size, T, outputs),
            torch.randn(outputs, inputs),
        )
    channels, outputs, image, kernel, stride, padding, groups = CONVOLUTIONS[name]
    product = ConvProduct((kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1), groups)
    size = B if channels * image <= 1000 else 16
    x, weight = torch.randn(size, channels, image, image), torch.randn(outputs, channels // groups, kernel, kernel)
    return product, x, torch.randn(product.output(x, weight).shape), weight


def torch_weight_gradient(product, x, gy, weight):
    """The layer's weight gradient by torch's own kernels."""
    if isinstance(product, ConvProduct):
        return product._backward(gy, x, weight, (False, True, False))[1]
    return gy.flatten(0, 1).t() @ x.flatten(0, 1)


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *LINEARS])
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark, stored, name, op):
    """Time one op on one layer."""
    torch.set_num_threads(2)
    product, x, gy, weight = case(name)
    total, s, *_ = product.statistics(x, gy, None)
    torch.testing.assert_close(
        total, torch_weight_gradient(product, x, gy, weight), rtol=1e-3, atol=1e-2 * float(total.std())
    )
    torch.testing.assert_close(product.sq_norms(x, gy, None), s, rtol=1e-3, atol=0)
    calls = {
        "torch weight gradient": lambda: torch_weight_gradient(product, x, gy, weight),
        "weighted_sum": lambda: product.weight_grad(x, gy),
        "statistics": lambda: product.statistics(x, gy, None),
        "norms": lambda: product.sq_norms(x, gy, None),
        "derivatives": lambda: product.sq_norms_with_grad(x, gy, None, (True, True, False)),
        "centered derivatives": lambda: product.sq_norms_with_grad(x, gy, weight, (True, True, True)),
        "jvp": lambda: product.jvp(x, gy, weight),
    }
    layer = product.layer(x, gy)
    purpose = {"statistics": "statistics", "norms": "norms", "derivatives": "grad", "centered derivatives": "grad"}.get(
        op
    )
    operations = layer.forward_operations
    path = None
    if purpose is not None:
        path = planning.choose_path(layer, purpose, op.startswith("centered"))
        operations = planning.cost(layer, path, purpose, op.startswith("centered")).operations
    benchmark.group = name
    benchmark(calls[op])
    seconds = benchmark.stats.stats.median
    stored.append(
        setting()
        | {
            "layer": name,
            "batch": x.size(0),
            "op": op,
            "path": path or "",
            "microseconds": f"{1e6 * seconds:.0f}",
            "multiply_adds": f"{x.size(0) * operations:.3g}",
            "gigaflops": f"{2e-9 * x.size(0) * operations / seconds:.1f}",
            "bytes_of_x_and_gy": 4 * (x.numel() + gy.numel()),
        }
    )
