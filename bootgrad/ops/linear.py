"""Per-sample gradients of linear layers: y = x Wᵀ + b.

    G_i = Σ_t gy_{i,t} ⊗ x_{i,t}

Samples are in dimension 0; the dimensions between it and the features are positions, T in all. With T = 1 the G_i have rank
one and plain torch is at the limit: ‖G_i‖² = ‖x_i‖² ‖gy_i‖². Letters as in `ops.schema`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import planning, waiting
from ..errors import ArgumentError
from . import product
from .product import LayerStatistics, Mask, Product, VisitResult, per_sample
from .schema import accumulation_dtype, argument_errors, check_linear, check_shape

_raw = torch.ops.bootgrad


def linear_sq_norms(x: Tensor, gy: Tensor) -> Tensor:
    """Squared norms of a linear layer's per-sample weight gradients.

        s_i = ‖Σ_t gy_{i,t} ⊗ x_{i,t}‖²

    Args:
        x: the layer's input, (B, I) or (B, …, I).
        gy: gradient of the summed losses by the layer's output, (B, O) or (B, …, O).

    Returns:
        (B,) in the accumulation dtype (float32 for half precisions); twice differentiable.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit together.
    """
    return product.sq_norms(LINEAR, *_pair(x, gy))


def linear_deviation_sq_norms(x: Tensor, gy: Tensor, center: Tensor) -> Tensor:
    """Squared distances ‖G_i − center‖² of a linear layer's per-sample weight gradients from a center (O, I).

    Args and raises as `linear_sq_norms`; the result is (B,) and differentiable by the center, too.
    """
    return product.sq_norms(LINEAR, *_pair(x, gy, center=center), center)


def linear_jvp(x: Tensor, gy: Tensor, v: Tensor) -> Tensor:
    """Inner products ⟨G_i, v⟩ of a linear layer's per-sample weight gradients with v (O, I): the rows of G @ v, (B,)."""
    return product.jvp(LINEAR, *_pair(x, gy, v=v), v)


def linear_weighted_sum(x: Tensor, gy: Tensor, w: Tensor | None = None) -> Tensor:
    """Σ_i w_i G_i of a linear layer, (O, I): G.T @ w; with w (B,) absent the ordinary weight gradient."""
    return product.weighted_sum(LINEAR, *_pair(x, gy, w=w), w)


def _pair(x: Tensor, gy: Tensor, w: Tensor | None = None, **layers: Tensor) -> tuple[Tensor, Tensor]:
    """(x, gy) as (B, T, ·), checked against weights w (B,) and tensors of the weight's shape."""
    if x.dim() < 2:
        raise ArgumentError(f"x must be (B, …, I); got shape {tuple(x.shape)}")
    x, gy = LINEAR.canonical(x, gy)
    with argument_errors():
        check_linear(x, gy)
        check_shape("w", w, x.shape[:1])
        for name, tensor in layers.items():
            check_shape(name, tensor, (gy.size(2), x.size(2)))
    return x, gy


