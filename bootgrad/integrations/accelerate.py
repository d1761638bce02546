"""Penalties and statistics in a loop of Hugging Face's accelerate.

model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
penalties = bootgrad.integrations.accelerate.PerSample(accelerator, model, penalties={"reg1": 0.01})
for x, y in loader:
with accelerator.accumulate(model):
accelerator.backward(penalties.loss(losses, x, y))    # losses(x, y) gives (b,)
optimizer.step()
optimizer.zero_grad()
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .. import GradientRegularizer, Report
from ..errors import ArgumentError, UnsupportedError
from ..monitoring import Monitor
from .loops import loop_of, numbers_of
from .required import missing

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    raise missing("accelerate", error) from None

_BACKENDS = ("NO", "MULTI_CPU", "MULTI_GPU")


class PerSample:
    """What makes the loss of a step in a loop of accelerate's, from the losses of its samples.

    Batches in a window of ``accelerator.accumulate`` are one batch, in which each sample counts once: penalties, centers and
    ``.grad`` are those of the whole. Clipping, GradScalers and ``accelerator.save_state`` go with it; penalties and statistics
    are registered for checkpoints.

    Args:
        accelerator: of the loop.
        model: as ``accelerator.prepare`` has returned it.
        penalties: options of `bootgrad.GradientRegularizer`, or None.
        statistics: options of `bootgrad.monitoring.Monitor`, or None. Alone they leave the training as it is, and watch the
            last batch of a window.

    Raises:
        ArgumentError: neither penalties nor statistics.
        UnsupportedError: a backend that does more to a backward pass than is known here.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        *,
        penalties: Mapping[str, Any] | None = None,
        statistics: Mapping[str, Any] | None = None,
    ):
        """Make them, and have them saved with the accelerator's state."""
        if penalties is None and statistics is None:
            raise ArgumentError("nothing was asked for: give penalties={...}, statistics={...}, or both")
        backend = accelerator.distributed_type.value
        if backend not in _BACKENDS:
            raise UnsupportedError(
                f"the backend {backend} does more to a backward pass than is known here: use DistributedDataParallel"
            )
        self._accelerator, self._loop = accelerator, loop_of(model, penalties, statistics)
        accelerator.register_for_checkpointing(self)

    @property
    def regularizer(self) -> GradientRegularizer | None:
        """What steps are taken with."""
        return self._loop.regularizer

    @property
    def monitor(self) -> Monitor | None:
        """What watches."""
        return self._loop.monitor

    @property
    def report(self) -> Report | None:
        """Of the last step with penalties."""
        return self._loop.report

    def loss(self, losses: Callable[..., Tensor], *batch: Any) -> Tensor:
        """The mean loss of a batch, (), for ``accelerator.backward``, which does the step's backward pass.

        Args:
            losses: a function of ``batch`` that gives one loss per sample, (b,), with the prepared model in it.
            batch: what it is called with.

        Raises:
            ArgumentError: in the backward pass, of a loss that was multiplied on the way.
            Others: as `bootgrad.GradientRegularizer.backward`.
        """
        accelerator = self._accelerator
        divisor = accelerator.gradient_accumulation_steps
        return self._loop.loss(
            losses, *batch, last=accelerator.sync_gradients, divisor=divisor, scaler=accelerator.scaler
        )

    def numbers(self) -> dict[str, float]:
        """Of the last step and the last observation, for ``accelerator.log``."""
        monitor, report = self._loop.monitor, self._loop.report
        seen = {} if monitor is None or monitor.last is None else monitor.last.scalars()
        return seen | ({} if report is None else {name: float(value) for name, value in numbers_of(report).items()})

    def state_dict(self) -> dict[str, Any]:
        """What a loop goes on from."""
        return self._loop.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._loop.load_state_dict(state)
