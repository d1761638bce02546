"""What losses are multiplied by in backward passes, so that gradients in half precision are not rounded away.

A number below 6e-8 is zero in float16, and one below 6e-5 has lost digits; bfloat16 has float32's range, but 8 bits. Where an
output between the losses and the parameters is in one of them, a sample's loss is multiplied by σ in a pass, and what comes out
is divided by σ in the parameters' precision:

    σ = S/B    in float16 with a `torch.amp.GradScaler` of factor S: as its own ``scale(losses.mean()).backward()`` does
    σ = 1      in half precision otherwise: 1/B would be rounded in a bfloat16 loss, and take 1/B of float16's range
    σ = 1/B    where all is wider, so that the mean gradient comes out as it is, and no sweep over the parameters is needed

**Second derivatives.** Through the backward pass of σ̃ ℓ_i with its gy, a penalty sends back cotangents h of gy: for Reg1 in a
layer (σ/σ̃) 2 λ (G_i − c) x. What gy and h make where they meet, times a second derivative of the model, is σ times what it is
for the losses alone, and so is the gradient of the mean loss that is taken along. A scaler finds the largest S at which σ times
a gradient does not overflow; so gy and h are to share σ between them. With all of it in σ̃ = S/B, h would have no S at all:
underflow where λ ‖G_i x‖ is small, and where it is large overflow whatever S falls to, so that the scaler would skip steps for
ever. With all of it in h, σ̃ = 1, gy would have none. Each gets half of it,

    σ̃ = √σ, rounded to a power of two, so that dividing by it is exact

and all that is made in half precision answers to S. Without a scaler σ̃ = σ = 1, so that h is without the 1/B of the penalty.

Outside of half precision S enters no pass: ``.grad`` is multiplied by it at the end.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import graph, waiting
from .errors import ArgumentError, ArgumentTypeError

Number = float | Tensor
HALF = (torch.float16, torch.bfloat16)  # the one with the smaller range first


class Scale(NamedTuple):
    """What the losses of one pass over B samples are multiplied by.

    Attributes:
        sample: σ.
        first: σ̃, the same for a backward pass that is to be differentiated.
        to_mean: 1/(σ B), what Σ σ g_i is to be multiplied by to be ḡ; one where nothing is in half precision.
        to_grad: S/(σ B), the same to be what a scaler finds in ``.grad``.
    """

    sample: Number
    first: Number = 1.0
    to_mean: Number = 1.0
    to_grad: Number = 1.0


class Scaling:
    """How the losses of a step are scaled.

    Args:
        scaler: a `torch.amp.GradScaler`, or None; one that is disabled is none.
        device: where its factor is wanted.

    Attributes:
        factor: S, a number on CPUs and () on an accelerator, for which nobody waits; None without a scaler.
    """

    def __init__(self, scaler: Any = None, device: torch.device | None = None):
        """Read the factor.

        Raises:
            ArgumentTypeError: the scaler is none.
            ArgumentError: its factor is zero or infinite.
        """
        self.factor: Number | None = None
        if scaler is None:
            return
        if not callable(getattr(scaler, "scale", None)) or not callable(getattr(scaler, "is_enabled", None)):
            raise ArgumentTypeError(f"scaler must be a torch.amp.GradScaler; got {type(scaler).__name__}")
        if scaler.is_enabled():
            factor = scaler.scale(torch.ones((), device=device))
            self.factor = float(factor) if waiting.answers_at_once(factor) else factor
        if isinstance(self.factor, float) and not 0 < self.factor < math.inf:
            raise ArgumentError(
                f"the scaler's factor is {self.factor}, where gradients that are not finite at any scale drive it: look for "
                "what makes the loss NaN or infinite"
            )

    @property
    def skips(self) -> bool:
        """Whether a scaler will see ``.grad``, and skip the step where it is not finite: then that is no error."""
        return self.factor is not None

    def of(self, narrow: torch.dtype | None, B: int) -> Scale:
        """The scale of a pass over B samples, of which ``narrow`` is the narrowest half precision."""
        S = 1.0 if self.factor is None else self.factor
        if narrow is None:
            return Scale(1 / B, to_grad=S)
        if narrow is not torch.float16 or self.factor is None:
            return Scale(1.0, to_mean=1 / B, to_grad=S / B)
        sigma, to_mean = S / B, 1 / S
        if isinstance(sigma, Tensor):
            return Scale(sigma, sigma.log2().div(2).round().exp2(), to_mean)
        return Scale(sigma, math.ldexp(1.0, round(math.log2(sigma) / 2)), to_mean)

    def scaled(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """S times gradients."""
        return multiplied(grads, 1.0 if self.factor is None else self.factor)

    def finite(self, losses: Tensor) -> Tensor | None:
        """As `graph.check_finite`; where a scaler skips steps nothing is raised, and the answer is there on CPUs, too."""
        if self.factor is None:
            return graph.check_finite(losses)
        return None if waiting.is_capturing() else torch.isfinite(losses.detach()).all()


def narrowest(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The half precision among dtypes with the smallest range, None where there is none."""
    found = set(dtypes)
    return next((dtype for dtype in HALF if dtype in found), None)


def peak_of(weights: Tensor) -> Tensor:
    """The largest of |w_i|, (), or what is nearest to zero where all are zero."""
    return weights.abs().max().clamp(min=torch.finfo(weights.dtype).tiny)


def seeds(losses: Tensor, factor: Number) -> Tensor:
    """``factor`` for each loss, (B,)."""
    if isinstance(factor, Tensor):
        return torch.ones_like(losses, requires_grad=False) * factor.to(losses.dtype)
    return torch.full_like(losses, factor, requires_grad=False)


Gradient = TypeVar("Gradient", Tensor, Tensor | None)


@torch.no_grad()
def multiplied(grads: Sequence[Gradient], factor: Number) -> list[Gradient]:
    """``factor`` times each gradient, in memory of its own; by one, as they are."""
    if isinstance(factor, float) and factor == 1:
        return list(grads)
    dense = [g for g in grads if g is not None and g.layout == torch.strided]
    products = iter(torch._foreach_mul(dense, factor) if dense else ())
    return [g if g is None else next(products) if g.layout == torch.strided else g * factor for g in grads]


def without_autocast(losses: Any) -> AbstractContextManager:
    """A context in which nothing is cast behind our back where ``losses`` are: autocast is for the forward pass alone."""
    kind = losses.device.type if isinstance(losses, Tensor) else "meta"
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
