"""Which sample the rows of an operation's output belong to, where the caller says so by an index.

The index has the shape of the data's leading dimensions, and at each position the number of its sample, 0 … B − 1. A dimension
along which it does not change stands for one of any length: of arange(B).expand(T, B) only (·, B) counts. An output may be read

    by position    its leading dimensions are the index's, as they are, exchanged, or with one of any length more or less
    flattened      dimension 0 has as many rows as the index has entries, in either order, or k consecutive ones for each
    by samples     dimension 0 has B rows, or k consecutive ones for each sample

in this order; where its shape allows several, the recording's check takes the first that the gradients confirm. Letters: ``B``
samples, ``N`` rows, ``M`` rows of the sample that has the most.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError

# What to do, at the end of an error where dimension 0 does not seem to be the samples.
SAMPLES_ELSEWHERE = (
    ". If samples are elsewhere, tell the recording: record(model, samples=index), with the number of its sample at each "
    "position of the leading dimensions"
)


class Reading:
    """The sample of every row: how tensors (leading …, …) become (B, M, …), without a copy where samples are a dimension."""

    def __init__(self, owner: Tensor, batch_size: int, place: int = 0):
        """Take the samples' numbers, long, of the shape of the leading dimensions, on the CPU.

        ``place`` is the reading's among all that a shape allows, of which some may be alike.
        """
        self.owner, self.batch_size, self.place = owner, batch_size, place
        self.nobody: Tensor | None = None  # (N,), which rows nothing could be told of, if any
        self._moved: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

    @classmethod
    def told(cls, norms: Tensor, norms_a: Tensor, a: Tensor) -> "Reading":
        """The samples of rows (N,), from the norms of their gradients, plain and with the samples' losses times ``a``, (B,).

        A row of sample i has a_i times the norm; of the weights no two may be alike. Rows without a gradient are anybody's: as
        many of each sample, for all have room for as many as the one that has the most.
        """
        ordered, numbers = a.sort()
        nearest = torch.bucketize((norms_a / norms).to(a.dtype), (ordered[1:] + ordered[:-1]) / 2)
        owner, none = numbers[nearest].cpu(), (norms == 0).cpu()
        count = int(none.sum())
        owner[none] = torch.arange(count, device="cpu") * a.numel() // max(count, 1)
        reading = cls(owner, a.numel())
        reading.nobody = none if count else None
        return reading

    def data(self, t: Tensor) -> Tensor:
        """Each sample's rows of an input; where it has fewer than M, some of the others' again."""
        return self._by_sample(t, masked=False)

    def gradients(self, gy: Tensor) -> Tensor:
        """Each sample's rows of an output's gradient; where it has fewer than M, zeros."""
        return self._by_sample(gy, masked=True)

    def weights(self, a: Tensor) -> Tensor:
        """What a sample has in ``a`` (B,), for each of the rows, (N,)."""
        return a[self.owner.flatten().to(a.device)]

    def restored(self, t: Tensor) -> Tensor:
        """One shape of a sample's rows in ``t`` (B, M, …) that has as many leading dimensions as all of them, (B, …, M, …)."""
        before = self.owner.dim() - 1
        before = before if self.dimension is None else self.dimension
        behind = self.owner.dim() - 1 - before
        if self.dimension is None:
            return t.reshape(t.size(0), *[1] * before, *t.shape[1:])
        others = [n for d, n in enumerate(self.owner.shape) if d != self.dimension]
        return t.reshape(t.size(0), *others[:before], 1, *others[before : before + behind], *t.shape[2:])

    @cached_property
    def dimension(self) -> int | None:
        """The leading dimension that is the samples, 0 … B − 1, if there is one."""
        for d, size in enumerate(self.owner.shape):
            numbers = torch.arange(size, device="cpu").view(-1, *[1] * (self.owner.dim() - 1 - d))
            if size == self.batch_size and bool((self.owner == numbers).all()):
                return d
        return None

    @cached_property
    def is_fixed(self) -> bool:
        """Whether the shape alone says which rows are whose."""
        return self.dimension is not None or (self._is_consecutive and self.owner.numel() == self.batch_size)

    @cached_property
    def _is_consecutive(self) -> bool:
        """Whether all samples have as many rows, one after the other."""
        M, rest = divmod(self.owner.numel(), self.batch_size)
        return not rest and torch.equal(
            self.owner.flatten(), torch.arange(self.batch_size, device="cpu").repeat_interleave(M)
        )

    def _by_sample(self, t: Tensor, masked: bool) -> Tensor:
        dims = self.owner.dim()
        if self.dimension is not None:
            t = t.movedim(self.dimension, 0)
            return t.unsqueeze(1) if dims == 1 else t.flatten(1, dims - 1)
        flat = t.flatten(0, dims - 1)
        if self._is_consecutive:
            return flat.unflatten(0, (self.batch_size, -1))
        places, mask = self._places(t.device)
        rows = flat.index_select(0, places.flatten()).unflatten(0, (self.batch_size, -1))
        if mask is None or not masked:
            return rows
        return rows.masked_fill(mask.view(*mask.shape, *[1] * (rows.dim() - 2)), 0)

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Where each sample's rows are, (B, M), and which of these are not its own, if any."""
        if device not in self._moved:
            owner = self.owner.flatten()
            order, counts = owner.argsort(stable=True), owner.bincount(minlength=self.batch_size)
            begins, steps = counts.cumsum(0) - counts, torch.arange(int(counts.max()), device="cpu")
            places = order[(begins[:, None] + steps).clamp(max=owner.numel() - 1)]
            mask = steps >= counts[:, None]
            self._moved[device] = places.to(device), mask.to(device) if bool(mask.any()) else None
        return self._moved[device]


