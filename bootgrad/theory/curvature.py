"""The mean loss of a data set around a model's parameters: losses, gradient, Hessian–vector products, eigenvalues.

    L(θ) = (1/N) Σ_i ℓ_i(θ)        H = ∇²L(θ)        H v = ∇⟨∇L(θ), v⟩

No P×P matrix is made: a product with H is one more backward pass. Vectors go in flat (P,) or by parameter name, as into
`PerSampleGradients`, and come out flat, in the order of the parameters.

Letters: ``N`` samples, ``P`` entries of all parameters that require grad.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ArgumentTypeError, RecordingError, UnsupportedError
from ..graph import check_losses, gradients, hessian_product, refuse_losses, refuse_marked
from ..per_sample import Direction, as_parameter_dict
from ..recording import named_parameters
from ..rules.process_wide import eager
from ..rules.stand_ins import StandIns
from ..second_pass import check_parameters, displaced, traceless
from ..wrappers import ranks_of


@dataclass(frozen=True)
class Eigenpairs:
    """Some eigenvalues of a Hessian, the wanted end first; all in float64.

    Attributes:
        values: λ, (k,).
        vectors: v of unit length, (k, P), orthogonal to each other.
        products: H v, (k, P).
        residuals: ‖H v − λ v‖, (k,): an eigenvalue of H lies within that distance of λ.
    """

    values: Tensor
    vectors: Tensor
    products: Tensor
    residuals: Tensor


class Hessian:
    """The Hessian of a mean loss at a model's present parameters, as something to multiply with.

        H = theory.Hessian(model, loss_fn, x, y)
        H @ v                       # (P,)
        H.eigenpairs(5).values      # the five largest

    Parameters, ``.grad``, buffers and random number generators are left as they are. When the parameters have changed, the
    next call is about the new ones.

    Args:
        model: the module; its parameters in float32 or float64. What is compiled runs as it was written.
        loss_fn: ``loss_fn(*batch)`` gives losses (N,), and the same ones each time: dropout belongs in ``eval()``.
        batch: the data set: tensors with as many samples in dimension 0 as the first one, others passed as they are.
        chunk: how many samples to run at a time, for less memory at the price of a further forward pass in every product;
            all when None.

    Raises:
        ArgumentError, ArgumentTypeError: losses that are not (N,), not finite, or differ when they are computed again.
        RecordingError: the model has no parameter that requires grad.
        UnsupportedError: a model that several processes train.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor], *batch: Any, chunk: int | None = None):
        """Compute the losses twice, to check them; nothing else yet."""
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if not callable(loss_fn):
            raise ArgumentTypeError(
                f"loss_fn must be a function of the batch that gives losses (N,); got {type(loss_fn).__name__}"
            )
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
            raise ArgumentError(
                f"chunk must be a whole number of at least 1, samples at a time, or None; got {chunk!r}"
            )
        if ranks_of(model) is not None:
            raise UnsupportedError(
                "the Hessian of a model that DistributedDataParallel or fully_shard was called on is not made: "
                "pass the module as it was before, and the data set of all processes"
            )
        self.model, self.loss_fn = model, loss_fn
        self.parameters = named_parameters(model)
        if not self.parameters:
            raise RecordingError("the model has no parameter that requires grad: its loss has no Hessian")
        check_parameters(self.parameters, "Hessian–vector products")
        self.parts = _split(batch, chunk)
        self._kept: tuple[list[int], list[Tensor | None]] | None = None
        with self._running():
            losses = []
            for part in self.parts:
                first = loss_fn(*part)
                check_losses(first)
                refuse_losses(first)
                with torch.no_grad():
                    if not torch.equal(first, loss_fn(*part)):
                        raise ArgumentError(
                            "loss_fn gave other losses when it was called again, so that they are no function of the "
                            "parameters: put dropout into eval(), and leave random augmentation out"
                        )
                losses.append(first.detach())
        self.samples = sum(part.numel() for part in losses)

    @property
    def size(self) -> int:
        """P."""
        return sum(p.numel() for p in self.parameters.values())

    def parameter_vector(self) -> Tensor:
        """θ, (P,)."""
        return flat(p.detach() for p in self.parameters.values())

    def vector(self, value: Direction, what: str = "v") -> Tensor:
        """A direction, flat or by parameter name, as one flat tensor (P,)."""
        return flat(t.detach() for t in as_parameter_dict(value, self.parameters, what).values())

    def losses(self, move: Direction | None = None) -> Tensor:
        """Losses (N,) at θ, or at θ + move, in float64 and without a graph; what is not finite stays so."""
        moved: AbstractContextManager = nullcontext()
        if move is not None:
            by_name = as_parameter_dict(move, self.parameters, "move")
            moved = displaced(self.parameters, by_name.__getitem__, 1.0)
        with moved, self._running(), torch.no_grad():
            return torch.cat([self.loss_fn(*part).double() for part in self.parts])

    def gradient(self) -> Tensor:
        """∇L, (P,)."""
        return self._sum(lambda grads: grads)

    def __matmul__(self, v: Direction) -> Tensor:
        """H v, (P,); v flat (P,) or by parameter name."""
        by_name = as_parameter_dict(v, self.parameters, "v")
        direction = [t.detach().to(p) for t, p in zip(by_name.values(), self._tensors, strict=True)]
        return self._sum(lambda grads: hessian_product(grads, self._tensors, direction, retain_graph=True))

    def eigenpairs(
        self, k: int = 1, *, smallest: bool = False, tolerance: float = 1e-3, steps: int = 200, seed: int = 0
    ) -> Eigenpairs:
        """The k largest eigenvalues, or the smallest, by Lanczos's method.

        One product with H a step, and k at the end, for the residuals. The basis is kept, steps·P numbers in float64, and each
        new vector is made orthogonal to all of it, so that no eigenvalue comes twice; of one that is exactly multiple, fewer
        copies may come than there are. With P steps all eigenvalues are there. With fewer, a value is right to its residual,
        but a residual does not prove that no eigenvalue lies beyond it, for the start may have missed that one.

        Args:
            k: how many.
            smallest: the most negative ones, in place of the largest.
            tolerance: stop when all residuals are below this share of the largest eigenvalue in size.
            steps: the most steps to take.
            seed: of the random start.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.size:
            raise ArgumentError(f"k must be a whole number in 1 … P = {self.size}; got {k!r}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < k:
            raise ArgumentError(f"steps must be a whole number of at least k = {k}; got {steps!r}")
        values, vectors = _lanczos(self._product, self.parameter_vector(), k, smallest, tolerance, steps, seed)
        products = torch.stack([self._product(v) for v in vectors])
        residuals = (products - values[:, None] * vectors).norm(dim=1)
        return Eigenpairs(values, vectors, products, residuals)

    @property
    def _tensors(self) -> list[Tensor]:
        return list(self.parameters.values())

    def _product(self, v: Tensor) -> Tensor:
        return (self @ v).double()

    def _sum(self, function: Callable[[list[Tensor | None]], Sequence[Tensor | None]]) -> Tensor:
        """The sum over parts of a function of the gradient of a part's losses, by tensor and with a graph; by N, and flat."""
        sums = [torch.zeros_like(p, requires_grad=False) for p in self._tensors]
        versions = [p._version for p in self._tensors]
        if self._kept is not None and self._kept[0] != versions:
            self._kept = None
        with self._running():
            for part in self.parts:
                grads = self._gradients(part) if self._kept is None else self._kept[1]
                if len(self.parts) == 1:
                    self._kept = versions, grads
                for total, g in zip(sums, function(grads), strict=True):
                    if g is not None:
                        total += g.detach()
        return flat(sums) / self.samples

    def _gradients(self, part: tuple) -> list[Tensor | None]:
        losses = self.loss_fn(*part)
        check_losses(losses)
        refuse_losses(losses)
        weights = torch.ones_like(losses, requires_grad=True)  # by which a second derivative that would end is seen
        grads = list(gradients(losses, self._tensors, weights, create_graph=True, allow_unused=True))
        refuse_marked(grads)
        return grads

    @contextmanager
    def _running(self) -> Iterator[None]:
        with ExitStack() as stack:
            for context in (traceless(self.model), StandIns(), eager, torch.enable_grad()):
                stack.enter_context(context)
            yield


