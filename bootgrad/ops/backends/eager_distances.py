"""Distances of parameter-shaped tensors in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import schema


def sq_distances(a: Sequence[Tensor], b: Sequence[Tensor], scale: float) -> Tensor:
    """As the schema says."""
    schema.check_pairs(a, b)
    dtype = schema.accumulation_dtype(a[0].dtype)
    apart = [t.to(dtype) for t in a]
    if scale != 1:
        apart = list(torch._foreach_mul(apart, scale))
    if b:
        apart = list(torch._foreach_sub(apart, [t.to(dtype) for t in b]))
    return torch.stack(torch._foreach_norm(apart, 2, torch.float64)).square()


for _name in schema.PARAMETER_SCHEMAS:
    schema.library.impl(_name, globals()[_name], "CompositeExplicitAutograd")
