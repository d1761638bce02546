"""A graph of torch functions under a recording, for whoever traces it: statistics in the gradient of one input, the probe.

    probe      zeros (2 · parameters, B); after Σ_i ℓ_i has been differentiated, ‖g_i‖² of a parameter is in both of its rows
    probed     operations that are alone with their parameters: each reads its share of the probe
    gathered   parameters that several operations use, or that weights are made of: their terms are added up before they are
               squared, at a node behind the parameter, to which the backward passes of all of these lead

Nothing here asks for a value, and of what is noted at one batch size nothing but plans depends on it.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.autograd import Function
from torch.autograd.graph import GradientEdge
from torch.utils._python_dispatch import TorchDispatchMode

from .derived import Call, Derived, look_up
from .errors import UnsupportedError
from .modes import Mode
from .planning import as_number
from .recording import Recording
from .rules.base import Operation, Phase
from .rules.merging import merged
from .rules.stand_ins import run_plain
from .rules.terms import CHUNK_BYTES, ComputedTerm, SumTerm, Term, total

_POOLING = {torch.max_pool2d, F.max_pool2d}


@dataclass
class Layout:
    """What a graph does with the parameters among its inputs.

    Attributes:
        names: of the inputs that are parameters, by position.
        constants: positions of those that are the model's constants.
        probed: positions of the parameters of each probed operation, by the number of the operation.
        gathered: positions of parameters whose terms are gathered.
        batch: position of the input whose dimension 0 are the samples.
        merged: whether operations have several rows a sample.
        dtype, device: the probe's.
        narrow: the narrowest half precision of the operations' outputs, if there is any.
    """

    names: dict[int, str]
    constants: list[int]
    probed: dict[int, list[int]] = field(default_factory=dict)
    gathered: list[int] = field(default_factory=list)
    batch: int | None = None
    merged: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    narrow: torch.dtype | None = None

    @property
    def order(self) -> list[int]:
        """Positions of the parameters that the probe tells of, two rows each."""
        return [*(k for positions in self.probed.values() for k in positions), *self.gathered]

    def new_probe(self, parameters: int, batch_size: int) -> Tensor:
        """Zeros for a number of parameters and samples."""
        return torch.zeros(2 * parameters, batch_size, dtype=self.dtype, device=self.device, requires_grad=True)


class Written:
    """A captured graph as it was written, and what it does with parameters."""

    def __init__(self, graph: fx.GraphModule, layout: Layout):
        """Keep both."""
        self.graph, self.layout = graph, layout
        # The recording of the last call, to which the nodes that were made in it refer weakly.
        self.traced: Traced | None = None

    def examples(self) -> list[Any]:
        """The inputs, as tensors without values."""
        return [node.meta["example_value"] for node in self.graph.graph.find_nodes(op="placeholder")]

    def recorded(self, probe: Tensor, inputs: Sequence[Any]) -> Any:
        """The graph's outputs, with statistics in the gradient of the probe."""
        layout, given = self.layout, list(inputs)
        widths = [*(2 * len(positions) for positions in layout.probed.values()), *(2 for _ in layout.gathered)]
        shares = probe.split(widths)
        self.traced = recording = Traced(dict(zip(layout.probed, shares, strict=False)))
        for k, share in zip(layout.gathered, shares[len(layout.probed) :], strict=True):
            given[k] = _Gathered.apply(recording, layout.names[k], share.to(given[k].device), given[k])
        outputs = recording.run_graph(self.graph, given, layout)
        recording.phase, recording.batch_size = Phase.STATISTICS, probe.size(1)
        return outputs