@dataclass(frozen=True)
class LinearProduct(Product):
    """y = x Wᵀ with W (O, I), or y = x W with W (I, O) when ``transposed``; x (B, …, I).

    The transposed layer's G_i is Σ_t x ⊗ gy: the same op with x and gy in exchanged roles.
    """

    transposed: bool = False

    def factor(self, x, gy, weight_shape, batch_size):  # noqa: D102
        return self, *self.canonical(x, gy, batch_size), weight_shape

    def canonical(self, x: Tensor, gy: Tensor, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """(x, gy) as (B, T, I) and (B, T, O)."""
        B = x.size(0) if batch_size is None else batch_size
        if x.shape[:-1] != gy.shape[:-1]:
            raise ArgumentError(f"x and gy must agree but for the last dimension; got {_shapes(x, gy)}")
        T = math.prod(x.shape[:-1]) // max(B, 1)
        return x.reshape(B, T, x.size(-1)), gy.reshape(B, T, gy.size(-1))

    def output(self, x, weight, bias=None):  # noqa: D102
        return F.linear(x, weight.t() if self.transposed else weight, bias)

    def input_grad(self, gy, weight, x):  # noqa: D102
        return (gy @ (weight.t() if self.transposed else weight)).reshape(x.shape)

    def weight_grad(self, x, gy, w=None):  # noqa: D102
        x, gy = self._roles(x, gy)
        if x.dtype != accumulation_dtype(x.dtype):
            return _raw.linear_weighted_sum(*self.canonical(x, gy), w)
        gy = gy if w is None else gy * per_sample(w, gy)
        return gy.flatten(0, -2).t() @ x.flatten(0, -2)

    def bias_grad(self, gy):  # noqa: D102
        return gy.flatten(0, -2).sum(0)

    def bias_rows(self, gy):  # noqa: D102
        return gy if gy.dim() == 2 else gy.flatten(1, -2).sum(1)

    def rows(self, x, gy):  # noqa: D102
        x, gy = self._roles(*self.canonical(x, gy))
        return torch.einsum("bto,bti->boi", gy, x)

    def statistics(self, x, gy, center):  # noqa: D102
        if x.size(1) == 1:
            s = _raw.linear_rank1_sq_norms(x.squeeze(1), gy.squeeze(1))
            deviation = None
            if center is not None:
                center = center if self.transposed else center.t()
                u, v = (t.squeeze(1).to(center.dtype) for t in (x, gy))
                deviation = _about(s, u, v, center, u @ center)
            return LayerStatistics(self.weight_grad(x, gy), s, deviation, gy.squeeze(1))
        path = self._path(x, gy, "statistics", center)
        u, v = self._roles(x, gy)
        # A CPU's tiles are up to 1.6 times as quick on a G_i with more rows than columns.
        turned = path == "direct" and center is None and x.device.type == "cpu" and u.size(2) > v.size(2)
        u, v = (v, u) if turned else (u, v)
        total, s, deviation, bias_rows = _raw.linear_statistics(u, v, center, path)
        total = total.t().contiguous() if turned else total
        bias_rows = bias_rows if v is gy else gy.sum(1)
        return LayerStatistics(total, s, None if center is None else deviation, bias_rows)

    def sq_norms(self, x, gy, center):  # noqa: D102
        if x.size(1) == 1:
            return self._rank1(x, gy, (center, None), Mask(False, False, False, False)).sq_norms
        path = self._path(x, gy, "norms", center)
        if center is None:
            return _raw.linear_sq_norms(*self._roles(x, gy), path)
        return _raw.linear_deviation_sq_norms(*self._roles(x, gy), center, path)

    def visit(self, x, gy, centers, mask, scale=1.0):  # noqa: D102
        if x.size(1) == 1:
            return self._rank1(x, gy, centers, mask, 2 * scale)
        center, bias_center = centers
        path = self._path(x, gy, "grad", center, mask.total)
        # Beside Gram matrices Σ G_i is a product of its own, and torch's are the quickest.
        multiplies_apart = mask.total and path == "gram" and x.dtype == accumulation_dtype(x.dtype)
        masks = [*self._roles(*mask[:2]), mask.total and not multiplies_apart]
        s, *grads, total = _raw.linear_sq_norms_with_grad(*self._roles(x, gy), center, path, masks)
        if scale != 1:
            for d in grads:
                d.mul_(scale)
        total = self.weight_grad(x, gy) if multiplies_apart else total
        dx, dgy, total = (t if wanted else None for t, wanted in zip((*self._roles(*grads), total), mask, strict=False))
        if not mask.bias:
            return VisitResult(s, dx, dgy, total, None)
        rows = gy.sum(1, dtype=s.dtype)
        deviations = rows if bias_center is None else rows - bias_center
        if dgy is not None:
            dgy.add_(deviations.unsqueeze(1).to(dgy.dtype), alpha=2 * scale)
        return VisitResult(s + deviations.square().sum(1), dx, dgy, total, rows)

    def _rank1(self, x, gy, centers, mask, twice=2.0):
        """‖G_i − c‖² as `_about` has it, its derivatives and Σ G_i, all samples in one product with c.

        A bias adds ‖gy − c_b‖², as if x had a further entry of one.
        """
        center, bias_center = centers
        dtype, types = accumulation_dtype(x.dtype), (x.dtype, gy.dtype)
        x, gy = x.squeeze(1).to(dtype), gy.squeeze(1).to(dtype)
        xx, gg = x.square().sum(1), gy.square().sum(1)
        s, dx, dgy = xx * gg, None, None
        total = self.weight_grad(x, gy) if mask.total else None
        if center is not None:
            center = center if self.transposed else center.t()  # (I, O)
            cx = x @ center
            s = _about(s, x, gy, center, cx)
        if mask.bias:
            s = s + (gg if bias_center is None else (gy - bias_center).square().sum(1))
        if mask.x_grad:
            dx = twice * gg[:, None] * x
            dx = dx if center is None else dx.addmm_(gy, center.t(), alpha=-twice)
            dx = dx.unsqueeze(1).to(types[0])
        if mask.gy_grad:
            dgy = twice * (xx + mask.bias)[:, None] * gy
            dgy = dgy if center is None else dgy.sub_(cx, alpha=twice)
            dgy = dgy if bias_center is None else dgy.sub_(bias_center, alpha=twice)
            dgy = dgy.unsqueeze(1).to(types[1])
        return VisitResult(s, dx, dgy, total, gy if mask.bias else None)

    def jvp(self, x, gy, v):  # noqa: D102
        if x.size(1) == 1:
            y = x.to(v.dtype) @ (v if self.transposed else v.t())
            return (y * gy).flatten(1).sum(1)
        return _raw.linear_jvp(*self._roles(x, gy), v)

    def layer(self, x: Tensor, gy: Tensor) -> planning.LinearLayer:
        """The shape of the layer, for the cost model; x and gy canonical."""
        return planning.LinearLayer(*map(planning.as_number, (*x.shape, gy.size(2))))

    def _roles(self, x, gy):
        return (gy, x) if self.transposed else (x, gy)

    def _path(self, x: Tensor, gy: Tensor, purpose: str, center: Tensor | None, summed: bool = False) -> str:
        return planning.choose_path(self.layer(x, gy), purpose, center is not None, summed)


def _about(s: Tensor, x: Tensor, gy: Tensor, center: Tensor, cx: Tensor) -> Tensor:
    """‖G_i − c‖² of G_i = gy_i x_iᵀ from s_i = ‖G_i‖² and c x_i (B, O); x (B, I), gy (B, O), and the center as (I, O).

    s − 2 ⟨gy, c x⟩ + ‖c‖² is a small difference of large terms where samples agree with c. `_about_means` is taken where it has
    smaller ones: only if some sample has lost digits, and always on accelerators, which are not waited for.
    """
    large = s + center.square().sum()
    direct = (large - 2 * (gy * cx).sum(1)).clamp_(min=0)
    if waiting.answers_at_once(x) and not bool((direct < large / 64).any()):
        return direct
    parts, about_means = _about_means(x, gy, center, cx)
    return torch.where(parts < large, about_means, direct)


def _about_means(x: Tensor, gy: Tensor, center: Tensor, cx: Tensor) -> tuple[Tensor, Tensor]:
    """‖G_i − c‖² about the means m (I,) of x and n (O,) of gy, and its terms without signs, which tell what rounding costs.

    With dx = x − m, dy = gy − n and e = c − n mᵀ,

        G − c = n dxᵀ + dy xᵀ − e
        ‖G − c‖² = ‖n‖²‖dx‖² + ‖dy‖²‖x‖² + ‖e‖² + 2 ⟨n, dy⟩⟨dx, x⟩ − 2 ⟨n, e dx⟩ − 2 ⟨dy, c x − n ⟨m, x⟩⟩

    has terms as small as the samples' differences.
    """
    m, n = x.mean(0), gy.mean(0)
    dx, dy = x - m, gy - n
    e = torch.addr(center, m, n, alpha=-1)  # [I, O]
    parts = n.square().sum() * dx.square().sum(1) + dy.square().sum(1) * x.square().sum(1) + e.square().sum()
    inner = (dy @ n) * (dx * x).sum(1) - dx @ (e @ n) - (dy * torch.addr(cx, x @ m, n, alpha=-1)).sum(1)
    return parts, (parts + 2 * inner).clamp_(min=0)


def _shapes(x: Tensor, gy: Tensor) -> str:
    return f"{tuple(x.shape)} and {tuple(gy.shape)}"


LINEAR = LinearProduct()
