"""Compiled models: per-sample norms that come out of the compiled backward pass.

While a forward pass is recorded, what `torch.compile` was given is compiled for it once more: `backend` stands before the
backend that it was given with, and is handed graphs of torch functions. It puts a probe before a graph's inputs, zeros of shape
(2 · parameters, B), and has the user's backend trace the graph under a recording of its own (`traced`). So the rules are traced
along, forward and backward, and the gradient of the probe is ‖g_i‖² of each parameter, as everywhere.

All that is done with a parameter stands in the graph. Where its norms cannot be told, for an operation without a rule or a
parameter that reaches an output unseen, the graph runs as it was written under the recording of the forward pass, which makes
do or refuses it.
"""

import operator
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .errors import UnsupportedError
from .graph import keeping_buffers
from .recording import Recording
from .rules.base import Operation, Phase
from .rules.checkpointed import is_in_checkpoint, without_hooks
from .rules.process_wide import Stance
from .traced import Layout, Written, lay_out

_AS_WRITTEN = "record it as it was written, by bootgrad.record(model, compiled=False)"
_NO_TERMS = (
    "a compiled function has first derivatives and norms, and torch has no second derivatives of it: "
    f'{_AS_WRITTEN}; for penalties GradientRegularizer(method="auto") needs no more than these'
)


def is_compiled(module: nn.Module) -> bool:
    """Whether the module or a part of it was compiled."""
    if "torch._dynamo" not in sys.modules:
        return False
    wrapper = torch._dynamo.OptimizedModule
    return any(isinstance(m, wrapper) or m._compiled_call_impl is not None for m in module.modules())


class _Active(threading.local):
    def __init__(self):
        self.recordings: list[Recording] = []


_active = _Active()


@contextmanager
def compiling_for(recording: Recording) -> Iterator[None]:
    """A context in which compiled functions take statistics for ``recording``."""
    _active.recordings.append(recording)
    try:
        with _stance:
            yield
    finally:
        _active.recordings.pop()


def refuse_compiled(operations: Sequence[Operation], what: str) -> None:
    """Raise where a compiled function is among the operations, of which ``what`` cannot be had."""
    if any(isinstance(o, CompiledOperation) for o in operations):
        raise UnsupportedError(f"{what} cannot be had: {_NO_TERMS}")


