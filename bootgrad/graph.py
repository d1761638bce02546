"""The autograd graph behind losses: what they reach, and gradients with errors that say what to do.

A walk from the losses to the leaves stops at recorded uses of parameters, each of which has a node of its own. A parameter that
is met otherwise reached the losses unseen: an error that names it.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from . import waiting
from .errors import ArgumentError, ArgumentTypeError, RecordingError, UnsupportedError
from .rules.base import CHANGED, Operation
from .rules.terms import total


@dataclass
class Reach:
    """What losses depend on: recorded operations, parameters by name, and leaves outside of the model."""

    operations: list[Operation]
    parameters: dict[str, Tensor]
    other_leaves: list[Tensor]
    graph: int  # a number for the nodes' names in their order
    finite: Tensor | None = None  # whether the losses are, where that was not waited for
    narrow: torch.dtype | None = None  # the narrowest half precision between the losses and the parameters


class Uses:
    """The nodes by which recorded operations take their parameters: aliases of these, one for each use."""

    def __init__(self):
        """Start with none."""
        self._aliases: dict[int, Any] = {}
        self._own: dict[int, Any] = {}  # the operations' nodes, which may lead to an alias
        self._outputs: dict[int, tuple[Any, str]] = {}  # of each alias's operation, the output's node and the name
        self._pending: list[Any] = []

    def __contains__(self, node: Any) -> bool:
        """Whether ``node`` belongs to a recorded use."""
        return id(node) in self._aliases

    def begin(self, alias: Tensor) -> Tensor:
        """Take in an alias that the next operation uses."""
        self._aliases[id(alias.grad_fn)] = alias.grad_fn
        self._pending.append(alias.grad_fn)
        return alias

    def end(self, edge: GradientEdge, name: str, ends: Sequence[GradientEdge] = ()) -> None:
        """Close the operation whose output has this edge: the aliases since the last one are its own.

        Of several outputs, all lead to the node of ``edge``, from ``ends``.
        """
        if self._pending:
            self._outputs |= dict.fromkeys(map(id, self._pending), (edge.node, name))
            # Nodes are numbered as they are made: the operation's own are those since its first alias.
            first = min(alias._sequence_nr() for alias in self._pending)
            stack = [end.node for end in ends or (edge,)]
            while stack:
                node = stack.pop()
                if id(node) not in self._own:
                    self._own[id(node)] = node
                    stack += [n for n, _ in node.next_functions if n is not None and first < n._sequence_nr() < _LEAF]
            self._pending.clear()

    def met_by(self, node: Any) -> bool:
        """Whether ``node`` is part of a recorded operation, and not a derivative of one."""
        return id(node) in self._own

    def check_outputs(self, aliases: Iterable[Any], reached: Collection[Any]) -> None:
        """Raise unless the outputs of these aliases' operations are among the nodes that are ``reached``."""
        for alias in aliases:
            output, name = self._outputs[id(alias)]
            # Autograd puts the change of a view behind what it is a view of, and its own node beside the way.
            if output not in reached:
                raise UnsupportedError(
                    f"the output of {name} is a view of another tensor and was changed in place, which hides it: "
                    "clone it before, or write the change as a call that returns a new tensor"
                )


_LEAF = 2**63  # leaves are numbered from here, in whatever order


