"""Per-sample gradients of convolutions of one, two and three dimensions.

    G_i = Σ_t gy_{i,t} ⊗ u_{i,t}        u_{i,t} = the patch of x_i under the kernel at output position t

x is (B, C, *S), gy (B, O, *S'), weights (O, C/groups, *K). Padding is with zeros; other paddings are an operation of their
own on x. Letters as in `ops.schema`.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import planning
from ..errors import ArgumentError, UnsupportedError
from . import library, product
from .product import LayerStatistics, Product, VisitResult
from .schema import argument_errors, check_conv, check_shape, weight_shape

_raw = torch.ops.bootgrad
# Own kernels for convolutions themselves, on CPUs in float32; by BOOTGRAD_CONVOLUTIONS=torch outputs are torch's, bit for bit.
_OWN_PRODUCTS = os.environ.get("BOOTGRAD_CONVOLUTIONS", "").lower() != "torch"
IntOrInts = int | Sequence[int]


def conv_sq_norms(
    x: Tensor,
    gy: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
) -> Tensor:
    """Squared norms of a convolution's per-sample weight gradients.

        s_i = ‖Σ_t gy_{i,t} ⊗ u_{i,t}‖²

    Args:
        x: the layer's input, (B, C, *S).
        gy: gradient of the summed losses by the layer's output, (B, O, *S').
        kernel_size: K, one number or one per dimension; as are ``stride``, ``padding`` (zeros) and ``dilation``.
        stride: step between output positions.
        padding: zeros added on both sides.
        dilation: step between kernel positions.
        groups: number of blocks that channels in and out are cut into.

    Returns:
        (B,) in the accumulation dtype (float32 for half precisions); twice differentiable.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit together.
    """
    return product.sq_norms(_conv(x, gy, kernel_size, stride, padding, dilation, groups), x, gy)


def conv_deviation_sq_norms(
    x: Tensor,
    gy: Tensor,
    center: Tensor,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
) -> Tensor:
    """Squared distances ‖G_i − center‖² of per-sample weight gradients from a center (O, C/groups, *K).

    The rest as `conv_sq_norms`; the result is (B,) and differentiable by the center, too.
    """
    conv = _conv(x, gy, center.shape[2:], stride, padding, dilation, groups, center=center)
    return product.sq_norms(conv, x, gy, center)


def conv_jvp(
    x: Tensor,
    gy: Tensor,
    v: Tensor,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
) -> Tensor:
    """Inner products ⟨G_i, v⟩ with v (O, C/groups, *K): the rows of G @ v, (B,). The rest as `conv_sq_norms`."""
    return product.jvp(_conv(x, gy, v.shape[2:], stride, padding, dilation, groups, v=v), x, gy, v)


def conv_weighted_sum(
    x: Tensor,
    gy: Tensor,
    w: Tensor | None,
    kernel_size: IntOrInts,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
) -> Tensor:
    """Σ_i w_i G_i, (O, C/groups, *K): G.T @ w; with w None the ordinary weight gradient. The rest as `conv_sq_norms`."""
    return product.weighted_sum(_conv(x, gy, kernel_size, stride, padding, dilation, groups, w=w), x, gy, w)


def _conv(
    x: Tensor, gy: Tensor, kernel_size, stride, padding, dilation, groups, w=None, **layers: Tensor
) -> "ConvProduct":
    """The geometry, checked against x, gy, weights w (B,) and tensors of the weight's shape."""
    n = x.dim() - 2
    if n < 1:
        raise ArgumentError(f"x must be (B, C, *S); got shape {tuple(x.shape)}")
    geometry = expand(kernel_size, n), expand(stride, n), expand(padding, n), expand(dilation, n)
    with argument_errors():
        check_conv(x, gy, *geometry, groups)
        check_shape("w", w, x.shape[:1])
        for name, tensor in layers.items():
            check_shape(name, tensor, weight_shape(x, gy, geometry[0], groups))
    return ConvProduct(*geometry, groups)