def backend(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph for the recording that is active: what `torch.compile` is made to take as its backend."""
    with without_hooks():  # of a checkpoint around the function, which what is traced here is no part of
        return _compiled(_users_backend(), graph, example_inputs)


# A thread without a recording is handed graphs, too, while another one records: they run as they were written there.
_stance = Stance(partial(torch.compiler.set_stance, "default", force_backend=backend))


def _compiled(inner: Callable[..., Any], graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A graph as the ``inner`` backend compiles it, with statistics where gradients are taken."""
    if not torch.is_grad_enabled():
        return inner(graph, example_inputs)
    recording = _active.recordings[-1] if _active.recordings else None
    names, constants = {}, []
    for k, t in enumerate(example_inputs):
        tracked = recording is not None and recording.is_tracked(t)
        if isinstance(t, Tensor) and t.is_leaf and t.requires_grad and (tracked or isinstance(t, nn.Parameter)):
            names[k] = recording.name_of(t) if recording is not None and tracked else f"input {k}"
        elif recording is not None and recording.is_constant(t):
            constants.append(k)
    try:
        written = Written(graph, lay_out(graph, names, constants))
    except Exception as error:  # whatever it is, the graph itself will show it where it matters
        return CompiledGraph(Written(graph, Layout(names, constants)), None, _reason(error))
    with keeping_buffers():
        function = inner(*_with_probe(written, example_inputs))
    written.traced = None
    return CompiledGraph(written, function)


def _reason(error: Exception) -> str:
    """Why a graph cannot be laid out."""
    if isinstance(error, DataDependentOutputException):
        return f"what is done with its parameters cannot be told before their values are there ({error})"
    return str(error).partition("\n")[0]


def _users_backend() -> Callable[..., Any]:
    """The backend that the function which is being compiled was given to `torch.compile` with.

    Nothing public tells it: it is found in the frame of the function's wrapper. Without one there, it is the default.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        context = frame.f_locals.get("self")
        if isinstance(context, torch._dynamo.eval_frame._TorchDynamoContext) and callable(context.callback):
            found: Any = context.callback
            while hasattr(found, "_torchdynamo_orig_backend"):
                found = found._torchdynamo_orig_backend
            return found
        frame = frame.f_back
    return torch._dynamo.lookup_backend("inductor")


def _with_probe(written: Written, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A graph that is one recorded call of what is ``written``, with the probe before its inputs; and example inputs."""

    def call(probe: Tensor, *inputs: Any) -> Any:
        return written.recorded(probe, inputs)

    values, layout = written.examples(), written.layout
    if layout.batch is None:
        example = layout.new_probe(0, 1)
    else:
        samples = values[layout.batch]
        with samples.fake_mode:
            example = layout.new_probe(len(layout.order), samples.size(0))
    graph = fx.Graph()
    inputs = [graph.placeholder("probe"), *(graph.placeholder(f"input_{k}") for k in range(len(values)))]
    for node, value in zip(inputs, [example, *values], strict=True):
        node.meta["example_value"] = value
    outputs: Any = written.graph.graph.output_node().args[0]
    results = graph.call_function(call, tuple(inputs))
    graph.output(tuple(graph.call_function(operator.getitem, (results, k)) for k in range(len(outputs))))
    return fx.GraphModule({}, graph), [example, *example_inputs]


class CompiledGraph:
    """A graph, as it was written, and, where its statistics can be had, compiled with them."""

    def __init__(
        self,
        written: Written,
        function: Callable[..., Any] | None,
        reason: str = "parameters of the recorded modules stand in other places than when it was compiled",
    ):
        """Keep both; ``reason`` says why, if need be, the ``function`` that was compiled is not what runs."""
        self.written, self.function, self.reason = written, function, reason

    def __call__(self, *inputs: Any) -> Any:
        """The graph's outputs, recorded."""
        recordings = _active.recordings
        if not recordings:
            return self.written.graph(*inputs)
        recording = recordings[-1]
        reason = "it is inside of torch.utils.checkpoint, which runs it again" if is_in_checkpoint() else self.reason
        if self.function is None or len(recordings) > 1 or is_in_checkpoint() or not self._fits(recording, inputs):
            recording.warn(f"a compiled function runs as it was written while it is recorded: {reason}")
            return self.written.graph(*inputs)
        return CompiledOperation(recording, self.written, inputs)(recording, self.function, inputs)

    def _fits(self, recording: Recording, inputs: Sequence[Any]) -> bool:
        """Whether parameters and constants are where they were when the function was compiled."""
        layout = self.written.layout
        tracked = {k for k, t in enumerate(inputs) if recording.is_tracked(t)}
        if not tracked:
            return True
        return tracked <= layout.names.keys() and all(recording.is_constant(inputs[k]) for k in layout.constants)


class CompiledOperation(Operation):
    """A call of a compiled graph; tracked are the parameters whose norms its probe tells, which may be none."""

    remedy = f", or {_AS_WRITTEN}"

    def __init__(self, recorder: Recording, written: Written, inputs: Sequence[Any]):
        """Describe the call."""
        layout = written.layout
        self.rows = [row for row, k in enumerate(layout.order) if recorder.is_tracked(inputs[k])]
        super().__init__(recorder, "a compiled function", [inputs[layout.order[row]] for row in self.rows])
        self.written, self.layout = written, layout
        self.batch_size = 1 if layout.batch is None else inputs[layout.batch].size(0)
        self.output_shape = torch.Size([self.batch_size])
        self.probe = layout.new_probe(len(self.rows), self.batch_size)

    def __call__(self, recording: Recording, function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        """The graph's outputs, in the record."""
        given = [recording.alias(t) if recording.is_tracked(t) else t for t in inputs]
        with recording.in_phase(Phase.OUTPUTS):  # in which nothing else is recorded
            probe = self._whole_probe()
            outputs = function(probe, *given)
        self._traced, self.written.traced = self.written.traced, None  # kept, where the backend runs the graph itself
        ends = [get_gradient_edge(t) for t in outputs if isinstance(t, Tensor) and t.requires_grad]
        node = _node_between(ends, get_gradient_edge(probe).node)
        if node is not None:
            recording.add_compiled(self, GradientEdge(node, 0), ends)
        return outputs

    def _whole_probe(self) -> Tensor:
        """The probe with the rows, too, of parameters that the recording does not know."""
        assert self.probe is not None
        n = len(self.layout.order)
        if len(self.rows) == n:
            return self.probe
        whole = self.layout.new_probe(n, self.batch_size).detach()
        index = torch.tensor([2 * row + j for row in self.rows for j in (0, 1)], dtype=torch.long, device=whole.device)
        return whole.index_copy(0, index, self.probe)

    def is_merged(self, batch_size: int) -> bool:
        """Whether an operation of the graph has several rows a sample."""
        return self.layout.merged

    def fits(self, batch_size: int) -> bool:
        """Whether the graph was given as many samples."""
        return self.output_rows == batch_size

    @property
    def output_dtype(self) -> torch.dtype:
        """The narrowest of the graph's operations."""
        return self.layout.narrow or self.layout.dtype

    @property
    def normed(self) -> list[list[Tensor]]:
        """The tracked tensors, one by one."""
        return [[t] for t in self.tracked]

    def norms_in(self, probe_grad: Tensor) -> Tensor:
        """‖g_i‖ of each parameter, which every pass leaves in the probe."""
        return probe_grad[::2].sqrt()

    def terms(self, gy, batch_size):  # noqa: D102
        raise UnsupportedError(_NO_TERMS)


def _node_between(ends: Sequence[GradientEdge], begin: Any) -> Any:
    """The node from whose inputs ``begin`` is one, behind these ends; None where none leads there."""
    stack = [edge.node for edge in ends]
    seen = set(stack)
    while stack:
        node = stack.pop()
        successors = [n for n, _ in node.next_functions if n is not None]
        if begin in successors:
            return node
        stack += [n for n in successors if n not in seen]
        seen.update(successors)
    return None
