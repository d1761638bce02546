"""Centers c: estimates of the full-data gradient that Reg1 and Reg2 measure deviations from.

A center is known before a step begins, from the gradients of earlier steps, and constant in it: the derivative of a penalty is
exact for that c. What this drops against the derivative for c = ∇L(θ) is H c-ward noise of zero mean over batches;
`FullBatchMean` with ``differentiable=True`` keeps it. Averages and sums are kept in the accumulation dtype: in half precision,
(1 − β) ḡ would be rounded away.

Letters: ``ḡ_t`` mini-batch gradient of step t, ``P`` parameter entries.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError
from .graph import check_losses, gradients, hessian_product, refuse_losses, refuse_marked
from .ops.schema import accumulation_dtype
from .per_sample import Direction, Zeros, as_parameter_dict
from .wrappers import by_names_as_written

Parameters = Mapping[str, Tensor]


class Center(ABC):
    """One center. ``value`` is asked before a step, ``update`` is told the step's mean gradient after it succeeded."""

    @abstractmethod
    def value(self, parameters: Parameters) -> dict[str, Tensor] | None:
        """C by parameter name, in any floating dtype, or None as long as nothing is known.

        Good until the next `update`, which may change it in place, and not to be written to.
        """

    def update(self, mean: Parameters) -> None:
        """Take in ḡ of a finished step, {name: tensor}, which is not to be changed, and to be copied where it is kept."""
        return

    def derivative(self, parameters: Parameters, direction: Parameters) -> dict[str, Tensor] | None:
        """(∂c/∂θ)ᵀ direction, for centers that are differentiated, without parameters where it is zero; None for constants."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; there is nothing to take over from an empty one."""
        return


class BatchMean(Center):
    """c = ḡ of the batch itself: Reg1 is then the covariance trace Γ, and Reg2 identically zero."""

    def value(self, parameters: Parameters) -> dict[str, Tensor] | None:
        """None: the batch is not known before the step."""
        return None


class Zero(Center):
    """c = 0: Reg1 is the mean squared norm of the per-sample gradients, Reg2 the squared norm of their mean."""

    def value(self, parameters: Parameters) -> dict[str, Tensor] | None:
        """Zeros."""
        return Zeros(parameters)


class Fixed(Center):
    """c as given: {name: tensor} or flat (P,)."""

    def __init__(self, value: Direction):
        """Keep ``value``."""
        self._value = value

    def value(self, parameters: Parameters) -> dict[str, Tensor] | None:
        """The given center."""
        return {name: t.detach() for name, t in as_parameter_dict(self._value, parameters, "center").items()}


