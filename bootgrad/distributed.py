"""The processes that train one model together, each on its own samples, and what passes between them in a step.

A rank's samples are a part of the batch as a micro-batch is, of the share m_r/B, whatever the m_r are:

    t̄ = Σ_r (m_r/B) t_r      of gradients of the mean loss, of penalties, and of the mean gradient ḡ itself

A `Round` is an all-reduce of one buffer, which holds Σ_r m_r t_r, and for numbers that are not to be rounded a row for each
rank, zero in the buffers of the others: x + 0 = x. In float32 a float64 is the sum of three. What is large goes out in pieces,
the first of which do so while a backward pass still makes the last.

A rank on which something fails takes part in its next round with nothing but a flag, and all raise what happened there.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import DistributedError, UnsupportedError
from .ops.schema import accumulation_dtype

Named = Mapping[str, Tensor | None]
PIECE_BYTES = (2**20, 25 * 2**20)  # of the first piece of a buffer and of further ones, at least: those of torch's own


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

    def reduce(self, piece: Tensor) -> Any:
        """Begin to add up, in place; what comes back has to be waited for."""
        return dist.all_reduce(piece, group=self._group, async_op=True)

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
        self._buffer: _Buffer | None = None  # of the next round

    def fail(self, error: Exception) -> None:
        """Take part in the next round, if there is one, to say that this rank has failed."""
        if not self._left:
            return
        try:
            self._take(0, [], [], 1.0, error)
        except RuntimeError:  # the others have ended, or are told now what is known here already
            pass

    def take(
        self,
        count: int,
        sets: Sequence[Named],
        numbers: Tensor | Sequence[Tensor | float],
        weight: float | Tensor | None = None,
    ) -> Round:
        """Put together what this rank has of ``count`` samples with what the others have.

        Args:
            count: m.
            sets: tensors by parameter name, zero where they are None or not there.
            numbers: of this rank, () each, or (K,) in float64.
            weight: what tensors are multiplied by in the sum that is divided by B; None for m, where they are means.

        Raises:
            DistributedError: another rank has failed.
            UnsupportedError: a sparse gradient.
        """
        return self._take(count, sets, numbers, float(count) if weight is None else weight, None)

    @contextmanager
    def arriving(self, weight: float | Tensor) -> Iterator[None]:
        """A backward pass that makes the first set of the next round: what is there goes out while it runs.

        Args:
            weight: as of `take`, which is to be given the same.
        """
        buffer = self._open()
        handles = [
            p.register_hook(lambda g, name=name: buffer.put(name, g, weight)) for name, p in self._parameters.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _open(self) -> "_Buffer":
        if self._buffer is None:
            self._buffer = _Buffer(self.ranks, self._parameters, *self._left[0])
        return self._buffer

    @torch.no_grad()
    def _take(self, count: int, sets: Sequence[Named], numbers: Any, weight: float | Tensor, error: Exception | None):
        buffer = self._open()
        if error is None:
            buffer.fill(sets, weight)
            own = _stacked(numbers, buffer.device)
            buffer.tell(torch.cat([own.new_tensor([0.0, float(count)]), own]))
        else:
            buffer.tell(torch.ones(1, dtype=torch.float64, device=buffer.device))
        left, self._left, self._buffer = self._left[1:], [], None  # nothing is left where the others are gone
        values = buffer.reduced()
        failed, counts = (column.tolist() for column in values[:, :2].unbind(1))
        if any(failed):
            first = failed.index(1.0)
            text = self.ranks.error_of(first, error)
            raise DistributedError(f"rank {first} failed, and with it this step on all: {text}")
        self._left = left
        return Round(list(map(int, counts)), buffer.means(sum(counts)), values[:, 2:])


class _Buffer:
    """What is added up in one round, in pieces that go out in their order, each when all of it is there.

    The first set comes first, from the last parameter on, as a backward pass makes gradients; behind it are the other sets,
    which of the parameters have any, and a row of numbers for each rank.
    """

    def __init__(self, ranks: Ranks, parameters: Mapping[str, Tensor], n_sets: int, n_numbers: int):
        """Make room."""
        self._ranks, self._parameters = ranks, dict(reversed(list(parameters.items())))
        dtypes = {accumulation_dtype(p.dtype) for p in parameters.values()}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        words = 1 if dtype is torch.float64 else 3
        shape = (ranks.size, 2 + n_numbers, words)
        sizes = [p.numel() for p in self._parameters.values()]
        total = n_sets * sum(sizes)
        self._flat = torch.empty(
            total + len(sizes) + math.prod(shape), dtype=dtype, device=next(iter(parameters.values())).device
        )
        slots = self._flat[:total].split(sizes * n_sets)
        self._sets = [
            dict(zip(self._parameters, slots[k * len(sizes) : (k + 1) * len(sizes)], strict=True))
            for k in range(n_sets)
        ]
        self._reached = self._flat[total : total + len(sizes)]
        self._table = self._flat[total + len(sizes) :].view(shape)
        self._flat[total:] = 0
        self._arrived: set[str] = set()
        self._pieces = _pieces(dict(zip(self._parameters, sizes, strict=True)), self._flat)
        self._works: list = []

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._flat.device

    @torch.no_grad()
    def put(self, name: str, grad: Tensor, weight: float | Tensor) -> None:
        """Take in a tensor of the first set, and let a piece go that is whole."""
        _copy({name: self._sets[0][name]}, {name: grad}, weight)
        self._arrived.add(name)
        while len(self._works) < len(self._pieces) - 1 and self._pieces[len(self._works)][0] <= self._arrived:
            self._send()

    def fill(self, sets: Sequence[Named], weight: float | Tensor) -> None:
        """Take in all that has not come before."""
        for k, (slots, named) in enumerate(zip(self._sets, sets, strict=True)):
            left = {name: named.get(name) for name in slots if k or name not in self._arrived}
            _copy(slots, left, weight)
        reached = [float(name in self._arrived or sets[0].get(name) is not None) for name in self._parameters]
        self._reached.copy_(torch.tensor(reached))

    def tell(self, numbers: Tensor) -> None:
        """Numbers of this rank, float64."""
        self._table[self._ranks.rank, : numbers.numel()].copy_(_words(numbers, self._table.size(2)))

    def reduced(self) -> Tensor:
        """Let go of the rest and wait for all; the numbers of all ranks, (R, 2 + K), float64."""
        while len(self._works) < len(self._pieces):
            self._send()
        for work in self._works:
            work.wait()
        return self._table.double().sum(2)

    def means(self, count: float) -> list[dict[str, Tensor | None]]:
        """The sums over ``count``, each in memory of its own; in the first set None for those that no rank has."""
        reached = self._reached.tolist()
        means = []
        for slots in self._sets:
            shaped = [slot.view_as(p) for slot, p in zip(slots.values(), self._parameters.values(), strict=True)]
            named = dict(zip(slots, torch._foreach_mul(shaped, 1 / count), strict=True))
            is_first = slots is self._sets[0]
            is_known = dict(zip(slots, (not is_first or k > 0 for k in reached), strict=True))
            means.append(
                {
                    name: named[name].to(p.dtype) if is_known[name] else None
                    for name, p in reversed(self._parameters.items())
                }
            )
        return means

    def _send(self) -> None:
        self._works.append(self._ranks.reduce(self._pieces[len(self._works)][1]))


def _pieces(sizes: Mapping[str, int], flat: Tensor) -> list[tuple[set[str], Tensor]]:
    """The pieces of a buffer that begins with tensors of these sizes, with the names of those; the last has all the rest."""
    pieces: list[tuple[set[str], Tensor]] = []
    names: set[str] = set()
    begin = end = 0
    for name, size in sizes.items():
        names.add(name)
        end += size
        if (end - begin) * flat.element_size() >= PIECE_BYTES[min(len(pieces), 1)]:
            pieces.append((names, flat[begin:end]))
            begin, names = end, set()
    return [*pieces, (set(), flat[begin:])]


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


def _copy(slots: Mapping[str, Tensor], named: Named, weight: float | Tensor) -> None:
    """Fill slots with ``weight`` times tensors, zeros for None."""
    into, values = [], []
    for name, t in named.items():
        if t is None:
            slots[name].zero_()
        elif t.layout != torch.strided:
            raise UnsupportedError(
                f"parameter {name} has a sparse gradient, which ranks do not exchange: make the embedding with sparse=False"
            )
        else:
            into.append(slots[name])
            values.append(t.reshape(-1))
    if into:
        torch._foreach_copy_(into, values)
        if not isinstance(weight, float) or weight != 1:
            torch._foreach_mul_(into, weight)


def _stacked(numbers: Tensor | Sequence[Tensor | float], device: torch.device) -> Tensor:
    """(K,), float64."""
    if isinstance(numbers, Tensor):
        return numbers
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
