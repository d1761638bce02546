"""The processes that train one model together, each on its own samples, and what passes between them in a step.

A rank's samples are a part of the batch as a micro-batch is, of the share m_r/B, whatever the m_r are:

    t̄ = Σ_r (m_r/B) t_r      of gradients of the mean loss, of penalties, and of the mean gradient ḡ itself

A `Round` is one all-reduce of one buffer, which holds Σ_r m_r t_r, and for numbers that are not to be rounded a row for each
rank, zero in the buffers of the others: x + 0 = x. In float32 a float64 is the sum of three. The hooks of
`DistributedDataParallel` are silent meanwhile: they wait for the first backward pass, and know of no derivative of it.

A rank on which something fails takes part in its next round with nothing but a flag, and all raise what happened there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import DistributedError, UnsupportedError
from .ops.schema import accumulation_dtype

Named = Mapping[str, Tensor | None]


class Ranks:
    """The processes of a group, each with the same model and samples of its own.

    Args:
        group: theirs.

    Attributes:
        size, rank: R, and which of them this process is.
    """

    def __init__(self, group: dist.ProcessGroup):
        """Ask the group."""
        self._group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def silent(self) -> AbstractContextManager:
        """The context of a forward pass of a step: no hook of the wrapper's waits for its backward pass."""
        return nullcontext()

    def gather(self) -> None:
        """Have all of every parameter here, from the first forward pass of a step on."""

    def end(self) -> None:
        """Of a step, or what failed of it; whatever was gathered is let go."""

    def versions(self) -> list[int]:
        """How often what the model keeps of its parameters was written to."""
        return []

    def stored(self, leaves: list[Tensor], grads: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None]]:
        """The leaves whose ``.grad`` the optimizer reads, and what of the gradients belongs there."""
        return leaves, grads

    def reduce(self, buffer: Tensor) -> None:
        """Add up, in place."""
        dist.all_reduce(buffer, group=self._group)

    def error_of(self, rank: int, error: BaseException | None) -> str:
        """What failed on ``rank``, told by it to all."""
        text = [None if error is None else f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(text, dist.get_global_rank(self._group, rank), self._group)
        return str(text[0])


@dataclass(frozen=True)
class Round:
    """What all ranks have together, after one all-reduce.

    Attributes:
        counts: m_r.
        means: t̄ by name, for each set of tensors; None in the first where no rank has any.
        numbers: (R, K), float64, of each rank.
    """

    counts: list[int]
    means: list[dict[str, Tensor | None]]
    numbers: Tensor

    @property
    def count(self) -> int:
        """B."""
        return sum(self.counts)

    def averages(self) -> Tensor:
        """Σ_r (m_r/B) of each number, (K,)."""
        return self.numbers.new_tensor(self.counts) @ self.numbers / self.count


class Rounds:
    """The rounds of one step, known in number and size before it begins.

    Args:
        ranks: who takes part.
        parameters: by name, what tensors are like.
        plan: of each round, how many sets of tensors and how many numbers it takes.
    """

    def __init__(self, ranks: Ranks, parameters: Mapping[str, Tensor], plan: Sequence[tuple[int, int]]):
        """Begin; nothing is said yet."""
        self.ranks, self._parameters, self._left = ranks, parameters, list(plan)
        dtypes = {accumulation_dtype(p.dtype) for p in parameters.values()}
        self._dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self._device = next(iter(parameters.values())).device

    def fail(self, error: Exception) -> None:
        """Take part in the next round, if there is one, to say that this rank has failed."""
        if not self._left:
            return
        try:
            self._take(0, [], [], 0, error)
        except RuntimeError:  # the others have ended, or are told now what is known here already
            pass

    def take(
        self,
        count: int,
        sets: Sequence[Named],
        numbers: Sequence[Tensor | float],
        weight: float | Tensor | None = None,
    ) -> Round:
        """Put together what this rank has of ``count`` samples with what the others have.

        Args:
            count: m.
            sets: tensors by parameter name, zero where they are None or not there.
            numbers: of this rank, () each.
            weight: what tensors are multiplied by in the sum that is divided by B; None for m, where they are means.

        Raises:
            DistributedError: another rank has failed.
            UnsupportedError: a sparse gradient.
        """
        return self._take(count, sets, numbers, count if weight is None else weight, None)

    @torch.no_grad()
    def _take(
        self, count: int, sets: Sequence[Named], numbers: Sequence, weight: float | Tensor, error: Exception | None
    ):
        n_sets, n_numbers = self._left[0]
        shapes = [p.shape for p in self._parameters.values()]
        sizes = [*[shape.numel() for shape in shapes] * n_sets, len(shapes)]
        words = 1 if self._dtype is torch.float64 else 3
        rows = self.ranks.size * (2 + n_numbers) * words
        buffer = torch.zeros(sum(sizes) + rows, dtype=self._dtype, device=self._device)
        *slots, reached = buffer[: sum(sizes)].split(sizes)
        table = buffer[sum(sizes) :].view(self.ranks.size, 2 + n_numbers, words)
        if error is None:
            tensors = [named.get(name) for named in sets for name in self._parameters]
            _copy(slots, tensors, self._parameters)
            if not isinstance(weight, float) or weight != 1:
                buffer[: sum(sizes)].mul_(weight)
            reached.copy_(torch.tensor([float(t is not None) for t in tensors[: len(shapes)]]))
        own = [float(error is not None), float(count), *(numbers if error is None else [0.0] * n_numbers)]
        table[self.ranks.rank].copy_(_words(_stacked(own, self._device), words))
        left, self._left = self._left[1:], []  # nothing is left where the others are gone
        self.ranks.reduce(buffer)
        values = table.double().sum(2)
        failed, counts = (column.tolist() for column in values[:, :2].unbind(1))
        if any(failed):
            first = failed.index(1.0)
            text = self.ranks.error_of(first, error)
            raise DistributedError(f"rank {first} failed, and with it this step on all: {text}")
        self._left = left
        buffer[: -rows - len(shapes)].mul_(1 / sum(counts))
        known = [*(reached > 0).tolist(), *[True] * (len(slots) - len(shapes))]
        means: list[dict[str, Tensor | None]] = []
        for k in range(n_sets):
            part = slice(k * len(shapes), (k + 1) * len(shapes))
            triples = zip(self._parameters.items(), slots[part], known[part], strict=True)
            means.append({name: t.view_as(p).to(p.dtype) if is_known else None for (name, p), t, is_known in triples})
        return Round(list(map(int, counts)), means, values[:, 2:])


@contextmanager
def guarded(rounds: Rounds | None, keep: bool = False) -> Iterator[None]:
    """A block in which an error ends the step of all ranks, where there are several, and which is the end of the step.

    To ``keep`` is to leave the step open, for another backward pass through its graph.
    """
    try:
        yield
    except Exception as error:
        if rounds is not None:
            rounds.fail(error)
        raise
    finally:
        if rounds is not None and not keep:
            rounds.ranks.end()


def _copy(slots: Sequence[Tensor], tensors: Sequence[Tensor | None], names: Mapping[str, Tensor]) -> None:
    into, values = [], []
    for k, (slot, t) in enumerate(zip(slots, tensors, strict=True)):
        if t is not None and t.layout != torch.strided:
            name = list(names)[k % len(names)]
            raise UnsupportedError(
                f"parameter {name} has a sparse gradient, which ranks do not exchange: make the embedding with sparse=False"
            )
        if t is not None:
            into.append(slot)
            values.append(t.reshape(-1))
    if into:
        torch._foreach_copy_(into, values)


def _stacked(numbers: Sequence[Tensor | float], device: torch.device) -> Tensor:
    """(K,), float64."""
    if any(isinstance(x, Tensor) for x in numbers):
        return torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device).reshape(()) for x in numbers])
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _words(values: Tensor, words: int) -> Tensor:
    """(K, words): float32 whose sum is the value; of what is not finite in float32, the first alone."""
    if words == 1:
        return values.unsqueeze(1)
    parts, rest = [], values
    for _ in range(words):
        parts.append(rest.float())
        rest = torch.where(torch.isfinite(parts[0]), rest - parts[-1], 0.0)
    return torch.stack(parts, 1)
