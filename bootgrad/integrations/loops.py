"""Penalties and statistics in a loop that calls ``loss.backward()`` itself: a scalar loss whose backward pass is theirs.

Frameworks take one number from the user's step, divide it for gradient accumulation, scale it for half precision, and call its
``backward``. The number made here is the mean loss. Behind it is no graph of the model but one node, at which the step is done:
``.grad`` then receives what it would from a mean loss with penalties in it, in time for clipping and the optimizer.

    value = share · (1/b) Σ_i ℓ_i        ∂value arrives as S/n: a scaler's factor by what the framework divides by

Micro-batches of one optimizer step are one batch, a block of `GradientRegularizer.accumulate` that opens at the first of them
and ends in the backward pass of the last. What arrives otherwise than as S/n would be a weight that the penalties do not know
of, and is an error. Statistics alone change no gradient: what arrives is followed, and of a step the last micro-batch watched.

Letters: ``b`` samples of a micro-batch, ``n`` the divisor of gradient accumulation, ``S`` the factor of a GradScaler.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import GradientRegularizer, Report, record
from ..errors import ArgumentError, ArgumentTypeError, RecordingError, warn
from ..monitoring import Monitor
from ..monitoring.watched import watched
from ..regularizers import Accumulation
from ..wrappers import ranks_of

_NOT_TAKEN = (
    "the backward pass of the loss before was not taken, and its gradient is missing: return that loss, or call its "
    "backward"
)

Losses = Callable[..., Tensor]  # of a batch: one for each sample, (b,)
Share = Callable[[int], float]  # by b


class Loop:
    """A `GradientRegularizer`, a `Monitor`, or both in somebody else's loop; neither makes the plain mean loss.

    Args:
        regularizer: what steps are taken with.
        monitor: what watches them; of a step with penalties it takes in the report.

    Attributes:
        report: of the last step with penalties, None before the first.
    """

    def __init__(self, regularizer: GradientRegularizer | None = None, monitor: Monitor | None = None):
        """Nothing is open yet."""
        self.regularizer, self.monitor = regularizer, monitor
        self.report: Report | None = None
        self._block: Accumulation | None = None
        self._awaited: object | None = None  # stands for a loss whose backward pass is still to come
        self._watched_one: Callable[[], object] = lambda: (
            None
        )  # the same of statistics alone, as long as there is that loss

    @property
    def is_open(self) -> bool:
        """Whether micro-batches have come of which no step was made yet."""
        return self._block is not None

    def loss(
        self,
        losses: Losses,
        *batch: Any,
        last: bool = True,
        divisor: float = 1.0,
        scaler: Any = None,
        share: Share = lambda b: 1.0,
    ) -> Tensor:
        """The mean loss of a micro-batch, (), for a framework to call ``backward`` of.

        Args:
            losses: a function of ``batch`` that gives (b,); it is run under the autocast of now.
            batch: what it is called with.
            last: whether the optimizer steps after this one.
            divisor: n, what the framework divides the loss by.
            scaler: the framework's `torch.amp.GradScaler`, or None.
            share: of b, what the value is multiplied by where frameworks add micro-batches up.

        Raises:
            RecordingError: the backward pass of the loss before was not taken.
            Others: as `GradientRegularizer.backward`. The block of micro-batches is dropped then.
        """
        if not callable(losses):
            raise ArgumentTypeError(
                "losses must be a function of the batch that gives one loss per sample, which a penalty may have to run more "
                f"than once; got {type(losses).__name__}"
            )
        if scaler is not None and not scaler.is_enabled():
            scaler = None
        if self.regularizer is not None:
            return self._penalized(self.regularizer, losses, batch, last, divisor, scaler, share)
        if self.monitor is None or not self.records(last):
            self.pass_by(last)
            found = losses(*batch)
            return found.mean() * share(found.numel())
        return self._watched(self.monitor, losses, batch, last, scaler, share)

    def records(self, last: bool) -> bool:
        """Whether a micro-batch is recorded for statistics alone.

        `DistributedDataParallel` reduces in the last backward pass what the ones before have left in ``.grad``; where the last
        is recorded, the others of its step have to be, so that each is reduced by itself.
        """
        monitor = self.monitor
        return monitor is not None and monitor.due and (last or isinstance(monitor.model, DistributedDataParallel))

    def pass_by(self, last: bool) -> None:
        """Count a micro-batch that is not recorded."""
        if self.monitor is not None and last:
            self.monitor.step += 1

    def drop(self, error: BaseException | None = None) -> None:
        """Let go of what is open; ``.grad``, centers and the step are as before it."""
        block, self._block, self._awaited, self._watched_one = self._block, None, None, lambda: None
        if block is not None:
            error = error or RecordingError("the micro-batches were dropped")
            block.__exit__(type(error), error, None)

    def state_dict(self) -> dict[str, Any]:
        """Of the regularizer and the monitor."""
        parts = {"regularizer": self.regularizer, "monitor": self.monitor}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, as far as it is about what is here; micro-batches that are open are dropped."""
        self.drop()
        if self.regularizer is not None and "regularizer" in state:
            self.regularizer.load_state_dict(state["regularizer"])
        if self.monitor is not None and "monitor" in state:
            self.monitor.load_state_dict(state["monitor"])

    def _penalized(
        self,
        regularizer: GradientRegularizer,
        losses: Losses,
        batch: tuple[Any, ...],
        last: bool,
        divisor: float,
        scaler: Any,
        share: Share,
    ) -> Tensor:
        if self._awaited is not None:
            self.drop()
            raise RecordingError(_NOT_TAKEN)
        try:
            with _synchronized(regularizer.model):
                if self._block is None:
                    self._block = regularizer.accumulate(1 if last else None, scaler).__enter__()
                report = regularizer.backward(losses, *batch)
        except BaseException as error:
            self.drop(error)
            raise
        expected = (1.0 if scaler is None else scaler.get_scale()) / divisor
        self._awaited = token = object()

        def arrived(factor: float) -> None:
            if self._awaited is not token:
                raise RecordingError(
                    "this loss was dropped, with the micro-batches that it belongs to: compute it anew"
                )
            self._awaited = None
            if not abs(factor - expected) <= 1e-3 * expected:  # nan, too
                self.drop()
                raise ArgumentError(
                    f"the loss must reach its backward pass as it is; it was multiplied by {factor / expected:g} on the way: "
                    "weigh the losses of the samples, in the function that computes them"
                )
            if last:
                self._finish()

        return _scalar(report.loss * share(report.batch_size), arrived)

    def _finish(self) -> None:
        block, self._block = self._block, None
        assert block is not None
        block.__exit__(None, None, None)
        self.report = block.report
        if self.monitor is not None:
            self.monitor.observe(block.report)

    def _watched(
        self, monitor: Monitor, losses: Losses, batch: tuple[Any, ...], last: bool, scaler: Any, share: Share
    ) -> Tensor:
        if self._watched_one() is not None:
            raise RecordingError(_NOT_TAKEN)
        with _synchronized(monitor.model):
            ranks = ranks_of(monitor.model)
            names = watched(monitor.model, monitor.layers)
            recording = record(monitor.model, parameters=names, **monitor._options)
            with recording:
                found = losses(*batch)
        part, token = share(found.numel()), _Token()
        self._watched_one = weakref.ref(token)

        def arrived(factor: float, token: object = token) -> None:
            self._watched_one = lambda: None
            scale = None if scaler is None else _Factor(factor)
            weight = part if scale is not None else factor * part
            reduction: Any = "mean"
            if weight != 1 or ranks is not None:  # of ranks a mean of their own means, as without us
                everyone = found.numel() * (1 if ranks is None else ranks.size)
                reduction = torch.full_like(found, weight / everyone)
            statistics = recording.backward(found, reduction=reduction, scaler=scale)
            if last:
                monitor.observe(statistics, losses=found)

        return _scalar(found.detach().mean() * part, arrived)


