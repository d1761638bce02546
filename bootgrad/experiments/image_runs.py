"""A run of a CNN on images: trained in a way, and measured.

Letters: ``N`` training images, ``B`` batch size, ``s`` strength of the penalties.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bootgrad

from ..centers import Center
from ..strengths import Rule
from .image_draws import Draw, Pair

LOSSES = ("train_loss", "validation_loss", "test_loss", "gap", "stopped_loss")
OF_STEPS = ("ratio", "steps", "reg1", "reg2")
MEASURES = (*LOSSES, "train_accuracy", "test_accuracy", "gamma", *OF_STEPS)
Network = Callable[[tuple[int, int, int], int], nn.Module]
MakeCenter = Callable[[nn.Module, Pair], Center]
MakeRule = Callable[[str, float, torch.optim.Optimizer], Rule]
_PLAIN_EVERY, _CHUNK, _GAMMA_IMAGES = 8, 500, 1000


class Diverged(ArithmeticError):
    """A loss was not finite."""


@dataclass(frozen=True)
class Way:
    """A way to train: SGD on the mean loss + λ₁ Reg1 + λ₂ Reg2, with λ₁ = reg1 · s and λ₂ = reg2 · B · s.

    Reg2 is about Γ/B, so that s means much the same to both, and for every batch size.

    Attributes:
        name: of the way.
        reg1: whether Reg1 is taken, and how strongly.
        reg2: likewise.
        center: its name, or (model, training images) → the center.
        rule: (``"reg1"`` or ``"reg2"``, the λ it would have, optimizer) → the rule that sets λ in place of a constant.
    """

    name: str
    reg1: float = 0.0
    reg2: float = 0.0
    center: str | MakeCenter = "batch_mean"
    rule: MakeRule | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it has no penalty."""
        return self.reg1 == 0 and self.reg2 == 0

    def regularizer(
        self, model: nn.Module, images: Pair, optimizer: torch.optim.Optimizer, strength: float, batch: int
    ) -> bootgrad.GradientRegularizer | None:
        """What takes its backward passes; None where these are plain."""
        if self.is_plain:
            return None
        center = self.center if isinstance(self.center, str) else self.center(model, images)

        def asked(name: str, value: float) -> float | Rule:
            return self.rule(name, value, optimizer) if self.rule is not None and value else value

        reg1, reg2 = asked("reg1", self.reg1 * strength), asked("reg2", self.reg2 * batch * strength)
        return bootgrad.GradientRegularizer(model, reg1=reg1, reg2=reg2, center=center, statistics=False)


SGD = Way("sgd")
REG1 = Way("reg1", reg1=1.0)
REG2 = Way("reg2", reg2=1.0, center="ema")
UNCENTERED = Way("reg2 uncentered", reg2=1.0, center="zero")
BOTH = Way("both", reg1=1.0, reg2=1.0, center="ema")


