"""A second forward and backward pass in which sample i sees the parameters θ + f g_i, g_i its own gradient of the first pass.

    G = rec.per_sample_gradients(losses)
    with PerSamplePass(G, f) as second:
        losses = loss_fn(*batch)                              # the model, run again
    torch.autograd.grad(losses.sum(), parameters)             # Σ_i ∇ℓ_i at θ + f g_i

The displacements f g_i are constants, and B of them are never stored. A linear layer or convolution W, whose G_i is held
as (x, gy), adds f G_i ∗ x'_i to its output and f G_iᵀ ∗ gy'_i to its input's gradient; its weight gradient is the ordinary
one. A look-up in a table finds the rows of p + f E_i, of which no others are made. Any other operation on parameters is run by
``vmap`` with θ + f g_i, in chunks of samples that are made again in the backward pass.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from .derived import Derived, look_up
from .errors import ArgumentError, BootgradError, RecordingError, UnsupportedError
from .ops.applied import applied, applied_transposed, displaced, displaced_transposed
from .ops.embedding import looked_up
from .ops.linear import LinearProduct
from .ops.product import Product
from .per_sample import PerSampleGradients
from .recording import Recording, _states
from .rules import attention, bilinear, convolution, elementwise, embedding, linear, recurrent
from .rules.base import RULES, Operation, autocast_now, is_in_place
from .rules.checkpointed import StopRecomputation, without_hooks
from .rules.lookup_term import found_by
from .rules.parts import DisjointTerm, PartTerm
from .rules.terms import CHUNK_BYTES, DenseTerm, FactoredTerm, recomputed, vmap

# Of products and of rows, which are displaced here; other rules' operations are run one sample at a time.
_MODULES = {module.__name__ for module in (attention, bilinear, convolution, elementwise, linear, recurrent)}
_RULED = {func for func, rule in RULES.items() if rule.__module__ in _MODULES}


class _NoFactors(Exception):
    """The displacement of a layer's weight is not held as (x, gy) of that layer."""