class _Token:
    """Stands for a loss, and is gone when that is."""


class _Factor:
    """What has arrived, as a scaler that would have scaled by it."""

    def __init__(self, factor: float):
        self._factor = factor

    def is_enabled(self) -> bool:
        return True

    def scale(self, value: Tensor) -> Tensor:
        return value * self._factor


def loop_of(
    model: nn.Module, penalties: Mapping[str, Any] | None = None, statistics: Mapping[str, Any] | None = None
) -> Loop:
    """A loop of a model by the options of a regularizer and a monitor; random number generators are left as they are."""
    check_options(penalties, statistics)
    with torch.random.fork_rng(devices=()):
        regularizer = None if penalties is None else GradientRegularizer(model, **penalties)
    return Loop(regularizer, None if statistics is None else Monitor(model, **statistics))


def check_options(penalties: Mapping[str, Any] | None, statistics: Mapping[str, Any] | None) -> None:
    """Raise where there are no options of such names, and warn of those that do nothing beside penalties."""
    for kind, options in ((GradientRegularizer, penalties), (Monitor, statistics)):
        names = [name for name in inspect.signature(kind).parameters if name != "model"]
        unknown = sorted(set(options or ()) - set(names))
        if unknown:
            raise ArgumentError(f"{kind.__name__} has no option {', '.join(unknown)}: take of {', '.join(names)}")
    if penalties is not None and statistics is not None:
        warn_of_unused(statistics)


