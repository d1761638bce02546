"""Distances of parameter-shaped tensors in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import schema


def sq_distances(a: Sequence[Tensor], b: Sequence[Tensor], scale: float) -> Tensor:
    """As the schema says."""
    schema.check_pairs(a, b)
    apart = list(a) if scale == 1 else torch._foreach_mul(list(a), scale)
    apart = torch._foreach_sub(apart, list(b)) if b else apart
    return torch.stack(torch._foreach_norm(apart, 2, torch.float64)).square()


for _name in schema.PARAMETER_SCHEMAS:
    schema.library.impl(_name, globals()[_name], "CompositeExplicitAutograd")
