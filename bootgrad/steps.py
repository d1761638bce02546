"""One step of a `GradientRegularizer`: the passes over its samples that the method and the fraction ask for, and its report."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from . import graph
from .errors import ArgumentError
from .methods.base import Forward, Gradients, Method, Penalties, Whole
from .methods.parts import WithRest
from .methods.subsets import check_leaves, draw, rows, versions_of
from .ops.schema import accumulation_dtype
from .penalties import Distances, Report
from .recording import named_parameters
from .rules.base import autocast_now
from .rules.stand_ins import StandIns
from .scaling import Scaling, without_autocast
from .second_pass import Replay, Snapshot, same_buffers
from .statistics import record as Record


class Step:
    """What is taken in a step, and what came of its samples.

    Args:
        model: whose losses they are.
        method: makes the penalties' gradients.
        fraction: the share of the samples that the penalties are taken on.
        penalties: what to take; no strength makes a plain step.
        scaling: how losses are scaled.
        notes: for the report.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        fraction: float,
        penalties: Penalties,
        scaling: Scaling,
        notes: list[str],
    ):
        """Begin; nothing is run yet."""
        self.model, self.method, self.fraction = model, method, fraction
        self.penalties, self.scaling, self.notes = penalties, scaling, notes
        self._outcome: Gradients | None = None

    def add(self, function: Callable[..., Tensor], batch: tuple) -> None:
        """Run the user's function of the batch, as often as it takes; nothing of the user's is changed.

        The function runs under the autocast of now, and nothing else does.
        """
        parameter = next(iter(named_parameters(self.model).values()))
        autocast = autocast_now(parameter.device)

        def run(*batch: Any) -> Tensor:
            with autocast():
                return function(*batch)

        with without_autocast(parameter):
            self._add(run, batch)

    def add_losses(self, losses: Tensor, recording: Record | None) -> None:
        """Take in losses that were computed already, and what was recorded of that."""
        if self.method.repeats or self.fraction < 1:
            raise ArgumentError(
                f'backward must be given the function that computes the losses, which method="{self.method.name}" with '
                f"fraction={self.fraction} runs more than once; got {type(losses).__name__}"
            )
        with without_autocast(losses):
            self._take(Forward(losses, named_parameters(self.model), recording, None, self.scaling), Whole())

    def _add(self, function: Callable[..., Tensor], batch: tuple) -> None:
        runs_again = bool(self.penalties.strengths) and (self.fraction < 1 or self.method.repeats)
        if runs_again:
            check_leaves(batch)
        versions = versions_of(batch)
        with ExitStack() as kept:
            whole, index = Whole(), None
            if self.penalties.strengths and self.fraction < 1:
                chosen, others = draw(batch, self.fraction, self.penalties.generator)
                before = Snapshot(self.model)
                if others.numel():
                    rest = self.method.plain(self._run(function, batch, others, False))
                    kept.enter_context(same_buffers(self.model, before))
                    m, index = chosen.numel(), chosen
                    whole = WithRest(rest, m)
                    self.notes.append(f"the penalties were taken on {m} of {m + others.numel()} samples")
            forward = self._run(function, batch, index, bool(self.penalties.strengths))
            if runs_again and versions != versions_of(batch):
                raise ArgumentError(
                    "the function changed a tensor of its batch in place, and would do so again in each of the passes that "
                    f'method="{self.method.name}" with fraction={self.fraction} takes: let it work on a copy'
                )
            self._take(forward, whole)

    def outcome(self) -> Gradients:
        """What came of the samples."""
        assert self._outcome is not None
        return self._outcome

    def _run(self, function: Callable[..., Tensor], batch: tuple, index: Tensor | None, penalized: bool) -> Forward:
        """One pass of the user's function, over the samples ``index`` if they are not the whole batch."""

        def call() -> Tensor:  # the rows are taken in each pass, whose graph is let go
            return function(*(batch if index is None else rows(batch, index)))

        replay = Replay(self.model, call) if penalized and self.method.repeats else None
        recording = Record(self.model) if self.method.records and (penalized or self.penalties.statistics) else None
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
        return Forward(losses, parameters, recording, replay, self.scaling)

    def _take(self, forward: Forward, whole: Whole) -> None:
        if self.penalties.strengths:
            self._outcome = whole.complete(self.method.penalized(forward, self.penalties, whole))
        else:
            self._outcome = Gradients(**vars(self.method.plain(forward)))

    def report(self, outcome: Gradients, distances: Distances, finite: Tensor | None) -> Report:
        """What the step saw, and whether it is ``finite``.

        A penalty that was not taken follows from (1/B) Σ ‖g_i − c‖² = Γ + ‖ḡ − c‖².
        """
        covariance, losses = outcome.covariance, outcome.losses
        if covariance is None:
            covariance = torch.full_like(distances.sq_mean, torch.nan)
        reg1 = covariance + distances.about if outcome.reg1 is None else outcome.reg1
        reg2 = distances.from_center["reg2"]
        dtype = accumulation_dtype(losses.dtype)

        believed = outcome.finite if self.scaling.skips else None

        def told(t: Tensor) -> Tensor:
            return (t if believed is None else torch.where(believed, t, torch.nan)).to(dtype)

        notes = [*self.notes, *outcome.notes]
        if finite is not None and graph.answers_at_once(finite) and not finite:
            skipped = ", and the scaler skips the step" if self.scaling.skips else ""
            notes.append(f"the centers were left alone: the gradient is not finite{skipped}")
        return Report(
            loss=losses.mean(dtype=dtype),
            reg1=told(reg1),
            reg2=None if reg2 is None else told(reg2),
            covariance_trace=told(covariance),
            mean_sq_norm=told(covariance + distances.sq_mean),
            sq_mean_norm=told(distances.sq_mean),
            batch_size=losses.numel(),
            method=self.method.name if self.penalties.strengths else "plain",
            notes=tuple(notes),
            finite=finite if self.scaling.skips else None,
            unchecked=losses if outcome.finite is not None and not self.scaling.skips else None,
        )
