"""One step of a `GradientRegularizer`: the passes over its samples that the method and the fraction ask for, and its report."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from .errors import ArgumentError
from .methods.base import Forward, Gradients, Method, Penalties, Whole
from .methods.parts import WithRest
from .methods.subsets import check_leaves, draw, rows, versions_of
from .penalties import Distances, Report
from .recording import named_parameters
from .rules.stand_ins import StandIns
from .second_pass import Replay, Snapshot, same_buffers
from .statistics import record as Record


class Step:
    """What is taken in a step, and what came of its samples.

    Args:
        model: whose losses they are.
        method: makes the penalties' gradients.
        fraction: the share of the samples that the penalties are taken on.
        penalties: what to take; no strength makes a plain step.
        notes: for the report.
    """

    def __init__(self, model: nn.Module, method: Method, fraction: float, penalties: Penalties, notes: list[str]):
        """Begin; nothing is run yet."""
        self.model, self.method, self.fraction, self.penalties, self.notes = model, method, fraction, penalties, notes
        self._outcome: Gradients | None = None

    def add(self, function: Callable[..., Tensor], batch: tuple) -> None:
        """Run the user's function of the batch, as often as it takes; nothing of the user's is changed."""
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

    def add_losses(self, losses: Tensor, recording: Record | None) -> None:
        """Take in losses that were computed already, and what was recorded of that."""
        if self.method.repeats or self.fraction < 1:
            raise ArgumentError(
                f'backward must be given the function that computes the losses, which method="{self.method.name}" with '
                f"fraction={self.fraction} runs more than once; got {type(losses).__name__}"
            )
        self._take(Forward(losses, named_parameters(self.model), recording, None), Whole())

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
        return Forward(losses, parameters, recording, replay)

    def _take(self, forward: Forward, whole: Whole) -> None:
        if self.penalties.strengths:
            self._outcome = whole.complete(self.method.penalized(forward, self.penalties, whole))
        else:
            self._outcome = Gradients(**vars(self.method.plain(forward)))

    def report(self, outcome: Gradients, distances: Distances) -> Report:
        """What the step saw. A penalty that was not taken follows from (1/B) Σ ‖g_i − c‖² = Γ + ‖ḡ − c‖²."""
        covariance, losses = outcome.covariance, outcome.losses
        if covariance is None:
            covariance = torch.full_like(distances.sq_mean, torch.nan)
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
            method=self.method.name if self.penalties.strengths else "plain",
            notes=(*self.notes, *outcome.notes),
            unchecked=losses if outcome.finite is not None else None,
        )