def walk(
    losses: Tensor, uses: Uses, names: Mapping[int, str], alone: bool
) -> tuple[dict[Any, str], set[Any], list[Tensor]]:
    """What losses reach.

    Args:
        losses: where the walk begins.
        uses: where it stops.
        names: parameters' names by id.
        alone: the batch is one sample, whose gradient plain autograd has however it comes about.

    Returns:
        The nodes, in a fixed order, with their names; those of them that several lead to; the leaves outside of recorded uses.

    Raises:
        UnsupportedError: a parameter is met outside of its recorded uses, or through their derivatives, or past their output.
    """
    nodes: dict[Any, str] = {} if losses.grad_fn is None else {losses.grad_fn: losses.grad_fn.name()}
    seen = set(nodes)
    shared = set()
    met = []
    leaves: dict[int, Tensor] = {}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if nodes[node] == "CheckpointFunctionBackward":
            raise UnsupportedError(
                "a reentrant CheckpointFunction runs its part with gradients in the backward pass alone, where nothing is "
                "recorded: call torch.utils.checkpoint.checkpoint, of either kind, within the recording"
            )
        for successor, _ in node.next_functions:
            if successor is None:
                continue
            if successor in seen:
                shared.add(successor)
                continue
            if successor in uses:
                if alone:
                    continue
                if uses.met_by(node):
                    met.append(successor)
                    continue
                raise UnsupportedError(
                    f"a parameter reaches the losses through {nodes[node]}, which is a derivative of a recorded operation, "
                    "or the result of one that has no rule: losses made of gradients have no per-sample gradients here"
                )
            seen.add(successor)
            name = successor.name()
            if name != "torch::autograd::AccumulateGrad":
                nodes[successor] = name
                stack.append(successor)
                continue
            variable: Tensor = successor.variable
            if id(variable) in names and not alone:
                raise UnsupportedError(
                    f"parameter {names[id(variable)]} reaches the losses through {nodes[node]}, outside of the "
                    "recorded operations: use it inside the `with` block in supported operations, or freeze it with "
                    "requires_grad_(False)"
                )
            leaves[id(variable)] = variable
    uses.check_outputs(met, nodes)
    return nodes, shared, list(leaves.values())


def check_losses(losses: Any) -> None:
    """Raise unless ``losses`` is (B,), dense and attached to a graph."""
    if not isinstance(losses, Tensor):
        raise ArgumentTypeError(f"losses must be a tensor of shape (B,); got {type(losses).__name__}")
    if losses.layout != torch.strided:
        raise ArgumentTypeError(f"losses must be dense; got {losses.layout}: pass losses.to_dense()")
    if losses.dim() != 1:
        shape = tuple(losses.shape)
        raise ArgumentError(
            f"losses must have shape (B,), one loss per sample; got {shape}: "
            + ('pass reduction="none" to the loss' if not shape else _of_several(shape))
        )
    if losses.numel() == 0:
        raise ArgumentError("losses are empty: a batch needs at least one sample")
    if not losses.is_floating_point():
        raise ArgumentTypeError(f"losses must be floating point; got {losses.dtype}")
    if not losses.requires_grad:
        raise RecordingError(
            "losses do not depend on anything that requires grad: was the forward pass run under torch.no_grad()?"
        )


def _of_several(shape: tuple[int, ...]) -> str:
    """What to do with losses of more dimensions than one: images' pixels see each other, tokens need not."""
    mean = "reduce each sample's losses to one number, by losses.flatten(1).mean(1) where samples are dimension 0"
    if len(shape) > 2:
        return mean
    return (
        f"{mean}; or, where each loss is of a sample of its own, as of a token, pass losses.flatten(), and tell the recording: "
        f"record(model, samples=torch.arange({math.prod(shape)}).view{shape})"
    )


def check_finite(losses: Tensor) -> Tensor | None:
    """Raise where a loss is NaN or infinite; on an accelerator, which a question would stop, return the answer () instead.

    Nothing is checked, and nothing returned, while a graph of kernels is captured.
    """
    if waiting.answers_at_once(losses):
        refuse_losses(losses)
        return None
    return None if waiting.is_capturing() else torch.isfinite(losses.detach()).all()


def refuse_losses(losses: Tensor) -> None:
    """Raise if a loss is NaN or infinite, and name the samples."""
    bad = (~torch.isfinite(losses.detach())).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", …" if len(bad) > 8 else "")
        raise ArgumentError(f"losses are NaN or infinite at {len(bad)} of {losses.numel()} samples: {shown}")


def powers_of_two(batch_size: int, seed: int) -> Tensor:
    """Weights ¼ to 4, as many of each: scaling is exact, so that even rounding errors of independent samples scale."""
    return 2.0 ** (_order(batch_size, seed) % 5 - 2)


def unlike(batch_size: int, seed: int) -> Tensor:
    """Weights from 1 to 2 of which no two are alike."""
    return 1 + _order(batch_size, seed) / batch_size


