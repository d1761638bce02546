"""The models that whole steps are timed on, in plain torch: small ones for CPUs, and those that GPUs are judged by.

A residual network's norms are group norms, since batch norm has no per-sample gradients. Sums and attention are modules of
their own, so that a hook sees every tensor that a step moves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bootgrad.training.model import reference_cnn


def reference() -> tuple[nn.Module, tuple[int, ...]]:
    """Reference CNN: conv 32 – pool – conv 64 – pool – conv 64 – fc 128 – fc 10 on 28×28×1."""
    return reference_cnn((1, 28, 28), 10), (1, 28, 28)


def mixed() -> tuple[nn.Module, tuple[int, ...]]:
    """Group norm, 5×5, depthwise strided, grouped and 1×1 convolutions on 28×28×1."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32),
        nn.Conv2d(32, 64, 1),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, groups=4),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1, groups=64),
        nn.Conv2d(64, 128, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    return model, (1, 28, 28)


def resnet18() -> tuple[nn.Module, tuple[int, ...]]:
    """ResNet-18 with group norms, for 32×32×3."""
    return _resnet18(True, 10)(), (3, 32, 32)


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, D)."""
        return x.mean(1)


def encoder() -> tuple[nn.Module, tuple[int, ...]]:
    """Torch's own transformer encoder, 6 layers of 256 features and 8 heads, on 128 vectors."""
    layer = nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.0, batch_first=True)
    stack = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    return nn.Sequential(stack, Mean(), nn.Linear(256, 10)), (128, 256)


class Words(nn.Module):
    """Numbers in [0, 1) as words of a vocabulary, so that batches are made as for images."""

    def __init__(self, vocabulary: int):
        """Keep the number of words."""
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, x: Tensor) -> Tensor:
        """Word numbers, int64."""
        return (x * self.vocabulary).long()


def words() -> tuple[nn.Module, tuple[int, ...]]:
    """A table of 50,000 words of 128 features, and a classifier of their mean over 64 words."""
    return nn.Sequential(Words(50_000), nn.Embedding(50_000, 128), Mean(), nn.Linear(128, 10)), (64,)


MODELS = {"reference": reference, "mixed": mixed, "resnet18": resnet18, "encoder": encoder, "words": words}


def batch(shape: tuple[int, ...], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(size, *shape, generator=generator), torch.randint(0, 10, (size,), generator=generator)


class Add(nn.Module):
    """A sum of two branches."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """A + b."""
        return a + b


class Residual(nn.Module):
    """relu(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module):
        """Join two branches."""
        super().__init__()
        self.body, self.shortcut, self.add, self.relu = body, shortcut, Add(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The joined branches."""
        return self.relu(self.add(self.body(x), self.shortcut(x)))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.GroupNorm(min(32, outputs // 2), outputs)]


def _basic(inputs: int, width: int, stride: int) -> list[nn.Module]:
    return [*_conv(inputs, width, 3, stride), nn.ReLU(), *_conv(width, width, 3)]


def _bottleneck(inputs: int, width: int, stride: int) -> list[nn.Module]:
    return [
        *_conv(inputs, width, 1),
        nn.ReLU(),
        *_conv(width, width, 3, stride),
        nn.ReLU(),
        *_conv(width, 4 * width, 1),
    ]


def resnet(depths: tuple[int, ...], bottleneck: bool, small_images: bool, classes: int, width: int = 64) -> nn.Module:
    """A residual network with group norms.

    Args:
        depths: blocks per stage.
        bottleneck: 1×1, 3×3, 1×1 blocks of four times the width, as ResNet-50 has, rather than 3×3, 3×3.
        small_images: begin with 3×3 at full resolution, as for CIFAR, rather than with 7×7, stride 2, and pooling.
        classes: outputs.
        width: channels of the first stage.
    """
    stem = _conv(3, width, 3) if small_images else _conv(3, width, 7, 2)
    layers: list[nn.Module] = [*stem, nn.ReLU()]
    if not small_images:
        layers.append(nn.MaxPool2d(3, 2, 1))
    block, expansion = (_bottleneck, 4) if bottleneck else (_basic, 1)
    channels = width
    for stage, depth in enumerate(depths):
        for k in range(depth):
            stride, inner = (2 if stage and not k else 1), width * 2**stage
            same = stride == 1 and channels == inner * expansion
            shortcut = nn.Identity() if same else nn.Sequential(*_conv(channels, inner * expansion, 1, stride))
            layers.append(Residual(nn.Sequential(*block(channels, inner, stride)), shortcut))
            channels = inner * expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Attention(nn.Module):
    """Causal attention without parameters: plain products and a softmax, which have second derivatives, or torch's kernel."""

    def __init__(self, heads: int, fused: bool):
        """Choose the kind."""
        super().__init__()
        self.heads, self.fused = heads, fused

    def forward(self, qkv: Tensor) -> Tensor:
        """(B, T, 3D) to (B, T, D)."""
        B, T, D = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in qkv.split(D, 2))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
            scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(future, float("-inf"))
            y = scores.softmax(-1).to(v.dtype) @ v
        return y.transpose(1, 2).reshape(B, T, D)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, fused: bool):
        """Make the layers."""
        super().__init__()
        self.norm1, self.qkv, self.attention = nn.LayerNorm(width), nn.Linear(width, 3 * width), Attention(heads, fused)
        self.out, self.add1 = nn.Linear(width, width), Add()
        self.norm2, self.up, self.gelu = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(approximate="tanh")
        self.down, self.add2 = nn.Linear(4 * width, width), Add()

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x = self.add1(x, self.out(self.attention(self.qkv(self.norm1(x)))))
        return self.add2(x, self.down(self.gelu(self.up(self.norm2(x)))))