def flat(parts: Iterable[Tensor]) -> Tensor:
    """Tensors one after the other, as one flat tensor."""
    return torch.cat([t.reshape(-1) for t in parts])


def _split(batch: tuple, chunk: int | None) -> list[tuple]:
    size = next((t.size(0) for t in batch if isinstance(t, Tensor) and t.dim()), 0)
    if chunk is None or chunk >= size:
        return [batch]
    return [
        tuple(t[begin : begin + chunk] if isinstance(t, Tensor) and t.dim() and t.size(0) == size else t for t in batch)
        for begin in range(0, size, chunk)
    ]


@torch.no_grad()
def _lanczos(
    product: Callable[[Tensor], Tensor],
    like: Tensor,
    k: int,
    smallest: bool,
    tolerance: float,
    steps: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Ritz values (k,) and vectors (k, P) of a symmetric product, from the wanted end on."""
    P = like.numel()
    steps = min(steps, P)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.zeros(steps, P, dtype=torch.float64, device=like.device)
    diagonal: list[float] = []
    beside: list[float] = []

    def new_direction(done: int) -> Tensor:
        return orthogonal(torch.randn(P, dtype=torch.float64, generator=generator).to(like.device), done)

    def orthogonal(w: Tensor, done: int) -> Tensor:
        for _ in range(2):  # the second time for what the first left by rounding
            w = w - basis[:done].T @ (basis[:done] @ w)
        return w

    w = new_direction(0)
    basis[0] = w / w.norm()
    while True:
        j = len(diagonal)
        w = product(basis[j])
        diagonal.append(float(basis[j] @ w))
        w = orthogonal(w, j + 1)
        beta = float(w.norm())
        if j + 1 == steps or (j + 1 >= k and j % 5 == 4):
            values, s = torch.linalg.eigh(_tridiagonal(diagonal, beside))
            wanted = torch.arange(k) if smallest else torch.arange(j, j - k, -1)
            residual = beta * float(s[-1, wanted].abs().max())
            if j + 1 == steps or residual <= tolerance * float(values.abs().max()):
                return values[wanted].to(basis), s[:, wanted].T.to(basis) @ basis[: j + 1]
        if beta <= 1e-12 * max(
            map(abs, (*diagonal, *beside))
        ):  # all that is reached from here is known: go on elsewhere
            w, beta = new_direction(j + 1), 0.0
        beside.append(beta)
        basis[j + 1] = w / w.norm()


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    off = torch.diag(torch.tensor(beside, dtype=torch.float64), 1)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + off + off.T
