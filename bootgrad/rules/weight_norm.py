"""Weight normalization, W = v g/‖v‖, in operations whose second derivatives are right.

Those of ``torch._weight_norm`` are not, up to torch 2.13: through it a penalty's gradient by v was off by a quarter.
"""

import torch
from torch import Tensor

from .stand_ins import written_out


@written_out(torch._weight_norm)
def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The weight, with norms over all dimensions but ``dim``."""
    return v * (g / torch.norm_except_dim(v, 2, dim))
