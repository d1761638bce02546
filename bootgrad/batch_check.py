"""The check whether samples are the rows of every recorded operation's output, and of which reading.

Sizes do not tell: of (T, B, d) with T = B, of batch statistics, of contrasts within a batch. Backward passes under other
weights do. Where samples are independent, the losses Σ a_i ℓ_i give each row of an output's gy its sample's a_i times what it
is under Σ ℓ_i. Norms of rows are compared, so that no gradient is kept; they scale exactly, but for what is below float16's
range, or has a square below float32's, of which nothing can be told.

    1    the plain pass
    a    powers of two, of which many are alike: every reading that an output's shape allows is asked
    b    no two alike, where several readings are right, or none: they tell which, and which sample each row is of, as of tokens
         that are sorted by their experts
    c    as b, in another order, for rows that were told by b: one of two samples may look like a third's, but not by both

Letters: ``B`` samples, ``N`` rows of an output, ``K`` norms of each, one in most operations; ``k`` numbers operations.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from . import waiting
from .errors import UnsupportedError, warn
from .graph import Reach, powers_of_two, unlike
from .rules.base import Operation, Phase, norms_of_rows
from .rules.samples import SAMPLES_ELSEWHERE, Reading, Samples
from .scaling import Scaling, seeds

_MOST_SIGNATURES = 4096  # that are remembered of a model: shapes may change with every batch


@dataclass
class ModelState:
    """What is remembered of a model from one recording to the next."""

    uses: dict = field(default_factory=dict)  # how often each signature was seen without an objection
    choices: dict = field(
        default_factory=dict
    )  # by signature, of each operation's readings the only one that was right
    sorts: bool = False  # whether rows were met that are not in the samples' order
    warned: set = field(default_factory=set)

    def count(self, signature: int, count: int) -> None:
        """Remember that the signature was seen this often without an objection."""
        if len(self.uses) > _MOST_SIGNATURES:
            self.uses.clear()
            self.choices.clear()
        self.uses[signature] = count

    def is_new(self, warning: Any) -> bool:
        """Whether a warning was not given before; from now on it was."""
        is_new = warning not in self.warned
        self.warned.add(warning)
        return is_new


class Checked(Protocol):
    """What the check asks of a recording."""

    check: str
    samples: Samples | None
    batch_size: int
    operations: list[Operation]
    scaling: Scaling
    state: ModelState
    has_contributions: bool

    @property
    def modes(self) -> tuple[bool, ...]:
        """Whether each of the modules is in training."""

    def name_of(self, tracked: Tensor) -> str:
        """The parameter's name, or those that a derived tensor is made of."""

    def describe(self, operation: Operation, tracked: Sequence[Tensor] | None = None) -> str:
        """The operation's name, and those of its parameters, or of the ``tracked`` ones."""

    def in_phase(self, phase: Phase) -> AbstractContextManager:
        """A context in which backward passes through the record are of ``phase``."""

    def gradients(self, losses: Tensor, inputs: Sequence, weights: Tensor, **options: Any) -> Sequence[Tensor | None]:
        """Gradients of Σ w_i ℓ_i."""


@dataclass
class _Weighted:
    """A pass under the losses Σ w_i ℓ_i."""

    weights: Tensor  # (B,)
    norms: list[Tensor]  # (K, N) of each operation


@dataclass
class _Verdict:
    """What a weighted pass said of an operation."""

    is_unknown: bool  # norms are not finite
    is_vague: bool  # gradients are at the end of float16's range
    right: list[int]  # the readings under which rows scaled


