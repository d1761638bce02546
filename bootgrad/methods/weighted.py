"""Gradients of weighted sums of losses, Σ w_i ℓ_i, of a forward pass of which nothing was recorded.

First-order passes of this kind run whatever torch differentiates once: fused recurrent and attention kernels, compiled models,
whose graph is good for one backward pass, and libraries' own reentrant checkpoints, which differentiate into ``.grad`` only.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import graph
from ..errors import RecordingError, UnsupportedError
from ..scaling import Number, multiplied, narrowest, peak_of
from ..second_pass import traceless
from .base import FirstOrder, Forward, mean_by_name

_REENTRANT = "CheckpointFunctionBackward"
_COMPILED = "CompiledFunctionBackward"
ADVICE = 'derivative="finite_difference" needs first derivatives only'


class WeightedPass:
    """The graph of losses (m,), differentiated under several weights.

    Attributes:
        leaves: all parameters, and what else the losses reach.
        finite: whether the losses are, where that was not waited for.
        scale: what they are multiplied by.
    """

    def __init__(self, forward: Forward):
        """Look at the graph.

        Raises:
            ArgumentError: losses of a wrong shape, or not finite.
            RecordingError: the losses depend on no parameter.
            UnsupportedError: a parameter has a gradient hook.
        """
        self._forward, self.losses = forward, forward.losses
        graph.check_losses(self.losses)
        found, self._kinds, self._narrow = _survey(self.losses)
        own = set(map(id, forward.parameters.values()))
        self.leaves = [*forward.parameters.values(), *(t for t in found if id(t) not in own)]
        if _REENTRANT not in self._kinds and not any(id(t) in own for t in found):
            raise RecordingError(
                "the losses do not depend on any parameter of the model that requires grad: compute them from its output, "
                "with gradients enabled"
            )
        for name, p in forward.parameters.items():
            if p._backward_hooks:
                raise UnsupportedError(
                    f"parameter {name} has a gradient hook, so that its gradient is not the mean of the per-sample gradients: "
                    "remove the hook, or change .grad after the backward pass"
                )
        self.finite = forward.scaling.finite(self.losses)
        self.scale = forward.scaling.of(self._narrow, self.losses.numel())
        self._fresh = True

    def gradient(self, weights: Tensor, last: bool = False) -> list[Tensor | None]:
        """The gradient of Σ w_i ℓ_i by leaf; after the ``last`` the graph is let go."""
        replay = self._forward.replay
        if _COMPILED not in self._kinds:
            return self.of(self.losses, weights, retain_graph=not last)
        if self._fresh or replay is None:
            self._fresh = False
            return self.of(self.losses, weights)
        with replay.again() as losses:
            return self.of(losses, weights)

    def of(self, losses: Tensor, weights: Tensor, retain_graph: bool = False) -> list[Tensor | None]:
        """The gradient of Σ w_i ℓ_i by the same leaves, for losses of another pass."""
        factor = self._factor(weights, self.scale.sample)
        weights = weights * factor
        if _REENTRANT in self._kinds:
            with _own_grads(self.leaves):
                torch.autograd.backward(losses, weights, retain_graph=retain_graph)
                return multiplied([leaf.grad for leaf in self.leaves], 1 / factor)
        grads = graph.gradients(losses, self.leaves, weights, retain_graph=retain_graph, allow_unused=True)
        return multiplied(grads, 1 / factor)

    def _factor(self, weights: Tensor, scale: Number) -> Number:
        """What the weights are multiplied by in a pass: in half precision the largest becomes ``scale``, see `scaling`."""
        return 1.0 if self._narrow is None else scale / peak_of(weights)

    def differentiable_gradient(self, weights: Tensor) -> tuple[dict[str, Tensor], Number]:
        """A factor times the gradient of Σ w_i ℓ_i by parameter name, with a graph of its own, and the factor.

        What is not reached has zeros.

        Raises:
            UnsupportedError: compiled or reentrantly checkpointed parts, which have no second derivative.
        """
        for kind, what in ((_COMPILED, "a compiled model"), (_REENTRANT, "reentrant checkpointing")):
            if kind in self._kinds:
                raise UnsupportedError(f"{what} has no second derivative in torch: {ADVICE}")
        parameters = self._forward.parameters
        factor = self._factor(weights, self.scale.first)
        # With weights that require grad, what can be differentiated once leaves a mark.
        weights = (weights.detach() * factor).requires_grad_()
        with second_derivatives():
            grads = graph.gradients(
                self.losses, list(parameters.values()), weights, create_graph=True, materialize_grads=True
            )
        graph.refuse_marked(grads)
        return dict(zip(parameters, grads, strict=True)), factor  # type: ignore[arg-type]

    @contextmanager
    def traceless(self) -> Iterator[None]:
        """Checkpointed parts run again in each backward pass: after the first, that leaves no trace."""
        if self._forward.replay is None:
            yield
            return
        with traceless(self._forward.replay.model):
            yield


def unrecorded(forward: Forward) -> FirstOrder:
    """The plain gradient from one backward pass of which nothing was recorded; Γ is not known."""
    run = WeightedPass(forward)
    grads = run.gradient(torch.full_like(forward.losses, 1 / forward.losses.numel(), requires_grad=False), last=True)
    mean = mean_by_name(forward.parameters, run.leaves, grads)
    return FirstOrder(forward.losses.detach(), run.leaves, grads, mean, None, run.finite)


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Raise UnsupportedError where torch has no second derivative of an operation."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, UnsupportedError) or not any(
            words in str(error) for words in ("is not implemented", "double backward", "differentiate twice")
        ):
            raise
        raise UnsupportedError(
            f"an operation of the model has no second derivative in torch ({error}): {ADVICE}"
        ) from error


def _survey(losses: Tensor) -> tuple[list[Tensor], set[str], torch.dtype | None]:
    """The leaves that losses reach, in a fixed order, the kinds of nodes between, and their narrowest half precision."""
    nodes = list(graph.nodes_behind([losses]))
    kinds = {node.name() for node in nodes}
    leaves = [node.variable for node in nodes if node.name() == "torch::autograd::AccumulateGrad"]
    return leaves, kinds, narrowest(output.dtype for node in nodes for output in node._input_metadata)


@contextmanager
def _own_grads(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Let a backward pass write to a ``.grad`` of its own, without the hooks that wait for it; put the former back."""
    former = [leaf.grad for leaf in leaves]
    hooks = [getattr(leaf, "_post_accumulate_grad_hooks", None) or {} for leaf in leaves]
    held = [dict(h) for h in hooks]
    try:
        for leaf, h in zip(leaves, hooks, strict=True):
            leaf.grad = None
            if h:
                h.clear()
        yield
    finally:
        for leaf, grad, h, items in zip(leaves, former, hooks, held, strict=True):
            leaf.grad = grad
            if items:
                h.update(items)
