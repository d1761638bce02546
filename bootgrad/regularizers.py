"""Reg1 and Reg2, penalties on the noise of mini-batch gradients, and one object that trains with them.

    Reg1 = (1/B) Σ_i ‖g_i − c‖²        Reg2 = ‖ḡ − c‖²

Source: "A Bootstrap Perspective on Stochastic Gradient Descent", arXiv 2512.07676, eqs. 11 and 12.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .accumulation import accumulate, call_hooks, gated
from .centers import BatchMean, Center, as_center
from .errors import ArgumentError, ArgumentTypeError, BootgradWarning, RecordingError, UnsupportedError
from .graph import answers_at_once
from .ops.schema import accumulation_dtype
from .per_sample import Direction, PerSampleGradients, as_parameter_dict, sq_norm
from .recording import named_parameters
from .rules.terms import total
from .statistics import CheckedOnRead, difference
from .statistics import record as Record

Strength = float | Callable[[int], float]
METHODS = ("exact",)


def reg1(G: PerSampleGradients, center: Direction | None = None) -> Tensor:
    """Mean squared deviation of the per-sample gradients, without its strength λ₁.

        Reg1 = (1/B) Σ_i ‖g_i − c‖²

    Args:
        G: made with ``create_graph=True``.
        center: {name: tensor} or flat (P,), constant; the batch mean ḡ when None, which makes Reg1 = Γ.

    Returns:
        Scalar, units of loss²/parameter²; its gradient is (2/B) Σ_i H_i (g_i − c).

    Raises:
        RecordingError: G was made without ``create_graph=True``: the penalty would silently do nothing.

    Source: arXiv 2512.07676, eq. 11.
    """
    _check_differentiable(G, "reg1")
    return G.covariance_trace() if center is None else G.deviation_sq_norms(center).mean()


def reg2(G: PerSampleGradients, center: Direction) -> Tensor:
    """Squared distance of the mini-batch gradient from a center, without its strength λ₂.

        Reg2 = ‖ḡ − c‖²

    Args:
        G: made with ``create_graph=True``.
        center: {name: tensor} or flat (P,), constant.

    Returns:
        Scalar, units of loss²/parameter²; its gradient is 2 H̄ (ḡ − c).

    Raises:
        ArgumentError: no center; about the batch mean Reg2 is identically zero.
        RecordingError: as `reg1`.

    Source: arXiv 2512.07676, eq. 12.
    """
    _check_differentiable(G, "reg2")
    if center is None:
        raise ArgumentError("reg2 needs a center: about the batch mean it is identically zero")
    c = as_parameter_dict(center, dict(G.parameters), "center")
    return total(sq_norm(g - c[name]) for name, g in G.mean().items())


def _check_differentiable(G: PerSampleGradients, name: str) -> None:
    if not isinstance(G, PerSampleGradients):
        raise ArgumentTypeError(f"{name} takes per-sample gradients of record(model); got {type(G).__name__}")
    if not G.differentiable:
        raise RecordingError(
            f"{name} of per-sample gradients made without create_graph=True has no gradient and would silently do nothing: "
            "make them with rec.per_sample_gradients(losses, create_graph=True)"
        )


_FIRST_STEP = {
    "reg1": "reg1 was taken about the batch mean: its center knows nothing before the first step",
    "reg2": "reg2 was left out: its center knows nothing before the first step",
}


def _total_sq_norm(tensors) -> Tensor:
    """Σ ‖t‖² over tensors, in float64."""
    return total(torch.linalg.vector_norm(t, dtype=accumulation_dtype(t.dtype)).double().square() for t in tensors)


@dataclass(frozen=True)
class Report(CheckedOnRead):
    """What one step of a `GradientRegularizer` saw; detached, and about the loss gradient, never the penalized one.

    Attributes:
        loss: mean loss without penalty, ().
        reg1: Reg1 without λ₁, ().
        reg2: Reg2 without λ₂, (), or None where there is no center to measure it from.
        covariance_trace: Γ of the batch, ().
        mean_sq_norm: (1/B) Σ ‖g_i‖², ().
        sq_mean_norm: ‖ḡ‖², ().
        batch_size: B.
        method: how the penalty's gradient was made.
        notes: what was done otherwise than asked, and why.

    On an accelerator, the first read raises if the losses were not finite; ``.grad`` and the centers were then left alone.
    """

    loss: Tensor
    reg1: Tensor
    reg2: Tensor | None
    covariance_trace: Tensor
    mean_sq_norm: Tensor
    sq_mean_norm: Tensor
    batch_size: int
    method: str
    notes: tuple[str, ...] = ()
    unchecked: Tensor | None = None

    @property
    def minibatch_covariance_trace(self) -> Tensor:
        """Γ / B."""
        return self.covariance_trace / self.batch_size

    @property
    def noise_scale(self) -> Tensor:
        """Γ / ‖ḡ‖², the biased plug-in ratio; feed reports to `NoiseScale` for the unbiased one."""
        return self.covariance_trace / self.sq_mean_norm


class GradientRegularizer:
    """Backward passes with λ₁ Reg1 + λ₂ Reg2 added to the mean loss, for a plain training loop.

        reg = bootgrad.GradientRegularizer(model, reg1=0.1, reg2=0.2, center="ema")
        optimizer.zero_grad()
        report = reg.backward(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y)
        optimizer.step()

    The model's class, forward, hooks and ``state_dict`` stay as they are.

    Args:
        model: the module to regularize; frozen parameters are left out.
        reg1: λ₁ ≥ 0, a number or a function of the step.
        reg2: λ₂ ≥ 0, likewise.
        center: ``"batch_mean"``, ``"zero"``, ``"ema"``, ``"window"``, a mapping {parameter name: tensor}, an object of
            `bootgrad.centers`, or {"reg1": …, "reg2": …}. Centers move after each successful backward. As long as a moving
            center knows nothing, on the first step, Reg1 is about the batch mean and Reg2 is left out.
        method: ``"exact"``.
        fraction: share of the batch that the penalty is taken on; 1.
        every: steps between penalties; 1.

    Raises:
        ArgumentError: an option out of range; Reg2 about the batch mean, which is identically zero.
        RecordingError: the model has no parameter that requires grad.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reg1: Strength = 0.0,
        reg2: Strength = 0.0,
        center: Any = "batch_mean",
        method: str = "exact",
        fraction: float = 1.0,
        every: int = 1,
    ):
        """Check the options; nothing is computed yet."""
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if not named_parameters(model):
            raise RecordingError("the model has no parameter that requires grad: the penalties would do nothing")
        if method not in METHODS:
            raise ArgumentError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
        for name, value in (("fraction", fraction), ("every", every)):
            if isinstance(value, bool) or value != 1:
                raise ArgumentError(f"{name} must be 1, the penalty on all samples of every step; got {value!r}")
        self.model = model
        self.strengths = {"reg1": reg1, "reg2": reg2}
        self.method = method
        self.step = 0
        for name, strength in self.strengths.items():
            self._strength(name, strength if not callable(strength) else 0.0)
        by_term = isinstance(center, Mapping) and center and set(center) <= {"reg1", "reg2"}
        if by_term and not set(center) <= set(named_parameters(model)):
            self.centers = {name: as_center(center.get(name, "batch_mean")) for name in ("reg1", "reg2")}
        else:
            self.centers = dict.fromkeys(("reg1", "reg2"), as_center(center))
        if isinstance(self.centers["reg2"], BatchMean) and (callable(reg2) or reg2 != 0):
            raise ArgumentError(
                'reg2 about "batch_mean" is identically zero: give it a center of its own, for example '
                'center={"reg1": "batch_mean", "reg2": "ema"}'
            )
        if not callable(reg1) and not callable(reg2) and reg1 == 0 and reg2 == 0:
            warnings.warn("reg1 and reg2 are both 0: gradients will be the plain ones", BootgradWarning, stacklevel=2)
        self._recording: Record | None = None

    def record(self) -> Record:
        """The context for the forward pass, where `backward` is given losses."""
        self._recording = Record(self.model)
        return self._recording

    def backward(self, losses: Tensor | Callable[..., Tensor], *batch: Any) -> Report:
        """Accumulate the gradient of ``losses.mean() + λ₁ Reg1 + λ₂ Reg2`` into ``.grad``, move the centers, and report.

        Args:
            losses: a function of ``batch`` that gives losses (B,), or the losses themselves, computed in ``with reg.record()``.
            batch: what the function is called with.

        Raises:
            As `record.backward`; exceptions of the user's function pass as they are. On any error ``.grad``, the centers and
            the step are as before, but for one of a hook that waits for ``.grad``: the step is then done.
        """
        if callable(losses):
            recording = Record(self.model)
            with recording:
                losses = losses(*batch)
        else:
            if batch:
                raise ArgumentTypeError(
                    "a batch was given along with losses: pass the function that computes the losses instead"
                )
            if self._recording is None:
                raise RecordingError(
                    "nothing was recorded: compute the losses inside `with reg.record():`, or pass a function"
                )
            recording, self._recording = self._recording, None
        strengths = {name: self._strength(name, s) for name, s in self.strengths.items()}
        parameters = recording.parameters
        distinct = list({id(c): c for c in self.centers.values()}.values())
        values = {id(c): c.value(parameters) for c in distinct}
        centers = {name: values[id(c)] for name, c in self.centers.items()}
        report, leaves, grads, mean, sq_mean = self._gradients(recording, losses, strengths, centers)
        accumulate(leaves, grads)
        finite = torch.isfinite(sq_mean)
        if not answers_at_once(sq_mean):  # what is not finite is replaced by what the center holds already
            for center in distinct:
                held = values[id(center)]
                center.update({n: torch.where(finite, g, 0 if held is None else held[n]) for n, g in mean.items()})
        elif finite:
            for center in distinct:
                center.update(mean)
        else:
            report = replace(report, notes=(*report.notes, "the centers were left alone: the gradient is not finite"))
        self.step += 1
        call_hooks(leaves, grads)
        return report

    def _gradients(self, recording: Record, losses: Tensor, strengths, centers):
        """The report, the leaves, their gradients, and ḡ; nothing of the user's is changed."""
        G = recording.per_sample_gradients(losses, create_graph=True)
        parameters = recording.parameters  # all: a center may depend on what this batch does not reach
        assert recording.last_reach is not None
        leaves = [*parameters.values(), *recording.last_reach.other_leaves]
        notes = []
        objective = losses.mean()
        penalties: dict[str, Tensor] = {}
        for name, function in (("reg1", reg1), ("reg2", reg2)):
            strength, c, center = strengths[name], centers[name], self.centers[name]
            if strength and c is None and not isinstance(center, BatchMean):
                notes.append(_FIRST_STEP[name])
            if strength and (name == "reg1" or c is not None):
                penalties[name] = function(G, c)
                objective = objective + strength * penalties[name]
        finite = recording.last_reach.finite
        report, mean, sq_mean = self._report(G, losses, centers, penalties, notes, finite is not None)
        try:
            grads = list(torch.autograd.grad(objective, leaves, allow_unused=True))
        except RuntimeError as error:
            if "is not implemented" in str(error):
                raise UnsupportedError(
                    f"an operation of the model has no second derivative in torch ({error}): use an implementation that has"
                ) from error
            raise
        recording.release()
        for name in penalties:
            if centers[name] is not None:
                self._add_center_derivative(parameters, grads, mean, centers[name], self.centers[name], strengths[name])
        return report, leaves, gated(grads, finite), mean, sq_mean

    @torch.no_grad()
    def _report(
        self, G: PerSampleGradients, losses: Tensor, centers, penalties, notes, unchecked: bool
    ) -> tuple[Report, dict[str, Tensor], Tensor]:
        """The report, ḡ and ‖ḡ‖². A penalty that was not taken follows from (1/B) Σ ‖g_i − c‖² = Γ + ‖ḡ − c‖²."""
        mean = G.mean()
        sq_mean = _total_sq_norm(mean.values())
        distance = {
            name: None if c is None else _total_sq_norm(g - c[n] for n, g in mean.items())
            for name, c in centers.items()
        }
        values = {name: value.detach() for name, value in penalties.items()}
        about = sq_mean.new_zeros(()) if distance["reg1"] is None else distance["reg1"]
        covariance = (values["reg1"].double() - about).clamp(min=0) if "reg1" in values else None
        # About a far center Γ is lost in ‖ḡ − c‖²: then it is worth another visit, where to ask does not stop a device.
        if covariance is None or (answers_at_once(about) and about > torch.maximum(sq_mean, 100 * covariance)):
            covariance = difference(G.sq_norms().double(), sq_mean)
            values.setdefault("reg1", covariance + about)
        values.setdefault("reg2", distance["reg2"])
        dtype = losses.dtype
        report = Report(
            loss=losses.detach().mean(),
            reg1=values["reg1"].to(dtype),
            reg2=None if values["reg2"] is None else values["reg2"].to(dtype),
            covariance_trace=covariance.to(dtype),
            mean_sq_norm=(covariance + sq_mean).to(dtype),
            sq_mean_norm=sq_mean.to(dtype),
            batch_size=G.batch_size,
            method=self.method,
            notes=tuple(notes),
            unchecked=losses.detach() if unchecked else None,
        )
        return report, mean, sq_mean

    def _add_center_derivative(self, parameters, grads, mean, c, center: Center, strength: float) -> None:
        """A penalty's derivative by c is −2 λ (ḡ − c); a differentiable center takes it on to θ."""
        extra = center.derivative(parameters, {n: mean[n] - c[n] for n in mean})
        for k, (name, p) in enumerate(parameters.items()):
            if extra is not None and name in extra:
                step = -2 * strength * extra[name]
                grads[k] = (step if grads[k] is None else grads[k] + step).to(p.dtype)

    def _strength(self, name: str, strength: Strength) -> float:
        value = strength(self.step) if callable(strength) else strength
        if isinstance(value, bool) or not isinstance(value, int | float):
            try:
                value = float(value)
            except (TypeError, ValueError):
                raise ArgumentTypeError(f"{name} must be a number or a function of the step; got {value!r}") from None
        if not (math.isfinite(value) and value >= 0):
            raise ArgumentError(f"{name} must be finite and not negative; got {value}")
        return float(value)

    def state_dict(self) -> dict[str, Any]:
        """The step and the centers' states."""
        return {"step": self.step, "centers": {name: c.state_dict() for name, c in self.centers.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of a regularizer with the same centers; on an error, all is as before."""
        before = {name: center.state_dict() for name, center in self.centers.items()}
        try:
            step = state["step"]
            for name, center in self.centers.items():
                center.load_state_dict(state["centers"][name])
        except Exception as error:
            for name, center in self.centers.items():
                center.load_state_dict(before[name])
            if not isinstance(error, KeyError | TypeError | ValueError | AttributeError):
                raise
            raise ArgumentError(f"not a state_dict of a GradientRegularizer with these centers: {error!r}") from None
        self.step = step
