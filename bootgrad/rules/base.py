"""What a recorded operation is, and how the gradient of its output becomes per-sample gradients of its parameters.

A rule is a function ``rule(recorder, func, args, kwargs)``, registered for the torch functions it understands. It runs the
operation, so that the user's graph goes on, and hands the recorder an `Operation` that can turn ``gy`` into `Term`s. It may
return ``NotImplemented`` to leave a call to the fallback.

Two `autograd.Function`s put an operation into the graph. `RecordedProduct` replaces a linear or convolution layer;
`Tap` follows any other operation whose rows are small. Each takes a ``probe``, a tensor of zeros of shape
(2 · parameters, rows of the output): while statistics are taken, its gradient carries ‖g_i‖² and ‖g_i − c‖² of each
parameter, so that no (x, gy) outlives its own step of the backward pass.
"""

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import RecordingError
from ..ops.product import Product, Visit, Visited, input_grad, weight_grad
from ..ops.schema import accumulation_dtype
from ..planning import ConvLayer, LinearLayer
from .checkpointed import is_in_checkpoint
from .samples import Reading
from .terms import DenseTerm, FactoredTerm, Term, VisitedBias, VisitedTerm

CHANGED = "modified by an inplace operation"  # what torch says when saved tensors are not what they were


class Phase(Enum):
    """What a backward pass through recorded operations is for."""

    PLAIN = auto()  # gradients of everything, as without a recording
    OUTPUTS = auto()  # gradients of the operations' outputs only
    STATISTICS = auto()  # gradients of everything, and the probes
    ROW_NORMS = auto()  # the norms of the rows of gy, in the probes


