"""Networks of convolutions and one of linear layers that transformers does not have, written out."""

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import CLASSES


class Block(nn.Module):
    """A bottleneck whose middle convolution has groups. Source: arXiv 1611.05431."""

    def __init__(self, i, o, groups, stride):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(i, o // 2, 1, bias=False),
            nn.BatchNorm2d(o // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(o // 2, o // 2, 3, stride, 1, groups=groups, bias=False),
            nn.BatchNorm2d(o // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(o // 2, o, 1, bias=False),
            nn.BatchNorm2d(o),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        out = self.layers(x)
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


def resnext():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        Block(8, 16, 4, 1),
        Block(16, 32, 4, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


class DenseLayer(nn.Module):
    """Norm, ReLU, convolution, twice; its output is put behind its input. Source: arXiv 1608.06993."""

    def __init__(self, channels, growth):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, 2 * growth, 1, bias=False),
            nn.BatchNorm2d(2 * growth),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x):
        return torch.cat([x, self.layers(x)], 1)


def densenet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, 2, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        DenseLayer(8, 4),
        DenseLayer(12, 4),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 8, 1, bias=False),
        nn.AvgPool2d(2),
        DenseLayer(8, 4),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


def vgg():
    """Source: arXiv 1409.1556."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 2),
        nn.AdaptiveAvgPool2d((3, 3)),
        nn.Flatten(),
        nn.Linear(16 * 9, 32),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(32, CLASSES),
    )


def video():
    """Convolutions over space and over time in turn. Source: arXiv 1711.11248."""
    return nn.Sequential(
        nn.Conv3d(3, 6, (1, 3, 3), padding=(0, 1, 1)),
        nn.GroupNorm(2, 6),
        nn.ReLU(inplace=True),
        nn.Conv3d(6, 8, (3, 1, 1), padding=(1, 0, 0)),
        nn.InstanceNorm3d(8, affine=True),
        nn.ReLU(inplace=True),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


def _twice(i, o):
    return nn.Sequential(
        nn.Conv2d(i, o, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(o, o, 3, padding=1), nn.ReLU(inplace=True)
    )


class UNet(nn.Module):
    """Down by pooling, up by transposed convolutions, what was on the way down concatenated. Source: arXiv 1505.04597."""

    def __init__(self, width=8):
        super().__init__()
        self.down = nn.ModuleList([_twice(3, width), _twice(width, 2 * width)])
        self.middle = _twice(2 * width, 4 * width)
        self.up = nn.ModuleList([nn.ConvTranspose2d(n * width, n * width // 2, 2, 2) for n in (4, 2)])
        self.out = nn.ModuleList([_twice(n * width, n * width // 2) for n in (4, 2)])
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x):  # (B, 3, H, W)
        across = []
        for down in self.down:
            across.append(down(x))
            x = F.max_pool2d(across[-1], 2)
        x = self.middle(x)
        for up, out in zip(self.up, self.out, strict=True):
            x = out(torch.cat([across.pop(), up(x)], 1))
        return self.head(x)  # (B, CLASSES, H, W)


class Mixer(nn.Module):
    """Linear layers over patches and over channels in turn. Source: arXiv 2105.01601."""

    def __init__(self, patches=16, width=16, depth=2):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, stride=8)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2 * depth + 1)])
        self.across = nn.ModuleList([self._two_layers(patches) for _ in range(depth)])
        self.along = nn.ModuleList([self._two_layers(width) for _ in range(depth)])
        self.head = nn.Linear(width, CLASSES)

    def _two_layers(self, n):
        return nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n))

    def forward(self, x):  # (B, 3, 32, 32)
        x = self.embed(x).flatten(2).transpose(1, 2)  # (B, patches, width)
        norms = iter(self.norms)
        for across, along in zip(self.across, self.along, strict=True):
            x = x + across(next(norms)(x).transpose(1, 2)).transpose(1, 2)
            x = x + along(next(norms)(x))
        return self.head(next(norms)(x).mean(1))
