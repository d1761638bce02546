"""Group norm's ops in plain torch, a chunk of samples at a time. Letters as in `ops.group_norm`."""

import torch
from torch import Tensor

from ..schema import accumulation_dtype, check_group_norm, check_layer

CHUNK_BYTES = 4 * 2**20


@torch.no_grad()
def group_norm_rows(gy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    """Σ gy x̂ and Σ gy, (B, C) each."""
    check_group_norm(x, {"gy": gy}, mean, rstd)
    parts = [
        ((g * _normalized(v, m, r)).sum(2), g.sum(2)) for g, v, m, r in _chunks(_channels(gy), _channels(x), mean, rstd)
    ]
    dtype = accumulation_dtype(x.dtype)
    return tuple(torch.cat([x.new_zeros(0, x.size(1), dtype=dtype), *(p[k] for p in parts)]) for k in range(2))


@torch.no_grad()
def group_norm_rows_backward(a: Tensor, b: Tensor, gy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor):
    """A x̂ + b and r P(a gy)."""
    check_group_norm(x, {"gy": gy}, mean, rstd)
    check_layer("a", a, x.shape[:2], x)
    check_layer("b", b, x.shape[:2], x)
    dgy, dx = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    outs = _channels(dgy), _channels(dx)
    for out_gy, out_x, a_i, b_i, g, v, m, r in _chunks(*outs, a, b, _channels(gy), _channels(x), mean, rstd, cast=2):
        normal = _normalized(v, m, r)
        out_gy.copy_(torch.addcmul(b_i[..., None], a_i[..., None], normal))
        out_x.copy_(_projected(g * a_i[..., None], normal, r))
    return dgy, dx


@torch.no_grad()
def group_norm_grad_backward(u: Tensor, gy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor):
    """∂⟨u, gx⟩ by gy, by x, and by γ for each sample."""
    check_group_norm(x, {"gy": gy, "u": u}, mean, rstd)
    check_layer("weight", weight, x.shape[1:2], x)
    dtype = accumulation_dtype(x.dtype)
    dgy, dx = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = torch.empty(x.shape[:2], dtype=dtype, device=x.device)
    gamma = torch.ones(x.size(1), dtype=dtype, device=x.device) if weight is None else weight
    gamma = gamma[:, None]
    outs = _channels(dgy), _channels(dx), rows
    for out_gy, out_x, out_rows, w, g, v, m, r in _chunks(
        *outs, _channels(u), _channels(gy), _channels(x), mean, rstd, cast=3
    ):
        normal = _normalized(v, m, r)
        projected = _projected(w, normal, r)  # r P(u)
        out_gy.copy_(gamma * projected)
        out_rows.copy_((g * projected).sum(2))
        g = gamma * g
        rho = r.repeat_interleave(x.size(1) // r.size(1), 1)[..., None]
        a, b, s = (_group_mean(t, r.size(1)) for t in (w * normal, g * normal, g * projected))
        out_x.copy_(-rho * (a * _projected(g, normal, r) + b * projected + s * normal))
    return dgy, dx, rows


def _channels(t: Tensor) -> Tensor:
    """(B, C, N)."""
    return t.reshape(*t.shape[:2], -1) if t.numel() else t.new_zeros(*t.shape[:2], 0)


def _chunks(*tensors: Tensor, cast: int = 0):
    """The tensors' chunks of samples; from the ``cast``-th on in the accumulation dtype."""
    largest = max(tensors, key=torch.Tensor.numel)
    B = largest.size(0)
    step = max(1, CHUNK_BYTES // max(1, 8 * largest.numel() // max(1, B)))
    for start in range(0, B, step):
        parts = [t[start : start + step] for t in tensors]
        yield parts[:cast] + [t.to(accumulation_dtype(t.dtype)) for t in parts[cast:]]


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