class Samples:
    """An index, and the readings of outputs by it.

    Attributes:
        index: as given, on the CPU.
        changing: the same with one entry where it does not change along a dimension.
    """

    def __init__(self, index: Tensor):
        """Check the index.

        Raises:
            ArgumentTypeError: not a long tensor.
            ArgumentError: no entries, or a negative one.
        """
        if not isinstance(index, Tensor) or index.dtype != torch.long:
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise ArgumentTypeError(
                f"samples must be a long tensor, the number of its sample at each position; got {got}"
            )
        if not index.dim() or not index.numel():
            raise ArgumentError(
                f"samples must have the shape of the data's leading dimensions, and entries; got shape {tuple(index.shape)}"
            )
        index = index.detach().to("cpu", copy=True)  # theirs may be written to, for the next batch
        self.index, self._least, self._most = index, int(index.min()), int(index.max())
        if self._least < 0:
            raise ArgumentError(f"samples must be numbers from 0 on; got {self._least}")
        for d in range(index.dim()):
            first = index.narrow(d, 0, 1)
            index = first if bool((index == first).all()) else index
        self.changing = index
        squeezed = index.squeeze() if index.numel() > 1 else index.flatten()
        forms = [index, *([index.mT] if index.dim() == 2 else []), squeezed, squeezed.unsqueeze(0)]
        self._forms = [form for form in forms if form.size(-1) > 1 or form.dim() == 1]
        self._readings: dict[tuple[torch.Size, int], list[Reading]] = {}

    def check(self, batch_size: int) -> None:
        """Raise unless all entries are numbers of as many samples."""
        if self._most >= batch_size:
            raise ArgumentError(
                f"samples must be numbers from 0 to {batch_size - 1}, as there are {batch_size} losses, one per sample; "
                f"got {self._most}"
            )

    def leading(self, shape: Sequence[int]) -> int:
        """How many leading dimensions of ``shape`` hold rows."""
        return max((form.dim() for form in self._forms if _fits(form, shape)), default=1)

    def readings(self, leading: torch.Size, batch_size: int) -> list[Reading]:
        """The possible readings of outputs with these leading dimensions, in the order in which they are to be tried."""
        key = leading, batch_size
        if key not in self._readings:
            found: list[Reading] = []
            for place, owner in enumerate(self._owners(leading, batch_size)):
                if not any(torch.equal(owner, other.owner) for other in found):
                    found.append(Reading(owner, batch_size, place))
            self._readings[key] = found
        return self._readings[key]

    def _owners(self, leading: torch.Size, batch_size: int) -> list[Tensor]:
        """The numbers of the samples, of shape ``leading``."""

        def spread(owner: Tensor) -> Tensor:
            return owner.reshape(*owner.shape, *[1] * (len(leading) - owner.dim())).expand(leading)

        found = [spread(form.expand(leading[: form.dim()])) for form in self._forms if _fits(form, leading)]
        rows = leading[0]
        if len(leading) == 1:
            for index in (self.index, self.index.mT) if self.index.dim() == 2 else (self.index,):
                if rows % index.numel() == 0:
                    found.append(index.flatten().repeat_interleave(rows // index.numel()))
            for form in self._forms:
                if form.dim() == 2 and form.size(0) == 1 and rows % form.numel() == 0:
                    found.append(form.expand(rows // form.numel(), -1).flatten())
        if rows == batch_size or (len(leading) == 1 and rows % batch_size == 0):
            found.append(spread(torch.arange(batch_size, device="cpu").repeat_interleave(rows // batch_size)))
        return found


def _fits(form: Tensor, shape: Sequence[int]) -> bool:
    return form.dim() <= len(shape) and all(n in (1, s) for n, s in zip(form.shape, shape, strict=False))
