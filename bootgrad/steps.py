"""One step of a `GradientRegularizer`: the passes over its samples that the method and the fraction ask for, and its report."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import waiting
from .distributed import Ranks, Rounds
from .errors import ArgumentError
from .graph import check_losses
from .methods.base import Forward, Gradients, Method, Penalties, Whole
from .methods.parts import Known, Total, WithRest
from .methods.ranks import OfRanks, Together
from .methods.subsets import check_leaves, draw, rows, versions_of
from .ops.schema import accumulation_dtype
from .penalties import Distances, Report
from .rules.base import autocast_now
from .rules.stand_ins import StandIns
from .scaling import Scaling, without_autocast
from .second_pass import Replay, Snapshot, check_second, same_buffers
from .statistics import answered
from .statistics import record as Record
from .strength_pairs import Plan
from .wrappers import silent


@dataclass(frozen=True)
class _Kept:
    """A pass that a second sweep is to repeat.

    Attributes:
        replay: runs it again.
        losses: of the first time, detached.
        count: the samples that stand behind those that penalties are taken on.
        batch, versions: what the function is called with, and how often its tensors had been written to.
    """

    replay: Replay
    losses: Tensor
    count: int
    batch: tuple
    versions: list[int]


class Step:
    """What is taken in a step, and what came of its samples, which come in one call or in several.

    Where in several, Reg1 about the batch mean and Reg2 take two sweeps: the functions of all calls are kept with their
    batches, and run again when the mean gradient is known, with the random numbers and buffers of their first time.

    Args:
        model: whose losses they are.
        parameters: the model's, by name.
        method: makes the penalties' gradients.
        fraction: the share of the samples that the penalties are taken on.
        penalties: what to take; no strength makes a plain step.
        scaling: how losses are scaled.
        plan: what was asked of the penalties, and to be told of it.
        alone: whether one call brings all samples.
        batchnorm: as of `record`.
        ranks: that take the step together, each with its own samples; None for one process.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, Tensor],
        method: Method,
        fraction: float,
        penalties: Penalties,
        scaling: Scaling,
        plan: Plan,
        alone: bool,
        batchnorm: str,
        ranks: Ranks | None = None,
    ):
        """Begin; nothing is run yet."""
        self.model, self.parameters, self.method, self.fraction = model, parameters, method, fraction
        self.penalties, self.scaling, self.plan, self.batchnorm = penalties, scaling, plan, batchnorm
        self.takes_two_sweeps = not alone and penalties.needs_mean
        self.ranks = ranks
        self._together = None if ranks is None else Together(ranks, parameters, penalties)
        self._total = Total(parameters, penalties.statistics)
        self._kept: list[_Kept] = []
        self._former = 0  # parts of former calls
        self._subset = 0  # samples that penalties were taken on, where these are not all

    @property
    def rounds(self) -> Rounds | None:
        """What passes between ranks."""
        return None if self._together is None else self._together.rounds

    def add(self, function: Callable[..., Tensor], batch: tuple) -> None:
        """Run the user's function of the batch, as often as it takes; nothing of the user's is changed.

        The function runs under the autocast of now, and nothing else does.
        """
        parameter = next(iter(self.parameters.values()))
        autocast, ranks = (
            autocast_now(parameter.device),
            self.ranks,
        )  # not this object, which keeps what holds the function

        def run(*batch: Any) -> Tensor:
            with autocast(), silent(ranks):
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
        if self.takes_two_sweeps:
            raise ArgumentError(
                "backward must be given the function that computes the losses, to be run again at the end of the block: Reg1 "
                "about the batch mean and Reg2 need the mean gradient of all micro-batches first; for reg1 alone, about a "
                'center of earlier steps (center="ema"), losses will do'
            )
        with without_autocast(losses):
            self._take(Forward(losses, self.parameters, recording, None, self.scaling), Whole())

    def finish(self) -> Gradients:
        """What came of all samples, after the second sweep where there is one."""
        if self._kept:
            mean = self._total.mean()
            if self._together is not None:
                mean = self._together.mean(mean, self._total.count)
            whole, apart = Known(mean), []
            with without_autocast(self._kept[0].losses):
                for kept in self._kept:
                    apart.append(self._again(kept, whole))
            if torch.stack(apart).any():
                raise ArgumentError(
                    "the function gave other losses when it was run again at the end of the block: it must depend on its "
                    "arguments and the model alone; pass what changes from call to call, as in reg.backward(loss_fn, x, y), in "
                    "place of a lambda that sees the variables of a loop"
                )
        outcome = self._total.result()
        if self._together is None:
            return outcome
        outcome = replace(outcome, finite=answered(outcome.losses, outcome.finite, self.scaling))
        return self._together.joined(outcome)

    def _add(self, function: Callable[..., Tensor], batch: tuple) -> None:
        penalized = bool(self.penalties.strengths)
        runs_again = penalized and (self.fraction < 1 or self.method.repeats or self.takes_two_sweeps)
        if runs_again:
            check_leaves(batch)
        versions = versions_of(batch)
        with ExitStack() as kept:
            whole, index = Whole(), None
            if penalized and self.fraction < 1:
                chosen, others = draw(batch, self.fraction, self.penalties.generator)
                before = Snapshot(self.model)
                if others.numel():
                    rest = self.method.plain(self._run(function, batch, others, False))
                    kept.enter_context(same_buffers(self.model, before))
                    index, whole = chosen, WithRest(rest, chosen.numel())
                    self._subset += chosen.numel()
            forward = self._run(function, batch, index, penalized)
            if runs_again and versions != versions_of(batch):
                raise ArgumentError(
                    "the function changed a tensor of its batch in place, and would do so again in each of the passes that "
                    f'method="{self.method.name}" with fraction={self.fraction} takes: let it work on a copy'
                )
            self._take(forward, whole, batch)

    def _recording(self, compiled: bool = False) -> Record | None:
        """A recording for one pass, where the method takes one; penalties need more than a ``compiled`` one has."""
        return Record(self.model, batchnorm=self.batchnorm, compiled=compiled) if self.method.records else None

    def _run(self, function: Callable[..., Tensor], batch: tuple, index: Tensor | None, penalized: bool) -> Forward:
        """One pass of the user's function, over the samples ``index`` if they are not the whole batch."""

        def call() -> Tensor:  # the rows are taken in each pass, whose graph is let go
            return function(*(batch if index is None else rows(batch, index)))

        replay = None
        if penalized and (self.method.repeats or self.takes_two_sweeps):
            replay = Replay(self.model, call)
        recording = self._recording(not penalized) if penalized or self.penalties.statistics else None
        with recording or StandIns():
            losses = call()
        m = None if index is None else index.numel()
        if m is not None and isinstance(losses, Tensor) and losses.shape != (m,):
            raise ArgumentError(
                f"the losses of {m} samples must have shape ({m},); got {tuple(losses.shape)}: fraction takes rows of every "
                "tensor of the batch that has as many as the first; pass all that belongs to samples in such tensors, or take "
                "fraction=1"
            )
        check_losses(losses)
        return Forward(losses, self.parameters, recording, replay, self.scaling)

    def _take(self, forward: Forward, whole: Whole, batch: tuple = ()) -> None:
        """What there is to take from a forward pass, now or in the second sweep."""
        self._former = len(self._total.parts)
        if not self.penalties.strengths:
            self._total.add(self.method.plain(forward))
        elif not self.takes_two_sweeps:
            if self._together is not None:
                rest = whole.rest.losses.numel() if isinstance(whole, WithRest) else 0
                whole = OfRanks(whole, forward.losses.numel() + rest, self._together)
            self._total.add(whole.complete(self.method.penalized(forward, self.penalties, whole)))
        else:
            before = self._total.count
            if isinstance(whole, WithRest):
                self._total.add(whole.rest)
            first = self.method.plain(forward)
            self._total.add(first)
            assert forward.replay is not None
            count = self._total.count - before
            self._kept.append(_Kept(forward.replay, first.losses, count, batch, versions_of(batch)))

    def _again(self, kept: _Kept, whole: Known) -> Tensor:
        """Take the penalties on what is run again; whether its losses are others than at first, ()."""
        if kept.versions != versions_of(kept.batch):
            raise ArgumentError(
                "a tensor of a micro-batch was changed in place after its call, and is needed again at the end of the block: "
                "pass each micro-batch in memory of its own"
            )
        penalties = replace(self.penalties, statistics=False, mean=False)
        recording = self._recording()
        with kept.replay.again(recording) as losses:
            check_second(losses, kept.losses.numel(), self.scaling)
            distance, size = (losses.detach() - kept.losses).norm(), kept.losses.norm()
            forward = Forward(losses, self.parameters, recording, kept.replay, self.scaling)
            self._total.add_penalties(self.method.penalized(forward, penalties, whole), kept.count)
        return distance > (1e-4 if losses.dtype in (torch.float32, torch.float64) else 2e-2) * size

    def report_of_call(self) -> Report:
        """The mean loss of the samples of the last call; what the rest is will be known at the end."""
        parts = self._total.parts[self._former :]
        losses = torch.cat([part.losses for part in parts])
        dtype = accumulation_dtype(losses.dtype)
        unknown = torch.full((), torch.nan, dtype=dtype, device=losses.device)
        return Report(
            loss=losses.mean(dtype=dtype),
            reg1=unknown,
            reg2=None,
            covariance_trace=unknown,
            mean_sq_norm=unknown,
            sq_mean_norm=unknown,
            batch_size=losses.numel(),
            method=self.method.name if self.penalties.strengths else "plain",
            strengths=self.plan.asked,
            notes=("a part of a batch: the report of the block is about the whole of it",),
            unchecked=losses if parts[0].finite is not None and not self.scaling.skips else None,
        )

    def report(self, outcome: Gradients, distances: Distances, finite: Tensor | None) -> Report:
        """What the step saw, and whether it is ``finite``.

        A penalty that was not taken follows from (1/B) Σ ‖g_i − c‖² = Γ + ‖ḡ − c‖².
        """
        covariance, losses, B = outcome.covariance, outcome.losses, outcome.batch_size
        if covariance is None:
            covariance = torch.full_like(distances.sq_mean, torch.nan)
        reg1, reg2 = (outcome.value(name, distances) for name in ("reg1", "reg2"))
        dtype = accumulation_dtype(losses.dtype)

        believed = outcome.finite if self.scaling.skips else None

        def told(t: Tensor) -> Tensor:
            return (t if believed is None else torch.where(believed, t, torch.nan)).to(dtype)

        notes = [*self.plan.notes, *outcome.notes]
        if self._subset:
            notes.insert(
                len(self.plan.notes), f"the penalties were taken on {self._subset} of {losses.numel()} samples"
            )
        if finite is not None and waiting.answers_at_once(finite) and not finite:
            skipped = ", and the scaler skips the step" if self.scaling.skips else ""
            notes.append(f"the centers were left alone: the gradient is not finite{skipped}")
        return Report(
            loss=losses.mean(dtype=dtype) if outcome.loss is None else outcome.loss.to(dtype),
            reg1=told(reg1),  # type: ignore[arg-type]  # there always
            reg2=None if reg2 is None else told(reg2),
            covariance_trace=told(covariance),
            mean_sq_norm=told(covariance + distances.sq_mean),
            sq_mean_norm=told(distances.sq_mean),
            batch_size=B,
            method=self.method.name if self.penalties.strengths else "plain",
            strengths=self.plan.asked,
            notes=tuple(notes),
            finite=finite if self.scaling.skips else None,
            unchecked=losses if outcome.finite is not None and not self.scaling.skips else None,
        )