def warn_of_unused(statistics: Mapping[str, Any]) -> None:
    """Warn of options for what reports of penalties do not tell."""
    unused = [name for name in ("layers", "outliers", "outlier_deviations") if name in statistics]
    if unused:
        warn(
            f"beside penalties statistics are of their reports, which have no layers and no norms of samples: "
            f"{', '.join(unused)} will do nothing; leave out one or the other"
        )


def _scalar(value: Tensor, arrived: Callable[[float], None]) -> Tensor:
    """A scalar of the value of ``value``, of whose ``backward`` is made ``arrived(factor)``, once.

    The node is the CPU's whatever the device of the value, so that it runs in the thread that called ``backward``.
    """
    zero = _Arrival.apply(torch.zeros((), dtype=value.dtype, requires_grad=True), arrived)
    total: Tensor = value.detach() + zero
    return total


@contextmanager
def _synchronized(model: nn.Module) -> Iterator[None]:
    """Out of the ``no_sync()`` that frameworks put around all but the last micro-batch: a block holds gradients back itself."""
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    before, model.require_backward_grad_sync = model.require_backward_grad_sync, True
    try:
        yield
    finally:
        model.require_backward_grad_sync = before


class _Arrival(torch.autograd.Function):
    """Zero, with a function to be called when its gradient comes."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, arrived: Callable[[float], None]) -> Tensor:
        """0."""
        ctx.arrived = arrived
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        """Tell of the factor; nothing is passed on."""
        arrived, ctx.arrived = ctx.arrived, None
        if arrived is None:
            raise RecordingError("the backward pass of this loss was taken already: compute the loss anew")
        with torch.enable_grad():
            arrived(float(gradient))
        return None, None


def numbers_of(report: Report) -> dict[str, Tensor]:
    """What a step saw, under the names to log it by; what it did not see is left out."""
    found = {
        "loss": report.loss,
        "reg1": report.reg1,
        "reg2": report.reg2,
        "covariance_trace": report.covariance_trace,
        "sq_mean_norm": report.sq_mean_norm,
    }
    found |= {f"strength/{name}": torch.as_tensor(value) for name, value in report.strengths.items()}
    return {f"bootgrad/{name}": value for name, value in found.items() if value is not None}
