"""Networks that make images, densities and fields, written out."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import CLASSES


def sines(t: Tensor, width: int) -> Tensor:
    """Of times (B,), (B, width)."""
    angles = t[:, None] * torch.exp(-math.log(1000) * torch.arange(width // 2, dtype=t.dtype) / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], 1)


class Block(nn.Module):
    """Two convolutions with group norms; the time scales and shifts what is between them."""

    def __init__(self, i, o, time):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, i), nn.SiLU(), nn.Conv2d(i, o, 3, padding=1))
        self.time = nn.Linear(time, 2 * o)
        self.norm = nn.GroupNorm(4, o)
        self.second = nn.Sequential(nn.SiLU(), nn.Conv2d(o, o, 3, padding=1))
        self.shortcut = nn.Identity() if i == o else nn.Conv2d(i, o, 1)

    def forward(self, x, t):
        scale, shift = self.time(F.silu(t))[..., None, None].chunk(2, 1)
        return self.shortcut(x) + self.second(self.norm(self.first(x)) * (1 + scale) + shift)


class Attention(nn.Module):
    """Every place looks at all."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(1).chunk(3, -1)  # (B, 1, H W, C)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.out(y.mT.unflatten(2, x.shape[2:]))


class Denoiser(nn.Module):
    """The noise in an image of a class, at a time of the diffusion. Source: arXiv 2006.11239."""

    def __init__(self, width=8, time=16):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.label = nn.Embedding(CLASSES, time)
        self.inside = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([Block(width, width, time), Block(width, 2 * width, time)])
        self.shrink = nn.Conv2d(width, width, 3, 2, 1)
        self.middle = nn.ModuleList([Block(2 * width, 2 * width, time), Block(2 * width, 2 * width, time)])
        self.attention = Attention(2 * width)
        self.up = nn.ModuleList([Block(4 * width, width, time), Block(2 * width, width, time)])
        self.grow = nn.Conv2d(width, width, 3, padding=1)
        self.outside = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x, t, label):
        t = self.time(sines(t, 8)) + self.label(label)
        first = self.down[0](self.inside(x), t)
        second = self.down[1](self.shrink(first), t)
        y = self.middle[1](self.attention(self.middle[0](second, t)), t)
        y = self.up[0](torch.cat([y, second], 1), t)
        y = self.grow(F.interpolate(y, scale_factor=2, mode="nearest"))
        return self.outside(self.up[1](torch.cat([y, first], 1), t))


class NeRF(nn.Module):
    """The color of a ray, from densities and colors on it; positions come in again half-way. Source: arXiv 2003.08934."""

    def __init__(self, width=24, octaves=4):
        super().__init__()
        self.register_buffer("octaves", 2.0 ** torch.arange(octaves))
        n = 3 + 6 * octaves
        self.first = nn.Sequential(nn.Linear(n, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(width + n, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.density = nn.Linear(width, 1)
        self.feature = nn.Linear(width, width)
        self.color = nn.Sequential(nn.Linear(width + n, width // 2), nn.ReLU(), nn.Linear(width // 2, 3))

    def encoded(self, x):
        angles = (x[..., None] * self.octaves).flatten(-2)
        return torch.cat([x, angles.sin(), angles.cos()], -1)

    def forward(self, origins, directions, depths):  # (B, 3), (B, 3), (B, T)
        points = self.encoded(origins[:, None] + depths[..., None] * directions[:, None])  # (B, T, n)
        h = self.second(torch.cat([self.first(points), points], -1))
        density = F.softplus(self.density(h)).squeeze(-1)
        views = self.encoded(directions)[:, None].expand(-1, depths.size(1), -1)
        colors = self.color(torch.cat([self.feature(h), views], -1)).sigmoid()
        steps = torch.diff(depths, dim=1, append=depths[:, -1:] + 0.1)
        passed = torch.exp(-torch.cumsum(F.pad(density * steps, (1, 0)), 1)[:, :-1])
        weights = passed * (1 - torch.exp(-density * steps))
        return (weights[..., None] * colors).sum(1)


class Siren(nn.Module):
    """A field in sines. Source: arXiv 2006.09661."""

    def __init__(self, width=16):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(3 * layer(x))
        return self.head(x)


class FourierLayer(nn.Module):
    """Products with complex weights among the frequencies. Source: arXiv 2010.08895."""

    def __init__(self, width=6, modes=4):
        super().__init__()
        self.spectral = nn.Parameter(torch.zeros(width, width, modes, 2))
        self.along = nn.Conv1d(width, width, 1)
        self.modes = modes

    def forward(self, x):
        spectrum = torch.fft.rfft(x)[..., : self.modes]
        y = torch.einsum("bim,iom->bom", spectrum, torch.view_as_complex(self.spectral))
        return torch.fft.irfft(y, n=x.size(-1)) + self.along(x)


class VAE(nn.Module):
    """Source: arXiv 1312.6114."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 16, 2 * 6))
        self.decoder = nn.Sequential(
            nn.Linear(6, 8 * 16), nn.Unflatten(1, (8, 4, 4)), nn.SiLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1)
        )

    def losses(self, x):
        mean, log_variance = self.encoder(x).chunk(2, 1)
        y = self.decoder(mean + torch.randn_like(mean) * (log_variance / 2).exp())
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
        return (y - x).square().sum((1, 2, 3)) / 2 + divergence


class RealNVP(nn.Module):
    """One half of a vector scales and shifts the other. Source: arXiv 1605.08803."""

    def __init__(self, width=4, depth=4):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(2 * width))
        self.nets = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 2 * width)) for _ in range(depth)]
        )

    def losses(self, x):
        a, b = (x * self.log_scale.exp()).chunk(2, 1)
        volume = self.log_scale.sum().expand(len(x))
        for net in self.nets:
            scale, shift = net(a).chunk(2, 1)
            scale = scale.tanh()
            a, b = b * scale.exp() + shift, a
            volume = volume + scale.sum(1)
        return torch.cat([a, b], 1).square().sum(1) / 2 - volume
