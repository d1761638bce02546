"""A batch that comes in micro-batches, as if it came at once: a block of calls, and the statistics of all their samples.

    ∇L = Σ_k (B_k/B) ∇L_k        s = (s₁, s₂, …)        Γ = (1/B) Σ_i s_i − ‖Σ_k (B_k/B) ḡ_k‖²

Norms are put one after the other, and gradients averaged with the sizes of the micro-batches, whatever these are.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .distributed import Rounds, guarded
from .errors import ArgumentError, RecordingError
from .grads import add_to_grads, call_hooks, gated
from .ops.distances import sq_distances
from .ops.schema import accumulation_dtype
from .per_sample import Direction, as_parameter_dict
from .rank_statistics import Exchange
from .recording import named_parameters
from .running_mean import RunningMean
from .scaling import Scaling, multiplied, seeds, without_autocast
from .statistics import Statistics, answered, summarized
from .statistics import record as Record

AnyBlock = TypeVar("AnyBlock", bound="Block")


class Block(ABC):
    """A ``with`` block that takes in micro-batches, and does what there is to do with all of them at its end.

    An error in it undoes it: nothing of the user's was changed. That of a micro-batch does so even where it is caught in the
    block, for what came of the micro-batch before is not known.

    Args:
        n: the number of micro-batches, or None for as many as there are.
        modules: whose parameters must stay as they are until the end.

    Attributes:
        calls: micro-batches so far.
    """

    def __init__(self, n: int | None, modules: Sequence[nn.Module]):
        """Check the number."""
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise ArgumentError(
                f"n must be a whole number of at least 1, micro-batches in the block, or None; got {n!r}"
            )
        self.n, self.calls = n, 0
        self._parameters = named_parameters(*modules)
        self._versions: list[int] | None = (
            None  # of the parameters after the last call; None where the block is not open
        )
        self._used = self._in_call = False
        self._rounds: Rounds | None = None  # where several ranks take part

    def __enter__(self: AnyBlock) -> AnyBlock:
        """Begin."""
        if self._used:
            raise RecordingError("this block was used already: make a new one for every batch")
        self._used = True
        self._begin()
        self._versions = self._present_versions()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        """Finish, or drop all where there was an error."""
        try:
            with guarded(self._rounds):
                if kind is None:
                    self._check_block()
                    if not self.calls or (self.n is not None and self.calls < self.n):
                        raise RecordingError(
                            f"the block ended after {self.calls} micro-batches; expected {self.n or 'one or more'}: nothing "
                            "was done with them; leave n out where their number is not known before"
                        )
                    self._finish()
                elif self._rounds is not None and isinstance(error, Exception):
                    self._rounds.fail(error)
        finally:
            self._versions = self._rounds = None
            self._drop()

    def _before_call(self) -> None:
        """Check that one more micro-batch may come."""
        if self._versions is None:
            raise RecordingError("micro-batches belong inside of the `with` block, which is not open")
        if self.calls == self.n:
            raise RecordingError(
                f"one more micro-batch came than the {self.n} that the block was made for: end the block before it, or leave "
                "n out"
            )
        self._check_block()

    def _after_call(self) -> None:
        """Count it."""
        self.calls, self._in_call = self.calls + 1, False
        self._versions = self._present_versions()

    def _present_versions(self) -> list[int]:
        own = [] if self._rounds is None else self._rounds.ranks.versions()
        return own + [p._version for p in self._parameters.values()]

    def _check_block(self) -> None:
        if self._in_call:
            raise RecordingError(
                "a micro-batch of the block has failed, and the others alone are not the batch: begin anew"
            )
        if self._versions != self._present_versions():
            raise RecordingError(
                "parameters were changed between the micro-batches of one batch, whose gradients are then not those of one "
                "point: step after the block"
            )

    @abstractmethod
    def _begin(self) -> None:
        """Before the first micro-batch."""

    @abstractmethod
    def _finish(self) -> None:
        """After the last one."""

    @abstractmethod
    def _drop(self) -> None:
        """Let go of what is held, at the end or after an error."""


class accumulate(Block):  # noqa: N801 — used as a verb, like record
    """Statistics of a batch that comes in micro-batches; ``.grad`` receives the gradient of the mean loss of all samples.

        with bootgrad.accumulate(model) as batch:
            for x, y in micro_batches:
                with batch.record():
                    losses = loss_function(model(x), y)      # (B_k,)
                batch.backward(losses)
        batch.statistics                                     # of all samples, as one `record.backward` would tell

    ``.grad`` is written at the end of the block, all at once. Until then one tensor of each parameter's size is held, beside
    what a micro-batch needs; where ``.grad`` is None it becomes that.

    Args:
        modules: as of `record`.
        n: the number of micro-batches, or None for as many as there are.
        center: as of `record.backward`, for all micro-batches.
        scaler: as of `record.backward`.
        check: as of `record`.
        batchnorm: as of `record`; statistics of the batch are those of each micro-batch.

    Raises:
        RecordingError: another number of micro-batches than ``n``, or parameters that changed between them. ``.grad`` is
            untouched by this and by all errors in the block.
    """

    def __init__(
        self,
        *modules: nn.Module,
        n: int | None = None,
        center: Direction | None = None,
        scaler: Any = None,
        check: str = "first",
        batchnorm: str = "refuse",
    ):
        """Check the arguments; nothing is computed yet."""
        self._record = partial(Record, *modules, check=check, batchnorm=batchnorm)
        self._ranks = self._record().ranks  # raises what it would raise
        if self._ranks is not None:
            self._ranks.end()
        super().__init__(n, modules)
        self._scaler = scaler
        self._centers = None if center is None else as_parameter_dict(center, self._parameters, "center")
        self._statistics: Statistics | None = None
        self._recording: Record | None = None
        self._exchange: Exchange | None = None
        self._drop()

    @property
    def statistics(self) -> Statistics:
        """Those of the whole batch, after the block."""
        if self._statistics is None:
            raise RecordingError("the statistics are those of all micro-batches, and there when the block has ended")
        return self._statistics

    def record(self) -> Record:
        """The context for the forward pass of the next micro-batch."""
        self._before_call()
        self._recording = self._record(compiled=self._centers is None)
        return self._recording

    def backward(self, losses: Tensor) -> None:
        """Take in the losses of a micro-batch, (B_k,).

        Raises:
            BootgradError: as `record.backward`.
        """
        self._before_call()
        recording, self._recording = self._recording, None
        if recording is None:
            raise RecordingError(
                "nothing was recorded: compute the losses of each micro-batch in `with batch.record():`"
            )
        self._in_call = True
        with without_autocast(losses):
            self._take(losses, recording)
        self._after_call()

    def _begin(self) -> None:
        self._scaling = Scaling(self._scaler, next((p.device for p in self._parameters.values()), None))
        if self._ranks is not None:
            self._exchange = exchange = Exchange(self._ranks, self._parameters, self._centers is not None)
            self._rounds = exchange.rounds

    def _take(self, losses: Tensor, recording: Record) -> None:
        recording.scaling = self._scaling
        reach = recording.reach(losses)
        scale = recording._scale(reach)
        scaled = None if self._centers is None else {name: c * scale.sample for name, c in self._centers.items()}
        grads, norms = recording._first_order(losses, reach, seeds(losses, scale.sample), scaled, False)
        leaves: dict[Hashable, Tensor] = {id(t): t for t in (*reach.parameters.values(), *reach.other_leaves)}
        recording.release()
        self._leaves |= leaves
        self._grads.add(dict(zip(leaves, multiplied(grads, scale.to_mean), strict=True)), losses.numel())
        sq = scale.sample**2
        self._norms.append({name: (s / sq, None if d is None else d / sq) for name, (s, d) in norms.items()})
        self._losses.append(losses.detach())
        if reach.finite is not None:
            self._finite.append(reach.finite)

    def _finish(self) -> None:
        grads: dict[Hashable, Tensor | None] = dict(self._grads.values)
        scaling = self._scaling
        means = {name: grads.get(id(p)) for name, p in self._parameters.items()}
        finite = torch.stack(self._finite).all() if self._finite else None
        losses, norms = torch.cat(self._losses), self._all_norms()
        exchange = self._exchange
        if exchange is not None:
            finite = answered(losses, finite, scaling)
            exchange.bring([means], float(losses.numel()), finite)
        self._statistics = summarized(
            self._parameters, means, norms, losses, 1.0, 1.0, self._centers, scaling, finite, exchange
        )
        if exchange is not None:
            finite = exchange.finite
            for name, p in self._parameters.items():
                self._leaves[id(p)], grads[id(p)] = p, exchange.mean()[name]
        leaves = list(self._leaves.values())
        cast = [None if (g := grads.get(k)) is None else g.to(leaf.dtype) for k, leaf in self._leaves.items()]
        sums = gated(scaling.scaled(cast), finite, scaling.skips)
        if self._ranks is not None:
            leaves, sums = self._ranks.stored(leaves, sums)
        add_to_grads(leaves, sums)
        call_hooks(leaves, sums)

    def _all_norms(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """‖g_i‖² and ‖g_i − c‖² of all samples, by parameter that one reaches; of one that does not, g_i is zero."""
        out: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name, p in self._parameters.items():
            if not any(name in norms for norms in self._norms):
                continue
            zero = torch.zeros((), dtype=accumulation_dtype(p.dtype), device=p.device)
            distance = None if self._centers is None else sq_distances([self._centers[name]])[0].to(zero.dtype)
            parts = []
            for norms, losses in zip(self._norms, self._losses, strict=True):
                absent = (t if t is None else t.expand(losses.numel()) for t in (zero, distance))
                parts.append(norms.get(name) or tuple(absent))
            rows, deviations = zip(*parts, strict=True)
            out[name] = torch.cat(rows), None if distance is None else torch.cat(deviations)
        return out

    def _drop(self) -> None:
        self._recording = None
        self._leaves: dict[Hashable, Tensor] = {}
        self._grads = RunningMean()
        self._norms: list[dict[str, tuple[Tensor, Tensor | None]]] = []
        self._losses: list[Tensor] = []
        self._exchange = None
        self._finite: list[Tensor] = []
