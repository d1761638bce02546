"""Tensors that are functions of parameters alone: transposed, masked, concatenated or reparametrized weights.

A derived tensor W' = D(θ) is followed like a parameter. Its per-sample gradients G'_i belong to W'; those of θ are Jᵀ G'_i
with J = ∂D/∂θ. Where D only reorders entries or picks some (`ISOMETRIES`, `SELECTIONS`), norms carry over and nothing is
multiplied out.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import UnsupportedError
from .rules.base import autocast_now
from .rules.parts import PartTerm
from .rules.terms import ComputedTerm, Term, vmap

_T = torch.Tensor
TRANSPOSITIONS = {
    torch.t, torch.transpose, torch.permute, torch.movedim, torch.swapaxes, torch.swapdims,
    _T.t, _T.transpose, _T.permute, _T.movedim, _T.swapaxes, _T.swapdims,
    _T.T.__get__, _T.mT.__get__,  # type: ignore[attr-defined]  # torch's stubs have tensors for these descriptors
}  # fmt: skip
ISOMETRIES = TRANSPOSITIONS | {
    torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.clone, torch.unflatten,
    _T.reshape, _T.view, _T.flatten, _T.squeeze, _T.unsqueeze, _T.clone, _T.contiguous, _T.unflatten,
}  # fmt: skip
SELECTIONS = {
    torch.narrow, torch.select, torch.split, torch.chunk, torch.tensor_split, torch.unbind, torch.split_with_sizes,
    _T.narrow, _T.select, _T.split, _T.chunk, _T.tensor_split, _T.unbind, _T.split_with_sizes,
}  # fmt: skip
_MASKINGS = {
    torch.mul, torch.multiply, torch.div, torch.add, torch.sub, torch.where, torch.masked_fill,
    _T.mul, _T.multiply, _T.__mul__, _T.__rmul__, _T.div, _T.__truediv__, _T.add, _T.__add__, _T.__radd__,
    _T.sub, _T.__sub__, _T.__rsub__, _T.masked_fill, _T.where,
}  # fmt: skip


@dataclass(eq=False)
class Derived:
    """One derived tensor: the call that made it, and which of the call's results it is."""

    tensor: Tensor
    func: Callable
    args: tuple
    kwargs: dict
    position: int
    parents: Mapping[int, "Derived | None"]  # id of a tracked argument -> how it was derived; None for a parameter
    stale: "Derived | None" = None  # one on the way that had been changed unseen when it was taken

    def __post_init__(self):
        """Note the tensor's version, and under which autocast it was made."""
        self.version = self.tensor._version
        self.autocast = autocast_now(self.tensor.device)
        self.used = False  # by an operation, which takes the tensor for what it is in the end

    def changed(self, version: int) -> "Derived | None":
        """Itself if the tensor was not in this ``version`` when it was made, or what was changed so on the way to it."""
        return self if version != self.version else self.stale

    def check_unchanged(self, names_of: Callable[[Tensor], str]) -> None:
        """Raise if a tensor on the way from the parameters, whose names are told, was changed in place by what was not seen."""
        changed = self.changed(self.tensor._version)
        if changed is not None:
            raise UnsupportedError(
                f"a weight made of {names_of(self.tensor)} by {name_of(changed.func)} was changed in place afterwards: "
                "write the change as a call that returns a new tensor"
            )

    def chain(self) -> "list[Derived]":
        """This tensor and those that it is derived from, each once, parents first."""
        found: dict[int, Derived] = {}
        _add_chain(self, found)
        return list(found.values())

    @property
    def picks(self) -> bool:
        """Whether the tensor holds entries of one parameter, each at most once."""
        parents = list(self.parents.values())
        if len(parents) != 1 or not (parents[0] is None or parents[0].picks):
            return False
        if self.func is _T.__getitem__:
            return _is_basic(self.args[1])
        return self.func in SELECTIONS or self.func in ISOMETRIES and self.tensor.numel() == self.source.numel()

    @property
    def isometric(self) -> bool:
        """Whether it holds all of them."""
        return self.picks and self.tensor.numel() == self.leaves()[0].numel()

    @property
    def source(self) -> Tensor:
        """The first tracked tensor that the call takes."""
        return next(t for t in self._tensors() if id(t) in self.parents)

    @functools.cached_property
    def period(self) -> int:
        """How many rows are repeated along dimension 0, whatever the parameters are: 1 of a class token; all where none are.

        They are if they are alike with the parameters as they are, and with others near by.
        """
        n = self.tensor.size(0) if self.tensor.dim() else 1
        k = self._written_period(n)
        if k is not None:
            return k
        with torch.no_grad():
            periods = _periods(self.tensor)
            if periods:
                near = {
                    id(p): p + 0.1 * torch.arange(1, p.numel() + 1).to(p).sin().view(p.shape) for p in self.leaves()
                }
                periods = [k for k in periods if _repeats(self.replay(near), k)]
        return periods[0] if periods else n

    def _written_period(self, n: int) -> int | None:
        """The period of ``n`` rows as far as the call itself tells it, whatever the values."""
        if n > 1 and any(t.stride(0) == 0 for t in (self.tensor, *self._indices()) if t.dim() and t.size(0) == n):
            return 1
        if self.func is _T.repeat:
            k = 1 if self.source.dim() < self.tensor.dim() else self.source.size(0)
            return k if k < n else None
        parent = self.parents[id(self.source)]
        return parent.period if self.func in (_T.contiguous, _T.clone) and parent is not None else None

    def one_period(self, run: Callable) -> Tensor | None:
        """The rows of `period` alone, made by what ``run`` calls without the others where the call itself tells how."""
        if self.changed(self.tensor._version) is not None:
            return None
        if self.func is _T.repeat:
            sizes = [*[1] * (self.tensor.dim() - self.source.dim()), *self.source.shape]
            count, *others = (n // max(1, size) for n, size in zip(self.tensor.shape, sizes, strict=True))
            return None if count == 1 else run(_T.repeat, self.source, 1, *others)
        for index in self._indices():
            if index.dim() and index.stride(0) == 0:
                row = {id(index): run(_T.__getitem__, index, slice(0, 1))}
                args, kwargs = pytree.tree_map(lambda t: row.get(id(t), t), (self.args, self.kwargs))  # noqa: B023
                return run(self.func, *args, **kwargs)
        return None

    def _indices(self) -> list[Tensor]:
        """What the tensor's rows are looked up by, if they are; masks are no such."""
        if self.func in _LOOK_UPS or (self.func is _T.__getitem__ and _is_lookup(self.args[1])):
            return [t for t in self._tensors() if id(t) not in self.parents]
        return []

    def leaves(self) -> list[Tensor]:
        """The parameters that the tensor is a function of."""
        found = {
            id(t): t for d in self.chain() for t in d._tensors() if id(t) in d.parents and d.parents[id(t)] is None
        }
        return list(found.values())

    def replay(self, values: Mapping[int, Tensor]) -> Tensor:
        """The tensor, were the parameters the given ``values`` (by id of the parameter)."""
        made: dict[int, Tensor] = {}

        def value(t: Any, parents: Mapping[int, Derived | None]) -> Any:
            parent = parents.get(id(t))
            return values.get(id(t), t) if parent is None else made[id(parent)]

        for derived in self.chain():
            args, kwargs = pytree.tree_map(partial(value, parents=derived.parents), (derived.args, derived.kwargs))
            with derived.autocast():
                results = pytree.tree_leaves(derived.func(*args, **kwargs))
            made[id(derived)] = results[derived.position]
        return made[id(self)]

    def constants(self) -> list[Tensor]:
        """The other tensors that the calls take, masks for example."""
        return [t for d in self.chain() for t in d._tensors() if id(t) not in d.parents]

    def _tensors(self) -> list[Tensor]:
        return [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]


def _add_chain(derived: Derived, found: dict[int, Derived]) -> None:
    """Add a tensor to those that were ``found``, behind its parents; no closure, which would hold itself, and them."""
    for parent in derived.parents.values():
        if parent is not None and id(parent) not in found:
            _add_chain(parent, found)
    found[id(derived)] = derived


def _periods(t: Tensor) -> list[int]:
    """The numbers of rows that dimension 0 repeats, but all."""
    n = t.size(0) if t.dim() else 1
    least = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return [k for k in sorted({*least, *(n // k for k in least)} - {n}) if _repeats(t, k)]


def _repeats(t: Tensor, k: int) -> bool:
    """Whether dimension 0 is its first k rows several times."""
    return torch.equal(t[k:], t[:-k])


def look_up(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`F.embedding` with a dense gradient that can be mapped over samples.

    Where it can be, by indexing: of `F.embedding`'s own derivative, mapped, torch traces the number of samples as a fixed one.
    Padding's gradient is taken off behind it: torch's rule for ``vmap`` knows only sample 0's padding.
    """
    indexed = max_norm is None and not scale_grad_by_freq
    rows = weight[input] if indexed else F.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)
    if padding_idx is None:
        return rows
    return torch.where((input == padding_idx % weight.size(0)).unsqueeze(-1), rows.detach(), rows)


_LOOK_UPS = {F.embedding, look_up}


def _is_lookup(index: Any) -> bool:
    """Whether an index chooses rows of dimension 0 by their numbers."""
    return isinstance(index, Tensor) and index.dtype not in (torch.bool, torch.uint8)


def _is_basic(index: Any) -> bool:
    """Whether an index chooses no entry twice: numbers, slices, new dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(i is None or i is Ellipsis or (isinstance(i, int | slice) and not isinstance(i, bool)) for i in parts)


def may_be_batch_free(func: Callable, others: Sequence[Tensor]) -> bool:
    """Whether a call with ``others`` beside tracked tensors can be a function of parameters alone: see `is_batch_free`."""
    return not others or (func in _MASKINGS and not any(t.requires_grad for t in others))


def is_batch_free(result: Any, tracked: list[Tensor], others: list[Tensor]) -> bool:
    """Whether such a call yielded a function of parameters alone.

    Others are taken for constants (a mask) in elementwise calls that leave a tracked tensor's shape as it is.
    """
    shapes = [t.shape for t in tracked]
    return not others or (isinstance(result, Tensor) and result.shape in shapes)


class Call:
    """A call of functions of parameters alone, before it is made: what it takes, and in which state."""

    def __init__(self, func: Callable, args: tuple, kwargs: dict, known: Mapping[int, Derived | None]):
        """Note the arguments, of which those that are ``known`` are tracked."""
        self.func, self.args, self.kwargs = func, args, kwargs
        self._leaves = pytree.tree_leaves((args, kwargs))
        tracked = [t for t in self._leaves if isinstance(t, Tensor) and id(t) in known]
        self._versions = {id(t): t._version for t in tracked}
        self.parents = {id(t): known[id(t)] for t in tracked}
        stale = (d.changed(t._version) for t in tracked if (d := known[id(t)]) is not None)
        self._stale = next((d for d in stale if d is not None), None)

    def derived(self, result: Any) -> list[Derived]:
        """The derived tensors among the results, and those of the arguments that the call has changed in place."""
        out = []
        for k, t in enumerate(self._leaves):
            before = self.parents.get(id(t))
            if before is not None and not before.used and t._version != self._versions[id(t)]:
                out.append(self._made(t, Changing(self.func, k), 0))
        return out + [
            self._made(t, self.func, k)
            for k, t in enumerate(pytree.tree_leaves(result))
            if isinstance(t, Tensor) and t.requires_grad and id(t) not in self.parents
        ]

    def _made(self, t: Tensor, func: Callable, position: int) -> Derived:
        return Derived(t, func, self.args, self.kwargs, position, self.parents, self._stale)


class Changing:
    """A call that changes one of its flat arguments, as one that returns the changed argument and leaves its own alone."""

    def __init__(self, func: Callable, position: int):
        """Of ``func``, which changes the argument at ``position``."""
        self.func, self.position, self.__name__ = func, position, name_of(func)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The argument, changed."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        leaves[self.position] = changed = leaves[self.position].clone()
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        self.func(*args, **kwargs)
        return changed


def name_of(func: Callable) -> str:
    """What a torch function is called."""
    return getattr(func, "__name__", str(func))


def check_repeats(derived: Derived, names_of: Callable[[Tensor], str]) -> None:
    """Raise where the calls that made a tensor do not make it again; ``names_of`` is for the error."""
    with torch.no_grad():
        if not torch.equal(derived.replay({}), derived.tensor):
            derived.check_unchanged(names_of)
            raise UnsupportedError(
                f"a weight made of {names_of(derived.tensor)} by {name_of(derived.func)} comes out differently when it is made "
                "again: functions of parameters that draw random numbers have no per-sample gradients here"
            )


def pull_back(term: Term, derived: Derived, leaf: Tensor) -> Term:
    """The term of the parameter ``leaf`` when ``term`` is that of the derived tensor."""
    if derived.picks:
        return PartTerm(term, leaf.shape, lambda value: derived.replay({id(leaf): value}))
    leaves = derived.leaves()

    def compute(index: Tensor, term: Term, *values: Tensor) -> Tensor:
        current = {id(t): v for t, v in zip(leaves, values, strict=False)}  # behind them are the constants
        value = current.pop(id(leaf))
        pull = torch.func.vjp(lambda t: derived.replay(current | {id(leaf): t}), value)[1]
        chosen = term.select(index)
        rows = chosen.rows(0, chosen.batch_size).to(derived.tensor.dtype)
        return vmap(lambda g: pull(g)[0], rows)

    parts = [term, *leaves, *derived.constants()]
    return ComputedTerm(compute, torch.arange(term.batch_size, device=leaf.device), leaf.shape, parts)
