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
from torch.overrides import TorchFunctionMode

from ..errors import ArgumentError, ArgumentTypeError, RecordingError, UnsupportedError
from ..graph import check_losses, gradients, hessian_product, refuse_losses, refuse_marked
from ..per_sample import Direction, as_parameter_dict
from ..recording import named_parameters
from ..rules.normalization import is_over_batch
from ..rules.process_wide import eager
from ..rules.stand_ins import StandIns
from ..second_pass import check_parameters, displaced, traceless
from ..wrappers import ranks_of
from .lanczos import lanczos


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

    Parameters, ``.grad``, buffers and random number generators are left as they are. When parameters, buffers, the mode or the
    data have changed, the next call is about the new ones.

    Args:
        model: the module; its parameters in float32 or float64. What is compiled runs as it was written.
        loss_fn: ``loss_fn(*batch)`` gives losses (N,), and the same ones each time: dropout belongs in ``eval()``.
        batch: the data set: tensors with as many samples in dimension 0 as the first one, others passed as they are.
        chunk: how many samples to run at a time, for less memory at the price of a further forward pass in every product;
            all when None.

    Raises:
        ArgumentError, ArgumentTypeError: losses that are not (N,), not finite, or differ when they are computed again.
        RecordingError: the model has no parameter that requires grad.
        UnsupportedError: a model that several processes train, or batch norm in training mode.
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
        self._sharing = False
        self._kept: list[Tensor | None] | None = None
        with self._running():
            losses = []
            for part in self.parts:
                first = loss_fn(*part)
                check_losses(first)
                refuse_losses(first)
                with torch.no_grad():
                    with _NoBatchStatistics(model):
                        again = loss_fn(*part)
                    refuse_unlike(first, again)
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
        moved: AbstractContextManager[Any] = nullcontext()
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

    @contextmanager
    def one_graph(self) -> Iterator[None]:
        """Products in the block share one graph of the gradient, unless there are chunks; nothing may change meanwhile."""
        outer, self._sharing = self._sharing, True
        try:
            yield
        finally:
            self._sharing = outer
            if not outer:
                self._kept = None

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

        Raises:
            ArgumentError: k or steps out of range, or a product that is not finite.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.size:
            raise ArgumentError(f"k must be a whole number in 1 … P = {self.size}; got {k!r}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < k:
            raise ArgumentError(f"steps must be a whole number of at least k = {k}; got {steps!r}")
        with self.one_graph():
            values, vectors = lanczos(self._product, self.parameter_vector(), k, smallest, tolerance, steps, seed)
            products = torch.stack([self._product(v) for v in vectors])
        residuals = (products - values[:, None] * vectors).norm(dim=1)
        return Eigenpairs(values, vectors, products, residuals)

    @property
    def _tensors(self) -> list[Tensor]:
        return list(self.parameters.values())

    def _product(self, v: Tensor) -> Tensor:
        out = (self @ v).double()
        if not torch.isfinite(out).all():
            raise ArgumentError(
                "the product of the Hessian and a vector of unit length is not finite: the loss has no second derivative "
                "here, as a norm or a square root at zero has none (add a small number inside), or it overflows"
            )
        return out

    def _sum(self, function: Callable[[list[Tensor | None]], Sequence[Tensor | None]]) -> Tensor:
        """The sum over parts of a function of the gradient of a part's losses, by tensor and with a graph; by N, and flat."""
        sums = [torch.zeros_like(p, requires_grad=False) for p in self._tensors]
        with self._running():
            for part in self.parts:
                grads = self._gradients(part) if self._kept is None else self._kept
                if self._sharing and len(self.parts) == 1:
                    self._kept = grads
                for total, g in zip(sums, function(grads), strict=True):
                    if g is not None:
                        total += g.detach()
        return flat(sums) / self.samples

    def _gradients(self, part: tuple[Any, ...]) -> list[Tensor | None]:
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


class _NoBatchStatistics(TorchFunctionMode):
    """Refuses batch norm over the batch, under which a chunk or a changed sample makes every other loss another one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_over_batch(func, args, kwargs):
            over = (
                name
                for name, module in self.model.named_modules()
                if isinstance(module, nn.modules.batchnorm._BatchNorm)
                and (module.training or module.running_mean is None)
            )
            raise UnsupportedError(
                f"batch norm in training mode ({', '.join(over) or 'a function'}) makes every loss depend on every sample, so "
                "that the loss of a data set is no mean over its samples: put the BatchNorm modules into eval() to use their "
                "running statistics, or replace them by GroupNorm with bootgrad.replace_batchnorm(model)"
            )
        return func(*args, **kwargs)


def refuse_unlike(losses: Tensor, again: Tensor) -> None:
    """Raise where losses are others when they are computed again."""
    if not torch.equal(losses, again):
        raise ArgumentError(
            "loss_fn gave other losses when it was called again, so that they are no function of the parameters: put dropout "
            "into eval(), and leave random augmentation out"
        )


def flat(parts: Iterable[Tensor]) -> Tensor:
    """Tensors one after the other, as one flat tensor."""
    return torch.cat([t.reshape(-1) for t in parts])


def _split(batch: tuple[Any, ...], chunk: int | None) -> list[tuple[Any, ...]]:
    size = next((t.size(0) for t in batch if isinstance(t, Tensor) and t.dim()), 0)
    if chunk is None or chunk >= size:
        return [batch]
    return [
        tuple(t[begin : begin + chunk] if isinstance(t, Tensor) and t.dim() and t.size(0) == size else t for t in batch)
        for begin in range(0, size, chunk)
    ]
