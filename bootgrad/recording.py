"""Recording: a `TorchFunctionMode` that sees every torch function which is handed a parameter of the model.

Known operations are replaced by ones that keep (x, gy); functions of parameters and of the model's constants alone (buffers,
frozen parameters, ranges) are followed; the rest falls back to ``vmap`` or is refused. After the forward pass the recording
knows, for losses (B,), which operations and parameters they reach (`graph`), and by backward passes under other weights whether
samples are the rows of every operation (`batch_check`).
"""

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from .batch_check import BatchCheck, ModelState
from .derived import TRANSPOSITIONS, Call, Derived, check_repeats, is_batch_free, may_be_batch_free, pull_back
from .distributed import Ranks
from .errors import ArgumentError, ArgumentTypeError, RecordingError, UnsupportedError, warn
from .graph import Reach, Uses, as_met, check_losses, filled, gradients, keeping_buffers, walk
from .modes import Mode
from .ops.piecewise import is_seen
from .ops.product import Product
from .planning import as_number
from .rules.base import RULES, Operation, Phase, ProductOperation, is_in_place
from .rules.checkpointed import Returning, comes_back
from .rules.expanded import ExpandOperation
from .rules.fallback import FallbackOperation
from .rules.merging import merged
from .rules.normalization import apart, is_apart, is_over_batch, refuse_batch_statistics
from .rules.opened import opened
from .rules.process_wide import eager
from .rules.reentrant import not_reentrant
from .rules.samples import Samples
from .rules.stand_ins import OF_PARAMETERS, is_in_transform, run_plain
from .rules.terms import Term
from .scaling import Scale, Scaling, narrowest
from .wrappers import parameters_of, ranks_of, silent

_IN_COMPILED = (
    "a forward pass is recorded inside of a compiled function: compile what is recorded, the model or a function that computes "
    "the losses, and not the step around it"
)
CHECKS = ("first", "always", "never")
BATCHNORM = ("refuse", "contribution")
_getitem = Tensor.__getitem__
_DIFFERENTIATION = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


_states: "weakref.WeakKeyDictionary[nn.Module, ModelState]" = weakref.WeakKeyDictionary()


AnyRecording = TypeVar("AnyRecording", bound="Recording")