class Traced(Recording):
    """The recording of one call of a graph, whose parameters are among its inputs."""

    def __init__(self, probes: Mapping[int, Tensor]):
        """Prepare to record; ``probes`` by the number of the operation that takes them."""
        Mode.__init__(self)
        self.check, self.batchnorm = "never", "refuse"
        self._probes = probes
        self._parts: dict[str, list[Term]] = {}

    def run_graph(self, graph: fx.GraphModule, inputs: Sequence[Any], layout: Layout) -> Any:
        """The outputs of a graph with this layout, recorded."""
        parameters = {name: inputs[k] for k, name in layout.names.items()}
        self._begin(parameters, [inputs[k] for k in layout.constants], None)
        self._gathered = {layout.names[k] for k in layout.gathered}
        with self:
            return graph(*inputs)

    def sq_norms(self, name: str) -> Tensor | None:
        """‖g_i‖², (B,), of a parameter whose terms were gathered in this pass; None where there is none."""
        parts = self._parts.pop(name, None)
        if parts is None:
            return None
        term = merged(parts)
        B, numbers = as_number(term.batch_size), term.shape.numel()
        if isinstance(term, SumTerm | ComputedTerm) and 8 * B * numbers > CHUNK_BYTES:
            raise UnsupportedError(f"the gradients of all samples by {name}, of several uses, would not fit memory")
        return term.sq_norms()

    def _compiler_stance(self) -> AbstractContextManager:
        return nullcontext()

    def finder(self) -> "Callable[[], Traced]":
        """What finds it in the same trace, as long as which it is kept."""
        reference = weakref.ref(self)

        def find() -> Traced:
            recording = reference()
            assert recording is not None
            return recording

        return find

    # What rules ask of a recorder

    def new_probe(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The next operation's share of the graph's probe; zeros of its own where it has none.

        A checkpointed part's second run takes any, whose gradient nobody asks for: it must call no more than the first.
        """
        share = self._probes.get(len(self.operations))
        if self._runs_again:
            share = next((s for s in self._probes.values() if s.shape == shape), None)
        return super().new_probe(shape, dtype, device) if share is None else share.to(device, dtype)

    def takes_statistics(self, operation: Operation) -> bool:
        """Whether the operation has a share of the probe."""
        return self.phase is Phase.STATISTICS and operation.probe is not None and not operation.probe.is_leaf

    def add(self, operation: Operation, edge: GradientEdge) -> None:
        """Take an operation into the record, and see what arrives at it where its terms are gathered."""
        super().add(operation, edge)
        if not self._runs_again and self._gathers(operation):
            edge.node.register_hook(_gatherer(weakref.ref(self), weakref.ref(operation), edge.output_nr))

    def keep_saved(self, operation: Operation, saved: tuple[Tensor, ...]) -> None:
        """Keep what a checkpointed operation's node has for its terms, which are made next."""
        if self._gathers(operation):
            self._saved[id(operation)] = saved

    def _gathers(self, operation: Operation) -> bool:
        return any(self._names[id(leaf)] in self._gathered for t in operation.tracked for leaf in self.leaves(t))

    def gather(self, operation: Operation, gy: Tensor) -> None:
        """Keep the terms of an operation until all of a parameter's are there."""
        for name, term in self.terms([operation], [gy]).items():
            self._parts.setdefault(name, []).append(term)

    def _run_plain(self, func, args, kwargs):
        # Activations the compiler joins with what is before and behind, and others may look at that, too.
        return run_plain(self, func, args, kwargs) if func in _POOLING else func(*args, **kwargs)

    def _derive(self, call: Call, result: Any) -> Any:
        if call.func is F.embedding:
            call.func = look_up
        return super()._derive(call, result)

    def _check_repeats(self, derived: Derived) -> None:
        with _WithoutDraws():
            derived.replay({})

    def _fall_back(self, func, args, kwargs, tracked: Sequence[Tensor]) -> Any:
        names = " and ".join(map(self.name_of, tracked))
        raise UnsupportedError(f"{getattr(func, '__name__', func)} on {names} has no rule")


def _gatherer(traced: "weakref.ref[Traced]", operation: "weakref.ref[Operation]", slot: int) -> Callable:
    def hook(_: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
        recording, gathered, gy = traced(), operation(), grads[slot]
        if recording is not None and gathered is not None and gy is not None:
            recording.gather(gathered, gy)

    return hook


class _Gathered(Function):
    """A parameter behind a node to which the backward passes of all its operations lead, with its share of the probe."""

    @staticmethod
    def forward(ctx, recording, name, share, parameter):
        """The parameter."""
        ctx.recording, ctx.of, ctx.dtype = weakref.ref(recording), name, share.dtype
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, grad):
        """Hand the gradient on, and tell the norms."""
        s = ctx.recording().sq_norms(ctx.of)
        return None, None, None if s is None else torch.stack([s, s]).to(ctx.dtype), grad


class _WithoutDraws(TorchDispatchMode):
    """A context in which nothing may draw random numbers, with which a weight would come out differently when made again."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UnsupportedError(f"a weight is made with random numbers, by {func}")
        return func(*args, **(kwargs or {}))


def lay_out(graph: fx.GraphModule, names: dict[int, str], constants: list[int]) -> Layout:
    """What a graph does with the parameters ``names``, found by running it, forward and backward, on tensors without values.

    Raises:
        Exception: the norms of one of them cannot be told.
    """
    layout = Layout(names, constants)
    if list(graph.parameters()):
        raise UnsupportedError("parameters are parts of the captured graph, and no inputs of it")
    if not names:
        return layout
    written = Written(graph, layout)
    inputs = [_renewed(value) for value in written.examples()]
    with inputs[next(iter(names))].fake_mode, enable_python_dispatcher():  # as compilers trace, with sizes left open
        traced = Traced({})
        objective = _objective(traced.run_graph(graph, inputs, layout))
        if objective is None:
            return layout
        reach = traced.walk(objective)
        probed, others = traced.split(reach.operations)
        if not probed and not others:
            return layout
        position = {id(t): k for k, t in enumerate(inputs)}

        def positions(operation: Operation) -> list[int]:
            return [position[id(leaf)] for t in operation.tracked for leaf in traced.leaves(t)]

        layout.probed = {traced.operations.index(o): positions(o) for o in probed}
        layout.gathered = list(dict.fromkeys(k for o in others for k in positions(o)))
        layout.batch, layout.merged = _batch(inputs, layout, {as_number(o.output_rows) for o in (*probed, *others)})
        probes = [o.probe for o in (*probed, *others) if o.probe is not None]
        layout.dtype = torch.float64 if any(p.dtype == torch.float64 for p in probes) else torch.float32
        layout.device, layout.narrow = probes[0].device, reach.narrow
        inputs = [_renewed(value) for value in written.examples()]
        probe = layout.new_probe(len(layout.order), inputs[layout.batch].size(0))
        objective = _objective(written.recorded(probe, inputs))
        assert objective is not None
        torch.autograd.grad(objective, [probe, *(inputs[k] for k in layout.order)])
    return layout


def _renewed(value: Any) -> Any:
    """A tensor with a graph of its own, a leaf if ``value`` is one; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    new = value.detach().requires_grad_(value.requires_grad)
    return new if value.is_leaf else new.clone()


def _objective(outputs: Sequence[Any]) -> Tensor | None:
    """A number that depends on all outputs that something can be differentiated of; None where there is no such."""
    ends = [t.sum() for t in outputs if isinstance(t, Tensor) and t.requires_grad]
    return total(ends) if ends else None


def _batch(inputs: Sequence[Any], layout: Layout, rows: set[int]) -> tuple[int, bool]:
    """The input whose dimension 0 are the samples, and whether operations, with so many ``rows``, have several for each."""
    sizes = {
        k: as_number(t.size(0))
        for k, t in enumerate(inputs)
        if isinstance(t, Tensor) and t.dim() and k not in layout.names and k not in layout.constants
    }
    fitting = [k for k, size in sizes.items() if size and all(r % size == 0 for r in rows)]
    if not fitting:
        raise UnsupportedError("dimension 0 of no input has as many samples as the operations on its parameters")
    found = next((k for k in fitting if sizes[k] in rows), fitting[0])
    return found, rows != {sizes[found]}
