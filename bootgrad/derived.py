"""Tensors that are functions of parameters alone: transposed, masked, concatenated or reparametrized weights.

A derived tensor W' = D(θ) is followed like a parameter. Its per-sample gradients G'_i belong to W'; those of θ are Jᵀ G'_i
with J = ∂D/∂θ. Where D only reorders entries (`ISOMETRIES`), norms carry over and nothing is multiplied out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import UnsupportedError
from .ops.linear import LinearProduct
from .rules.base import autocast_now
from .rules.terms import ComputedTerm, FactoredTerm, Term, vmap

_T = torch.Tensor
ISOMETRIES = {
    torch.t, torch.transpose, torch.permute, torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.movedim,
    torch.clone, torch.swapaxes, torch.swapdims, torch.unflatten,
    _T.t, _T.transpose, _T.permute, _T.reshape, _T.view, _T.flatten, _T.squeeze, _T.unsqueeze, _T.movedim,
    _T.clone, _T.contiguous, _T.swapaxes, _T.swapdims, _T.unflatten,
    _T.T.__get__, _T.mT.__get__,  # type: ignore[attr-defined]  # torch's stubs have tensors for these descriptors
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

    def __post_init__(self):
        """Note the tensor's version, and under which autocast it was made."""
        self._version = self.tensor._version
        self.autocast = autocast_now(self.tensor.device)

    def check_unchanged(self) -> None:
        """Raise if a tensor on the way from the parameters was changed in place, after which the calls do not make it."""
        for derived in self.chain():
            if derived.tensor._version == derived._version:
                continue
            raise UnsupportedError(
                f"a weight made by {getattr(derived.func, '__name__', derived.func)} was changed in place afterwards: "
                "write the change as a call that returns a new tensor"
            )

    def chain(self) -> "list[Derived]":
        """This tensor and those that it is derived from, each once, parents first."""
        found: dict[int, Derived] = {}

        def visit(derived: Derived) -> None:
            for parent in derived.parents.values():
                if parent is not None and id(parent) not in found:
                    visit(parent)
            found[id(derived)] = derived

        visit(self)
        return list(found.values())

    @property
    def isometric(self) -> bool:
        """Whether the tensor holds each entry of one parameter once."""
        parents = list(self.parents.values())
        return (
            self.func in ISOMETRIES
            and len(parents) == 1
            and (parents[0] is None or parents[0].isometric)
            and self.tensor.numel() == next(t for t in self._tensors() if id(t) in self.parents).numel()
        )

    @property
    def repeats_a_row(self) -> bool:
        """Whether dimension 0 was made by ``repeat`` of one row."""
        source = next(t for t in self._tensors() if id(t) in self.parents)
        return self.func is _T.repeat and (source.dim() < self.tensor.dim() or source.size(0) == 1)

    def leaves(self) -> list[Tensor]:
        """The parameters that the tensor is a function of."""
        found = {
            id(t): t for d in self.chain() for t in d._tensors() if id(t) in d.parents and d.parents[id(t)] is None
        }
        return list(found.values())

    def replay(self, values: Mapping[int, Tensor]) -> Tensor:
        """The tensor, were the parameters the given ``values`` (by id of the parameter)."""
        made = dict(values)

        def substitute(t: Any) -> Any:
            return made.get(id(t), t) if isinstance(t, Tensor) else t

        for derived in self.chain():
            args, kwargs = pytree.tree_map(substitute, (derived.args, derived.kwargs))
            with derived.autocast():
                results = pytree.tree_leaves(derived.func(*args, **kwargs))
            made[id(derived.tensor)] = results[derived.position]
        return made[id(self.tensor)]

    def constants(self) -> list[Tensor]:
        """The other tensors that the calls take, masks for example."""
        return [t for d in self.chain() for t in d._tensors() if id(t) not in d.parents]

    def _tensors(self) -> list[Tensor]:
        return [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]


def may_be_batch_free(func: Callable, others: Sequence[Tensor]) -> bool:
    """Whether a call with ``others`` beside tracked tensors can be a function of parameters alone: see `is_batch_free`."""
    return not others or (func in _MASKINGS and not any(t.requires_grad for t in others))