class BatchCheck:
    """The check of one record against one batch of losses; the operations have their ``reading`` from it."""

    def __init__(self, recording: Checked, losses: Tensor, reach: Reach):
        """Find the readings that outputs' shapes allow.

        Args:
            recording: whose state remembers what was found.
            losses: (B,), B > 1.
            reach: what they reach.

        Raises:
            UnsupportedError: ``samples`` were told, and an output's shape allows no reading by them.
        """
        self.recording, self.state, self.losses = recording, recording.state, losses
        self.operations = reach.operations
        self.readings = [self._readings(o) for o in reach.operations]
        self._narrow, self._graph = reach.narrow, reach.graph
        self._tolerance = 1e-4 if reach.narrow is None else 2e-2
        self._plain: list[Tensor] = []  # norms (K, N) of each operation, of the plain pass
        self._allowed: list[Tensor] = []  # how far others may be from what they are compared with, (K,)

    def run(self) -> None:
        """Raise unless samples are rows, and settle of each output which, if that is due.

        Raises:
            UnsupportedError: samples are coupled, or rows are those of no sample, or of none that can be told.
        """
        signature = self._signature()
        settled = self.state.choices.get(signature)
        self._take(settled or [0] * len(self.operations))
        is_open = settled is None and any(len(of_one) > 1 for of_one in self.readings)
        if is_open and waiting.is_capturing():
            raise UnsupportedError(
                "which rows are whose is not known, and cannot be found out while a graph of kernels is captured: take a step "
                "before that"
            )
        if self.recording.check == "never" or waiting.is_capturing() or self.recording.has_contributions:
            return self._refuse_unreadable()
        count = self.state.uses.get(signature, 0) + 1
        if self.recording.check == "always" or is_open or _is_power_of_two(count) or self._may_vary():
            right = self._ask(count)
            if right is None:  # losses that are not finite: the next ones will be asked
                return self._refuse_unreadable()
            if is_open and all(len(of_one) == 1 for of_one in right):
                self.state.choices[signature] = [k for (k,) in right]
        self.state.count(signature, count)

    # Which readings there are

    def _readings(self, operation: Operation) -> Sequence[Reading | None]:
        """The ways in which an output's rows may belong to the samples, by its shape; None for N/B consecutive ones of each."""
        samples, B = self.recording.samples, self.recording.batch_size
        if samples is None:  # if not as in the batch, gradients may tell
            return (None,) if operation.fits(B) else ()
        readings = samples.readings(operation.output_shape[: operation.row_dims], B)
        if not operation.reads_samples:
            readings = [r for r in readings if r.dimension == 0 and r.owner.dim() == 1]
            if not readings:
                raise UnsupportedError(
                    f"{self.recording.describe(operation)} is recorded with samples in dimension 0 alone: lay out its input "
                    "so, or freeze the parameter"
                )
        if not readings:
            raise UnsupportedError(
                f"{self.recording.describe(operation)} puts out {tuple(operation.output_shape)}: expected the leading "
                f"dimensions of `samples`, {tuple(samples.index.shape)}, or in dimension 0 a row for each of its "
                f"{samples.index.numel()} entries or for each of the {B} losses"
            )
        return readings

    def _take(self, choices: Sequence[int]) -> None:
        """Give each operation the reading of that number; none where it has none."""
        for operation, of_one, choice in zip(self.operations, self.readings, choices, strict=True):
            operation.reading = of_one[choice] if of_one else None

    def _signature(self) -> int:
        """A number for all that the answer depends on, but for data; of the rest, which may be large, nothing is kept."""
        samples = self.recording.samples
        return hash(
            (
                self.recording.batch_size,
                self.recording.modes,
                self._graph,
                None if samples is None else (samples.index.shape, samples.changing.shape),
                tuple(
                    (o.name, tuple(map(self.recording.name_of, o.tracked)), o.output_shape[: o.row_dims])
                    for o in self.operations
                ),
                # By an index of other numbers, other readings are alike.
                tuple(reading.place for of_one in self.readings for reading in of_one if reading is not None),
            )
        )

    def _may_vary(self) -> bool:
        """Whether the data may say which rows are whose, so that one batch says nothing of the next."""
        B = self.recording.batch_size
        return self.state.sorts or any(
            o.is_merged(B) if o.reading is None else not o.reading.is_fixed for o in self.operations
        )

    # Which are right

    def _ask(self, count: int) -> list[list[int]] | None:
        """The numbers of each operation's readings that are right, of which it is given the first.

        None of an operation whose reading was told by its gradients. Nothing, and no reading is given, where the losses are
        not finite. The ``count`` of passes under the same signature chooses the weights.
        """
        self._plain = self._pass(torch.ones_like(self.losses)).norms
        by_a = self._pass(powers_of_two(self.recording.batch_size, count))
        verdicts = self._verdicts(by_a)
        if any(verdict.is_unknown for verdict in verdicts):
            return None
        for k, verdict in enumerate(verdicts):
            if verdict.is_vague:
                self._warn_of_float16(self.operations[k])
            if not verdict.right and not self._can_be_told(self.operations[k]):
                self._refuse_most_apart(k, by_a)
        right = [verdict.right for verdict in verdicts]
        if self.state.sorts or any(len(of_one) != 1 for of_one in right):
            right = self._ask_by_unlike_weights(right, by_a, count)
        for operation, of_one, those in zip(self.operations, self.readings, right, strict=True):
            if those:
                operation.reading = of_one[those[0]]
        return right

    def _ask_by_unlike_weights(self, right: list[list[int]], by_a: _Weighted, count: int) -> list[list[int]]:
        """``right`` without readings that hold under weights of which some are alike alone, the nearest first.

        An operation that has none is given the reading that its gradients tell.
        """
        B, right = self.recording.batch_size, list(right)
        by_b = by_c = self._pass(unlike(B, count))
        for k, operation in enumerate(self.operations):
            # Another order may look like the samples' own where weights are alike.
            in_order = bool(right[k]) and self.readings[k][0] is None
            if in_order and bool(self._is_apart(k, None, by_b)):
                right[k] = []
                if not self._can_be_told(operation):
                    self._refuse_rows(operation)
        if not all(right):
            by_c = self._pass(unlike(B, -count))
        for k, operation in enumerate(self.operations):
            if right[k]:
                right[k] = self._nearest(k, right[k], by_b)
                continue
            operation.reading = reading = Reading.told(self._plain[k][0], by_b.norms[k][0], by_b.weights)
            if any(self._is_apart(k, reading, weighted) for weighted in (by_a, by_b, by_c)):
                self._refuse_rows(operation)
            self.state.sorts = True
        return right

    def _pass(self, weights: Tensor) -> _Weighted:
        """The pass under these weights, (B,), and in half precision what keeps it within its range before them."""
        weights = weights.to(self.losses)
        scale = 1.0 if self._narrow is None else self.recording.scaling.of(self._narrow, weights.numel()).sample
        return _Weighted(weights, self.row_norms(seeds(self.losses, scale) * weights))

    def row_norms(self, weights: Tensor) -> list[Tensor]:
        """The norms (K, N) of the rows of each operation's gy under the losses Σ w_i ℓ_i."""
        losses, operations = self.losses, self.operations
        inputs = [o.edge if o.probe is None else o.probe for o in operations]
        with self.recording.in_phase(Phase.ROW_NORMS):
            grads = self.recording.gradients(losses, inputs, weights, retain_graph=True, allow_unused=True)
        return [
            losses.new_zeros(len(o.normed), o.output_rows, requires_grad=False)
            if g is None
            else o.norms_in(g)
            if o.probe is not None
            else norms_of_rows(g, o.output_rows).unsqueeze(0)
            for o, g in zip(operations, grads, strict=True)
        ]

    def _verdicts(self, weighted: _Weighted) -> list[_Verdict]:
        """What the first weighted pass says of each operation, for which a device is waited for once."""
        is_half = self._narrow is torch.float16
        answers = []
        for k, (operation, norms) in enumerate(zip(self.operations, weighted.norms, strict=True)):
            # The smallest number of float16 for each entry, by which rounding may be off on the way through a few operations;
            # else the smallest entry whose square is in the norm's range.
            least = 2.0**-24 if is_half else torch.finfo(norms.dtype).tiny ** 0.5
            lost = least * operation.output_shape.numel() ** 0.5
            size = norms.norm(dim=1)
            self._allowed.append(self._tolerance * size + 4 * lost)
            answers += [~torch.isfinite(size).all(), ((size > 0) & (self._tolerance * size < lost)).any() & is_half]
            answers += [self._is_apart(k, reading, weighted) for reading in self.readings[k]]
        said = iter(torch.stack(answers).tolist())
        return [
            _Verdict(next(said), next(said), [n for n, _ in enumerate(of_one) if not next(said)])
            for of_one in self.readings
        ]

    def _is_apart(self, k: int, reading: Reading | None, weighted: _Weighted) -> Tensor:
        """Whether operation k's rows do not scale with their samples' weights under a reading, ()."""
        return (self._distances(k, reading, weighted) > self._allowed[k]).any()

    def _distances(self, k: int, reading: Reading | None, weighted: _Weighted) -> Tensor:
        """How far operation k's norms are from scaling so, (K,)."""
        w, norms = weighted.weights, self._plain[k]
        of_rows = w.repeat_interleave(norms.size(1) // w.numel()) if reading is None else reading.weights(w)
        return (weighted.norms[k] - norms * of_rows.to(norms.dtype)).norm(dim=1)

    def _nearest(self, k: int, right: list[int], weighted: _Weighted) -> list[int]:
        """Those among operation k's ``right`` that hold by unlike weights, too, the nearest first; all if none does."""
        if len(right) == 1:
            return right
        errors = [self._distances(k, self.readings[k][n], weighted).norm() for n in right]
        *found, most = torch.stack([*errors, self._tolerance * weighted.norms[k].norm()]).tolist()
        nearest = sorted(zip(found, right, strict=True))
        return [n for error, n in nearest if error <= most] or [n for _, n in nearest]

    def _can_be_told(self, operation: Operation) -> bool:
        """Whether unlike weights, of which B are between 1 and 2, can say which sample each of an output's rows is of."""
        reads = self.recording.samples is None and operation.reads_samples and operation.row_dims == 1
        return reads and 2 * self.recording.batch_size * self._tolerance < 1

    # What is said

    def _warn_of_float16(self, operation: Operation) -> None:
        if self.state.is_new(("float16", operation.name)):
            warn(
                f"gradients at {self.recording.describe(operation)} are so small that float16 rounds them away, and norms "
                "with them: scale the losses, by backward(..., scaler=torch.amp.GradScaler(...)) for example"
            )

    def _refuse_unreadable(self) -> None:
        """Raise where an output's rows are not asked about, and its shape allows no reading."""
        for operation, of_one in zip(self.operations, self.readings, strict=True):
            if not of_one:
                self._refuse_rows(operation)

    def _refuse_most_apart(self, k: int, weighted: _Weighted) -> NoReturn:
        """Raise for operation k, and those of its parameters whose norms are furthest from scaling."""
        operation, tracked = self.operations[k], None
        for reading in self.readings[k][:1]:
            errors = self._distances(k, reading, weighted) / weighted.norms[k].norm(dim=1)
            tracked = operation.normed[int(errors.nan_to_num().argmax())]
        self._refuse_rows(operation, tracked)

    def _refuse_rows(self, operation: Operation, tracked: Sequence[Tensor] | None = None) -> NoReturn:
        """Raise for an output whose rows are those of no sample, or of none that can be told; ``tracked``: for these alone."""
        samples, B, describe = self.recording.samples, self.recording.batch_size, self.recording.describe
        remedy = "" if samples is not None else operation.remedy or self._remedy()
        if samples is None and not operation.fits(B):
            raise UnsupportedError(
                f"{describe(operation)} puts out {operation.output_rows} rows in dimension 0 for {B} losses: samples must be "
                "dimension 0 of every operation on a parameter, or each row one sample's; and what they share, as an index of "
                f"positions that is kept from pass to pass, a buffer of the model{remedy}"
            )
        where = "in dimension 0" if samples is None else "where `samples` says"
        raise UnsupportedError(
            f"samples are coupled after {describe(operation, tracked)}, or not {where} there: scaling one sample's loss "
            "changes other samples' gradients, so per-sample gradients do not exist. Look for batch statistics, in-batch "
            f"contrasts, or a batch in another dimension than 0 between it and the losses{remedy}"
        )

    def _remedy(self) -> str:
        """What to do where samples are elsewhere, as in dimension 1 they seem to be where that is as long."""
        B = self.recording.batch_size
        lengths = [o.output_shape[0] for o in self.recording.operations if o.output_shape[1:2] == (B,)]
        if not lengths:
            return SAMPLES_ELSEWHERE
        told = f"record(model, samples=torch.arange({B}).expand({lengths[0]}, {B}))"
        return f". If samples are dimension 1, tell the recording: {told}"


def _is_power_of_two(count: int) -> bool:
    """Whether passes of one signature are checked after so many: what was zero at first may grow."""
    return not count & (count - 1)