class Recording(Returning):
    """The record of one forward pass of one or more modules."""

    ranks: Ranks | None = None  # that the modules are trained by together
    unwatched: Mapping[str, Tensor] = {}  # parameters that are not followed, and receive gradients as other leaves do

    def __init__(
        self,
        *modules: nn.Module,
        check: str = "first",
        samples: Tensor | None = None,
        batchnorm: str = "refuse",
        parameters: Collection[str] | None = None,
    ):
        """Prepare to record ``modules``.

        Args:
            modules: what to record.
            check: when the batch dimension is checked: first, always or never.
            samples: the number of its sample at each position of the leading dimensions, where that is not dimension 0.
            batchnorm: whether batch norm in training mode is refused, or the samples' contributions are taken.
            parameters: names of those that are followed; all when None.
        """
        if torch.compiler.is_dynamo_compiling():
            raise RecordingError(_IN_COMPILED)
        super().__init__()
        if not modules:
            raise ArgumentTypeError("record needs at least one module; got none")
        self._children: list[nn.Module] = []
        for module in modules:
            if not isinstance(module, nn.Module):
                raise ArgumentTypeError(f"record takes torch.nn.Module objects; got {type(module).__name__}")
            for name, child in module.named_modules():
                self._children.append(child)
                if isinstance(child, torch.jit.ScriptModule):
                    raise UnsupportedError(
                        f"{name or 'the model'} is a ScriptModule, inside which no operation can be seen: "
                        "record the Python module that it was made from"
                    )
        if check not in CHECKS:
            raise ArgumentError(f"check must be one of {', '.join(CHECKS)}; got {check!r}")
        if batchnorm not in BATCHNORM:
            raise ArgumentError(f"batchnorm must be one of {', '.join(BATCHNORM)}; got {batchnorm!r}")
        self.check, self.batchnorm = check, batchnorm
        self.modules = modules
        self.state = _states.setdefault(modules[0], ModelState())
        self.ranks = ranks_of(*modules)
        if self.ranks is not None:
            self.ranks.gather()
        others = (t for child in self._children for t in (*child._buffers.values(), *child._parameters.values()))
        watched, self.unwatched = chosen(named_parameters(*modules), parameters)
        self._begin(watched, others, None if samples is None else Samples(samples))

    def _begin(
        self, parameters: dict[str, Tensor], constants: Iterable[Tensor | None], samples: Samples | None
    ) -> None:
        """Know these parameters by name, and constants, and nothing yet of what will be done with them."""
        self.parameters, self.samples = parameters, samples
        self.scaling = Scaling()
        self.phase = Phase.PLAIN
        self.batch_size = 0
        self.operations: list[Operation] = []
        self._names = {id(p): name for name, p in parameters.items()}
        self._known: dict[int, Derived | None] = dict.fromkeys(self._names)
        self._constants: dict[int, Tensor] = {id(t): t for t in constants if t is not None and id(t) not in self._names}
        # Parameters that are not followed, and what is made of constants and these: with grad, in the version that it had.
        self._fixed = {id(t): (t, t._version) for t in self.unwatched.values()}
        self._numbers: dict[int, Tensor] = {}  # () without grad, made of data
        self._edges: dict[int, GradientEdge] = {}
        self._uses = Uses()
        self._by_products: dict[int, tuple[Tensor, Any]] = {}
        self._chosen: set[int] = set()
        self._centers: dict[str, Tensor] | None = None
        self._compiled: set[Any] = set()  # nodes of functions that were compiled to be differentiated more than once
        self._saved: dict[int, tuple[Tensor, ...]] = {}
        self._around = ExitStack()
        self._used = self.freed = self._runs_again = self.has_contributions = self._keeps_buffers = False

    # Recording

    def __enter__(self: AnyRecording) -> AnyRecording:
        """Begin to record."""
        if self._used:
            raise RecordingError(
                "this recording was used already: make a new one with record(model) for every forward pass"
            )
        self._used = True
        with ExitStack() as around:
            try:
                around.enter_context(self._compiler_stance())
            except RuntimeError as error:  # torch refuses it nowhere else
                raise RecordingError(_IN_COMPILED) from error
            around.enter_context(silent(self.ranks))
            self._around = around.pop_all()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        """Stop recording."""
        self._around.close()
        if self.ranks is not None and exc[0] is not None:
            self.ranks.end()
        return super().__exit__(*exc)

    def _compiler_stance(self) -> AbstractContextManager:
        """A context for what becomes of compiled functions: compiled code would run what the rules did once."""
        return eager

    def run(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call ``func`` as the model would, recorded if it is handed a tracked tensor."""
        in_backward = self.phase is not Phase.PLAIN and not self._runs_again
        if in_backward or not torch.is_grad_enabled() or func in _DIFFERENTIATION:
            return func(*args, **kwargs)
        known, tensors = self._known, _tensors_in((args, kwargs))
        has_data = any(map(self._is_data, tensors))
        is_tracked = any(id(t) in known for t in tensors)
        if has_data and is_over_batch(func, args, kwargs):
            if self.batchnorm == "refuse":
                refuse_batch_statistics()
            self.has_contributions = True
        if (
            has_data and is_tracked and is_apart(func, args, kwargs)
        ):  # then scale and shift have a rule, and it has none
            with _Active(self):
                return apart(func, *args, **kwargs)
        if not is_tracked:
            result = self._run_plain(func, args, kwargs)
            if func is torch.arange or (tensors and not has_data):
                self._add_constants(result)
            elif has_data:
                self._add_numbers(result)
            return result
        if func is _getitem and id(args[0]) in known:  # a number chooses a part for all, as of an expert
            has_data = any(t.dim() for t in tensors if self._is_data(t))
        # To replay a call that writes to a constant would write again.
        if not has_data and not (is_in_place(func) and any(id(t) not in known for t in _tensors_in(args[:1]))):
            call = Call(OF_PARAMETERS.get(func, func), args, kwargs, known)
            return self._derive(call, call.func(*args, **kwargs))
        self._refuse_second_runs(func)
        return self._operate(func, args, kwargs)

    def _refuse_second_runs(self, func: Callable) -> None:
        """Raise where the call is inside of something that runs it again, or otherwise than as written."""
        name = getattr(func, "__name__", func)
        if not comes_back(self):
            raise UnsupportedError(
                f"{name} is inside of torch.utils.checkpoint, which in this version of torch cannot be seen to run it again: "
                "leave checkpointing out of recorded forward passes"
            )
        if is_in_transform():
            raise UnsupportedError(
                f"{name} is inside of a transform of torch.func, where its per-sample gradients cannot be seen: call the model "
                "without vmap, grad or jvp"
            )

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run a checkpointed part for the second time: the same operations, of which nothing is taken down."""
        before = self._known.copy(), self._constants.copy(), self._fixed.copy(), self._runs_again
        self._runs_again = True
        try:
            with eager, not_reentrant, nullcontext() if self in _get_current_function_mode_stack() else _Active(self):
                yield
        finally:
            self._known, self._constants, self._fixed, self._runs_again = before

    def finder(self) -> "Callable[[], Recording]":
        """What finds this recording as long as it is there: it may hold the graph."""
        reference, modules = weakref.ref(self), self.modules
        samples = None if self.samples is None else self.samples.index
        names = tuple(self.parameters) if self.unwatched else None
        options: dict[str, Any] = dict(check="never", samples=samples, batchnorm=self.batchnorm, parameters=names)
        return lambda: reference() or Recording(*modules, **options)

    def _run_plain(self, func, args, kwargs):
        """Run a call without parameters."""
        return run_plain(self, func, args, kwargs)

    def _operate(self, func, args, kwargs):
        """Run a call of tracked tensors and data: an operation."""
        rule = RULES.get(func)
        # Rules multiply by what a complex product's derivative has the conjugate of.
        if rule is not None and not any(t.is_complex() for t in _tensors_in((args, kwargs))):
            out = rule(self, func, args, kwargs)
            if out is not NotImplemented:
                return out
        return self._run_without_rule(func, args, kwargs)

    def _derive(self, call: Call, result: Any) -> Any:
        """``result``, each of its tensors known as a function of parameters alone."""
        for derived in call.derived(result):
            self._known[id(derived.tensor)] = derived
        self._add_constants(result)
        return result

    def _add_constants(self, result: Any) -> None:
        for t in pytree.tree_leaves(result):
            if isinstance(t, Tensor) and id(t) not in self._known:
                self._constants[id(t)] = t
                if t.requires_grad:
                    self._fixed[id(t)] = t, t._version

    def _add_numbers(self, result: Any) -> None:
        for t in result if isinstance(result, list | tuple) else (result,):
            if isinstance(t, Tensor) and not t.dim() and not t.requires_grad:
                self._numbers[id(t)] = t

    def _run_without_rule(self, func, args, kwargs, may_repeat: bool = True):
        """Run a call that no rule knows; ``may_repeat``: rows that are alike may be there for the samples."""
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        tracked = list({id(t): t for t in tensors if id(t) in self._known}.values())
        others = [t for t in tensors if id(t) not in self._known]
        rows = self._rows_by_sample(tracked, others) if may_repeat else {}
        target = args[0] if is_in_place(func) and id(args[0]) in rows else None
        if rows and target is None:
            args, kwargs = pytree.tree_map(lambda t: rows.get(id(t), t), (args, kwargs))
            return self.run(func, *args, **kwargs)
        if target is not None and self._may_become_data(target):
            result = self.run(func, rows[id(target)].clone(), *args[1:], **kwargs)
            del self._known[id(target)]
            return target.detach_().copy_(result)
        body = self._opened(func)
        if body is not None:
            with _Active(self):
                return body(*args, **kwargs)
        if may_be_batch_free(func, others):
            call, result = Call(func, args, kwargs, self._known), func(*args, **kwargs)
            if is_batch_free(result, tracked, others):
                return self._derive(call, result)
            if not any(isinstance(t, Tensor) and t.requires_grad for t in pytree.tree_leaves(result)):
                return result
        return self._fall_back(func, args, kwargs, tracked)

    def _opened(self, func: Callable) -> Callable | None:
        """The operations that a function is made of, if they are to be recorded in its place."""
        return opened(func)

    def _fall_back(self, func, args, kwargs, tracked: Sequence[Tensor]) -> Any:
        """Run an operation that no rule knows."""
        operation = FallbackOperation(self, func, args, kwargs, tracked)
        names = " and ".join(map(self.name_of, tracked))
        result = operation(names)
        if operation in self.operations:
            self.warn(
                f"{operation.name} on {names} has no rule: its per-sample gradients are made one by one, which is slow"
            )
        return result

    def warn(self, message: str) -> None:
        """Say something about the model once, whatever the number of its recordings."""
        if self.state.is_new(message):
            warn(message)

    def _rows_by_sample(self, tracked: Sequence[Tensor], others: Sequence[Tensor]) -> dict[int, Tensor]:
        """The tracked tensors that have as many rows as the data, and repeat some, as data, by their ids."""
        shapes = {(t.dim(), n) for t in others if t.dim() and (n := as_number(t.size(0))) > 1}
        rows = {id(t): self.by_sample(t) for t in tracked if t.dim() and (t.dim(), as_number(t.size(0))) in shapes}
        return {key: t for key, t in rows.items() if t is not None}

    def by_sample(self, tracked: Tensor) -> Tensor | None:
        """A tensor that repeats rows for the samples, as a class token is repeated, as data; None where it repeats none."""
        n, dims, derived = tracked.size(0), tracked.dim(), self._known[id(tracked)]
        k = n if derived is None else derived.period
        if derived is None or k == n:
            return None
        source = derived.source
        if derived.func is Tensor.expand and (source.dim() < dims or source.size(0) == 1):
            return self.expand(source, tracked.shape[: self.leading(tracked.shape)], dims).expand(tracked.shape)
        rows = derived.one_period(self.run)
        if rows is None:  # in a memory of their own: what they are taken from may be changed in place
            rows = self.run(Tensor.clone, self.run(_getitem, tracked, slice(0, k)))
        return self.expand(rows, (n,), dims) if k == 1 else self.expand(rows, (n // k,), dims + 1).flatten(0, 1)

    def _may_become_data(self, tracked: Tensor) -> bool:
        """Whether nothing else looks at a derived tensor that data is about to change in place."""
        derived = self._known[id(tracked)]
        return derived is not None and not derived.used and not tracked._is_view()

    def _is_data(self, t: Tensor) -> bool:
        """Whether a tensor is neither made of parameters nor a constant of the model; other numbers () than data's are."""
        if id(t) in self._known or self._is_fixed(t):
            return False
        return t.requires_grad or id(t) in self._numbers or (t.dim() > 0 and id(t) not in self._constants)

    def _is_fixed(self, t: Tensor) -> bool:
        known = self._fixed.get(id(t))
        return known is not None and known[1] == t._version

    def is_constant(self, value: Any) -> bool:
        """Whether ``value`` is a buffer, a frozen parameter, or made of these alone."""
        return isinstance(value, Tensor) and id(value) in self._constants and not self._is_data(value)

    # What rules ask of a recorder

    def is_tracked(self, value: Any) -> bool:
        """Whether ``value`` is a parameter or derived from parameters alone."""
        return isinstance(value, Tensor) and id(value) in self._known

    def alias(self, tracked: Tensor) -> Tensor:
        """``tracked`` behind a node of its own, at which the walk stops."""
        derived = self._known[id(tracked)]
        if derived is not None:
            derived.check_unchanged(self.name_of)
            derived.used = True
        alias = tracked.view_as(tracked)
        return alias if self._runs_again else self._uses.begin(alias)

    def alias_cast(self, alias: Tensor, dtype: torch.dtype) -> Tensor:
        """An alias in another dtype, at whose node the walk stops, too."""
        return self._uses.begin(alias.to(dtype)) if alias.grad_fn in self._uses else alias.to(dtype)

    def leading(self, shape: Sequence[int]) -> int:
        """How many leading dimensions of ``shape`` hold rows that belong to samples."""
        return 1 if self.samples is None else self.samples.leading(shape)

    def expand(self, tracked: Tensor, rows: Sequence[int], dims: int, name: str = "expand") -> Tensor:
        """A tracked tensor for each of ``rows``, leading dimensions, as an operation of its own."""
        return ExpandOperation(self, name, tracked).expanded(rows, dims)

    def add(self, operation: Operation, edge: GradientEdge) -> None:
        """Take an operation into the record; the aliases made since the last one are its own."""
        if self._runs_again:
            return
        self.operations.append(operation)
        self._edges[id(operation)] = edge
        self._uses.end(edge, operation.name)

    def add_compiled(self, operation: Operation, edge: GradientEdge, ends: Sequence[GradientEdge]) -> None:
        """Take in a call of a compiled function, with the edge of its node and those of its outputs."""
        self._compiled.add(edge.node)
        if operation.tracked:
            self.operations.append(operation)
            self._edges[id(operation)] = edge
            self._uses.end(edge, operation.name, ends)

    def edge_of(self, operation: Operation) -> GradientEdge:
        """The edge that the operation was added with."""
        return self._edges[id(operation)]

    def transposed(self, tracked: Tensor) -> Tensor | None:
        """The tracked matrix that this one is the transpose of, if it was made as one."""
        derived = self._known.get(id(tracked))
        if derived is None or derived.func not in TRANSPOSITIONS or derived.source.dim() != 2:
            return None
        source = derived.source
        same_memory = tracked._base is (source._base if source._is_view() else source)
        is_view = same_memory and source.storage_offset() == tracked.storage_offset()
        is_view = is_view and source.stride() == tracked.stride()[::-1]
        return source if is_view and source.shape == tracked.shape[::-1] else None

    def takes_statistics(self, operation: Operation) -> bool:
        """Whether the operation's probe is read now."""
        return self.phase is Phase.STATISTICS and id(operation) in self._chosen

    def takes_visit(self, tracked: Tensor | None) -> bool:
        """Whether a penalty will visit a product's weight or bias in the graph that is made now."""
        return self.phase is Phase.OUTPUTS and id(tracked) in self._chosen

    def center_of(self, tracked: Tensor) -> Tensor | None:
        """The present center's part for a tracked tensor that has a probe."""
        if self._centers is None:
            return None
        derived = self._known[id(tracked)]
        if derived is None:
            return self._centers[self._names[id(tracked)]]
        (leaf,) = derived.leaves()
        return derived.replay({id(leaf): self._centers[self._names[id(leaf)]]})

    def keep_by_product(self, operation: Operation, gy: Tensor, value: Any) -> None:
        """Keep what a backward pass made; here, since a graph node that held it would hold its own graph."""
        self._by_products[id(operation)] = (gy, value)

    def keep_saved(self, operation: Operation, saved: tuple[Tensor, ...]) -> None:
        """Keep what a checkpointed operation's node has now, where `terms` will ask for it: it would be made again."""
        statistics = self.phase is Phase.STATISTICS and id(operation) not in self._chosen
        if statistics or self.phase is Phase.OUTPUTS:
            self._saved[id(operation)] = saved

    def held(self, operation: Operation) -> tuple[Tensor, ...] | None:
        """What was kept, once."""
        return self._saved.pop(id(operation), None)

    def by_product(self, operation: Operation, gy: Tensor) -> Any:
        """What was kept for the operation, once, if it was made from this ``gy``; else None."""
        made_from, value = self._by_products.pop(id(operation), (None, None))
        return value if made_from is gy else None

    def product_of(self, product: Product, weight: Tensor | None, bias: Tensor | None) -> Product:
        """The product that a layer with these tracked tensors computes: as it was written."""
        return product

    def new_probe(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros for the operation that is recorded next, whose gradient tells its statistics."""
        return torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)

    def name_of(self, tracked: Tensor) -> str:
        """The parameter's name, or those that a derived tensor is made of."""
        return " and ".join(self._names[id(leaf)] for leaf in self.leaves(tracked))

    def leaves(self, tracked: Tensor) -> list[Tensor]:
        """The parameters that a tracked tensor is or is made of."""
        derived = self._known[id(tracked)]
        return [tracked] if derived is None else derived.leaves()

    # What the losses reach

    def reach(self, losses: Tensor) -> Reach:
        """Check ``losses`` and the record against each other; everything here happens before any gradient is touched."""
        if not self._used:
            raise RecordingError("nothing was recorded: run the forward pass inside `with record(model) as rec:` first")
        if self.freed:
            raise RecordingError(
                "the graph of this recording was freed by an earlier backward: record again, or pass retain_graph=True to it"
            )
        check_losses(losses)
        self.batch_size = losses.numel()
        reach = self.walk(losses)
        reach.finite = self.scaling.finite(losses)
        if not reach.parameters and not self.parameters:
            raise RecordingError("the model has no parameter that requires grad: nothing to take gradients of")
        if not reach.parameters:
            raise RecordingError(
                "the losses do not depend on any recorded parameter: run the forward pass of this model inside the "
                "`with` block, with gradients enabled, and compute the losses from its output"
            )
        if self.samples is not None:
            self.samples.check(self.batch_size)
        if self.batch_size > 1:
            BatchCheck(self, losses, reach).run()
        return reach

    def walk(self, losses: Tensor) -> Reach:
        """What ``losses`` reach."""
        nodes, shared, leaves = walk(losses, self._uses, self._names, alone=self.batch_size == 1)
        compiled = {node for node, name in nodes.items() if name == "CompiledFunctionBackward"}
        self._keeps_buffers = bool(compiled) and compiled <= self._compiled
        operations = [o for o in self.operations if o.edge.node in nodes]
        idle = set()  # of an operation and one that covers it, either
        for o in operations:
            if o.covers is not None:
                node = o.covers.edge.node
                o.covers_all = node not in shared and not is_seen(o.between, node)
                idle.add(id(o.covers if o.covers_all else o))
        operations = [o for o in operations if id(o) not in idle]
        used = {id(leaf) for o in operations for t in o.tracked for leaf in self.leaves(t)} | set(map(id, leaves))
        parameters = {name: p for name, p in self.parameters.items() if id(p) in used}
        own = self._names.keys() | {id(o.probe) for o in self.operations}
        narrow = narrowest([losses.dtype, *(o.output_dtype for o in operations)])
        other_leaves = [t for t in leaves if id(t) not in own]
        return Reach(operations, parameters, other_leaves, graph=hash(tuple(nodes.values())), narrow=narrow)

    def _scale(self, reach: Reach) -> Scale:
        """What the losses are multiplied by in a backward pass."""
        return self.scaling.of(reach.narrow, self.batch_size)

    def describe(self, operation: Operation, tracked: Sequence[Tensor] | None = None) -> str:
        """The operation's name, and those of its parameters, or of the ``tracked`` ones."""
        names = [self.name_of(t) for t in (operation.tracked if tracked is None else tracked)]
        return f"{operation.name} (parameter {', '.join(names[:4])}{', …' if len(names) > 4 else ''})"

    @property
    def modes(self) -> tuple[bool, ...]:
        """Whether each of the modules is in training."""
        return tuple(child.training for child in self._children)

    def gradients(self, losses: Tensor, inputs: Sequence, weights: Tensor, **options) -> Sequence[Tensor | None]:
        """`graph.gradients`, through compiled functions as often as through others."""
        with keeping_buffers() if self._keeps_buffers and options.get("retain_graph") else nullcontext():
            return gradients(losses, inputs, weights, **options)

    # Gradients of outputs, and terms

    def output_gradients(
        self,
        losses: Tensor,
        weights: Tensor,
        operations: Sequence[Operation],
        create_graph: bool = False,
        visited: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Gy of each operation under the losses Σ w_i ℓ_i; no gradient of a parameter is computed.

        Where a graph is made, one with places for a penalty to visit the parameters ``visited`` at.
        """
        with self.in_phase(Phase.OUTPUTS, visited):
            edges = [o.edge for o in operations]
            options = dict(retain_graph=True, create_graph=create_graph, allow_unused=True)
            with as_met(edges) as met:
                grads = met(self.gradients(losses, edges, weights, **options))
            return filled(grads, operations, losses)

    def terms(self, operations: Sequence[Operation], gys: Sequence[Tensor]) -> dict[str, Term]:
        """One term per parameter that the operations use."""
        parts: dict[str, list[Term]] = {}
        for operation, gy in zip(operations, gys, strict=True):
            for tracked, term in zip(operation.tracked, operation.terms(gy, self.batch_size), strict=True):
                derived = self._known[id(tracked)]
                if derived is not None:
                    self._check_repeats(derived)
                for leaf in self.leaves(tracked):
                    own = term if derived is None else pull_back(term, derived, leaf)
                    parts.setdefault(self._names[id(leaf)], []).append(own)
        return {name: merged(p) for name, p in parts.items()}

    def _check_repeats(self, derived: Derived) -> None:
        """Raise where a tensor is not the same when it is made again."""
        check_repeats(derived, self.name_of)

    def _count_uses(self, operations: Sequence[Operation]) -> dict[int, int]:
        """How often each parameter is used, by id."""
        uses: dict[int, int] = {}
        for operation in operations:
            for tracked in operation.tracked:
                for leaf in self.leaves(tracked):
                    uses[id(leaf)] = uses.get(id(leaf), 0) + 1
        return uses

    def visitable(self, operations: Sequence[Operation]) -> list[Tensor]:
        """Weights and biases of products that no other operation uses: one visit of (x, gy) tells all about them."""
        uses = self._count_uses(operations)
        tracked = [t for o in operations if isinstance(o, ProductOperation) for t in o.tracked]
        return [t for t in tracked if self._known[id(t)] is None and uses[id(t)] == 1]

    def split(self, operations: Sequence[Operation]) -> tuple[list[Operation], list[Operation]]:
        """Operations whose probe can be read, and the others: parameters used twice, weights made from parameters."""
        uses = self._count_uses(operations)

        def readable(tracked: Tensor) -> bool:
            derived = self._known[id(tracked)]
            return (derived is None or derived.isometric) and uses[id(self.leaves(tracked)[0])] == 1

        def holds(probe: Tensor | None) -> bool:
            return probe is not None and probe.size(1) >= self.batch_size

        probed = [o for o in operations if holds(o.probe) and all(map(readable, o.tracked))]
        chosen = set(map(id, probed))
        return probed, [o for o in operations if id(o) not in chosen]

    def release(self) -> None:
        """Let go of the graph; the recording cannot be used again."""
        self.freed = True
        self.operations.clear()
        self._edges.clear()
        self._compiled.clear()
        self._uses = Uses()
        self._by_products.clear()
        self._saved.clear()
        self._known = dict.fromkeys(self._names)
        self._constants.clear()
        self._fixed.clear()
        self._numbers.clear()

    def in_phase(
        self, phase: Phase, chosen: Sequence[Operation | Tensor] = (), centers: dict[str, Tensor] | None = None
    ):
        """A context in which backward passes through the record are of ``phase``.

        ``chosen`` are the operations whose probes are read, or the parameters that will be visited.
        """
        return _InPhase(self, phase, set(map(id, chosen)), centers)

    def read_probes(
        self, probed: Sequence[Operation], grads: Sequence[Tensor]
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """‖g_i‖² and ‖g_i − c‖² by parameter, from the gradients of the probes."""
        out: dict[str, tuple[Tensor, Tensor | None]] = {}
        for operation, grad in zip(probed, grads, strict=True):
            rows = iter(grad[:, : self.batch_size].unbind())
            for tracked in operation.tracked:
                out[self.name_of(tracked)] = (next(rows), next(rows))
        return out


class _Active:
    """The recording again, within a call that it sees."""

    def __init__(self, recording: Recording):
        self.recording = recording

    def __enter__(self):
        Mode.__enter__(self.recording)

    def __exit__(self, *exc):
        Mode.__exit__(self.recording, *exc)


def _tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    found, left = [], [value]
    while left:
        v = left.pop()
        if isinstance(v, Tensor):
            found.append(v)
        elif isinstance(v, (list, tuple)):
            left += v
        elif isinstance(v, dict):
            left += v.values()
    return found


class _InPhase:
    def __init__(self, recording: Recording, phase: Phase, chosen: set[int], centers):
        self.recording, self.state = recording, (phase, chosen, centers)

    def _swap(self):
        r = self.recording
        before = (r.phase, r._chosen, r._centers)
        (r.phase, r._chosen, r._centers), self.state = self.state, before

    def __enter__(self):
        self._swap()

    def __exit__(self, *exc):
        self._swap()


def named_parameters(*modules: nn.Module) -> dict[str, Tensor]:
    """The parameters that require grad, by name, without duplicates; several modules' names begin with their number."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for k, module in enumerate(modules):
        for name, p in parameters_of(module):
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                name = name if len(modules) == 1 else f"{k}.{name}"
                if name in out:
                    raise UnsupportedError(
                        f"two parameters are called {name} where the _orig_mod that torch.compile adds is left out: rename one"
                    )
                out[name] = p
    return out


def chosen(parameters: dict[str, Tensor], names: Collection[str] | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters of these names, all when None, and the others.

    Raises:
        ArgumentTypeError: one name in place of several.
        ArgumentError: there are none, or no parameters of these names.
    """
    if names is None:
        return parameters, {}
    if isinstance(names, str):
        raise ArgumentTypeError(f"parameters must be a collection of names; got one, {names!r}: put it into a list")
    names = tuple(names)
    unknown = [name for name in names if name not in parameters]
    if unknown or not names:
        among = f"{', '.join(map(repr, unknown[:4]))} among them" if unknown else "none"
        raise ArgumentError(
            f"parameters must be names of trained parameters of the model, as named_parameters() has them; got {among}"
        )
    own = set(names)
    return (
        {name: p for name, p in parameters.items() if name in own},
        {name: p for name, p in parameters.items() if name not in own},
    )
