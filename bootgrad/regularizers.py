"""One object that trains with the penalties Reg1 and Reg2: what `GradientRegularizer` does in a step, whatever the method.

Reg1 = (1/B) Σ_i ‖g_i − c‖²        Reg2 = ‖ḡ − c‖²
"""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import graph
from .accumulation import accumulate, call_hooks, gated
from .centers import BatchMean, Center, as_center
from .errors import ArgumentError, ArgumentTypeError, BootgradWarning, RecordingError, UnsupportedError
from .graph import answers_at_once
from .methods.base import Forward, Gradients, Penalties
from .methods.choice import choose, is_number
from .methods.random_signs import RandomSigns
from .methods.subsets import check_leaves, draw, rows, versions_of
from .penalties import Distances, Report, reg1, reg2
from .per_sample import Zeros
from .recording import named_parameters
from .rules.stand_ins import StandIns
from .second_pass import Replay, Snapshot, same_buffers
from .statistics import record as Record

__all__ = ["GradientRegularizer", "Report", "reg1", "reg2"]

Strength = float | Callable[[int], float]
_FIRST_STEP = {
    "reg1": "reg1 was taken about the batch mean: its center knows nothing before the first step",
    "reg2": "reg2 was left out: its center knows nothing before the first step",
}


def _constant(value: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    """A center's value without a graph, of which a step takes no derivative."""
    if value is None or isinstance(value, Zeros):
        return value
    return {name: t.detach() for name, t in value.items()}


def _moves(center: Center) -> bool:
    """Whether a center asks for the mean gradient, to follow it or to be differentiated."""
    constant = (Center.update, Center.derivative)
    return any(getattr(f, "__func__", f) not in constant for f in (center.update, center.derivative))


class GradientRegularizer:
    """Backward passes with λ₁ Reg1 + λ₂ Reg2 added to the mean loss, for a plain training loop.

        reg = bootgrad.GradientRegularizer(model, reg1=0.1, reg2=0.2, center="ema")
        optimizer.zero_grad()
        report = reg.backward(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y)
        optimizer.step()

    The model's class, forward, hooks and ``state_dict`` stay as they are. Where a method runs the model a second time, dropout
    draws the same numbers again, and random number generators and buffers are left as one pass leaves them.

    ==========================  ======================================  ================================================
    method                      price, 3 being a plain step             bias and variance
    ==========================  ======================================  ================================================
    ``"exact"``                 6 to 9                                  none
    ``"finite_difference"``     6 for Reg2, 6 to 8 with Reg1            O(ε); another estimate where it is not smooth
    ``"random_signs"``          3 + 8 probes, or 3 + 5 probes by        none, or O(ε); the variance of the signs over probes
                                finite differences
    ==========================  ======================================  ================================================

    With ``fraction=m/B`` a price u becomes 3 + (m/B)(u − 3), and with ``every=k`` 3 + (u − 3)/k on average. Both are unbiased:
    the plain gradient is that of the whole batch always. A fraction has the variance (1 − m/B) S²/m in the penalties' gradient,
    S² that of the samples' own parts of it. Steps between penalties leave those of one step k times as large on every k-th.

    Args:
        model: the module to regularize; frozen parameters are left out.
        reg1: λ₁ ≥ 0, a number or a function of the step; all steps count, with penalty or without, and it is asked at each.
        reg2: λ₂ ≥ 0, likewise.
        center: ``"batch_mean"``, ``"zero"``, ``"ema"``, ``"window"``, a mapping {parameter name: tensor}, an object of
            `bootgrad.centers`, or {"reg1": …, "reg2": …}. Centers move after each successful backward. As long as a moving
            center knows nothing, on the first step, Reg1 is about the batch mean and Reg2 is left out.
        method: ``"exact"``; ``"finite_difference"``, from another first-order pass at displaced parameters;
            ``"random_signs"``, for any architecture, with nothing recorded and hence no check for coupled samples; ``"auto"``,
            the cheapest exact one. `Report.method` says what ran.
        fraction: m/B in (0, 1], the share of the batch that the penalty is taken on, at least one sample, chosen at random in
            each step. Every tensor in the batch with as many rows as the first is indexed in dimension 0.
        every: k, the penalty is taken on steps 0, k, 2k, …, with k times λ.
        probes: vectors of signs that ``"random_signs"`` averages over.
        derivative: of ``"random_signs"``: ``"exact"``, by double backward, or ``"finite_difference"``, by first-order passes
            alone, which run compiled models, fused attention and reentrant checkpointing, too. (Parameters that a reentrantly
            checkpointed part has from outside of the model receive the passes' gradients: leave them out of such parts.)
        statistics: whether reports are to tell Γ, ‖ḡ‖² and what follows from them at any price. If not, they are nan where the
            penalties do not bring them along: no norms are made on steps and samples without a penalty, and by ``"exact"``
            none for Γ, and about a constant center no ḡ, a product of each layer less. By ``"exact"`` Reg1 is then that of the
            samples it was taken on, and nan where Reg2 was taken, too.
        epsilon: length of a finite step relative to ‖θ‖; 0.0001. Parameters must be float32 or wider; under autocast to half
            precision, steps that are shorter than its rounding are lost in it.

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
        probes: int = 1,
        derivative: str = "exact",
        epsilon: float | None = None,
        statistics: bool = True,
    ):
        """Check the options; nothing is computed yet."""
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if not named_parameters(model):
            raise RecordingError("the model has no parameter that requires grad: the penalties would do nothing")
        self._method = choose(method, probes, derivative, epsilon)
        if not is_number(fraction) or not 0 < fraction <= 1:
            raise ArgumentError(f"fraction must be a number in (0, 1], a share of the batch; got {fraction!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(
                f"every must be a whole number of at least 1, steps from one penalty to the next; got {every!r}"
            )
        self.model = model
        self.strengths = {"reg1": reg1, "reg2": reg2}
        self.fraction, self.every, self.statistics = fraction, every, bool(statistics)
        self.step = 0
        for name, strength in self.strengths.items():
            self._strength(name, strength if not callable(strength) else 0.0)
        by_term = isinstance(center, Mapping) and center and set(center) <= {"reg1", "reg2"}
        if by_term and not set(center) <= set(named_parameters(model)):
            self.centers = {name: as_center(center.get(name, "batch_mean")) for name in ("reg1", "reg2")}
        elif isinstance(center, Mapping) and not set(center) & set(named_parameters(model)):
            raise ArgumentError(
                f'a center by name has the names of penalties, "reg1" and "reg2", or of parameters; got {list(center)[:5]}'
            )
        else:
            self.centers = dict.fromkeys(("reg1", "reg2"), as_center(center))
        if isinstance(self.centers["reg2"], BatchMean) and (callable(reg2) or reg2 != 0):
            raise ArgumentError(
                'reg2 about "batch_mean" is identically zero: give it a center of its own, for example '
                'center={"reg1": "batch_mean", "reg2": "ema"}'
            )
        if not callable(reg1) and not callable(reg2) and reg1 == 0 and reg2 == 0:
            warnings.warn("reg1 and reg2 are both 0: gradients will be the plain ones", BootgradWarning, stacklevel=2)
        # What is drawn in a step follows from this and the step, so that one that fails and is taken again draws the same.
        draws = isinstance(self._method, RandomSigns) or fraction < 1
        self._seed = int(torch.randint(2**62, (), device="cpu")) if draws else None
        self._recording: Record | None = None
        self._awaits_losses = False

    @property
    def method(self) -> str:
        """The method that runs; "auto" is the one that was chosen."""
        return self._method.name

    def record(self, samples: Tensor | None = None) -> AbstractContextManager:
        """The context for the forward pass, where `backward` is given losses; ``samples`` as for `bootgrad.record`."""
        self._recording = Record(self.model, samples=samples) if self._method.records else None
        self._awaits_losses = True
        return self._recording or StandIns()

    def backward(self, losses: Tensor | Callable[..., Tensor], *batch: Any) -> Report:
        """Accumulate the gradient of ``losses.mean() + λ₁ Reg1 + λ₂ Reg2`` into ``.grad``, move the centers, and report.

        Calls add up as torch's do: after k micro-batches ``.grad`` is the sum of k such gradients, each with its penalties, and
        the centers and the step have moved k times. Divide by k what is to be their mean.

        Args:
            losses: a function of ``batch`` that gives losses (B,), or the losses themselves, computed in ``with reg.record()``.
                Finite differences and fractions need the function, which they call twice or more.
            batch: what the function is called with.

        Raises:
            As `record.backward`; exceptions of the user's function pass as they are. On any error ``.grad``, the centers and
            the step are as before, but for one of a hook that waits for ``.grad``, when the step is done, and of a center's
            own update.
        """
        with ExitStack() as kept:
            report, values, outcome = self._gradients(losses, batch, kept)
        grads = gated(outcome.grads, outcome.finite)
        accumulate(outcome.leaves, grads)
        distinct = {id(c): c for c in self.centers.values()}.values()
        sq_mean, mean = outcome.distances.sq_mean, outcome.mean
        finite = torch.isfinite(sq_mean) if outcome.finite is None else torch.isfinite(sq_mean) & outcome.finite
        if not mean:  # all centers are constant
            pass
        elif not answers_at_once(sq_mean):  # what is not finite is replaced by what the center holds already
            for center in distinct:
                held = values[id(center)]
                center.update({n: torch.where(finite, g, 0 if held is None else held[n]) for n, g in mean.items()})
        elif finite:
            for center in distinct:
                center.update(mean)
        else:
            report = replace(report, notes=(*report.notes, "the centers were left alone: the gradient is not finite"))
        self.step += 1
        call_hooks(outcome.leaves, grads)
        return report

    def _gradients(self, losses: Any, batch: tuple, kept: ExitStack) -> tuple[Report, dict[int, Any], Gradients]:
        """The report, the centers' values by id, and the gradients; nothing of the user's is changed."""
        takes_penalty = self.step % self.every == 0
        generator = torch.Generator()
        if self._seed is not None:
            generator.manual_seed((self._seed + self.step) % 2**63)
        if takes_penalty and (self._seed is not None or self._method.repeats) and graph.is_capturing():
            raise UnsupportedError(
                "a captured graph of kernels would repeat the signs or samples of the step that it was captured from, and "
                'cannot rewind random number generators for a second pass: take method="exact" and fraction=1 there'
            )
        rest, notes = None, []
        if not callable(losses):
            forward = self._take(losses, batch)
        else:
            index, self._recording, self._awaits_losses = None, None, False
            runs_again = takes_penalty and (self.fraction < 1 or self._method.repeats)
            if runs_again:
                check_leaves(batch)
            versions = versions_of(batch)
            if takes_penalty and self.fraction < 1:
                chosen, others = draw(batch, self.fraction, generator)
                before = Snapshot(self.model)
                if others.numel():
                    rest = self._method.plain(self._run(losses, batch, others, False))
                    kept.enter_context(same_buffers(self.model, before))
                    m, index = chosen.numel(), chosen
                    notes.append(f"the penalties were taken on {m} of {m + others.numel()} samples")
            forward = self._run(losses, batch, index, takes_penalty)
            if runs_again and versions != versions_of(batch):
                raise ArgumentError(
                    "the function changed a tensor of its batch in place, and would do so again in each of the passes that "
                    f'method="{self.method}" with fraction={self.fraction} takes: let it work on a copy'
                )
        strengths = {name: self._strength(name, s) for name, s in self.strengths.items()}
        distinct = {id(c): c for c in self.centers.values()}
        values = {key: _constant(c.value(forward.parameters)) for key, c in distinct.items()}
        centers = {name: values[id(c)] for name, c in self.centers.items()}
        taken = {}
        for name, strength in strengths.items() if takes_penalty else ():
            if strength and centers[name] is None and not isinstance(self.centers[name], BatchMean):
                notes.append(_FIRST_STEP[name])
            if strength and (name == "reg1" or centers[name] is not None):
                taken[name] = self.every * strength
        if not taken and rest is None:
            plain = self._method.plain(forward)
            outcome = Gradients(**vars(plain), distances=Distances(plain.mean, centers))
            return self._report(outcome, "plain", notes), values, outcome
        wants_mean = (
            self.statistics or "reg2" in taken or centers["reg1"] is None or any(_moves(c) for c in distinct.values())
        )
        penalties = Penalties(taken, centers, generator, self.statistics, wants_mean)
        outcome = self._method.penalized(forward, penalties, rest)
        for name, strength in taken.items():
            if centers[name] is not None:
                self._add_center_derivative(forward.parameters, outcome, centers[name], self.centers[name], strength)
        return self._report(outcome, self.method, notes), values, outcome

    def _run(self, function: Callable[..., Tensor], batch: tuple, index: Tensor | None, penalized: bool) -> Forward:
        """One pass of the user's function, over the samples ``index`` if they are not the whole batch."""

        def call() -> Tensor:  # the rows are taken in each pass, whose graph is let go
            return function(*(batch if index is None else rows(batch, index)))

        replay = Replay(self.model, call) if penalized and self._method.repeats else None
        recording = Record(self.model) if self._method.records and (penalized or self.statistics) else None
        with recording or StandIns():
            losses = call()
        m = None if index is None else index.numel()
        if m is not None and isinstance(losses, Tensor) and losses.shape != (m,):
            raise ArgumentError(
                f"the losses of {m} samples must have shape ({m},); got {tuple(losses.shape)}: fraction takes rows of every "
                "tensor of the batch that has as many as the first; pass all that belongs to samples in such tensors, or take "
                "fraction=1"
            )
        parameters = recording.parameters if recording else named_parameters(self.model)
        return Forward(losses, parameters, recording, replay)

    def _take(self, losses: Tensor, batch: tuple) -> Forward:
        """The losses that were computed in ``with reg.record()``."""
        if batch:
            raise ArgumentTypeError(
                "a batch was given along with losses: pass the function that computes the losses instead"
            )
        if self._method.repeats or self.fraction < 1:
            raise ArgumentError(
                f'backward must be given the function that computes the losses, which method="{self.method}" with '
                f"fraction={self.fraction} runs more than once; got {type(losses).__name__}"
            )
        if not self._awaits_losses:
            raise RecordingError(
                "nothing was recorded: compute the losses inside `with reg.record():`, or pass a function"
            )
        recording, self._recording, self._awaits_losses = self._recording, None, False
        return Forward(losses, named_parameters(self.model), recording, None)

    def _report(self, outcome: Gradients, method: str, notes: list[str]) -> Report:
        """What the step saw. A penalty that was not taken follows from (1/B) Σ ‖g_i − c‖² = Γ + ‖ḡ − c‖²."""
        covariance, distances, losses = outcome.covariance, outcome.distances, outcome.losses
        reg1 = covariance + distances.about if outcome.reg1 is None else outcome.reg1
        reg2 = distances.from_center["reg2"]
        dtype = losses.dtype
        return Report(
            loss=losses.mean(),
            reg1=reg1.to(dtype),
            reg2=None if reg2 is None else reg2.to(dtype),
            covariance_trace=covariance.to(dtype),
            mean_sq_norm=(covariance + distances.sq_mean).to(dtype),
            sq_mean_norm=distances.sq_mean.to(dtype),
            batch_size=losses.numel(),
            method=method,
            notes=(*notes, *outcome.notes),
            unchecked=losses if outcome.finite is not None else None,
        )

    def _add_center_derivative(self, parameters, outcome: Gradients, c, center: Center, strength: float) -> None:
        """A penalty's derivative by c is −2 λ (ḡ − c); a differentiable center takes it on to θ."""
        if type(center).derivative is Center.derivative:  # a constant
            return
        extra = center.derivative(parameters, {n: g - c[n] for n, g in outcome.mean.items()})
        places = {id(leaf): k for k, leaf in enumerate(outcome.leaves)}
        for name, derivative in (extra or {}).items():
            p = parameters[name]
            step = -2 * strength * derivative
            if id(p) not in places:
                outcome.leaves.append(p)
                outcome.grads.append(step.to(p.dtype))
                continue
            k = places[id(p)]
            grad = outcome.grads[k]
            outcome.grads[k] = (step if grad is None else grad + step).to(p.dtype)

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
        """The step, the centers' states, and what random samples and signs follow from, where there are any."""
        state = {"step": self.step, "centers": {name: c.state_dict() for name, c in self.centers.items()}}
        return state if self._seed is None else state | {"seed": self._seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of a regularizer with the same centers and options; on an error, all is as before."""
        before = {name: center.state_dict() for name, center in self.centers.items()}
        try:
            step = int(state["step"])
            seed = None if self._seed is None else int(state["seed"])
            for name, center in self.centers.items():
                center.load_state_dict(state["centers"][name])
        except Exception as error:
            for name, center in self.centers.items():
                center.load_state_dict(before[name])
            if not isinstance(error, KeyError | TypeError | ValueError | AttributeError):
                raise
            raise ArgumentError(f"not a state_dict of a GradientRegularizer with these centers: {error!r}") from None
        self.step, self._seed = step, seed
