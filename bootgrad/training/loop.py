"""The training loop: the reference CNN on images, with the library's statistics at every step.

A `Trainer` is all the state of a run. Its numbers are a function of the settings and the data alone: a run that is
stopped after any step, saved, loaded and continued has the same parameters and history, bit for bit, as one that was
not.
Beside the run, now and then, a copy of the model takes a plain step, from which the price of a step is known.

Letters: ``N`` training images, ``B`` batch size.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bootgrad

from ..errors import ArgumentError, BootgradError, DataError
from .data import ImageData
from .history import History
from .model import reference_cnn
from .settings import Settings

_PLAIN_EVERY = 8
_EVALUATION_BATCH = 1000
_NOISE_SCALE_DECAY = 0.98  # an average over some 50 steps, short enough to follow a training run


class TrainingError(BootgradError, RuntimeError):
    """A run that cannot go on, such as one whose loss became infinite."""


class Trainer:
    """A run of ``settings`` on ``data``: model, optimizer, regularizer, random states, place in the data, history.

    Raises:
        ArgumentError: fewer training images than a batch takes, or options that the library refuses.
    """

    def __init__(self, settings: Settings, data: ImageData):
        """Make everything anew from the seed."""
        self.settings, self.data = settings, data
        self.device = torch.device(settings.device)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.images = len(data.x_train) if settings.train_size is None else min(settings.train_size, len(data.x_train))
        if self.images < settings.batch_size:
            raise ArgumentError(
                f"--batch-size {settings.batch_size} is larger than the training set of {self.images} images"
            )
        torch.manual_seed(settings.seed)
        self.model = reference_cnn(data.image_shape, data.classes).to(self.device)
        self.optimizer = self._make_optimizer(self.model)
        self.regularizer = None
        if not settings.is_plain:
            self.regularizer = bootgrad.GradientRegularizer(
                self.model, reg1=settings.reg1, reg2=settings.reg2, center=settings.centers, **settings.estimator
            )
        self.noise_scale = bootgrad.NoiseScale(decay=_NOISE_SCALE_DECAY)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.history = History()
        self.epoch = self.position = 0
        self.order = torch.empty(0, dtype=torch.long)
        self._plain_model = copy.deepcopy(self.model)
        self._plain_optimizer = self._make_optimizer(self._plain_model)
        self._steps_here = 0  # of this process

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training set; the images of an incomplete one wait for another epoch."""
        return self.images // self.settings.batch_size

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.settings.epochs

    @property
    def cost(self) -> tuple[float, float]:
        """Median seconds of a step and of a plain one, over the pairs measured side by side; nan before the first.

        With penalties on every k-th step, a pair's step is the mean of the last k, of which one has them.
        """
        pairs = self.history.pairs
        if not len(pairs):
            return float("nan"), float("nan")
        return statistics.median(pairs["seconds"]), statistics.median(pairs["plain_seconds"])

    def run_epoch(
        self, should_stop: Callable[[], bool] = lambda: False, on_step: Callable[[dict], Any] = lambda row: None
    ) -> bool:
        """Train to the end of the epoch and test, or until ``should_stop`` says so after a step.

        Args:
            should_stop: asked after each step.
            on_step: told each step's row of the history.

        Returns:
            Whether the epoch was finished.

        Raises:
            TrainingError: the loss is not finite.
        """
        if self.position == 0:
            self.order = torch.randperm(self.images, generator=self.generator)
        while self.position < self.steps_per_epoch:
            self._step()
            on_step(self.history.steps.row(-1))
            if should_stop():
                return False
        self._finish_epoch()
        return True

    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the test images."""
        loss, correct = 0.0, 0
        with torch.no_grad():
            batches = zip(
                self.data.x_test.split(_EVALUATION_BATCH), self.data.y_test.split(_EVALUATION_BATCH), strict=True
            )
            for x, y in batches:
                outputs, y = self.model(x.to(self.device)), y.to(self.device)
                loss += float(F.cross_entropy(outputs, y, reduction="sum"))
                correct += int((outputs.argmax(1) == y).sum())
        return loss / len(self.data.y_test), correct / len(self.data.y_test)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, in the layout of `checkpoint`."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "settings": self.settings.as_dict(),
            "fingerprint": self.data.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "regularizer": None if self.regularizer is None else self.regularizer.state_dict(),
            "noise_scale": self.noise_scale.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda, "order": self.generator.get_state()},
            "progress": {"epoch": self.epoch, "position": self.position, "order": self.order},
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict` made with the same settings, but for the number of epochs.

        Raises:
            DataError: the state is of another model or of other data, or damaged.
            ArgumentError: it has begun more epochs than the settings ask for.
        """
        try:
            self._check_same_model(state["model"])
            if state["fingerprint"] != self.data.fingerprint:
                raise DataError(
                    f"the checkpoint was trained on other data than --data {self.settings.data} holds now: "
                    "give --data the file it was trained on"
                )
            self.model.load_state_dict(state["model"])
            self._check_optimizer(state["optimizer"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.regularizer is not None:
                self.regularizer.load_state_dict(state["regularizer"])
            self.noise_scale.load_state_dict(state["noise_scale"])
            self.history.load_state_dict(state["history"])
            progress, rng = state["progress"], state["rng"]
            self.epoch, self.position, self.order = progress["epoch"], progress["position"], progress["order"]
            self._check_progress()
            torch.set_rng_state(rng["torch"])
            if rng["cuda"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.device)
            self.generator.set_state(rng["order"])
        except (DataError, MemoryError):
            raise
        except Exception as error:  # whatever a state that was made by hand makes tensors and optimizers raise
            raise DataError(f"the checkpoint is not whole ({type(error).__name__}: {error}): start anew") from error
        begun = self.epoch + (self.position > 0)
        if self.settings.epochs < begun:
            raise ArgumentError(
                f"--epochs {self.settings.epochs} is fewer than the {begun} that the run has begun: give {begun} or more"
            )

    def _make_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        if self.settings.optimizer == "adam":
            return torch.optim.Adam(model.parameters(), lr=self.settings.lr, betas=(self.settings.momentum, 0.999))
        return torch.optim.SGD(model.parameters(), lr=self.settings.lr, momentum=self.settings.momentum)

    def _batch(self) -> tuple[Tensor, Tensor]:
        B = self.settings.batch_size
        chosen = self.order[self.position * B : (self.position + 1) * B]
        return self.data.x_train[chosen].to(self.device), self.data.y_train[chosen].to(self.device)

    def _step(self) -> None:
        x, y = self._batch()
        seconds, (loss, moments, reg1, reg2) = self._timed(self._take_step, x, y)
        every = 1 if self.regularizer is None else self.settings.every
        is_place = self.position % _PLAIN_EVERY == min(_PLAIN_EVERY, self.steps_per_epoch) // 2
        if not self._steps_here:  # a first step also checks the batch dimension and allocates: no pair comes from it
            self._take_plain_step(x, y)
        elif is_place and self._steps_here >= every:
            recent = [*self.history.steps["seconds"][-every:], seconds][-every:]
            plain = self._timed(self._take_plain_step, x, y)[0]
            self.history.pairs.add(seconds=statistics.fmean(recent), plain_seconds=plain)
        self._steps_here += 1
        self.noise_scale.update(moments)
        self.position += 1
        self.history.steps.add(
            step=len(self.history.steps) + 1,
            epoch=self.epoch + 1,
            loss=loss,
            covariance_trace=moments.covariance_trace,
            sq_mean_norm=moments.sq_mean_norm,
            noise_scale=self.noise_scale.value,
            reg1=float("nan") if reg1 is None else reg1,
            reg2=float("nan") if reg2 is None else reg2,
            seconds=seconds,
        )

    def _take_step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Any, Tensor | None, Tensor | None]:
        moments: Any
        reg1: Tensor | None
        reg2: Tensor | None
        self.optimizer.zero_grad()
        if self.regularizer is None:
            with bootgrad.record(self.model) as rec:
                losses = self._losses(self.model, x, y)
            moments = rec.backward(losses)
            loss, reg1, reg2 = losses.detach().mean(), None, None
        else:
            moments = report = self.regularizer.backward(lambda x, y: self._losses(self.model, x, y), x, y)
            loss, reg1, reg2 = report.loss, report.reg1, report.reg2
        self.optimizer.step()
        return loss, moments, reg1, reg2

    def _take_plain_step(self, x: Tensor, y: Tensor) -> None:
        self._plain_optimizer.zero_grad()
        F.cross_entropy(self._plain_model(x), y, reduction="none").mean().backward()
        self._plain_optimizer.step()

    def _losses(self, model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(model(x), y, reduction="none")
        if not torch.isfinite(losses.detach()).all():
            raise TrainingError(
                f"the loss became infinite or NaN at step {self.position + 1} of epoch {self.epoch + 1}: "
                "lower --lr, --reg1 or --reg2"
            )
        return losses

    def _timed(self, function: Callable, *args: Any) -> tuple[float, Any]:
        self._wait()
        start = time.perf_counter()
        result = function(*args)
        self._wait()
        return time.perf_counter() - start, result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _finish_epoch(self) -> None:
        loss, accuracy = self.evaluate()
        losses, traces = (self.history.steps[name][-self.steps_per_epoch :] for name in ("loss", "covariance_trace"))
        ours, plain = self.cost
        self.epoch, self.position = self.epoch + 1, 0
        self.history.epochs.add(
            epoch=self.epoch,
            step=len(self.history.steps),
            train_loss=statistics.fmean(losses),
            test_loss=loss,
            test_accuracy=accuracy,
            covariance_trace=_known_mean(traces),
            noise_scale=self.noise_scale.value,
            seconds_per_step=ours,
            plain_seconds_per_step=plain,
        )

    def _check_optimizer(self, state: dict[str, Any]) -> None:
        """Raise where a state is not one of this optimizer, which takes over whatever it is given."""
        if state["param_groups"] != self.optimizer.state_dict()["param_groups"]:
            raise ValueError("the optimizer's options are not those of the settings")
        names = {"adam": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}[self.settings.optimizer]
        parameters = list(self.model.parameters())
        if set(state["state"]) not in (set(), set(range(len(parameters)))):
            raise ValueError("the optimizer's state is not that of the model's parameters")
        for number, kept in state["state"].items():
            shapes = {name: () if name == "step" else tuple(parameters[number].shape) for name in names}
            if self.settings.optimizer == "sgd" and kept == {"momentum_buffer": None}:
                continue
            if {name: tuple(t.shape) for name, t in kept.items()} != shapes:
                raise ValueError(f"the optimizer's state of parameter {number} must have the shapes {shapes}")
            if not all(t.is_floating_point() for t in kept.values()):
                raise ValueError(f"the optimizer's state of parameter {number} must be floating point")

    def _check_progress(self) -> None:
        """Raise where the place in the data is none, or not where the history ends."""
        steps, order = self.steps_per_epoch, self.order
        for number, most in ((self.epoch, 1 << 53), (self.position, steps)):
            if type(number) is not int or not 0 <= number <= most:
                raise ValueError(f"epoch {self.epoch} and position {self.position} are no place in {steps} steps")
        if order.dtype != torch.long or order.dim() != 1 or (self.position and order.numel() != self.images):
            raise ValueError(f"the order of {self.images} images must be that many whole numbers")
        if order.numel() and not torch.equal(order.sort().values, torch.arange(order.numel())):
            raise ValueError("the order of the images must name each of them once")
        done, epochs = len(self.history.steps), len(self.history.epochs)
        if (done, epochs) != (self.epoch * steps + self.position, self.epoch):
            raise ValueError(f"a history of {done} steps and {epochs} epochs is not that of epoch {self.epoch}")

    def _check_same_model(self, state: dict[str, Tensor]) -> None:
        ours = {name: tuple(t.shape) for name, t in self.model.state_dict().items()}
        theirs = {name: tuple(t.shape) for name, t in state.items()}
        different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if different:
            name = different[0]
            raise DataError(
                f"the checkpoint is of another model: {name} must be {ours.get(name, 'absent')} for these images; "
                f"got {theirs.get(name, 'none')}: give --data the images it was trained on"
            )


def _known_mean(values: list[float]) -> float:
    """The mean of those that are known, for by random signs Γ is on no step without Reg1; nan where none is."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan
