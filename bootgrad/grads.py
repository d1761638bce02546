"""Writing gradients to ``.grad`` as a backward pass does: all at once, in memory of their own, and hooks last."""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import waiting

_adding = threading.RLock()  # one model in two threads: a sum that the other has begun would be lost


@torch.no_grad()
def gated(grads: Sequence[Tensor | None], finite: Tensor | None, spoil: bool = False) -> list[Tensor | None]:
    """The gradients, or zeros where ``finite``, () on their device, turns out false; nobody waits for it.

    To ``spoil`` them is to put nan there, for a scaler to see.
    """
    if finite is None or (waiting.answers_at_once(finite) and finite):
        return list(grads)
    other = torch.nan if spoil else 0
    return [g if g is None or g.layout != torch.strided else torch.where(finite, g, other) for g in grads]


@torch.no_grad()
def add_to_grads(
    leaves: Sequence[Tensor], grads: Sequence[Tensor | None], before: Callable[[], None] | None = None
) -> None:
    """Add gradients to ``.grad`` in memory of its own, as a backward pass does; `call_hooks` is to follow.

    All memory is made before the first ``.grad`` is written, so that one that cannot be added to leaves all as they were.
    Then ``before`` is called, whose errors leave them so, too, and all that is added in place is added at once.
    """
    with _adding:
        taken: set[int] = set()
        sums: list[tuple[Tensor, Tensor, bool]] = []  # leaf, gradient, whether it is added in place
        for leaf, grad in zip(leaves, grads, strict=True):
            if grad is None:
                continue
            if leaf.grad is None:
                sums.append((leaf, grad if is_traceable_wrapper_subclass(grad) else _owned(grad, leaf, taken), False))
            elif _is_writable(leaf.grad):
                sums.append((leaf, grad, True))
            else:
                sums.append((leaf, leaf.grad + grad if grad.is_sparse else grad + leaf.grad, False))
        if before is not None:
            before()
        added = [(leaf.grad, grad) for leaf, grad, in_place in sums if in_place and leaf.grad is not None]
        if added:
            torch._foreach_add_([present for present, _ in added], [grad for _, grad in added])
        for leaf, grad, in_place in sums:
            if not in_place:
                leaf.grad = grad


@torch.no_grad()
def call_hooks(leaves: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Call the hooks that wait for the ``.grad`` of leaves that received a gradient, last: their errors undo nothing."""
    for leaf, grad in zip(leaves, grads, strict=True):
        hooks = getattr(leaf, "_post_accumulate_grad_hooks", None) or {}
        for hook in list(hooks.values()) if grad is not None else ():
            hook(leaf)


def _is_writable(present: Tensor) -> bool:
    """Whether a gradient can be added to ``present`` in place: it is dense, may be changed, and its entries share no memory."""
    if present.layout != torch.strided or present.is_inference():
        return False
    return not any(stride == 0 and size > 1 for stride, size in zip(present.stride(), present.shape, strict=True))


def _owned(grad: Tensor, leaf: Tensor, taken: set[int]) -> Tensor:
    """``grad`` with the leaf's strides, in memory that is not among what was ``taken`` before."""
    if grad.layout != torch.strided:
        return grad.clone()
    storage = grad.untyped_storage()
    shared = storage.data_ptr() in taken or storage.nbytes() != grad.numel() * grad.element_size()
    taken.add(storage.data_ptr())
    if not shared and grad.stride() == leaf.stride():
        return grad
    return torch.empty_like(leaf, requires_grad=False).copy_(grad)
