"""Group norm's ops in plain torch, a chunk of samples at a time. Letters as in `ops.group_norm`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..schema import RELU_SCHEMAS, accumulation_dtype, check_group_norm, check_layer, library

CHUNK_BYTES = 8 * 2**20


@torch.no_grad()
def group_norm_backward(gy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, input_grad: bool):
    """By the input, r P(γ gy), and by γ and β for each sample, Σ gy x̂ and Σ gy."""
    gamma = _checked(gy, x, weight, mean, rstd)
    dx = torch.empty(x.shape if input_grad else 0, dtype=x.dtype, device=x.device)
    rows, bias_rows = _rows(x), _rows(x)
    for part in _chunks(x, 2):
        g, v, m, r = (_wide(t[part]) for t in (_channels(gy), _channels(x), mean, rstd))
        normal = _normalized(v, m, r)
        rows[part], bias_rows[part] = (g * normal).sum(2), g.sum(2)
        if input_grad:
            _channels(dx)[part] = _projected(gamma * g, normal, r).to(x.dtype)
    return dx, rows, bias_rows


@torch.no_grad()
def group_norm_double_backward(
    u: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    gy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
):
    """The adjoint of `group_norm_backward` for cotangents u, a and b: by gy, by x, and by γ for each sample."""
    gamma = _checked(gy, x, weight, mean, rstd, u)
    for name, t in (("a", a), ("b", b)):
        check_layer(name, t, x.shape[:2], x)
    dgy, dx = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rows = _rows(x)
    for part in _chunks(x, 5):
        g, v, m, r = (_wide(t[part]) for t in (_channels(gy), _channels(x), mean, rstd))
        normal = _normalized(v, m, r)
        by_gy, by_x = torch.zeros_like(g), torch.zeros_like(g)
        if u is not None:
            w = _wide(_channels(u)[part])
            projected = _projected(w, normal, r)  # r P(u)
            by_gy += gamma * projected
            rows[part] = (g * projected).sum(2)
            rho = r.repeat_interleave(x.size(1) // r.size(1), 1)[..., None]
            h = gamma * g
            ux, gx, s = (_group_mean(t, r.size(1)) for t in (w * normal, h * normal, h * projected))
            by_x -= rho * (ux * _projected(h, normal, r) + gx * projected + s * normal)
        if a is not None:
            by_gy += a[part][..., None] * normal
            by_x += _projected(a[part][..., None] * g, normal, r)
        if b is not None:
            by_gy += b[part][..., None]
        _channels(dgy)[part], _channels(dx)[part] = by_gy.to(x.dtype), by_x.to(x.dtype)
    return dgy, dx, rows


@torch.no_grad()
def group_norm_relu_backward(gz: Tensor, z: Tensor, x: Tensor, *rest) -> tuple[Tensor, ...]:
    """`group_norm_backward` for the gradient of z = max(0, y)."""
    return torch.ops.bootgrad.group_norm_backward(_passed(gz, z, x), x, *rest)


@torch.no_grad()
def group_norm_relu_double_backward(
    u: Tensor | None, a: Tensor | None, b: Tensor | None, gz: Tensor, z: Tensor, x: Tensor, *rest
) -> tuple[Tensor, ...]:
    """The adjoint of `group_norm_relu_backward`: by gz, by x, and by γ for each sample."""
    dgy, dx, rows = torch.ops.bootgrad.group_norm_double_backward(u, a, b, _passed(gz, z, x), x, *rest)
    return _passed(dgy, z, x), dx, rows


def _passed(g: Tensor, z: Tensor, x: Tensor) -> Tensor:
    """``g`` where z > 0, else 0."""
    for name, t in (("gz", g), ("z", z)):
        torch._check(t.shape == x.shape and t.dtype == x.dtype, lambda name=name: f"{name} must be like x")
    return torch.ops.aten.threshold_backward(g, z, 0)


def _checked(
    gy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, u: Tensor | None = None
) -> Tensor:
    """Γ as (C, 1), ones where there is none, when all arguments fit together."""
    check_group_norm(x, {"gy": gy} | ({} if u is None else {"u": u}), weight, mean, rstd)
    ones = torch.ones(x.size(1), dtype=mean.dtype, device=x.device) if weight is None else weight
    return ones[:, None]


def _rows(x: Tensor) -> Tensor:
    """Zeros (B, C) of the accumulation dtype."""
    return torch.zeros(x.shape[:2], dtype=accumulation_dtype(x.dtype), device=x.device)


def _wide(t: Tensor) -> Tensor:
    return t.to(accumulation_dtype(t.dtype))


def _channels(t: Tensor) -> Tensor:
    """(B, C, N)."""
    return t.reshape(*t.shape[:2], -1) if t.numel() else t.new_zeros(*t.shape[:2], 0)


def _chunks(x: Tensor, activations: int) -> Iterator[slice]:
    """Ranges of samples, so many that this number of activations in double precision fit the budget."""
    if x.numel():
        step = max(1, CHUNK_BYTES // (8 * activations * x[0].numel()))
        yield from (slice(start, start + step) for start in range(0, x.size(0), step))


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """x̂ (b, C, N)."""
    repeats = x.size(1) // mean.size(1)
    return (x - mean.repeat_interleave(repeats, 1)[..., None]) * rstd.repeat_interleave(repeats, 1)[..., None]


def _group_mean(t: Tensor, groups: int) -> Tensor:
    """Means over groups, (b, C, 1)."""
    mean = t.reshape(t.size(0), groups, -1).mean(2)
    return mean.repeat_interleave(t.size(1) // groups, 1)[..., None]


def _projected(w: Tensor, normal: Tensor, rstd: Tensor) -> Tensor:
    """R P(w)."""
    groups = rstd.size(1)
    out = w - _group_mean(w, groups) - normal * _group_mean(w * normal, groups)
    return out * rstd.repeat_interleave(w.size(1) // groups, 1)[..., None]


for _name in RELU_SCHEMAS:
    library.impl(_name, globals()[_name], "CompositeExplicitAutograd")