def train(model: nn.Module, images: Pair, way: Way, *, lr: float, strength: float, batch: int, epochs: float, seed: int,
          on_epoch: Callable[[], object] = lambda: None) -> dict[str, float]:  # fmt: skip
    """Train by SGD, in whole batches of images that are shuffled anew in each epoch.

    Before every eighth step a copy of the model takes a plain one of the same batch, and both are timed; the copy takes another
    one first, so that it finds its memory in the caches as the model does.

    Args:
        model: changed in place.
        images: to train on.
        way: the penalties.
        lr: the learning rate.
        strength: s.
        batch: B; all images where there are fewer.
        epochs: how many, not only whole ones.
        seed: of the order.
        on_epoch: called after each epoch, and at the end.

    Returns:
        The columns `OF_STEPS`: the time of a step over that of a plain one (a median; nan if none was timed), how many steps,
        and λ₁ and λ₂ of the last one.

    Raises:
        Diverged: a loss was not finite.
    """
    x, y = images
    B = min(batch, len(y))
    per_epoch = len(y) // B
    steps = round(epochs * per_epoch)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    regularizer = way.regularizer(model, images, optimizer, strength, B)
    plain = copy.deepcopy(model)
    of_plain = torch.optim.SGD(plain.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    ratios, strengths = [], dict.fromkeys(("reg1", "reg2"), 0.0)
    for number in range(steps):
        place = number % per_epoch
        if place == 0:
            order = torch.randperm(len(y), generator=generator)
        chosen = order[place * B : (place + 1) * B]
        is_timed = number % _PLAIN_EVERY == _PLAIN_EVERY // 2
        if is_timed or number == 0:
            for _ in range(2):
                plain.load_state_dict(model.state_dict())
                of_plain_step, _ = _step(plain, of_plain, None, x[chosen], y[chosen])
        seconds, taken = _step(model, optimizer, regularizer, x[chosen], y[chosen])
        strengths |= taken
        if is_timed:
            ratios.append(seconds / of_plain_step)
        if place == per_epoch - 1 or number == steps - 1:
            on_epoch()
    return {"ratio": statistics.median(ratios or [math.nan]), "steps": steps, **strengths}


def run(way: Way, images: Draw, network: Network, *, final: bool, seed: int, **options) -> dict[str, float]:
    """Train a new model, and measure it: the columns `MEASURES` of a row.

    Accuracies and losses are means over images, ``gap`` the test loss minus the training loss, ``stopped_loss`` the test
    loss after the epoch with the lowest validation loss, ``gamma`` Γ of up to 1000 training images, the rest as `train` returns
    it. Of a run that diverged losses are infinite, and the others nan.

    Args:
        way: how to train.
        images: to train, validate and test on.
        network: (image shape, classes) → the model.
        final: whether to look at the test images; nan where not.
        seed: of the model and of the order.
        options: of `train`.
    """
    torch.manual_seed(seed)
    shape = images.train[0].shape[1:]
    model = network((shape[0], shape[1], shape[2]), images.classes)
    best = Best(model, images.validation)
    try:
        row = train(model, images.train, way, seed=seed, on_epoch=best.look, **options)
        row["gamma"] = gamma(model, images.train) if final else math.nan
    except Diverged:
        return {name: math.inf if name in (LOSSES if final else LOSSES[:2]) else math.nan for name in MEASURES}
    row["train_loss"], row["train_accuracy"] = evaluate(model, images.train)
    row["test_loss"], row["test_accuracy"] = evaluate(model, images.test) if final else (math.nan, math.nan)
    row |= {"validation_loss": best.last, "gap": row["test_loss"] - row["train_loss"]}
    model.load_state_dict(best.state)
    return row | {"stopped_loss": evaluate(model, images.test)[0] if final else math.nan}


class Best:
    """The parameters with the lowest validation loss so far."""

    def __init__(self, model: nn.Module, images: Pair):
        """Begin with the model as it is."""
        self.model, self.images, self.loss = model, images, math.inf
        self.look()

    def look(self) -> None:
        """Validate, and keep the parameters if they are the best."""
        self.last = evaluate(self.model, self.images)[0]
        if self.last <= self.loss:
            self.loss, self.state = self.last, copy.deepcopy(self.model.state_dict())


@torch.no_grad()
def evaluate(model: nn.Module, images: Pair) -> tuple[float, float]:
    """Mean loss and accuracy; an infinite loss and no accuracy where outputs are not finite."""
    outputs = torch.cat([model(x) for x in images[0].split(_CHUNK)])
    if not torch.isfinite(outputs).all():
        return math.inf, math.nan
    return float(F.cross_entropy(outputs, images[1])), float((outputs.argmax(1) == images[1]).float().mean())


def gamma(model: nn.Module, images: Pair) -> float:
    """Γ of the per-sample gradients of up to 1000 images."""
    x, y = (t[:_GAMMA_IMAGES].split(_CHUNK) for t in images)
    with bootgrad.accumulate(model) as whole:
        for part in zip(x, y, strict=True):
            with whole.record():
                losses = losses_of(model, *part)
            whole.backward(losses)
    model.zero_grad()
    return float(whole.statistics.covariance_trace)


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropies (B,); raises `Diverged` where one is not finite."""
    losses = F.cross_entropy(model(x), y, reduction="none")
    if not torch.isfinite(losses.detach()).all():
        raise Diverged("a loss is not finite")
    return losses


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, regularizer, x: Tensor, y: Tensor
) -> tuple[float, Mapping[str, float]]:
    """Take a step; its seconds, and λ by penalty."""
    start = time.perf_counter()
    optimizer.zero_grad()
    strengths: Mapping[str, float] = {}
    if regularizer is None:
        losses_of(model, x, y).mean().backward()
    else:
        strengths = regularizer.backward(partial(losses_of, model), x, y).strengths
    optimizer.step()
    return time.perf_counter() - start, strengths