def is_batch_free(result: Any, tracked: list[Tensor], others: list[Tensor]) -> bool:
    """Whether such a call yielded a function of parameters alone.

    Others are taken for constants (a mask) in elementwise calls that leave a tracked tensor's shape as it is.
    """
    shapes = [t.shape for t in tracked]
    return not others or (isinstance(result, Tensor) and result.shape in shapes)


def derive(
    func: Callable, args: tuple, kwargs: dict, result: Any, known: Mapping[int, "Derived | None"]
) -> list[Derived]:
    """The derived tensors among the results of a call."""
    used = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and id(t) in known]
    parents = {id(t): known[id(t)] for t in used}
    return [
        Derived(t, func, args, kwargs, k, parents)
        for k, t in enumerate(pytree.tree_leaves(result))
        if isinstance(t, Tensor) and t.requires_grad and id(t) not in known
    ]


def pull_back(term: Term, derived: Derived, leaf: Tensor) -> Term:
    """The term of the parameter ``leaf`` when ``term`` is that of the derived tensor."""
    with torch.no_grad():
        if not torch.equal(derived.replay({}), derived.tensor):
            raise UnsupportedError(
                f"a weight made by {getattr(derived.func, '__name__', derived.func)} comes out differently when it is made "
                "again: functions of parameters that draw random numbers have no per-sample gradients here"
            )
    if derived.isometric:
        return ViewTerm(term, leaf.shape, derived, leaf)
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


@dataclass
class ViewTerm(Term):
    """A term whose entries stand in another order than the parameter's."""

    term: Term
    shape: torch.Size
    derived: Derived
    leaf: Tensor

    @property
    def batch_size(self) -> int:  # noqa: D102
        return self.term.batch_size

    def rows(self, start, stop):  # noqa: D102
        return vmap(self._back, self.term.rows(start, stop))

    def sq_norms(self, center=None):  # noqa: D102
        return self.term.sq_norms(None if center is None else self._forward(center))

    def covariance(self, mean):  # noqa: D102
        return self.term.covariance(self._forward(mean))

    def jvp(self, v):  # noqa: D102
        return self.term.jvp(self._forward(v))

    def weighted_sum(self, w):  # noqa: D102
        return self._back(self.term.weighted_sum(w))

    def gram(self):  # noqa: D102
        return self.term.gram()

    def inner_product(self, other):  # noqa: D102
        turned = self._turned()
        return None if turned is None else turned.inner_product(other) or other.inner_product(turned)

    def _turned(self) -> FactoredTerm | None:
        """The term of the parameter itself, where a linear layer's weight is its transpose: there x and gy change roles."""
        term, view = self.term, self.derived.tensor
        is_transpose = view.shape == self.shape[::-1] and view.stride() == self.leaf.stride()[::-1]
        if view.dim() != 2 or not is_transpose or view.data_ptr() != self.leaf.data_ptr():
            return None
        if not isinstance(term, FactoredTerm) or not isinstance(term.product, LinearProduct):
            return None
        return FactoredTerm(LinearProduct(not term.product.transposed), *term.pair(), self.shape, self.shape)

    def map(self, function):  # noqa: D102
        return ViewTerm(self.term.map(function), self.shape, self.derived, self.leaf)

    def select(self, index):  # noqa: D102
        return ViewTerm(self.term.select(index), self.shape, self.derived, self.leaf)

    def _forward(self, value: Tensor) -> Tensor:
        """From the parameter's order to the term's."""
        return self.derived.replay({id(self.leaf): value})

    def _back(self, value: Tensor) -> Tensor:
        """From the term's order to the parameter's: the transpose of a reordering is its inverse."""
        order = torch.arange(value.numel(), device=value.device).view(self.shape)
        return (
            torch.zeros_like(value)
            .reshape(-1)
            .index_copy(0, self._forward(order).reshape(-1), value.reshape(-1))
            .view(self.shape)
        )