def autocast_now(device: torch.device) -> Callable[[], AbstractContextManager]:
    """A function that makes contexts with the present autocast of a device, in which to run a call again."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return partial(torch.autocast, kind, dtype, enabled, False) if enabled else nullcontext


def as_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors as the present autocast hands them to operations that it runs in its own dtype."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def is_in_place(func: Callable) -> bool:
    """Whether a torch function changes its first argument, by its name."""
    name = getattr(func, "__name__", "")
    return name.startswith("__i") if name.endswith("__") else name.endswith("_")


class Recorder(Protocol):
    """What rules may ask of the recording."""

    phase: Phase
    batch_size: int

    def is_tracked(self, value: Any) -> bool:
        """Whether ``value`` is a parameter of the model or derived from parameters alone."""

    def name_of(self, tracked: Tensor) -> str:
        """The parameter's name, or those that a derived tensor is made of."""

    def alias(self, tracked: Tensor) -> Tensor:
        """``tracked`` behind a node of its own, by which the walk over the graph knows this use."""

    def alias_cast(self, alias: Tensor, dtype: torch.dtype) -> Tensor:
        """An alias in another dtype, known to the walk, too."""

    def transposed(self, tracked: Tensor) -> Tensor | None:
        """The tracked matrix that this one is the transpose of, if it was made as one."""

    def add(self, operation: "Operation", edge: GradientEdge) -> None:
        """Take ``operation`` into the record, with the edge of its output."""

    def edge_of(self, operation: "Operation") -> GradientEdge:
        """The edge that the operation was added with."""

    def run(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call ``func`` as the model would, recording included."""

    def leading(self, shape: Sequence[int]) -> int:
        """How many leading dimensions of ``shape`` hold rows that belong to samples: one, unless the caller said more."""

    def expand(self, tracked: Tensor, rows: Sequence[int], dims: int, name: str = "expand") -> Tensor:
        """A tracked tensor, of one row or without, for each of ``rows``, leading dimensions, as a tensor of ``dims``.

        ``name`` is that of the operation which it is for.
        """

    def by_sample(self, tracked: Tensor) -> Tensor | None:
        """A tracked tensor that repeats rows for the samples, each sample's its own from here on; None where it does not."""

    def takes_statistics(self, operation: "Operation") -> bool:
        """Whether the operation's probe is read in the present backward pass."""

    def takes_visit(self, tracked: Tensor | None) -> bool:
        """Whether a penalty will visit a product's weight or bias in the graph of the present backward pass."""

    def center_of(self, tracked: Tensor) -> Tensor | None:
        """The center about which statistics are taken, shaped as ``tracked``; None when there is none."""

    def keep_by_product(self, operation: "Operation", gy: Tensor, value: Any) -> None:
        """Keep what a backward pass through the operation made from ``gy`` and its term will need."""

    def keep_saved(self, operation: "Operation", saved: tuple[Tensor, ...]) -> None:
        """Keep what the node of a checkpointed operation has in the present backward pass, if terms are made of it."""

    def held(self, operation: "Operation") -> tuple[Tensor, ...] | None:
        """What was kept by `keep_saved`, once."""

    def by_product(self, operation: "Operation", gy: Tensor) -> Any:
        """What was kept for the operation, once, if it was made from this ``gy``; else None."""

    def product_of(self, product: Product, weight: Tensor | None, bias: Tensor | None) -> Product:
        """The product that a layer with these tracked tensors computes."""

    def new_probe(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros for the operation that is recorded next, whose gradient tells its statistics."""


RULES: dict[Callable, Callable] = {}


def rule(*funcs: Callable):
    """Register a rule for torch functions."""

    def register(function):
        for func in funcs:
            RULES[func] = function
        return function

    return register


class Operation(ABC):
    """One recorded call: its name, the tracked tensors it used, and the edge at which its gy arrives."""

    output_shape: torch.Size
    remedy = ""  # where its rows are not those of samples
    reads_samples = False  # whether ``terms`` are right under any ``reading``

    def __init__(self, recorder: Recorder, name: str, tracked: Sequence[Tensor]):
        """Describe a call of ``name`` on the ``tracked`` tensors."""
        # Weak, and the edge is the recorder's: a graph node holds its operation, so that strong ones would be a cycle
        # through the graph, which no collector sees.
        self._recorder = weakref.ref(recorder)
        self.name = name
        self.tracked = list(tracked)
        self.probe: Tensor | None = None
        # An operation whose part this one can take, too, as long as nobody looks at the output ``between`` them; each walk from
        # losses decides whether it does. Sums of gradients are right either way.
        self.covers: Operation | None = None
        self.between: weakref.ref | None = None
        self.covers_all = False
        self.is_checkpointed = False
        self.row_dims = 1  # leading dimensions of the output in which rows are told apart
        self.reading: Reading | None = None  # which rows are whose; none for N/B consecutive ones of each sample

    @property
    def recorder(self) -> Recorder:
        """The recording, which must still be there."""
        recorder = self._recorder()
        if recorder is None:
            raise RecordingError(
                "the recording is gone: keep the object of `with record(model) as rec:` as long as it is used"
            )
        return recorder

    @property
    def phase(self) -> Phase:
        """What the present backward pass is for; plain where the recording is gone."""
        recorder = self._recorder()
        return Phase.PLAIN if recorder is None else recorder.phase

    @property
    def edge(self) -> GradientEdge:
        """Where the gradient of the output arrives."""
        return self.recorder.edge_of(self)

    @property
    def output_rows(self) -> int:
        """How many rows the output has: the size of its dimension 0, if that is the only one of rows."""
        return math.prod(self.output_shape[: self.row_dims])

    def fits(self, batch_size: int) -> bool:
        """Whether the output's rows may be those of so many samples."""
        return self.output_rows % batch_size == 0

    def is_merged(self, batch_size: int) -> bool:
        """Whether there are several rows a sample."""
        return self.output_rows != batch_size

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype of the output, and of its gradient."""
        return self.edge.node._input_metadata[self.edge.output_nr].dtype

    @abstractmethod
    def terms(self, gy: Tensor, batch_size: int) -> list[Term]:
        """One term per tracked tensor, from the gradient of the output; attached to the graph that made it."""

    @property
    def rows_reached(self) -> Tensor | None:
        """The rows (n,) of the tracked tensors that gradients can be other than zero in; None for all."""
        return None

    def held_bytes(self, batch_size: int) -> int:
        """Of all samples' gradients by the tracked tensors, as the terms hold them."""
        return batch_size * sum(t.numel() * t.element_size() for t in self.tracked)

    def attach(self, y: Tensor) -> Tensor:
        """Take the edge of ``y``, this operation's output, and join the record."""
        self.output_shape, self.is_checkpointed = y.shape, is_in_checkpoint()
        self.recorder.add(self, get_gradient_edge(y))
        return y

    def count_rows(self, leading: Sequence[int]) -> int:
        """The rows of an output in whose ``leading`` dimensions they may be, which is decided here."""
        self.row_dims = self.recorder.leading(leading)
        return math.prod(leading[: self.row_dims])

    def gradient_by_sample(self, gy: Tensor) -> Tensor:
        """The output's gradient as rows of samples, N/B consecutive ones of each.

        As many dimensions as before hold the rows: (N,) merged, and of more (B, M), in which a sample's rows are a dimension.
        """
        return gy if self.reading is None else self._merged(self.reading.gradients(gy))

    def data_by_sample(self, t: Tensor) -> Tensor:
        """The same of another tensor with the output's rows."""
        return t if self.reading is None else self._merged(self.reading.data(t))

    def _merged(self, t: Tensor) -> Tensor:
        return t.flatten(0, 1) if self.row_dims == 1 else t

    def new_probe(self, y_rows: int, like: Tensor) -> Tensor:
        """A probe for an output of ``y_rows`` rows."""
        shape = (2 * len(self.tracked), y_rows)
        self.probe = self.recorder.new_probe(shape, accumulation_dtype(like.dtype), like.device)
        return self.probe

    def probe_gradient(self, rows: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """The probe's gradient from ‖g_i‖² and ‖g_i − c‖² of each tracked tensor."""
        assert self.probe is not None
        # Where there is no center, nobody reads the second of each pair.
        out = torch.stack([t for s, deviation in rows for t in (s, s if deviation is None else deviation)])
        missing = self.probe.size(1) - out.size(1)
        return F.pad(out, (0, missing)) if missing else out

    def read(self, rows: Sequence[Tensor]) -> Tensor:
        """The probe's gradient from the rows (B, *shape) of each tracked tensor."""
        centers = [self.recorder.center_of(t) for t in self.tracked]
        return self.probe_gradient([row_statistics(r, c) for r, c in zip(rows, centers, strict=True)])

    def row_norms(self, gy: Tensor) -> Tensor:
        """The probe's gradient from the norms of the rows of gy."""
        assert self.probe is not None
        out = torch.zeros_like(self.probe, requires_grad=False)
        out[0] = norms_of_rows(gy, self.output_rows, out.dtype)
        return out

    @property
    def normed(self) -> list[list[Tensor]]:
        """The tracked tensors that each row of `norms_in` is about."""
        return [self.tracked]

    def norms_in(self, probe_grad: Tensor) -> Tensor:
        """Norms (·, rows) that scale as the losses do, from what a pass for row norms left in the probe."""
        return probe_grad[:1]

    def hold(self, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the node keeps, as its backward pass has it; where terms are made of it, it is not made a second time."""
        recorder = self._recorder()
        if self.is_checkpointed and recorder is not None:
            recorder.keep_saved(self, saved)
        return saved

    def saved(self) -> tuple[Tensor, ...]:
        """The tensors that the operation's node keeps."""
        held = self.recorder.held(self) if self.is_checkpointed else None
        if held is not None:
            return held
        try:
            return self.edge.node.saved_tensors  # type: ignore[attr-defined]  # a Function's node; the stub is any node's
        except RuntimeError as error:
            if CHANGED in str(error):
                names = " and ".join(map(self.recorder.name_of, self.tracked))
                raise RecordingError(
                    f"an input of {self.name} on {names} was changed in place after the call: clone it first ({error})"
                ) from None
            raise RecordingError(
                f"the graph of the recording was freed (at {self.name}): "
                f"record again, or pass retain_graph=True to the earlier backward ({error})"
            ) from None


class ProductOperation(Operation):
    """A linear or convolution layer; tracked are its weight, its bias, or both."""

    reads_samples = True

    def __init__(self, recorder, name, product: Product, weight: Tensor | None, bias: Tensor | None):
        """Describe the layer; ``weight`` and ``bias`` are None where they are not tracked."""
        super().__init__(recorder, name, [t for t in (weight, bias) if t is not None])
        self.product = recorder.product_of(product, weight, bias)
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        weight, bias = self._alias(weight), None if bias is None else self._alias(bias)
        device = x.device.type
        rows = self.count_rows(x.shape[: -1 if weight.dim() == 2 else 1])
        outside: AbstractContextManager = nullcontext()
        if torch.is_autocast_enabled(device):
            outside = torch.autocast(device, enabled=False)
            dtype = torch.get_autocast_dtype(device)
            x = x if x.dtype == torch.float64 else x.to(dtype)
            weight = weight if weight.dtype == torch.float64 else self.recorder.alias_cast(weight, dtype)
            bias = bias if bias is None or bias.dtype == torch.float64 else self.recorder.alias_cast(bias, dtype)
        with outside:
            y = RecordedProduct.apply(self, self.new_probe(rows, x), x, weight, bias)
        self.shapes = x.shape, y.shape
        return self.attach(y)

    def _alias(self, t: Tensor) -> Tensor:
        return self.recorder.alias(t) if t is self.weight or t is self.bias else t

    def layer(self, batch_size: int) -> LinearLayer | ConvLayer | None:
        """The layer's shape for the cost model; None where the weight is not tracked."""
        if self.weight is None:
            return None
        x, gy = (torch.empty(shape, device="meta") for shape in self.shapes)
        product, x, gy, _ = self.product.factor(x, gy, self.weight.shape, batch_size)
        return product.layer(x, gy)

    def factored(self, x: Tensor, gy: Tensor, batch_size: int) -> FactoredTerm:
        """The weight's term."""
        assert self.weight is not None
        x, gy = self.data_by_sample(x), self.gradient_by_sample(gy)
        product, x, gy, inner = self.product.factor(x, gy, self.weight.shape, batch_size)
        return FactoredTerm(product, x, gy, self.weight.shape, inner)

    def visited(self, x: Tensor, gy: Tensor) -> VisitedTerm | None:
        """The weight's term with a visit in the graph that is made now; None where there is nothing to differentiate."""
        assert self.weight is not None
        x, gy = self.data_by_sample(x), self.gradient_by_sample(gy)
        product, x, gy_of_samples, inner = self.product.factor(x, gy, self.weight.shape, self.recorder.batch_size)
        if not (x.requires_grad or gy_of_samples.requires_grad):
            return None
        visit = Visit(product)
        return VisitedTerm(product, self.weight.shape, inner, visit, Visited.apply(visit, x, gy_of_samples))

    def bias_rows(self, gy: Tensor, batch_size: int) -> Tensor:
        """The bias's rows, (B, O)."""
        rows = self.product.bias_rows(self.gradient_by_sample(gy))
        return rows if rows.size(0) == batch_size else rows.reshape(batch_size, -1, rows.size(1)).sum(1)

    def terms(self, gy, batch_size):  # noqa: D102
        out: list[Term] = []
        if self.weight is not None:
            term = self.recorder.by_product(self, gy)
            # The pass ended before this operation's node, or a hook put another gradient in the place of the one it saw: a
            # visit that is made now is the first to be differentiated.
            if term is None and self.recorder.takes_visit(self.weight):
                term = self.visited(self.saved()[0], gy)
            out.append(self.factored(self.saved()[0], gy, batch_size) if term is None else term)
        if self.bias is not None:
            if out and isinstance(out[0], VisitedTerm) and self.recorder.takes_visit(self.bias):
                out.append(VisitedBias(out[0], self.bias.shape))
            else:
                out.append(DenseTerm(self.bias_rows(gy, batch_size)))
        return out

    def statistics(self, x: Tensor, gy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Σ G_i, the bias's gradient, and the probe's, in one visit."""
        batch_size, center_of = self.recorder.batch_size, self.recorder.center_of
        gw = gb = rows = None
        out = []
        if self.weight is not None:
            term = self.factored(x, gy, batch_size)
            center = center_of(self.weight)
            if center is not None:
                center = center.to(accumulation_dtype(x.dtype)).reshape(term.inner).contiguous()
            gw, s, deviation, rows = term.product.statistics(term.x, term.gy, center)
            gw = gw.reshape(self.weight.shape).to(self.weight.dtype)
            out.append((s, deviation))
        if self.bias is not None:
            rows = self.bias_rows(gy, batch_size) if rows is None else rows
            out.append(row_statistics(rows, center_of(self.bias)))
            gb = rows.sum(0).to(self.bias.dtype)
        return gw, gb, self.probe_gradient(out)


class RecordedProduct(Function):
    """y = W ∗ x + b, with a probe."""

    @staticmethod
    def forward(ctx, operation, probe, x, weight, bias):
        """Compute y."""
        ctx.operation, ctx.x_shape = operation, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight)
        y = operation.product.output(x, weight, bias)
        # Torch lets nobody change a view in place that a Function puts out, and its linear layers with a bias view sequences.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx, gy):
        """Differentiate by what the phase asks for."""
        operation = ctx.operation
        x, weight = operation.hold(ctx.saved_tensors)
        phase, product = operation.phase, operation.product
        if phase is Phase.OUTPUTS and operation.recorder.takes_visit(operation.weight):
            # Before the input's gradient: a later node would be differentiated earlier.
            operation.recorder.keep_by_product(operation, gy, operation.visited(x, gy))
        gx = gw = gb = probe = None
        if ctx.needs_input_grad[2]:
            gx = input_grad(product, gy, weight, gy.new_empty(1).expand(ctx.x_shape) if x is None else x)
        if phase is Phase.ROW_NORMS:
            probe = operation.row_norms(gy)
        elif phase is Phase.STATISTICS and operation.recorder.takes_statistics(operation):
            gw, gb, probe = operation.statistics(x, gy)
        # What is not tracked may come from further back, from other operations.
        for_leaves = phase in (Phase.PLAIN, Phase.STATISTICS)
        if gw is None and ctx.needs_input_grad[3] and (for_leaves or operation.weight is None):
            gw = weight_grad(product, x, gy, weight.dtype)
        if gb is None and ctx.needs_input_grad[4] and (for_leaves or operation.bias is None):
            gb = product.bias_grad(gy)
        return None, probe, gx, gw, gb


class RowsOperation(Operation):
    """An operation whose per-sample gradients are small enough to be held; ``rows_of(gy, B, *saved)`` makes them.

    ``most`` leading dimensions of the output, as of what is saved, may hold rows.
    """

    reads_samples = True

    def __init__(self, recorder, name, tracked, rows_of: Callable[..., list[Tensor]], most: int = 1):
        """Describe the call; ``rows_of`` returns (B, *shape) per tracked tensor, differentiable by gy and the saved."""
        super().__init__(recorder, name, tracked)
        self.rows_of, self.most = rows_of, most

    def __call__(self, y: Tensor, *saved: Tensor | None) -> Tensor:
        """``y``, the output that plain torch computed, in the record; ``saved`` are the tensors that the rows need."""
        return self.attach(Tap.apply(self, self.new_probe(self.count_rows(y.shape[: self.most]), y), y, *saved))

    def rows(self, gy: Tensor, *saved: Tensor | None) -> list[Tensor]:
        """(B, *shape) per tracked tensor."""
        tensors = (None if t is None else self.data_by_sample(t) for t in saved)
        return self.rows_of(self.gradient_by_sample(gy), self.recorder.batch_size, *tensors)

    def terms(self, gy, batch_size):  # noqa: D102
        return [DenseTerm(rows) for rows in self.rows(gy, *self.saved())]


class Tap(Function):
    """The identity, in place, with a probe."""

    @staticmethod
    def forward(ctx, operation, probe, y, *saved):
        """Pass y on."""
        ctx.operation, ctx.unused = operation, (None,) * len(saved)
        ctx.mark_dirty(y)
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx, gy):
        """Pass gy on, and read the probe."""
        operation, probe = ctx.operation, None
        if operation.phase is Phase.ROW_NORMS:
            probe = operation.row_norms(gy)
        if operation.is_checkpointed or operation.phase is Phase.STATISTICS:
            saved = operation.hold(ctx.saved_tensors)
            if operation.phase is Phase.STATISTICS and operation.recorder.takes_statistics(operation):
                probe = operation.read(operation.rows(gy, *saved))
        return None, probe, gy, *ctx.unused


def row_statistics(rows: Tensor, center: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """‖g_i‖² and ‖g_i − c‖² of rows (B, *shape)."""
    term = DenseTerm(rows)
    return term.sq_norms(), None if center is None else term.sq_norms(center)


def norms_of_rows(gy: Tensor, rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """The norms of the ``rows`` of gy, (N,), of which there may be none."""
    return torch.linalg.vector_norm(gy.reshape(rows, gy.numel() // max(1, rows)), dim=1, dtype=dtype)


def per_sample_sum(rows: Tensor, batch_size: int, shape: torch.Size) -> Tensor:
    """``rows`` (N, …) summed to (B, *shape): over N/B consecutive rows and over what ``shape`` was broadcast along.

    ``shape`` aligns with the last dimensions; where it reaches dimension 0, its size there is one.
    """
    if rows.shape == (batch_size, *shape):
        return rows
    merged = rows.unflatten(0, (batch_size, rows.size(0) // batch_size))  # (B, N/B, …)
    aligned = (1,) * (rows.dim() - len(shape)) + tuple(shape)
    dims = [1] + [k + 1 for k in range(1, rows.dim()) if aligned[k] == 1]
    return merged.sum(dims).reshape(batch_size, *shape)