class PerSamplePass(Recording):
    """A context in which operations on parameters are run at θ + f g_i for sample i.

    Args:
        G: per-sample gradients of the first pass, for the samples that this pass is run on.
        factor: f, in units of parameter/gradient.
        modules: the modules that were recorded. Without them, those are taken that were recorded with these parameters.
        batchnorm: as they were recorded with.

    Made before the parameters are changed in place: what G would make from them anew is then lost.

    Raises:
        ArgumentError: the modules, or those that were found, lack a parameter of G.
        UnsupportedError: in the context, an operation that cannot be run one sample at a time, by name.
        RecordingError: as `Recording`; or a tensor that G is made from was changed in place.
    """

    def __init__(self, G: PerSampleGradients, factor: float, *modules: nn.Module, batchnorm: str = "refuse"):
        """Take the terms of G, without their graph."""
        if not G.in_order:
            raise UnsupportedError(
                "a pass at per-sample parameters has samples in dimension 0, in their order; got gradients that were recorded "
                "with samples=index, or of rows in another order: lay out the data samples first, and record without"
            )
        super().__init__(*(modules or _modules_with(G)), check="never", batchnorm=batchnorm)
        missing = [name for name, p in G.parameters.items() if id(p) not in self._known]
        if missing:
            raise ArgumentError(f"the modules must have every parameter of G; got none that has {', '.join(missing)}")
        self.batch_size, self.factor = G.batch_size, factor
        storages = {p.untyped_storage().data_ptr() for p in G.parameters.values()}

        def keep(t: Tensor) -> Tensor:
            t = t.detach()
            return t.clone() if t.untyped_storage().data_ptr() in storages else t

        self._terms = {id(p): G._terms[name].map(keep) for name, p in G.parameters.items() if name in G._terms}

    # What rules ask of a recorder

    def alias(self, tracked: Tensor) -> Tensor:
        """``tracked`` itself: nothing is looked for in the graph afterwards."""
        derived = self._known[id(tracked)]
        if derived is not None:
            derived.check_unchanged(self.name_of)
        return tracked

    def add(self, operation: Operation, edge: GradientEdge) -> None:
        """Keep nothing; the only operations that come here are products."""
        edge.node.register_prehook(_refuse_graph)

    def product_of(self, product: Product, weight: Tensor | None, bias: Tensor | None) -> Product:
        """The product with W + f G_i and b + f g_i."""
        term = None if weight is None else self._factored(weight)
        rows = None if bias is None else self._rows(bias)
        return cast(Product, _Displaced(product, self.batch_size, self.factor, term, rows))

    def finder(self) -> Callable[[], Recording]:
        """What finds this pass: nothing can stand for it."""
        reference = weakref.ref(self)

        def find() -> Recording:
            found = reference()
            if found is None:
                raise RecordingError(
                    "a pass at per-sample parameters is gone, and a checkpointed part of it is run again"
                )
            return found

        return find

    def _factored(self, weight: Tensor) -> FactoredTerm | None:
        """The weight's displacement in the order of its entries; None where there is none."""
        derived = self._known[id(weight)]
        leaves = self._displaced([weight])
        if not leaves:
            return None
        term = self._terms[id(leaves[0])]
        if derived is not None:
            parts = term.parts if isinstance(term, DisjointTerm) else [term]
            same = [p.term for p in parts if isinstance(p, PartTerm) and _same_order(derived, leaves[0], p)]
            if not same:
                raise _NoFactors
            term = same[0]
        if not isinstance(term, FactoredTerm):
            raise _NoFactors
        return term

    def _rows(self, bias: Tensor) -> Tensor | None:
        """The bias's displacements over f, (B, O)."""
        derived = self._known[id(bias)]
        leaves = self._displaced([bias])
        if not leaves:
            return None
        if derived is not None:
            raise _NoFactors
        return self._terms[id(leaves[0])].rows(0, self.batch_size)

    # Running operations

    def _operate(self, func, args, kwargs):
        try:
            if func in _RULED:
                return super()._operate(func, args, kwargs)
            if func is F.group_norm:
                return self._group_norm(*args, **kwargs)
            if func in embedding.PARSERS:
                return self._look_up(embedding.call_of(self, func, args, kwargs))
        except _NoFactors:
            pass
        # A rule takes a weight for what all samples share, also one whose rows are alike and as many as the samples.
        return self._run_without_rule(func, args, kwargs, may_repeat=func not in RULES)

    def _group_norm(self, input, num_groups, weight=None, bias=None, eps=1e-5) -> Tensor:
        """Group norm of one image of B·C channels, each sample's with its own weight and bias: nothing else is kept."""
        B, shape = self.batch_size, input.shape
        if self.is_tracked(input) or input.dim() < 3 or shape[0] != B or not input.numel():
            raise _NoFactors

        def of_samples(affine: Tensor | None) -> Tensor | None:
            """(B · C,)."""
            if affine is None:
                return None
            rows = self._rows(affine) if self.is_tracked(affine) else None
            return (affine.expand(B, -1) if rows is None else affine + self.factor * rows.to(affine.dtype)).reshape(-1)

        image = input.reshape(1, -1, *shape[2:])
        # F.group_norm refuses one value a group, in an image though not in a batch.
        return torch.group_norm(image, B * num_groups, of_samples(weight), of_samples(bias), eps).reshape(shape)

    def _look_up(self, call: Any) -> Tensor:
        """A look-up whose rows are moved by those of the sample's own gradient."""
        if call is NotImplemented or self._known[id(call.table)] is not None:
            raise _NoFactors
        self._check_rows(f"{call.name} on {self.name_of(call.table)}", call.shape[0])
        term, found = self._terms.get(id(call.table)), replace(call.look_ups, tokens=call.index)
        moved = None if term is None else found_by(term, found.merged(self.batch_size), call.inner[1])
        if moved is None:
            raise _NoFactors
        table = call.table.reshape(call.inner)
        rows = looked_up(call.look_ups, table, table.dtype)
        # Padding has a value and no gradient.
        rows = torch.where(call.look_ups.none, table.detach().index_select(0, call.index), rows)
        return call.pooled(torch.add(rows, moved, alpha=self.factor))

    def expand(self, tracked: Tensor, rows: Sequence[int], dims: int, name: str = "expand") -> Tensor:
        """Each sample's own, as many times as it has rows."""
        (n,) = rows
        self._check_rows(f"repeating {self.name_of(tracked)}", n)
        shape = (*[1] * (dims - 1 - tracked.dim()), *tracked.shape[tracked.dim() == dims :])
        leaves = self._displaced([tracked])
        if not leaves:
            return tracked.expand(n, *shape)

        def run(current, _):
            return self._substituted(tracked, current).expand(n // self.batch_size, *shape)

        return self._by_sample("expand", run, leaves, [], [])

    def _opened(self, func: Callable) -> Callable | None:
        """Not what has a rule, whose C function has none: it is run as it is, and sees no rows for the samples, either."""
        has_other = func in _REWRITTEN or (func in RULES and func is not F.multi_head_attention_forward)
        return None if has_other else super()._opened(func)

    def _fall_back(self, func, args, kwargs, tracked: Sequence[Tensor]) -> Any:
        leaves = self._displaced(tracked)
        if not leaves:
            return func(*args, **kwargs)
        flat, spec = pytree.tree_flatten((args, kwargs))
        name, target = getattr(func, "__name__", str(func)), flat[0] if is_in_place(func) else None
        if target is not None:
            flat[0] = target.clone()  # what the backward pass needs is not what the call writes to
        mine = [k for k, t in enumerate(flat) if isinstance(t, Tensor) and id(t) in self._known]
        others = [k for k, t in enumerate(flat) if isinstance(t, Tensor) and id(t) not in self._known]
        autocast, func = autocast_now(leaves[0].device), _REWRITTEN.get(func, func)

        def run(current, data):
            filled = list(flat)
            for k, t in zip(others, data, strict=True):
                filled[k] = t
            for k in mine:
                filled[k] = self._substituted(flat[k], current)
            if target is not None:
                filled[0] = filled[0].clone()
            args, kwargs = pytree.tree_unflatten(filled, spec)
            with autocast():
                return func(*args, **kwargs)

        data = [flat[k] for k in others]
        rows = self._rows_of(f"{name} on {' and '.join(map(self.name_of, tracked))}", data, lambda: run({}, data))
        cut = [t.dim() > 0 and t.size(0) == rows and id(t) not in self._constants for t in data]
        y = self._by_sample(name, run, leaves, data, cut)
        if sum(cut) > 1:
            self._check_cuts(name, run, leaves, data, cut)
        return y if target is None else target.copy_(y)

    def _by_sample(
        self, name: str, run: Callable[..., Tensor], leaves, data, cut, factor: float | None = None
    ) -> Tensor:
        """``run(current, data)`` under ``vmap``: the displaced parameters by id, and of what is cut each sample's rows."""
        factor, n, B = self.factor if factor is None else factor, len(leaves), self.batch_size
        terms = [self._terms[id(p)] for p in leaves]
        step = max(1, CHUNK_BYTES // (8 * sum(p.numel() for p in leaves) or 1))
        kept = step >= B and all(isinstance(term, DenseTerm) for term in terms)

        def of_chunk(start, stop, *parts):
            values, terms, data = parts[:n], parts[n : 2 * n], parts[2 * n :]
            with torch.no_grad(), without_hooks():
                rows = [factor * t.rows(start, stop).to(v.dtype) for v, t in zip(values, terms, strict=True)]
            displaced = [v + r for v, r in zip(values, rows, strict=True)]

            def one(*batched):
                samples = iter(batched[n:])
                current = {id(p): v for p, v in zip(leaves, batched, strict=False)}
                return run(current, [next(samples) if c else t for t, c in zip(data, cut, strict=True)])

            return vmap(one, *displaced, *(t for t, c in zip(data, cut, strict=True) if c))

        data = [t.unflatten(0, (B, t.size(0) // B)) if c else t for t, c in zip(data, cut, strict=True)]
        rows, out = {t.size(1) for t, c in zip(data, cut, strict=True) if c}, []
        try:
            for start in range(0, B, step):
                stop = min(start + step, B)
                chunk = partial(of_chunk, start, stop)
                some = [t[start:stop] if c else t for t, c in zip(data, cut, strict=True)]
                run_chunk = chunk if kept else partial(recomputed, chunk)
                out.append(run_chunk(*leaves, *terms, *some))
            y = torch.cat(out)
            if y.dim() < 2 or rows - {y.size(1)}:
                raise ValueError(f"it puts out {tuple(y.shape[1:])} for one sample")
            return y.flatten(0, 1)
        except (BootgradError, StopRecomputation, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedError(
                f"{name} on {' and '.join(self._names[id(p)] for p in leaves)} cannot be run one sample at a time with "
                f"parameters of its own ({error}): freeze these parameters, or write the operation with plain ones"
            ) from error

    def _rows_of(self, what: str, data: Sequence[Tensor], run: Callable[[], Tensor]) -> int:
        """The rows of the output's dimension 0, by running the call only where the inputs leave a doubt."""
        sizes = {t.size(0) for t in data if t.dim() and id(t) not in self._constants}
        if len(sizes) > 1:
            with torch.no_grad():
                y = run()
            sizes = {y.size(0)} if isinstance(y, Tensor) and y.dim() else set()
        rows = sizes.pop() if sizes else 1
        self._check_rows(what, rows)
        return rows

    def _check_rows(self, what: str, rows: int) -> None:
        if rows % self.batch_size or not rows:
            raise UnsupportedError(
                f"{what} puts out {rows} rows in dimension 0 for {self.batch_size} samples: "
                "samples must be dimension 0 of every operation on a parameter"
            )

    @torch.no_grad()
    def _check_cuts(self, name: str, run, leaves, data, cut) -> None:
        """Raise where several tensors have the samples' number of rows and to cut them all changes the result."""
        expected, ours = run({}, data), self._by_sample(name, run, leaves, data, cut, factor=0.0)
        tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
        if ours.shape != expected.shape or not (ours - expected).norm() <= tolerance * expected.norm():
            raise UnsupportedError(
                f"{name} on {' and '.join(self._names[id(p)] for p in leaves)} does something else on one sample at a time "
                "than on the batch: write the operation with plain ones, with samples in dimension 0"
            )

    def _displaced(self, tracked: Sequence[Tensor]) -> list[Tensor]:
        """The parameters with a displacement that tracked tensors are made of."""
        leaves = {id(p): p for t in tracked for p in self.leaves(t)}
        return [p for key, p in leaves.items() if key in self._terms]

    def _substituted(self, tracked: Tensor, current: dict[int, Tensor]) -> Tensor:
        """The tracked tensor, were the parameters the ``current`` ones."""
        derived = self._known[id(tracked)]
        return current.get(id(tracked), tracked) if derived is None else derived.replay(current)


def _look_up_rows(weight: Tensor, indices: Tensor, padding_idx=-1, scale_grad_by_freq=False, sparse=False) -> Tensor:
    """`torch.embedding`, in which a negative padding_idx is none."""
    padding = None if padding_idx < 0 else padding_idx
    return look_up(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq)


def _bag(
    input: Tensor,
    weight: Tensor,
    offsets=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    mode="mean",
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=None,
) -> Tensor:
    """`F.embedding_bag` of bags of one length, whose offsets would count the tokens of all samples."""
    if input.dim() != 2:
        raise RuntimeError("bags are told by offsets: give them as rows of one length, filled up by padding_idx")
    y = look_up(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)  # (N, T, D)
    padding = -1 if padding_idx is None else padding_idx % weight.size(0)
    none = (input == padding).unsqueeze(-1)
    if mode == "max":
        return y.masked_fill(none, -math.inf).amax(1).masked_fill(none.all(1), 0)
    y = y if per_sample_weights is None else y * per_sample_weights.unsqueeze(-1)
    y = y.masked_fill(none, 0).sum(1)
    return y if mode == "sum" else y / (~none).sum(1).clamp(min=1)


_REWRITTEN: dict[Callable, Callable] = {
    F.embedding: look_up,
    torch.embedding: _look_up_rows,
    F.embedding_bag: _bag,
}


def _refuse_graph(_) -> None:
    """Before a displaced product's backward pass: its derivatives by W would be displaced, too."""
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "a pass at per-sample parameters has first derivatives only; got create_graph=True: leave it out"
        )


class _Displaced:
    """A product with W + f G_i and b + f g_i in the place of W and b; its weight gradient and the rest are the product's."""

    def __init__(
        self, product: Product, batch_size: int, factor: float, term: FactoredTerm | None, rows: Tensor | None
    ):
        """Displace ``product`` by f times the term and the bias's rows (B, O), where there are."""
        if (
            term is not None
            and isinstance(product, LinearProduct)
            and term.product == LinearProduct(not product.transposed)
        ):
            term = FactoredTerm(product, term.gy, term.x, term.shape, term.inner)
        self.product, self.batch_size, self.factor, self.term, self.rows = product, batch_size, factor, term, rows

    def __getattr__(self, name: str) -> Any:
        """The product's own."""
        return getattr(self.product, name)

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(W + f G_i) ∗ x_i + b + f g_i."""
        term, shift = self.term, None if bias is None or self.rows is None else self.factor * self.rows
        if not x.dim() or x.size(0) % self.batch_size or (term is not None and term.x.dtype != x.dtype):
            raise _NoFactors
        if term is not None and term.product == self.product:
            plain = None if bias is None else bias.expand(self.batch_size, -1)
            whole = plain if plain is None or shift is None else plain + shift
            y = displaced(self.product, *term.pair(), x, weight, whole, self.factor)
            if y is not None:
                return y
        y = self._own(self.product.output(x, weight, bias))
        product, h, out, _ = self.product.factor(x, y, weight.shape, self.batch_size)
        is_linear = isinstance(product, LinearProduct)
        if term is not None:
            x, gy = term.pair()
            channels = 2 if is_linear else 1
            if product != term.product or h.size(channels) != x.size(channels):
                raise _NoFactors
            out.add_(applied(product, x, gy, h), alpha=self.factor)
        if shift is not None:
            out.add_(shift.view(self.batch_size, *(1, -1) if is_linear else (-1, *[1] * (out.dim() - 2))))
        return y

    def input_grad(self, gy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """(W + f G_i)ᵀ ∗ gy_i."""
        if self.term is not None and self.term.product == self.product:
            gx = displaced_transposed(self.product, *self.term.pair(), gy, weight, self.factor, x)
            if gx is not None:
                return gx
        gx = self._own(self.product.input_grad(gy, weight, x))
        if self.term is not None:
            product, out, g, _ = self.product.factor(gx, gy, weight.shape, self.batch_size)
            out.add_(applied_transposed(product, *self.term.pair(), g, out), alpha=self.factor)
        return gx

    def _own(self, result: Tensor) -> Tensor:
        """A result laid out so that its samples are a view of it."""
        return result.contiguous() if isinstance(self.product, LinearProduct) else result


def _same_order(derived: Derived, leaf: Tensor, part: PartTerm) -> bool:
    """Whether a derived weight holds its parameter's entries in the order of the part's."""
    if not derived.picks:
        return False
    places = torch.arange(leaf.numel(), device=leaf.device).view(leaf.shape)
    return torch.equal(derived.replay({id(leaf): places}), part.pick(places))


def _modules_with(G: PerSampleGradients) -> list[nn.Module]:
    """The modules that were recorded with parameters of G."""
    wanted = set(map(id, G.parameters.values()))
    return [module for module in list(_states) if wanted & set(map(id, module.parameters()))]
