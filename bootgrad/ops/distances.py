"""Squared distances of parameter-shaped tensors, such as mean gradients and centers: for reports, without a graph."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError


@torch.no_grad()
def sq_distances(a: Sequence[Tensor], b: Sequence[Tensor] | None = None, scale: float = 1.0) -> Tensor:
    """‖scale·a_k − b_k‖² of each of n tensors, (n,), float64; b is zeros when absent.

    Tensors of one dtype and device go through together; those of a pair are taken in the dtype that both fit in.

    Raises:
        ArgumentError: no tensors.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for k, (s, t) in enumerate(zip(a, a if b is None else b, strict=True)):
        groups.setdefault((torch.promote_types(s.dtype, t.dtype), s.device), []).append(k)
    if len(groups) == 1:
        ((dtype, _),) = groups
        return _of_one_kind(a, b, scale, dtype)
    if not a:
        raise ArgumentError("sq_distances needs at least one tensor")
    out = torch.empty(len(a), dtype=torch.float64, device=a[0].device)
    for (dtype, _), places in groups.items():
        pairs = [a[k] for k in places], None if b is None else [b[k] for k in places]
        out[places] = _of_one_kind(*pairs, scale, dtype).to(out.device)
    return out


def _of_one_kind(a: Sequence[Tensor], b: Sequence[Tensor] | None, scale: float, dtype: torch.dtype) -> Tensor:
    return torch.ops.bootgrad.sq_distances([t.to(dtype) for t in a], [t.to(dtype) for t in b or ()], scale)
