"""What a case of the zoo is: a model with random weights, a batch, and one loss per sample; and the register of all cases.

Letters: ``B`` samples, ``T`` tokens, ``V`` words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

transformers.logging.set_verbosity_error()  # it tells of kernels that are not installed
B, CLASSES = 3, 5


class Setting(NamedTuple):
    """One model, one batch, and ``losses(*inputs)``, (B,); ``samples`` as for `bootgrad.record`."""

    model: nn.Module
    losses: Callable[..., Tensor]
    inputs: tuple
    samples: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """An architecture, and what is expected of it.

    Attributes:
        build: makes the setting.
        refusal: what the error says, where per-sample gradients do not exist or cannot be had.
        differences: whether finite differences can be had, too, for which rows must be in the order of the samples.
        quick: whether the test is in the fast tier.
    """

    build: Callable[[], Setting]
    refusal: str | None = None
    differences: bool = True
    quick: bool = False


CASES: dict[str, Case] = {}


def case(name: str, **options) -> Callable:
    """Register a function that builds a setting under a name."""

    def register(build):
        assert name not in CASES
        CASES[name] = Case(build, **options)
        return build

    return register


def randomized(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode, all weights and running statistics random, so that every branch matters.

    As models are initialized, biases are zero, and class tokens and the scales of residual branches nearly so.
    """
    generator = torch.Generator().manual_seed(0)
    model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(p + 0.2 * noise if p.dim() < 2 else noise / p[0].numel() ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def model_of(kind: str, head: str, attention: str | None = None, **options: Any) -> nn.Module:
    """A model of transformers, ``kind`` + "Config" being the name of its settings."""
    config = getattr(transformers, f"{kind}Config")(**options)
    return randomized(getattr(transformers, f"{kind}{head}")._from_config(config, attn_implementation=attention))


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high: int, *shape: int, seed: int = 2) -> Tensor:
    """Numbers below ``high``."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def padding(T: int) -> Tensor:
    """1 where there is a token, 0 behind the last one; (B, T), each sample of another length."""
    return (torch.arange(T) < torch.tensor([[T], [T - 2], [T - 3]])).long()


def token_losses(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy averaged over each sample's tokens, (B,); logits (B, T, V), labels and mask (B, T)."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (losses * mask).sum(1) / mask.sum(1)


def classified(model: nn.Module, *inputs: Tensor) -> Setting:
    """A classifier, whose output is the logits or has them as an attribute."""

    def losses(labels, *inputs):
        out = model(*inputs)
        return F.cross_entropy(getattr(out, "logits", out), labels, reduction="none")

    return Setting(model, losses, (integers(CLASSES, B), *inputs))


def regressed(model: nn.Module, target: Tensor, *inputs: Tensor) -> Setting:
    """A mean squared error."""

    def losses(target, *inputs):
        return (model(*inputs) - target).square().flatten(1).mean(1)

    return Setting(model, losses, (target, *inputs))