class EmaMean(Center):
    """Exponential moving average of the mini-batch gradients, bias-corrected.

        c_t = Σ_{k<t} (1 − β) β^{t−1−k} ḡ_k / (1 − β^t),    c_{t+1} = c_t + (1 − β)/(1 − β^{t+1}) (ḡ_t − c_t)

    The second form is what is computed: P numbers are kept, and c is there without a pass over them.

    Args:
        decay: β in [0, 1).
    """

    def __init__(self, decay: float = 0.9):
        """Start with no steps."""
        if not 0 <= decay < 1:
            raise ArgumentError(f"decay must be in [0, 1); got {decay}")
        self.decay = decay
        self.steps = 0
        self._average: dict[str, Tensor] = {}
        self._weight: Tensor | None = None  # 1 − β^t, on the device, so that it goes on in a captured graph of kernels

    def value(self, parameters: Parameters) -> dict[str, Tensor] | None:
        """The corrected average itself."""
        if self._weight is None:
            return None
        self._average, self._weight = _beside(parameters, self._average), self._weight.to(_device(parameters))
        return as_parameter_dict(self._average, parameters, "the stored center")

    @torch.no_grad()
    def update(self, mean: Parameters) -> None:
        """Average in ḡ; all memory is made before anything is changed."""
        averages, weight = self._average, self._weight
        if weight is None:
            averages = {name: _zeros(g) for name, g in mean.items()}
            weight = torch.zeros((), dtype=torch.float64, device=_device(mean))
        new = [mean[name].detach().to(average.dtype) for name, average in averages.items()]
        moved = weight.lerp(torch.ones_like(weight), 1 - self.decay)
        share = moved.reciprocal() * (1 - self.decay)
        shares = [share.to(average) for average in averages.values()]
        self._average, self._weight = averages, weight
        torch._foreach_lerp_(list(averages.values()), new, shares)
        weight.copy_(moved)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Decay, steps, average and its weight."""
        average = {n: t.clone() for n, t in self._average.items()}
        weight = None if self._weight is None else self._weight.clone()
        return {"decay": self.decay, "steps": self.steps, "mean": average, "weight": weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        decay, steps, weight = EmaMean(state["decay"]).decay, _count(state["steps"]), state["weight"]
        average, weight = _sums(state["mean"]), None if weight is None else _number(weight.clone(), torch.float64)
        if bool(steps) != (weight is not None) or bool(steps) != bool(average):
            raise ValueError(f"{steps} steps, with {'no' if weight is None else 'a'} weight and {len(average)} tensors")
        if not all(t.is_floating_point() for t in average.values()):
            raise ValueError("averages are floating point")
        self.decay, self.steps, self._average, self._weight = decay, steps, average, weight


class WindowMean(Center):
    """Mean of the previous k mini-batch gradients, or of as many as there were.

        c_t = (1/n) Σ_{t−n ≤ s < t} ḡ_s,    n = min(k, t)

    The sum is kept in float64, and loses and gains exactly what is stored: rounding stays at float64's of the largest gradient
    that was ever in it.

    Args:
        k: length of the window, at least 1.
        storage: where the k gradients are: ``"device"``, k·P numbers beside the parameters; ``"bf16"``, there too, rounded to
            bfloat16, which changes c by up to 2⁻⁹ of the mean size of the gradients in it; ``"cpu"``, in main memory, at the
            price of moving P numbers there and P back in each step, for which the device is waited for.
    """

    STORAGES = ("device", "bf16", "cpu")

    def __init__(self, k: int = 16, storage: str = "device"):
        """Start with an empty window."""
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ArgumentError(f"the window's length must be a whole number of at least 1; got {k!r}")
        if storage not in self.STORAGES:
            raise ArgumentError(f"storage must be one of {', '.join(self.STORAGES)}; got {storage!r}")
        self.k, self.storage = k, storage
        self._window: dict[str, Tensor] = {}  # (k, *shape) each; the rows that are not filled yet are zeros
        self._sum: dict[str, Tensor] = {}
        # Steps so far, on the device, so that they go on in a captured graph of kernels.
        self._steps: Tensor | None = None

    def value(self, parameters: Parameters) -> dict[str, Tensor] | None:
        """The mean over the window."""
        if self._steps is None:
            return None
        self._sum, self._steps = _beside(parameters, self._sum), self._steps.to(_device(parameters))
        if self.storage != "cpu":
            self._window = _beside(parameters, self._window)
        sums = as_parameter_dict(self._sum, parameters, "the stored center")
        count = self._steps.clamp(max=self.k)
        return {n: (t / count.to(t.device)).to(_sum_dtype(parameters[n])) for n, t in sums.items()}

    @torch.no_grad()
    def update(self, mean: Parameters) -> None:
        """Put ḡ in the place of the oldest gradient, one parameter after the other, for the sum's conversions take memory."""
        window, sums, steps = self._window, self._sum, self._steps
        if steps is None:
            window = {name: self._rows(g) for name, g in mean.items()}
            sums = {name: torch.zeros_like(g, dtype=torch.float64, requires_grad=False) for name, g in mean.items()}
            steps = torch.zeros((), dtype=torch.int64, device=_device(mean))
        oldest = steps.remainder(self.k).reshape(1)
        self._window, self._sum, self._steps = window, sums, steps
        for name, rows in window.items():
            new, row = mean[name].detach().to(rows).unsqueeze(0), oldest.to(rows.device)
            lost, gained = rows.index_select(0, row)[0].to(sums[name]), new[0].to(sums[name])
            sums[name].sub_(lost).add_(gained)
            rows.index_copy_(0, row, new)
        steps += 1

    def _rows(self, g: Tensor) -> Tensor:
        device = torch.device("cpu") if self.storage == "cpu" else g.device
        return torch.zeros(self.k, *g.shape, dtype=torch.bfloat16 if self.storage == "bf16" else g.dtype, device=device)

    def state_dict(self) -> dict[str, Any]:
        """Length, steps, the window and its sum."""
        window, sums = ({n: t.clone() for n, t in held.items()} for held in (self._window, self._sum))
        steps = None if self._steps is None else self._steps.clone()
        return {"k": self.k, "steps": steps, "window": window, "sum": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, with the window in the dtype that it has there."""
        window, sums = ({n: t.clone() for n, t in by_names_as_written(state[key]).items()} for key in ("window", "sum"))
        k, steps = WindowMean(state["k"]).k, None if state["steps"] is None else state["steps"].clone()
        if steps is not None:
            _count(int(_number(steps, torch.int64)))
        shapes, rows = ({n: tuple(t.shape) for n, t in held.items()} for held in (sums, window))
        if rows != {n: (k, *shape) for n, shape in shapes.items()} or bool(rows) != (steps is not None):
            raise ValueError(f"a window of {k} has rows {rows} for sums {shapes}")
        if any(t.dtype != torch.float64 for t in sums.values()) or not all(
            t.is_floating_point() for t in window.values()
        ):
            raise ValueError("sums are float64, and windows floating point")
        if self.storage == "cpu":
            window = {n: t.cpu() for n, t in window.items()}
        self.k, self._window, self._sum, self._steps = k, window, sums, steps


class FullBatchMean(Center):
    """The gradient of the mean loss over a whole data set, made anew every few steps by one pass over it.

        c = (1/N) Σ_batches Σ_i ∇ℓ_i(θ)

    Args:
        loader: iterable of batches, gone through anew at every refresh; a batch that is not a tuple or list is one argument.
        loss_fn: ``loss_fn(*batch)`` gives losses (B,) of the model as it is.
        refresh_every: steps between passes.
        differentiable: treat c as the function of θ that it is: a penalty's derivative gains −2 λ H (ḡ − c), H the Hessian
            of the mean loss, by one more pass per step. Needs ``refresh_every=1``.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        loss_fn: Callable[..., Tensor],
        refresh_every: int = 1,
        differentiable: bool = False,
    ):
        """Keep the loader; nothing is computed yet."""
        if isinstance(refresh_every, bool) or not isinstance(refresh_every, int) or refresh_every < 1:
            raise ArgumentError(f"refresh_every must be a whole number of at least 1; got {refresh_every!r}")
        if differentiable and refresh_every != 1:
            raise ArgumentError(
                f"a differentiable center is that of the present parameters: refresh_every must be 1; got {refresh_every}"
            )
        if not callable(loss_fn):
            raise ArgumentTypeError(f"loss_fn must be callable; got {type(loss_fn).__name__}")
        self.loader, self.loss_fn = loader, loss_fn
        self.refresh_every, self.differentiable = refresh_every, differentiable
        self.steps = 0
        self._value: dict[str, Tensor] | None = None

    def value(self, parameters: Parameters) -> dict[str, Tensor] | None:
        """The full gradient at the present parameters, or at those of the last refresh."""
        if self._value is None or self.steps % self.refresh_every == 0:
            known = self._sweep(parameters, None)
            self._value = {n: known[n] if n in known else _zeros(p) for n, p in parameters.items()}
        self._value = _beside(parameters, self._value)
        return dict(self._value)

    def update(self, mean: Parameters) -> None:
        """Count the step."""
        self.steps += 1

    def derivative(self, parameters: Parameters, direction: Parameters) -> dict[str, Tensor] | None:
        """H direction, H the Hessian of the mean loss over the data set."""
        return self._sweep(parameters, direction) if self.differentiable else None

    def _sweep(self, parameters: Parameters, direction: Parameters | None) -> dict[str, Tensor]:
        """The mean gradient, or with a direction the gradient of its inner product with it, of what the losses depend on."""
        tensors = list(parameters.values())
        sums: dict[str, Tensor] = {}
        count = 0
        for batch in self.loader:
            with torch.enable_grad():
                losses = self.loss_fn(*batch) if isinstance(batch, tuple | list) else self.loss_fn(batch)
                check_losses(losses)
                refuse_losses(losses)
                twice = direction is not None
                grads: Sequence[Tensor | None]
                weights = torch.ones_like(losses, requires_grad=twice)
                grads = gradients(losses, tensors, weights, create_graph=twice, allow_unused=True)
                if direction is not None:
                    refuse_marked(grads)
                    grads = hessian_product(grads, tensors, [direction[n] for n in parameters])
            for (name, p), g in zip(parameters.items(), grads, strict=True):
                if g is not None:
                    sums[name] = (sums[name] if name in sums else _zeros(p)).add_(g)
            count += losses.numel()
        if not count:
            raise ArgumentError(
                "the loader of FullBatchMean yields no batch; it must be one that can be gone through again"
            )
        return {name: t.div_(count) for name, t in sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Steps, and the gradient in use."""
        return {"steps": self.steps, "value": self._value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        value = state["value"]
        self.steps, self._value = state["steps"], None if value is None else by_names_as_written(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no number of steps")
    return value


def _number(t: Tensor, dtype: torch.dtype) -> Tensor:
    if t.shape != () or t.dtype != dtype:
        raise ValueError(f"a tensor of {t.dtype} and shape {tuple(t.shape)} is no number of {dtype}")
    return t


def _device(tensors: Parameters) -> torch.device:
    """Where what there is one of lies: beside the first."""
    return next(iter(tensors.values())).device


def _beside(parameters: Parameters, held: Parameters) -> dict[str, Tensor]:
    """What is held by name, on the devices of the parameters: a state may be read elsewhere, and a model be moved."""
    return {name: t.to(parameters[name].device) if name in parameters else t for name, t in held.items()}


def _sum_dtype(t: Tensor) -> torch.dtype:
    return accumulation_dtype(t.dtype)


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=_sum_dtype(p), requires_grad=False)


def _sums(tensors: Parameters) -> dict[str, Tensor]:
    """Copies in the dtype that sums are kept in."""
    return {name: t.to(_sum_dtype(t), copy=True) for name, t in by_names_as_written(tensors).items()}


NAMED: dict[str, Callable[[], Center]] = {"batch_mean": BatchMean, "zero": Zero, "ema": EmaMean, "window": WindowMean}


def as_center(value: Any) -> Center:
    """A center from its name, a mapping {parameter name: tensor}, a flat tensor, or a `Center`.

    Raises:
        ArgumentError: an unknown name.
        ArgumentTypeError: anything else.
    """
    if isinstance(value, Center):
        return value
    if isinstance(value, str):
        if value not in NAMED:
            raise ArgumentError(
                f"center must be one of {', '.join(NAMED)}, a mapping by parameter name, or an object of bootgrad.centers, as "
                f"FullBatchMean(loader, loss_fn); got {value!r}"
            )
        return NAMED[value]()
    if isinstance(value, Mapping | Tensor):
        return Fixed(value)
    raise ArgumentTypeError(
        f"center must be a name, a mapping by parameter name or a Center; got {type(value).__name__}"
    )
