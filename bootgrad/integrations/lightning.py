"""Penalties and statistics under PyTorch Lightning's automatic optimization, as callbacks.

    class Network(L.LightningModule):
        def training_step(self, batch, batch_idx):
            return bootgrad.integrations.lightning.loss(self, self.losses, *batch)    # losses(x, y) gives (B,)

    L.Trainer(callbacks=[Penalties(reg1=0.01, center="ema")])

A module says what its samples' losses are, and a run's callbacks what becomes of them; without any the loss is their mean.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import GradientRegularizer, Report
from ..errors import ArgumentError, ArgumentTypeError, RecordingError, UnsupportedError
from ..monitoring import Monitor, Observation
from ..monitoring.trackers import finite
from .loops import Loop, Losses, check_options, loop_of, numbers_of, warn_of_unused
from .required import missing

try:
    import lightning.pytorch as L
except ModuleNotFoundError as error:
    raise missing("lightning", error) from None

_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
_PRECISIONS = ("Precision", "DoublePrecision", "HalfPrecision", "MixedPrecision")


def loss(module: Any, losses: Losses, *batch: Any) -> Tensor:
    """The loss to return from ``training_step``: the mean of the samples' losses, with what the run's callbacks do with them.

    In validation, without our callbacks, and without a trainer it is nothing else than that mean.

    Args:
        module: the LightningModule.
        losses: a function of ``batch`` that gives one loss per sample, (B,), such as a method of the module. A penalty may run
            it again, so that ``self.log`` belongs outside of it.
        batch: what it is called with.

    Raises:
        ArgumentError: two callbacks of one kind in one run.
        ArgumentTypeError: something else than a LightningModule.
        Others: as `bootgrad.GradientRegularizer.backward`.
    """
    if not hasattr(module, "_trainer"):  # nor of pytorch_lightning
        raise ArgumentTypeError(
            f"loss takes the LightningModule first, as in loss(self, losses, *batch); got {type(module).__name__}"
        )
    trainer = None if module._trainer is None else module.trainer
    if trainer is None or not trainer.training or not torch.is_grad_enabled():
        return losses(*batch).mean()
    penalties, statistics = _only(Penalties, trainer), _only(Statistics, trainer)
    if penalties is not None:
        penalties._begun.monitor = None if statistics is None else statistics.monitor
    ours: _Callback | None = penalties or statistics
    return losses(*batch).mean() if ours is None else ours._loss(trainer, losses, batch)


class _Callback(L.Callback):
    """What both callbacks do: they make a loop when the training begins, and go on from a checkpoint's state."""

    def __init__(self) -> None:
        self._loop: Loop | None = None
        self._state: dict[str, Any] | None = None  # of a checkpoint, until there is a model
        self._batch_index = 0
        self._made = self._stepped = False  # a loss in this batch; the last of a step

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, with the model as the strategy has wrapped it."""
        check_run(trainer, pl_module)
        if self._loop is None or not self._is_of(self._loop, trainer.strategy.model):
            self._loop = self._loop_of(trainer.strategy.model)
        self._loop.drop()
        if self._state is not None:
            self._loop.load_state_dict(self._state)
            self._state = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note which one it is."""
        self._batch_index, self._made = batch_idx, False

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """See whether the loss is ours."""
        if not self._made and not self._is_fed_by_other(trainer):
            raise RecordingError(
                f"training_step returned a loss that the {type(self).__name__} callback has no part in: return "
                "bootgrad.integrations.lightning.loss(self, losses, *batch)"
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of a batch of which a part was missing."""
        if self._loop is not None:
            self._loop.drop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return (self._state or {}) if self._loop is None else self._loop.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until the training begins."""
        self._state = state_dict

    def _loss(self, trainer: Any, losses: Losses, batch: tuple[Any, ...]) -> Tensor:
        n = trainer.accumulate_grad_batches
        index = self._batch_index + 1
        last = index % n == 0 or index >= trainer.num_training_batches or trainer.is_last_batch
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._made, self._stepped = True, last
        return self._begun.loss(losses, *batch, last=last, divisor=n, scaler=scaler)

    @property
    def _begun(self) -> Loop:
        assert self._loop is not None  # since the training began
        return self._loop

    def _loop_of(self, model: nn.Module) -> Loop:
        raise NotImplementedError

    def _is_of(self, loop: Loop, model: nn.Module) -> bool:
        raise NotImplementedError

    def _is_fed_by_other(self, trainer: Any) -> bool:
        return False


class Penalties(_Callback):
    """Trains with λ₁ Reg1 + λ₂ Reg2, by a `bootgrad.GradientRegularizer`.

    Batches that ``accumulate_grad_batches`` puts together are one batch, in which each sample counts once: penalties, centers
    and ``.grad`` are those of the whole, clipping and optimizers see the gradient with its penalties, and checkpoints hold what
    a resumed run goes on from.

    Args:
        log: whether loss, Reg1, Reg2, Γ, ‖ḡ‖² and λ are logged at each step, as ``bootgrad/…``.
        options: of `bootgrad.GradientRegularizer`.

    Raises, in ``fit``:
        UnsupportedError: manual optimization, a compiled LightningModule, or a strategy or precision that is not known here.
        RecordingError: ``training_step`` returns another loss than `loss` makes.
    """

    def __init__(self, *, log: bool = True, **options: Any):
        """Keep the options; the model is there when the training begins."""
        super().__init__()
        check_options(options, None)
        self.log_steps, self._options = log, options

    @property
    def regularizer(self) -> GradientRegularizer | None:
        """What the steps are taken with, from the beginning of the training on."""
        return None if self._loop is None else self._loop.regularizer

    @property
    def report(self) -> Report | None:
        """Of the last step."""
        return None if self._loop is None else self._loop.report

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """See whether there was a step of ours for this one."""
        if self._begun.is_open and not self._made:
            self._begun.drop()
            raise RecordingError(
                "training_step returned None for the micro-batch that its optimizer steps after, and the others wait for it: "
                "return None for whole batches alone, or a loss that is 0 for every sample"
            )
        if self._made and (self._begun.is_open or not self._stepped):
            self._begun.drop()
            raise RecordingError(
                "the optimizer is to step, and the micro-batches of its batch have no gradient yet: the loss that "
                "training_step returned does not lead back to bootgrad.integrations.lightning.loss, or was detached"
            )
        self._stepped = False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the step that ended with this batch."""
        report = self._begun.report
        if self.log_steps and report is not None and not self._begun.is_open:
            pl_module.log_dict(numbers_of(report), batch_size=report.batch_size)

    def _loop_of(self, model: nn.Module) -> Loop:
        return loop_of(model, self._options)

    def _is_of(self, loop: Loop, model: nn.Module) -> bool:
        return loop.regularizer is not None and loop.regularizer.model is model


class Statistics(_Callback):
    """Watches every k-th step by a `bootgrad.monitoring.Monitor`, and logs what it tells: Γ, noise scale, layers, outliers.

    The training stays what it is. Of batches that ``accumulate_grad_batches`` puts together the last one is watched, as a batch
    of its own; beside `Penalties`, which measure the whole, their reports are.

    Args:
        every: k, in optimizer steps.
        options: of `bootgrad.monitoring.Monitor`, such as ``layers`` and ``writers``; these are closed when the run ends.

    Raises, in ``fit``:
        As `Penalties`.
    """

    def __init__(self, every: int = 50, **options: Any):
        """Keep the options; the model is there when the training begins."""
        super().__init__()
        self._options = {"every": every, **options}
        check_options(None, self._options)
        self._logged: Observation | None = None

    @property
    def monitor(self) -> Monitor | None:
        """What watches, from the beginning of the training on."""
        return None if self._loop is None else self._loop.monitor

    @property
    def last(self) -> Observation | None:
        """The last observation."""
        return None if self.monitor is None else self.monitor.last

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, and warn of what `Penalties` will not tell."""
        super().on_train_start(trainer, pl_module)
        if self._is_fed_by_other(trainer):
            warn_of_unused(self._options)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what this batch has told: to loggers now, whatever `log_every_n_steps`; as metrics what `Penalties` do not."""
        seen = self.last
        if seen is None or seen is self._logged:
            return
        self._logged, penalties = seen, _only(Penalties, trainer)
        told: Mapping[str, Any] = {}
        if penalties is not None and penalties.log_steps and penalties.report is not None:
            told = numbers_of(penalties.report)
        numbers = {name: value for name, value in seen.scalars().items() if name not in told}
        pl_module.log_dict(numbers, batch_size=seen.batch_size, logger=False)
        every = trainer.log_every_n_steps
        are_logged = every and trainer.global_step % every == 0  # what `Penalties` log, with this step
        logged = {name: value for name, value in finite(seen).items() if name in numbers or not are_logged}
        for logger in trainer.loggers:
            logger.log_metrics({**logged, "epoch": trainer.current_epoch}, step=trainer.global_step - 1)
            logger.save()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the writers."""
        if self.monitor is not None:
            self.monitor.close()

    def _loop_of(self, model: nn.Module) -> Loop:
        return loop_of(model, statistics=self._options)

    def _is_of(self, loop: Loop, model: nn.Module) -> bool:
        return loop.monitor is not None and loop.monitor.model is model

    def _is_fed_by_other(self, trainer: Any) -> bool:
        return _only(Penalties, trainer) is not None


def _only(kind: type, trainer: Any) -> Any:
    found = [callback for callback in trainer.callbacks if isinstance(callback, kind)]
    if len(found) > 1:
        raise ArgumentError(f"a run has one {kind.__name__} callback; got {len(found)}: put all of it into one")
    return found[0] if found else None


def check_run(trainer: Any, module: Any) -> None:
    """Raise where a run is not trained as is known here."""
    if not module.automatic_optimization:
        raise UnsupportedError(
            "the module optimizes by hand: there call a GradientRegularizer of its own, reg.backward(losses, *batch), in place "
            "of self.manual_backward(loss)"
        )
    if getattr(module, "_compiler_ctx", None) is not None:
        raise UnsupportedError(
            "the LightningModule is compiled as a whole, with its training_step: compile the network inside of it, "
            "self.network = torch.compile(network)"
        )
    for what, plugin, known in (
        ("strategy", trainer.strategy, _STRATEGIES),
        ("precision", trainer.precision_plugin, _PRECISIONS),
    ):
        if type(plugin).__name__ not in known:
            raise UnsupportedError(
                f"the {what} {type(plugin).__name__} does more to a backward pass than is known here: take one of "
                f"{', '.join(known)}"
            )
