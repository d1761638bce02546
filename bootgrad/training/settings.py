"""The settings of a training run: what a run is made from, apart from the data themselves."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

import bootgrad

from ..errors import ArgumentError

CENTERS = ("batch_mean", "zero", "ema", "window")
OPTIMIZERS = ("adam", "sgd")
ESTIMATOR = ("method", "probes", "derivative", "epsilon", "fraction", "every")  # of `GradientRegularizer`


@dataclass(frozen=True)
class Settings:
    """Options of a run; each is checked, and an error names the option of the command line.

    Attributes:
        data: source of the images, as `data.load` takes it; ``data_root`` is where torchvision downloads to.
        train_size: how many of the training images are used, the first ones; all when None.
        reg1, reg2: the factors λ₁ and λ₂; both zero is a plain run, whose statistics are recorded all the same.
        center: what Reg1 and Reg2 measure deviations from: one name, or Reg1's and Reg2's with a comma between.
        method, probes, derivative, epsilon, fraction, every: how the penalties' gradient is made, as `GradientRegularizer`
            takes them; of no effect in a plain run.
        threads: of torch's CPU kernels; torch's own choice when None. Part of the settings since sums depend on it.
    """

    data: str = "digits"
    data_root: str = "data"
    train_size: int | None = None
    reg1: float = 0.0
    reg2: float = 0.0
    center: str = "batch_mean"
    method: str = "exact"
    probes: int = 1
    derivative: str = "exact"
    epsilon: float | None = None
    fraction: float = 1.0
    every: int = 1
    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 0.001
    momentum: float = 0.9
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self):
        """Check every value."""
        for name in ("reg1", "reg2", "lr", "momentum"):
            _check(name, "a finite number of at least 0", getattr(self, name), _is_number(getattr(self, name)))
        _check("lr", "above 0", self.lr, self.lr > 0)
        _check("momentum", "below 1", self.momentum, self.momentum < 1)
        most = (1 - self.momentum) * torch.finfo(torch.float32).max  # Adam's first step is of size lr / (1 − momentum)
        _check("lr", "so small that float32 holds lr / (1 − momentum)", self.lr, self.lr <= most)
        for name in ("train_size", "epochs", "batch_size", "threads"):
            value = getattr(self, name)
            if value is not None or name in ("epochs", "batch_size"):
                least = 2 if name == "batch_size" else 1
                _check(name, f"a whole number of at least {least}", value, _is_whole(value, least))
        _check("seed", "a whole number in 0…2⁶³−1", self.seed, _is_whole(self.seed, 0) and self.seed < 1 << 63)
        _check("threads", "at most 1024", self.threads, self.threads is None or self.threads <= 1024)
        for name in ("data", "data_root", "device", "center", "optimizer"):
            _check(name, "a word", getattr(self, name), isinstance(getattr(self, name), str))
        _check("optimizer", f"one of {', '.join(OPTIMIZERS)}", self.optimizer, self.optimizer in OPTIMIZERS)
        names = self.center.split(",")
        expected = f"one of {', '.join(CENTERS)}, or two with a comma between, for Reg1 and Reg2"
        _check("center", expected, self.center, len(names) <= 2 and set(names) <= set(CENTERS))
        if self.reg2 > 0 and names[-1] == "batch_mean":
            raise ArgumentError(
                "--reg2 about the batch mean is identically zero: give it another center, "
                "for example --center ema or --center batch_mean,ema"
            )
        _check_estimator(self.estimator)
        _check("every", "below 2⁶³", self.every, self.every < 1 << 63)
        _check_device(self.device)

    @property
    def centers(self) -> dict[str, str]:
        """The centers' names by penalty."""
        names = self.center.split(",")
        return {"reg1": names[0], "reg2": names[-1]}

    @property
    def estimator(self) -> dict[str, Any]:
        """How the penalties' gradient is made, as options of `GradientRegularizer`."""
        return {name: getattr(self, name) for name in ESTIMATOR}

    @property
    def penalty(self) -> str:
        """The penalties, and what is not the default of how they are taken, for people."""
        if self.is_plain:
            return "plain"
        others = [f", {name} {value}" for name, value in self.estimator.items() if value != getattr(Settings, name)]
        return f"λ₁ = {self.reg1:g}, λ₂ = {self.reg2:g}, center {self.center}{''.join(others)}"

    @property
    def is_plain(self) -> bool:
        """Whether no penalty is asked for."""
        return self.reg1 == 0 and self.reg2 == 0

    def as_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return asdict(self)


SETTING_NAMES = tuple(field.name for field in fields(Settings))


def _check(name: str, expected: str, value: Any, is_good: bool) -> None:
    if not is_good:
        raise ArgumentError(f"--{name.replace('_', '-')} must be {expected}; got {value}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_estimator(options: dict[str, Any]) -> None:
    """Let the library judge, on a model of nothing: its messages begin with the option's name."""
    try:
        with torch.random.fork_rng(devices=[]):  # from which a regularizer draws its seed
            bootgrad.GradientRegularizer(torch.nn.Linear(1, 1, device="meta"), reg1=1.0, **options)
    except ArgumentError as error:
        raise ArgumentError(f"--{error}") from None


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ArgumentError(f"--device must be cpu, cuda or cuda:N; got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"--device must be cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