class Transformer(nn.Module):
    """A decoder like GPT-2; the embeddings are frozen, and so is the output layer, which is the embedding's transpose."""

    def __init__(self, blocks: int, width: int, heads: int, vocabulary: int, length: int, fused: bool = False):
        """Make the layers."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width).requires_grad_(False)
        self.positions = nn.Embedding(length, width).requires_grad_(False)
        self.blocks = nn.Sequential(*(Block(width, heads, fused) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) to logits (B, T, vocabulary)."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.size(1), device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


@dataclass(frozen=True)
class Task:
    """A model with the batch that it is trained on.

    Attributes:
        build: makes the model.
        shape: of one sample's input: (C, H, W) of an image, or (T,) of tokens.
        batch_size: B.
        classes: of images, or the vocabulary.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_size: int
    classes: int

    def batch(self, device: torch.device | str = "cpu", size: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and labels."""
        generator, size = torch.Generator().manual_seed(0), size or self.batch_size
        if len(self.shape) == 1:
            tokens = torch.randint(self.classes, (size, self.shape[0] + 1), generator=generator).to(device)
            return tokens[:, :-1], tokens[:, 1:]
        x = torch.randn(size, *self.shape, generator=generator)
        return x.to(device), torch.randint(self.classes, (size,), generator=generator).to(device)


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of each sample, (B,); of a sequence, the mean over its positions."""
    logits = model(x)
    if logits.dim() == 2:
        return F.cross_entropy(logits, y, reduction="none")
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def _resnet18(small_images: bool, classes: int):
    return lambda: resnet((2, 2, 2, 2), False, small_images, classes)


def vgg() -> nn.Module:
    """VGG-like: twice 64, 128 and 256 channels of 3×3 on 32×32, each two pooled, then 256 and 10 units."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 128, 256):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, 256), nn.ReLU(), nn.Linear(256, 10))


def mlp() -> nn.Module:
    """784 – 1024 – 1024 – 10."""
    hidden = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(1024, 10))


def _transformer(fused: bool):
    return lambda: Transformer(12, 768, 12, 50257, 1024, fused)


TASKS = {
    "resnet18-cifar": Task(_resnet18(True, 10), (3, 32, 32), 256, 10),
    "resnet18-imagenet": Task(_resnet18(False, 1000), (3, 224, 224), 256, 1000),
    "resnet50-imagenet": Task(lambda: resnet((3, 4, 6, 3), True, False, 1000), (3, 224, 224), 64, 1000),
    "transformer-124m": Task(_transformer(False), (1024,), 8, 50257),
    "transformer-124m-fused": Task(_transformer(True), (1024,), 8, 50257),
}
TINY_TASKS = {
    "resnet18-tiny": Task(lambda: resnet((1, 1), False, True, 10, width=8), (3, 8, 8), 4, 10),
    "resnet50-tiny": Task(lambda: resnet((1, 1), True, False, 10, width=4), (3, 16, 16), 4, 10),
    "transformer-tiny": Task(lambda: Transformer(1, 16, 2, 31, 8), (8,), 4, 31),
    "transformer-tiny-fused": Task(lambda: Transformer(1, 16, 2, 31, 8, True), (8,), 4, 31),
}
# What other libraries are measured on beside this one, on a CPU.
PEER_TASKS = {
    "mlp": Task(mlp, (1, 28, 28), 128, 10),
    "reference": Task(lambda: reference()[0], (1, 28, 28), 128, 10),
    "vgg": Task(vgg, (3, 32, 32), 64, 10),
    "resnet18-gn": Task(_resnet18(True, 10), (3, 32, 32), 64, 10),
}
