"""The mean of gradients over the parts of a batch, taken in one part after the other.

    t̄ = Σ_k (n_k/n) t_k,    n = Σ_k n_k

After each part the mean of those so far is there: with a further one of share w = n_k/n it becomes (1 − w) t̄ + w t_k. One part
is kept as it is, and costs nothing. From the second on one tensor is kept for each key, in the accumulation dtype: in bfloat16,
the eighth of eight parts would keep five of its eight bits.
"""

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from .ops.schema import accumulation_dtype


class RunningMean:
    """Means of tensors by key; a tensor that a part lacks is zero there.

    Attributes:
        count: n.
        values: the means so far, not to be written to.
    """

    def __init__(self) -> None:
        """Start with no parts."""
        self.count = 0
        self.values: dict[Hashable, Tensor] = {}
        self._owned = False

    @torch.no_grad()
    def add(self, tensors: Mapping[Hashable, Tensor | None], count: int) -> None:
        """Take in the means ``tensors`` of a part of ``count`` samples."""
        new = {key: t for key, t in tensors.items() if t is not None}
        self.count += count
        if self.count == count:
            self.values = new
            return
        share, old = count / self.count, self.values
        dense = [key for key, t in old.items() if key in new and t.layout == new[key].layout == torch.strided]
        if dense and self._owned:
            torch._foreach_lerp_([old[k] for k in dense], [new[k].to(old[k].dtype) for k in dense], share)
        elif dense:
            for key in dense:  # one after the other, so that what was is gone before the next is made
                t = old.pop(key)
                old[key] = torch.lerp(
                    t.to(accumulation_dtype(t.dtype)), new[key].to(accumulation_dtype(t.dtype)), share
                )
        for key in (old | new).keys() - set(dense):
            parts = [
                t[key].to(accumulation_dtype(t[key].dtype)) * w for t, w in ((old, 1 - share), (new, share)) if key in t
            ]
            old[key] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        self._owned = True

    @torch.no_grad()
    def plus(self, others: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """The means and ``others`` added up, in the memory of the means where that is their own: the last use of them."""
        out = dict(self.values)
        for key, t in others.items():
            own = out.get(key)
            in_place = self._owned and own is not None and own.layout == torch.strided
            out[key] = t if own is None else own.add_(t) if in_place else own + t
        return out
