"""Embeddings' ops in plain torch, some columns at a time: memory grows neither with V·D nor by a second N·D.

Look-ups of one sample and token are a group, numbered in the order of sample and token: at most N groups, so that nothing has
to be asked of a device. Sums by groups are the derivative of torch's own embedding, which adds in a fixed order on GPUs, too.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..schema import EMBEDDING_SCHEMAS, accumulation_dtype, check_embedding, check_layer, check_table, library

CHUNK_BYTES = {"cpu": 4 * 2**20}
CHUNK_BYTES_ELSEWHERE = 128 * 2**20


@torch.no_grad()
def embedding_sq_norms(tokens: Tensor, bounds: Tensor, gy: Tensor, center: Tensor | None) -> Tensor:
    """‖E_i − center‖²."""
    return _rows(tokens, bounds, gy, center, None)


@torch.no_grad()
def embedding_rows(tokens: Tensor, bounds: Tensor, gy: Tensor, center: Tensor | None) -> tuple[Tensor, Tensor]:
    """‖E_i − center‖², and each look-up's row of E_i − center."""
    rows = torch.empty(gy.shape, dtype=gy.dtype, device=gy.device)
    return _rows(tokens, bounds, gy, center, rows), rows


@torch.no_grad()
def embedding_jvp(tokens: Tensor, bounds: Tensor, gy: Tensor, v: Tensor) -> Tensor:
    """⟨E_i, v⟩."""
    check_embedding(tokens, bounds, gy)
    check_table("v", v, gy)
    products, at = v.new_zeros(gy.size(0)), tokens.clamp(min=0)
    for columns in _columns(gy):
        products += (gy[:, columns].to(v.dtype) * _looked_up(v, at, columns)).sum(1)
    return _added_up(products.masked_fill_(tokens < 0, 0), _samples(tokens, bounds), bounds.size(0) - 1)


@torch.no_grad()
def embedding_weighted_sum(tokens: Tensor, bounds: Tensor, gy: Tensor, w: Tensor | None, size: int) -> Tensor:
    """Σ_i w_i E_i."""
    check_embedding(tokens, bounds, gy)
    check_layer("w", w, (bounds.size(0) - 1,), gy)
    dtype, at = accumulation_dtype(gy.dtype), tokens.clamp(min=-1)
    scale = None if w is None or not gy.size(0) else w[_samples(tokens, bounds)].unsqueeze(1)
    out = torch.empty(size, gy.size(1), dtype=dtype, device=gy.device)
    for columns in _columns(gy):
        part = gy[:, columns].to(dtype)
        out[:, columns] = _added_up(part if scale is None else part * scale, at, size)
    return out


class _Groups(NamedTuple):
    """Each look-up's group, and each group's token, negative for none, and sample; all (N,)."""

    of: Tensor
    token: Tensor
    sample: Tensor


def _grouped(tokens: Tensor, bounds: Tensor) -> _Groups:
    samples = _samples(tokens, bounds)
    order = tokens.argsort(stable=True)
    order = order[samples[order].argsort(stable=True)]
    token, sample = tokens[order], samples[order]
    new = torch.ones_like(token, dtype=torch.bool)
    new[1:] = (token[1:] != token[:-1]) | (sample[1:] != sample[:-1])
    number = new.cumsum(0) - 1
    return _Groups(
        torch.empty_like(order).index_copy_(0, order, number),
        torch.full_like(token, -1).scatter_(0, number, token),
        torch.zeros_like(sample).scatter_(0, number, sample),
    )


def _rows(tokens: Tensor, bounds: Tensor, gy: Tensor, center: Tensor | None, out: Tensor | None) -> Tensor:
    """‖E_i − center‖²; the look-ups' rows are written to ``out``."""
    check_embedding(tokens, bounds, gy)
    check_table("center", center, gy)
    groups, dtype = _grouped(tokens, bounds), accumulation_dtype(gy.dtype)
    none, at = (groups.token < 0).unsqueeze(1), groups.token.clamp(min=0)
    squares = gy.new_zeros(gy.size(0), dtype=dtype)
    for columns in _columns(gy):
        apart = _added_up(gy[:, columns].to(dtype), groups.of, gy.size(0))
        if center is not None:
            apart -= _looked_up(center, at, columns)
        apart.masked_fill_(none, 0)
        if out is not None:
            out[:, columns] = apart[groups.of]
        squares += apart.square_().sum(1)
    s = _added_up(squares, groups.sample, bounds.size(0) - 1)
    return s if center is None else s + _elsewhere(center, at, none.squeeze(1), groups.sample, s)


def _elsewhere(center: Tensor, at: Tensor, none: Tensor, sample: Tensor, s: Tensor) -> Tensor:
    """The squares of the center's rows that no look-up of a sample has: of all, less those that one has, in float64."""
    norms = torch.linalg.vector_norm(center, dim=1, dtype=torch.float64).square()
    own = norms[at].masked_fill_(none, 0)
    return (norms.sum() - _added_up(own, sample, s.numel())).clamp_(min=0).to(s.dtype)


def _samples(tokens: Tensor, bounds: Tensor) -> Tensor:
    """The sample of each look-up, (N,)."""
    return torch.searchsorted(bounds[1:].contiguous(), torch.arange(tokens.size(0), device=tokens.device), right=True)


def _looked_up(table: Tensor, at: Tensor, columns: slice) -> Tensor:
    return table[:, columns].index_select(0, at)


def _added_up(values: Tensor, index: Tensor, size: int) -> Tensor:
    """The sums of ``values`` (N,) or (N, D) that have one index, (size,) or (size, D); those of index −1 are left out."""
    if values.dim() == 1:
        return _added_up(values.unsqueeze(1), index, size).squeeze(1)
    return torch.ops.aten.embedding_dense_backward(values.contiguous(), index, size, -1, False)


def _columns(gy: Tensor) -> Iterator[slice]:
    """Runs of columns, of which three copies fit into a chunk."""
    budget = CHUNK_BYTES.get(gy.device.type, CHUNK_BYTES_ELSEWHERE)
    step = max(1, budget // max(1, 3 * gy.size(0) * accumulation_dtype(gy.dtype).itemsize))
    for start in range(0, gy.size(1), step):
        yield slice(start, start + step)


for _name in EMBEDDING_SCHEMAS:
    library.impl(_name, globals()[_name], "CompositeExplicitAutograd")
