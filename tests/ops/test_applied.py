"""G_i ∗ h_i and G_iᵀ ∗ g_i against plain torch with the oracle's G_i, one sample at a time, in float64."""

import pytest
import torch
import torch.nn.functional as F

from bootgrad import planning, reference
from bootgrad.ops.applied import applied, applied_transposed
from bootgrad.ops.backends.eager import CHUNK_BYTES
from bootgrad.ops.convolution import ConvProduct
from bootgrad.ops.linear import LinearProduct

from .cases import DTYPES, conv_case, linear_case
from .test_raw_ops import CONV_SIZES, LINEAR_SIZES

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
PATHS = pytest.mark.parametrize("path", ["direct", "gram"])
# Of the inputs' dtype; sums are of float32 for half precisions.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture
def planned(monkeypatch, path):
    """The path that is taken, whatever it costs; chunks of a few samples."""
    monkeypatch.setattr(planning, "choose_path", lambda *_: path)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 20_000)


def other(t, seed):
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(t.dtype)


def close(ours, expected, dtype):
    assert ours.dtype == dtype and ours.shape == expected.shape
    assert (ours.double() - expected).norm() <= 4 * TOLERANCE[dtype] * expected.norm()


@EVERY_DTYPE
@PATHS
@pytest.mark.parametrize("sizes", LINEAR_SIZES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_linear(planned, sizes, dtype, transposed):
    case = linear_case(*sizes, dtype)
    h, g = other(case.x, 1), other(case.gy, 2)
    G = reference.linear_rows(case.x.double(), case.gy.double())
    product = LinearProduct(transposed)  # how W is stored does not matter
    close(applied(product, case.x, case.gy, h), h.double() @ G.mT, dtype)
    close(applied_transposed(product, case.x, case.gy, g, h), g.double() @ G, dtype)


@EVERY_DTYPE
@PATHS
@pytest.mark.parametrize("sizes", CONV_SIZES.values(), ids=CONV_SIZES)
def test_convolution(planned, sizes, dtype):
    case = conv_case(*sizes, dtype)
    h, g = other(case.x, 1), other(case.gy, 2)
    product = ConvProduct(case.kernel_size, *case.geometry)
    ours = applied(product, case.x, case.gy, h), applied_transposed(product, case.x, case.gy, g, h)
    G = reference.conv_rows(case.x.double(), case.gy.double(), case.kernel_size, *case.geometry)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[case.x.dim() - 3]
    expected = [torch.zeros_like(case.gy, dtype=torch.float64), torch.zeros_like(case.x, dtype=torch.float64)]
    if case.x.numel() and case.gy.numel():
        for k, G_k in enumerate(G):
            h_k = h[k : k + 1].double().requires_grad_()
            y = convolve(h_k, G_k, None, *case.geometry)
            expected[0][k] = y[0].detach()
            expected[1][k] = torch.autograd.grad(y, h_k, g[k : k + 1].double())[0][0]
    for a, b in zip(ours, expected, strict=True):
        close(a, b, dtype)


@pytest.mark.parametrize("path", ["direct"])
def test_inputs_of_another_size(planned):
    """A weight that is used at a size that its gradients did not come from."""
    case, h = linear_case(3, 5, 7, 4, torch.float64), torch.randn(3, 2, 7, dtype=torch.float64)
    G = reference.linear_rows(case.x, case.gy)
    close(applied(LinearProduct(), case.x, case.gy, h), h @ G.mT, torch.float64)
    case = conv_case(3, 4, (6, 5), 6, (3, 2), (1, 2), (1, 0), (1, 1), 2, torch.float64)
    h = torch.randn(3, 4, 4, 7, dtype=torch.float64)
    G = reference.conv_rows(case.x, case.gy, case.kernel_size, *case.geometry)
    expected = torch.cat([F.conv2d(h[k : k + 1], G[k], None, *case.geometry) for k in range(3)])
    product = ConvProduct(case.kernel_size, *case.geometry)
    close(applied(product, case.x, case.gy, h), expected, torch.float64)


def test_costs():
    """Direct: G_i is formed, then multiplied. Gram: a matrix of N² C + K T² operations, and T² O."""
    layer = planning.ConvLayer(1, 64, (7, 7), 64, (3, 3), (1, 1), (1, 1), (1, 1))
    T = N = 49
    assert planning.cost(layer, "direct", "applied").operations == 2 * layer.forward_operations
    assert planning.cost(layer, "gram", "applied").operations == N**2 * 64 + T**2 * 64 + T**2 * 9 / 2
    assert planning.choose_path(layer, "applied") == "gram"
    linear = planning.LinearLayer(1, 20, 30, 40)
    assert planning.cost(linear, "gram", "applied").operations == 20**2 * (30 + 40)
