"""Many copies of a model, trained at once: a row of parameters for each, and the penalties by formula.

A model gives three means over samples as formulas of its parameters: loss, squared norm and gradient of the samples. From
them both penalties follow, and their derivatives are first derivatives:

    Reg1 = (1/n) Σ ‖g_i − ḡ‖² = (1/n) Σ ‖g_i‖² − ‖ḡ‖²        Reg2 = ‖ḡ − c‖²

Letters: ``…`` copies, ``P`` parameters, ``n`` samples, ``D`` inputs, ``H`` hidden units, ``K`` classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Moments(NamedTuple):
    """Means over the samples of each copy: ℓ̄ (…), (1/n) Σ ‖g_i‖² (…), and ḡ (…, P)."""

    loss: Tensor
    sq_norm: Tensor
    gradient: Tensor

    @property
    def covariance_trace(self) -> Tensor:
        """Γ = (1/n) Σ ‖g_i − ḡ‖² of each copy (…)."""
        return self.sq_norm - _sq(self.gradient)


Model = Callable[[Tensor, Tensor, Tensor], Moments]
Samples = tuple[Tensor, Tensor]


def penalized_gradient(
    model: Model,
    theta: Tensor,
    part: Samples,
    reg1: Tensor | float,
    reg2: Tensor | float,
    *,
    whole: Samples | None = None,
    center: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of ℓ̄ + λ₁ Reg1 + λ₂ Reg2 of each copy, ℓ̄ of a mini-batch.

    Args:
        model: (parameters, inputs, targets) → moments.
        theta: parameters (…, P).
        part: inputs and targets of the mini-batches.
        reg1: λ₁, a number or (…).
        reg2: λ₂, likewise.
        whole: all samples: Reg1 is of these, and Reg2's center is their gradient, which moves with the parameters. Without
            them Reg1 is the mini-batch's.
        center: Reg2's, a constant (…, P), where ``whole`` is not given; Reg2 is left out where there is neither.

    Returns:
        The gradient, and ℓ̄'s alone, (…, P) each.
    """
    theta = theta.detach().requires_grad_()
    drawn = model(theta, *part)
    full = drawn if whole is None else model(theta, *whole)
    penalty = reg1 * full.covariance_trace
    if whole is not None:
        center = full.gradient
    if center is not None:
        penalty = penalty + reg2 * _sq(drawn.gradient - center)
    (move,) = torch.autograd.grad(penalty.sum(), theta)
    mean = drawn.gradient.detach()
    return mean + move, mean


def diagonal_network(theta: Tensor, x: Tensor, y: Tensor) -> Moments:
    """Of a diagonal linear network, w = u ⊙ u − v ⊙ v and ℓ_i = ½ r_i² with r_i = ⟨w, x_i⟩ − y_i.

        g_i = 2 r_i (x_i ⊙ u, −x_i ⊙ v)        ‖g_i‖² = 4 r_i² ⟨x_i ⊙ x_i, u ⊙ u + v ⊙ v⟩

    Args:
        theta: u and v of the copies (…, M, 2D); M of them have the same samples.
        x: inputs (…, n, D).
        y: targets (…, n).
    """
    u, v = theta.chunk(2, -1)
    n = x.shape[-2]
    residuals = (u * u - v * v) @ x.mT - y[..., None, :]  # (…, M, n)
    back = 2 / n * residuals @ x  # (…, M, D)
    sq_norm = 4 / n * (residuals.square() @ x.square() * (u * u + v * v)).sum(-1)
    return Moments(0.5 * residuals.square().mean(-1), sq_norm, torch.cat([u * back, -v * back], -1))


class TwoLayers:
    """One hidden layer, ReLU, cross-entropy; a linear layer's gradient has the squared norm (‖x‖² + 1) ‖gy‖².

    Args:
        inputs: D.
        hidden: H.
        classes: K.
    """

    def __init__(self, inputs: int, hidden: int, classes: int):
        """Parameters are in the order of torch's: weight and bias of each layer."""
        self.classes = classes
        self.shapes = ((hidden, inputs), (hidden,), (classes, hidden), (classes,))
        self.sizes = [torch.Size(shape).numel() for shape in self.shapes]

    def start(self, generator: torch.Generator) -> Tensor:
        """Parameters (P,), uniform in ±1/√(inputs of the layer) as torch's are."""
        (_, inputs), _, (_, hidden), _ = self.shapes
        bounds = (inputs**-0.5, inputs**-0.5, hidden**-0.5, hidden**-0.5)
        parts = [b * (2 * torch.rand(n, generator=generator) - 1) for b, n in zip(bounds, self.sizes, strict=True)]
        return torch.cat(parts)

    def __call__(self, theta: Tensor, x: Tensor, y: Tensor) -> Moments:
        """Of parameters (…, P) on samples of the same or fewer leading dimensions, (…, n, D) and (…, n)."""
        n = x.shape[-2]
        w1, b1, w2, b2 = self._split(theta)
        hidden = torch.relu(x @ w1.mT + b1[..., None, :])
        logits = hidden @ w2.mT + b2[..., None, :]
        log_p = logits.log_softmax(-1)
        truth = F.one_hot(y, self.classes).to(theta.dtype)
        gy2 = log_p.exp() - truth  # (…, n, K)
        gy1 = gy2 @ w2 * (hidden > 0)
        loss = -(truth * log_p).sum(-1).mean(-1)
        sq_norms = _sq(gy1) * (_sq(x) + 1) + _sq(gy2) * (_sq(hidden) + 1)
        means = (gy1.mT @ x, gy1.sum(-2), gy2.mT @ hidden, gy2.sum(-2))
        flat = [part.flatten(theta.dim() - 1) for part in means]
        return Moments(loss, sq_norms.mean(-1), torch.cat(flat, -1) / n)

    def _split(self, theta: Tensor) -> list[Tensor]:
        parts = theta.split(self.sizes, -1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True)]


def _sq(x: Tensor) -> Tensor:
    return x.square().sum(-1)