def expand(value: IntOrInts, n: int) -> tuple[int, ...]:
    """``value`` as ``n`` numbers: itself, or repeated where it is a single one."""
    values = (value,) * n if isinstance(value, int) else tuple(int(v) for v in value)
    values = values * n if len(values) == 1 else values
    if len(values) != n:
        raise ArgumentError(f"expected one number or {n}, one per dimension; got {tuple(values)}")
    return values


@dataclass(frozen=True)
class ConvProduct(Product):
    """The geometry of a convolution, one number per dimension."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def _geometry(self):
        return self.stride, self.padding, self.dilation, self.groups

    def _by(self, product: str, x: Tensor, gy_channels: int, *read: Tensor) -> str:
        """What makes a product of x, of which the shape is read, and of what is ``read``."""
        if not (_OWN_PRODUCTS and library.is_loaded("_C")) or x.device.type != "cpu":
            return "default"
        if any(t.dtype != torch.float32 or not t.is_contiguous() for t in read):
            return "default"
        return _chosen(self, product, tuple(map(planning.as_number, x.shape)), planning.as_number(gy_channels))

    def output(self, x, weight, bias=None):  # noqa: D102
        by = self._by("output", x, weight.size(0), x, weight)
        if by == "minimal_filtering":
            return _raw.conv3x3(x, weight, bias, self.padding, False)
        if by == "planes":
            return _raw.conv_output(x, weight, bias, *self._geometry)
        zeros = (0,) * len(self.stride)
        return torch.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, zeros, self.groups)

    def input_grad(self, gy, weight, x):  # noqa: D102
        by = self._by("input_grad", x, gy.size(1), gy, weight)
        if by == "minimal_filtering":  # of gy, with the kernel turned around
            return _raw.conv3x3(gy, weight, None, tuple(2 - p for p in self.padding), True)
        if by == "planes":
            return _raw.conv_input_grad(gy, weight, x.shape[2:], *self._geometry)
        return self._backward(gy, x, weight, (True, False, False))[0]

    def weight_grad(self, x, gy, w=None):  # noqa: D102
        if self._by("weight_grad", x, gy.size(1), x, gy) == "minimal_filtering":
            return _raw.conv3x3_weighted_sum(x, gy, w, self.padding)
        return _raw.conv_weighted_sum(x, gy, w, self.kernel_size, *self._geometry)

    def _backward(self, gy, x, weight, mask):
        zeros = (0,) * len(self.stride)
        return torch.ops.aten.convolution_backward(
            gy, x, weight, None, self.stride, self.padding, self.dilation, False, zeros, self.groups, mask
        )

    def bias_grad(self, gy):  # noqa: D102
        return self.bias_rows(gy).sum(0)  # a sum over samples and positions at once would copy gy first

    def bias_rows(self, gy):  # noqa: D102
        return gy.sum(tuple(range(2, gy.dim())))

    def factor(self, x, gy, weight_shape, batch_size):  # noqa: D102
        if x.size(0) == batch_size:
            return self, x, gy, weight_shape
        # N/B consecutive images belong to a sample: they stack in a further dimension, which the kernel leaves alone.
        if len(self.stride) > 2:
            raise UnsupportedError(
                f"a {len(self.stride)}-d convolution over several images a sample; got {x.size(0)} rows"
            )
        x, gy = (t.reshape(batch_size, -1, *t.shape[1:]).transpose(1, 2) for t in (x, gy))
        stacked = ConvProduct(
            (1, *self.kernel_size), (1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups
        )
        return stacked, x, gy, torch.Size((*weight_shape[:2], 1, *weight_shape[2:]))

    def rows(self, x, gy):  # noqa: D102
        (B, C, *S), O = x.shape, gy.size(1)  # noqa: E741
        # One grouped convolution over all samples: its weight gradient holds each sample's own.
        weight = x.new_zeros(B * O, C // self.groups, *self.kernel_size, requires_grad=True)
        folded = ConvProduct(self.kernel_size, self.stride, self.padding, self.dilation, B * self.groups)
        x, gy = x.reshape(1, B * C, *S), gy.reshape(1, -1, *gy.shape[2:])
        g = folded._backward(gy, x, weight, (False, True, False))[1]
        return g.view(B, O, *weight.shape[1:])

    def statistics(self, x, gy, center):  # noqa: D102
        path = self._path(x, gy, "statistics", center)
        total, s, deviation, rows = _raw.conv_statistics(x, gy, center, self.kernel_size, *self._geometry, path)
        return LayerStatistics(total, s, None if center is None else deviation, rows)

    def sq_norms(self, x, gy, center):  # noqa: D102
        path = self._path(x, gy, "norms", center)
        if center is None:
            return _raw.conv_sq_norms(x, gy, self.kernel_size, *self._geometry, path)
        return _raw.conv_deviation_sq_norms(x, gy, center, *self._geometry, path)

    def visit(self, x, gy, centers, mask, scale=1.0):  # noqa: D102
        center, bias_center = centers
        path = self._path(x, gy, "grad", center, mask.total)
        apart = None if center is None or path == "direct" or not self._multiplies_apart(x, center) else center
        about = center if apart is None else None
        call = self.kernel_size, *self._geometry, path, list(mask[:3])
        if scale == 1 and not mask.bias:
            s, *rest = _raw.conv_sq_norms_with_grad(x, gy, about, *call)
        else:
            s, *rest = _raw.conv_visit(x, gy, about, mask.bias, bias_center, *call, scale)
        dx, dgy, total, rows = (t if wanted else None for t, wanted in zip((*rest, None)[:4], mask, strict=True))
        if apart is not None:  # ‖G_i − c‖² = ‖G_i‖² − 2 ⟨gy_i, c ∗ x_i⟩ + ‖c‖²
            y = self.output(x, apart)
            inner = (y * gy).flatten(1).sum(1, dtype=torch.float64)
            square = torch.linalg.vector_norm(apart, dtype=torch.float64).square()
            s = (s.double() - 2 * inner + square).clamp(min=0).to(s.dtype)
            if dgy is not None:
                dgy.sub_(y, alpha=2 * scale)
            if dx is not None:
                dx.sub_(self.input_grad(gy, apart, x), alpha=2 * scale)
        return VisitResult(s, dx, dgy, total, rows)

    @staticmethod
    def _multiplies_apart(x: Tensor, center: Tensor) -> bool:
        """Whether c ∗ x and cᵀ ∗ gy are quicker by torch than sample by sample: where c does not stay in a core's cache."""
        return x.device.type == "cpu" and x.dtype == center.dtype and center.numel() > 2**17

    def jvp(self, x, gy, v):  # noqa: D102
        return _raw.conv_jvp(x, gy, v, *self._geometry)

    def layer(self, x: Tensor, gy: Tensor) -> planning.ConvLayer:
        """The shape of the layer, for the cost model."""
        B, C, *size = map(planning.as_number, x.shape)
        return planning.ConvLayer(B, C, tuple(size), planning.as_number(gy.size(1)), self.kernel_size, *self._geometry)

    def _path(self, x: Tensor, gy: Tensor, purpose: str, center: Tensor | None, summed: bool = False) -> str:
        return planning.choose_path(self.layer(x, gy), purpose, center is not None, summed)


@functools.lru_cache(maxsize=1024)
def _chosen(product: ConvProduct, of: str, x_shape: tuple[int, ...], gy_channels: int) -> str:
    B, C, *size = x_shape
    geometry = product.kernel_size, *product._geometry
    return planning.cpu_product(planning.ConvLayer(B, C, tuple(size), gy_channels, *geometry), of)