def _order(batch_size: int, seed: int) -> Tensor:
    return torch.randperm(batch_size, generator=torch.Generator().manual_seed(0x5EED + seed))


def gradients(losses: Tensor, inputs: Sequence, weights: Tensor, **options) -> Sequence[Tensor | None]:
    """`torch.autograd.grad` of Σ w_i ℓ_i, with a freed graph reported as an error of the recording."""
    if not inputs:
        return []
    with torch.enable_grad():
        # As grad_outputs, the weights would have torch import its symbolic shapes: 40 MB for a shape comparison.
        total = (losses * weights).sum()
    try:
        return torch.autograd.grad(total, inputs, **options)
    except RuntimeError as error:
        if "second time" in str(error):
            raise RecordingError(
                "the graph of this recording was freed by an earlier backward: record again, or pass retain_graph=True to it"
            ) from error
        if CHANGED in str(error):
            raise RecordingError(
                "what an operation of the model needs for its backward pass was changed in place after the call: clone it "
                f"first. Operations on parameters keep their inputs here, as most of torch's do ({error})"
            ) from error
        if "is not implemented" in str(error) and options.get("create_graph"):
            raise UnsupportedError(
                f"an operation of the model has no second derivative in torch ({error}): use an implementation that has"
            ) from error
        raise


def hessian_product(
    grads: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    direction: Sequence[Tensor],
    retain_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """The gradient by ``tensors`` of the inner product of ``grads``, which have a graph, with ``direction``."""
    pairs = zip(grads, direction, strict=True)
    inner = [(g * d).sum() for g, d in pairs if g is not None and g.requires_grad]
    if not inner:
        return (None,) * len(tensors)
    return torch.autograd.grad(total(inner), tensors, allow_unused=True, retain_graph=retain_graph)


def keeping_buffers() -> AbstractContextManager:
    """A context to compile functions in that are differentiated several times, and to do it: else they reuse what they save."""
    return torch._functorch.config.patch(donated_buffer=False)


@contextmanager
def as_met(edges: Sequence[GradientEdge]) -> Iterator[Callable[[Sequence[Tensor | None]], list[Tensor | None]]]:
    """A context for `gradients` by edges, with a function that makes of them those that the edges' nodes are run with.

    Where a node has to be run for inputs further back, what torch returns for its edge is the gradient before the hooks of
    that tensor, which may put another in its place.
    """
    seen: dict[int, Tensor] = {}

    def see(k: int, slot: int) -> Callable[[Sequence[Tensor | None]], None]:
        def hook(grads: Sequence[Tensor | None]) -> None:
            if grads[slot] is not None:
                seen[k] = grads[slot]  # type: ignore[assignment]  # not None

        return hook

    handles = [edge.node.register_prehook(see(k, edge.output_nr)) for k, edge in enumerate(edges)]
    try:
        yield lambda grads: [seen.get(k, g) for k, g in enumerate(grads)]
    finally:
        for handle in handles:
            handle.remove()


def filled(grads: Sequence[Tensor | None], operations: Sequence[Operation], like: Tensor) -> list[Tensor]:
    """Gradients by operations' outputs, zeros where the losses reach one by a path that passes no gradient."""
    return [
        like.new_zeros(o.output_shape, requires_grad=False) if g is None else g
        for g, o in zip(grads, operations, strict=True)
    ]


def nodes_behind(tensors: Iterable[Tensor | None]) -> Iterator[Any]:
    """The nodes of the graphs of tensors, each once, in a fixed order; leaves' nodes are among them."""
    stack = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for successor, _ in node.next_functions:
            if successor is not None and successor not in seen:
                seen.add(successor)
                stack.append(successor)


def refuse_marked(grads: Sequence[Tensor | None]) -> None:
    """Raise where a gradient came through a `once_differentiable` function, at which a penalty's derivative would end.

    It leaves its mark where the weights of the losses required grad.
    """
    if "torch::autograd::Error" in [node.name() for node in nodes_behind(grads)]:
        raise UnsupportedError(
            "an operation of the model or the loss is an autograd.Function marked once_differentiable, through which a "
            "penalty would do nothing: write its backward pass in differentiable operations, without the mark"
        )
