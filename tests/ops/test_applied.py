"""G_i ∗ h_i and G_iᵀ ∗ g_i against plain torch with the oracle's G_i, one sample at a time, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from bootgrad import planning, reference
from bootgrad.ops import applied as ops_applied
from bootgrad.ops import schema
from bootgrad.ops.applied import applied, applied_transposed, displaced, displaced_transposed
from bootgrad.ops.backends import eager_applied
from bootgrad.ops.backends.eager import CHUNK_BYTES
from bootgrad.ops.convolution import ConvProduct
from bootgrad.ops.linear import LinearProduct

from .cases import DTYPES, conv_case, linear_case
from .test_raw_ops import CONV_SIZES, LAYOUTS, LINEAR_SIZES

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
PATHS = pytest.mark.parametrize("path", ["direct", "gram"])
compiled = all(torch._C._dispatch_has_kernel_for_dispatch_key(f"bootgrad::{n}", "CPU") for n in schema.APPLIED_SCHEMAS)
# Of the inputs' dtype; sums are of float32 for half precisions.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(params=["eager", "compiled"] if compiled else ["eager"])
def planned(monkeypatch, path, request):
    """The path that is taken, whatever it costs; chunks of a few samples. Each backend in turn."""
    if request.param == "eager":
        monkeypatch.setattr(ops_applied, "_raw", eager_applied)
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
    h.requires_grad_()
    y = torch.cat([F.conv2d(h[k : k + 1], G[k], None, *case.geometry) for k in range(3)])
    g = other(y, 1)
    expected = torch.autograd.grad(y, h, g)[0]
    close(applied_transposed(product, case.x, case.gy, g, h), expected, torch.float64)


def test_costs():
    """Direct: G_i is formed, then multiplied. Gram: a matrix of N² C + K T² operations, and T² O."""
    layer = planning.ConvLayer(1, 64, (7, 7), 64, (3, 3), (1, 1), (1, 1), (1, 1))
    T = N = 49
    assert planning.cost(layer, "direct", "applied").operations == 2 * layer.forward_operations
    assert planning.cost(layer, "gram", "applied").operations == N**2 * 64 + T**2 * 64 + T**2 * 9 / 2
    assert planning.choose_path(layer, "applied") == "gram"
    linear = planning.LinearLayer(1, 20, 30, 40)
    assert planning.cost(linear, "gram", "applied").operations == 20**2 * (30 + 40)


NAMES = pytest.mark.parametrize("name", schema.APPLIED_SCHEMAS)
GEOMETRY = (3, 6, (7, 5), 10, (3, 2), (1, 2), (1, 0), (1, 1), 2)


def raw_arguments(name, layout=lambda t: t, dtype=torch.float32, path="direct"):
    case = conv_case(*GEOMETRY, dtype)
    given = other(case.gy, 1) if name.endswith("transposed") else other(case.x, 1)
    tensors = [*map(layout, (case.x, case.gy, given))]
    if name.startswith("conv_displaced"):
        weight = torch.linspace(-1, 1, 180).view(10, 3, 3, 2).to(dtype)
        shift = [] if name.endswith("transposed") else [torch.linspace(0, 2, 30).view(3, 10).to(dtype)]
        return [*tensors, weight, *shift, 0.7, *case.geometry]
    return [*tensors, case.kernel_size, *case.geometry, path]


@NAMES
@pytest.mark.parametrize("path", ["direct", "gram"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_and_arguments_left_alone(name, path, layout):
    values = raw_arguments(name, layout, path=path)
    before = [t.clone() for t in values[:3]]
    expected = getattr(eager_applied, name)(*raw_arguments(name, dtype=torch.float64, path=path))
    for op in (getattr(torch.ops.bootgrad, name), getattr(eager_applied, name)):
        ours = op(*values)
        assert ours.is_contiguous()
        close(ours, expected, torch.float32)
    assert all(map(torch.equal, before, values[:3]))


@NAMES
@pytest.mark.parametrize("path", ["direct", "gram"])
def test_opcheck(name, path):
    opcheck(getattr(torch.ops.bootgrad, name).default, raw_arguments(name, path=path))


@NAMES
def test_what_eager_refuses_everything_refuses(name):
    right = raw_arguments(name)
    given = "g" if name.endswith("transposed") else "h"
    for index, wrong, message in (
        (0, right[0][:, :1], "groups must divide the channels"),
        (1, right[1][1:], "one batch size; got 3 and 2"),
        (2, right[2][..., 1:], rf"{given} must have shape .*; got"),
        (2, right[2].double(), f"{given} must have the dtype of x and gy"),
        (-1, "ghost", "path must be one of direct, gram; got 'ghost'")
        if name.startswith("conv_applied")
        else (
            3,
            right[3][1:] if name.startswith("conv_displaced") else None,
            r"weight must have shape \(10, 3, 3, 2\); got",
        ),
    ):
        index %= len(right)
        values = [*right[:index], wrong, *right[index + 1 :]]
        meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in values]
        op = getattr(torch.ops.bootgrad, name)
        for function, arguments in ((op, values), (op, meta), (getattr(eager_applied, name), values)):
            with pytest.raises(RuntimeError, match=message):
                function(*arguments)


@NAMES
@pytest.mark.parametrize("path", ["direct", "gram"])
def test_same_input_same_bits_on_any_number_of_threads(name, path):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(getattr(torch.ops.bootgrad, name)(*raw_arguments(name, path=path)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@EVERY_DTYPE
@pytest.mark.parametrize("backend", ["eager", "compiled"] if compiled else ["eager"])
@pytest.mark.parametrize("sizes", [s for k, s in CONV_SIZES.items() if not k.startswith("no ")], ids=str)
def test_displaced(backend, sizes, dtype):
    """(W + f G_i) ∗ h_i + s_i and its transpose, from the parts that are tested above."""
    case, factor = conv_case(*sizes, dtype), 0.7
    h, g, shift = other(case.x, 1), other(case.gy, 2), other(case.gy.flatten(2).sum(2).to(case.v.dtype), 3)
    module = eager_applied if backend == "eager" else torch.ops.bootgrad
    product = ConvProduct(case.kernel_size, *case.geometry)
    x, gy, h_wide, g_wide, weight = (t.double() for t in (case.x, case.gy, h, g, case.v))
    added = shift.double().view(*shift.shape, *[1] * (x.dim() - 2))
    expected = product.output(h_wide, weight) + factor * applied(product, x, gy, h_wide)
    ours = module.conv_displaced(case.x, case.gy, h, case.v, shift, factor, *case.geometry)
    close(ours, expected + added, dtype)
    ours = module.conv_displaced(case.x, case.gy, h, case.v, None, factor, *case.geometry)
    close(ours, expected, dtype)
    expected = product.input_grad(g_wide, weight, x) + factor * applied_transposed(product, x, gy, g_wide, h_wide)
    ours = module.conv_displaced_transposed(case.x, case.gy, g, case.v, factor, *case.geometry)
    close(ours, expected, dtype)


def test_what_is_done_at_once():
    """Many positions and few channels: W + f G_i is formed. Few positions, many channels: not. Linear layers: never."""
    for (C, S, O), at_once in (((1, 28, 32), True), ((32, 14, 64), True), ((64, 7, 64), False)):  # noqa: E741
        case = conv_case(2, C, (S, S), O, (3, 3), (1, 1), (1, 1), (1, 1), 1, torch.float64)
        product, h = ConvProduct((3, 3), *case.geometry), other(case.x, 1)
        y = displaced(product, case.x, case.gy, h, case.v, None, 0.7)
        gx = displaced_transposed(product, case.x, case.gy, case.gy, case.v, 0.7, h)
        assert ((y is not None), (gx is not None)) == (at_once, at_once)
    case = linear_case(2, 5, 3, 4, torch.float64)
    assert displaced(LinearProduct(), case.x, case.gy, case.x, case.v, None, 0.7) is None
