"""Layers and ways to use parameters, one by one: what the support matrix has rows for."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bootgrad

B = 4


class Uses(nn.Module):
    """Modules and parameters, and a function of them and of the inputs."""

    def __init__(self, function: Callable, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def parameter(*shape: int, shift: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2 + shift)


def normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(B, *shape, dtype=torch.float64)


def tokens(*shape: int, below: int = 7) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, below, (B, *shape))


@dataclass(frozen=True)
class Layer:
    """A row of the matrix.

    Attributes:
        make: the model.
        inputs: make one batch of inputs.
        sequence: make inputs with a further dimension of positions, where the layer takes such.
        autocast: whether its half-precision results are near float32's.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Callable[[], Tensor], ...]
    sequence: tuple[Callable[[], Tensor], ...] | None = None
    autocast: bool = True


def _attention(function, **options) -> Callable[[], nn.Module]:
    return lambda: Uses(function, m=nn.MultiheadAttention(8, 2, **options))


def _causal(m, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), dtype=x.dtype)
    return m.m(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


def _padded(m, x):
    padding = torch.arange(x.size(1)) >= 1 + torch.arange(len(x))[:, None]
    return m.m(x, x, x, key_padding_mask=padding)[0]


def _times_first(m, x):  # (T, B, E) inside
    x = x.transpose(0, 1)
    return m.m(x, x, x)[0].transpose(0, 1)


LAYERS = {
    "Linear": Layer(lambda: nn.Linear(5, 3), (normal(5),), (normal(6, 5),)),
    "Linear, four dimensions": Layer(lambda: nn.Linear(5, 3), (normal(2, 3, 5),)),
    "Linear, transposed weight": Layer(
        lambda: Uses(lambda m, x: x @ m.w.T, w=parameter(3, 5)), (normal(5),), (normal(6, 5),)
    ),
    "Conv1d": Layer(lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (normal(3, 9),)),
    "Conv2d": Layer(lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (normal(3, 6, 5),)),
    "Conv2d, dilated": Layer(lambda: nn.Conv2d(3, 4, 3, dilation=2, padding="same"), (normal(3, 6, 5),)),
    "Conv2d, grouped": Layer(lambda: nn.Conv2d(4, 6, 3, groups=2), (normal(4, 6, 5),)),
    "Conv2d, depthwise": Layer(lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (normal(4, 6, 5),)),
    "Conv3d": Layer(lambda: nn.Conv3d(2, 3, 2, padding=1), (normal(2, 3, 4, 3),)),
    "ConvTranspose1d": Layer(
        lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1), (normal(3, 7),)
    ),
    "ConvTranspose2d": Layer(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2), (normal(4, 5, 4),)),
    "ConvTranspose3d": Layer(lambda: nn.ConvTranspose3d(2, 3, 2, bias=False), (normal(2, 3, 3, 2),)),
    "GroupNorm": Layer(lambda: nn.GroupNorm(2, 4), (normal(4, 5, 5),), (normal(4, 7),)),
    "InstanceNorm": Layer(lambda: nn.InstanceNorm2d(4, affine=True), (normal(4, 5, 5),)),
    "InstanceNorm, running statistics": Layer(
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (normal(4, 5, 5),)
    ),
    "InstanceNorm with running statistics, eval": Layer(
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(), (normal(4, 5, 5),)
    ),
    "LayerNorm": Layer(lambda: nn.LayerNorm(6), (normal(6),), (normal(5, 6),)),
    "RMSNorm": Layer(lambda: nn.RMSNorm(6), (normal(6),), (normal(5, 6),)),
    "BatchNorm, eval": Layer(lambda: nn.BatchNorm2d(4).eval(), (normal(4, 5, 5),)),
    "PReLU": Layer(lambda: nn.PReLU(3), (normal(3, 5),)),
    "Scale, shift": Layer(
        lambda: Uses(lambda m, x: x * m.w + m.b, w=parameter(5), b=parameter(1, 5)), (normal(5),), (normal(4, 5),)
    ),
    "Divisor, exponent": Layer(
        lambda: Uses(lambda m, x: x.abs() ** m.p / m.w, w=parameter(5, shift=3), p=parameter(shift=2)),
        (normal(5),),
        (normal(4, 5),),
    ),
    "Class token": Layer(
        lambda: Uses(lambda m, x: torch.cat([m.w.expand(len(x), -1, -1), x], 1), w=parameter(1, 1, 5)), (normal(4, 5),)
    ),
    "Positions": Layer(lambda: Uses(lambda m, x: x + m.w[:, : x.size(1)], w=parameter(1, 6, 5)), (normal(4, 5),)),
    "Embedding": Layer(lambda: nn.Embedding(7, 4, padding_idx=2), (tokens(),), (tokens(5),)),
    "EmbeddingBag": Layer(lambda: nn.EmbeddingBag(7, 4, mode="mean"), (tokens(5),)),
    "EmbeddingBag, maxima": Layer(lambda: nn.EmbeddingBag(7, 4, mode="max"), (tokens(5),)),
    "EmbeddingBag, weighted": Layer(
        lambda: Uses(lambda m, t, w: m.inner(t, per_sample_weights=w), inner=nn.EmbeddingBag(7, 4, mode="sum")),
        (tokens(5), normal(5)),
    ),
    "Indexed by tokens": Layer(lambda: Uses(lambda m, t: m.w[t], w=parameter(7, 2, 3)), (tokens(),), (tokens(5),)),
    "Tied embedding and output layer": Layer(
        lambda: Uses(lambda m, t: F.linear(m.inner(t).tanh(), m.inner.weight), inner=nn.Embedding(7, 4)),
        (tokens(),),
        (tokens(5),),
    ),
    "LSTM, replaced": Layer(
        lambda: Uses(lambda m, x: m.inner(x)[0], inner=bootgrad.replace_rnn(nn.LSTM(4, 3, batch_first=True))),
        (normal(5, 4),),
    ),
    "GRU, replaced, two directions": Layer(
        lambda: Uses(
            lambda m, x: m.inner(x)[0],
            inner=bootgrad.replace_rnn(nn.GRU(4, 3, num_layers=2, bidirectional=True, batch_first=True)),
        ),
        (normal(3, 4),),
    ),
    "LSTMCell": Layer(lambda: Uses(lambda m, x: m.inner(x)[0], inner=nn.LSTMCell(4, 3)), (normal(4),)),
    "GRUCell": Layer(lambda: nn.GRUCell(4, 3), (normal(4),)),
    "Bilinear": Layer(lambda: nn.Bilinear(3, 4, 5), (normal(3), normal(4)), (normal(6, 3), normal(6, 4))),
    "Attention": Layer(_attention(lambda m, x: m.m(x, x, x)[0], batch_first=True), (normal(5, 8),)),
    "Attention, fused kernel": Layer(
        _attention(lambda m, x: m.m(x, x, x, need_weights=False)[0], batch_first=True), (normal(5, 8),)
    ),
    "Attention, causal": Layer(_attention(_causal, batch_first=True), (normal(5, 8),)),
    "Attention, padded": Layer(_attention(_padded, batch_first=True), (normal(5, 8),)),
    "Attention, batch second": Layer(_attention(_times_first), (normal(5, 8),)),
    "Attention, crossed": Layer(
        _attention(lambda m, x, y: m.m(x, y, y, need_weights=False)[0], batch_first=True), (normal(5, 8), normal(3, 8))
    ),
    "Attention, three inputs": Layer(
        _attention(lambda m, x, y, z: m.m(x, y, z)[0], batch_first=True, bias=False),
        (normal(5, 8), normal(3, 8), normal(3, 8)),
    ),
    "Attention, own sizes": Layer(
        _attention(lambda m, x, y, z: m.m(x, y, z, need_weights=False)[0], batch_first=True, kdim=6, vdim=4),
        (normal(5, 8), normal(3, 6), normal(3, 4)),
    ),
    "Attention, added keys": Layer(
        _attention(
            lambda m, x: m.m(x, x, x, need_weights=False)[0], batch_first=True, add_bias_kv=True, add_zero_attn=True
        ),
        (normal(5, 8),),
    ),
    "scaled_dot_product_attention": Layer(
        lambda: Uses(
            lambda m, x: F.scaled_dot_product_attention(
                *m.inner(x).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, -1)
            ),
            inner=nn.Linear(8, 24),
        ),
        (normal(5, 8),),
    ),
    "TransformerEncoderLayer": Layer(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True), (normal(5, 8),)
    ),
    "TransformerDecoderLayer": Layer(
        lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0, batch_first=True, norm_first=True),
        (normal(5, 8), normal(3, 8)),
    ),
    "Weight norm": Layer(lambda: parametrizations.weight_norm(nn.Linear(5, 3)), (normal(5),), (normal(4, 5),)),
    "Spectral norm": Layer(
        lambda: parametrizations.spectral_norm(nn.Linear(5, 3)).eval(), (normal(5),), (normal(4, 5),)
    ),
    "Orthogonal": Layer(lambda: parametrizations.orthogonal(nn.Linear(5, 3)), (normal(5),), (normal(4, 5),)),
    "Masked weight": Layer(
        lambda: Uses(lambda m, x: F.linear(x, m.w * (torch.arange(15).view(3, 5) % 2)), w=parameter(3, 5)), (normal(5),)
    ),
    "Low-rank adapter": Layer(
        lambda: Uses(
            lambda m, x: m.base(x) + m.up(m.down(x)),
            base=nn.Linear(5, 3).requires_grad_(False),
            down=nn.Linear(5, 2, bias=False),
            up=nn.Linear(2, 3, bias=False),
        ),
        (normal(5),),
        (normal(4, 5),),
    ),
    "Low-rank adapter, merged": Layer(
        lambda: Uses(
            lambda m, x: F.linear(x, m.base.weight + m.up @ m.down),
            base=nn.Linear(5, 3).requires_grad_(False),
            down=parameter(2, 5),
            up=parameter(3, 2),
        ),
        (normal(5),),
        (normal(4, 5),),
    ),
    "Split weight": Layer(
        lambda: Uses(
            lambda m, x: F.linear(x, m.w[:2]).tanh() @ m.w[2:4, :2] + F.linear(x, m.w.chunk(3)[2][:, :5]).tanh(),
            w=parameter(6, 5),
        ),
        (normal(5),),
        (normal(4, 5),),
    ),
    "Called three times": Layer(
        lambda: Uses(lambda m, x: m.inner(m.inner(m.inner(x).tanh()).tanh()), inner=nn.Linear(5, 5)),
        (normal(5),),
        (normal(4, 5),),
    ),
    "Tied linear layers": Layer(
        lambda: Uses(lambda m, x: F.linear(m.inner(x).tanh(), m.inner.weight.T), inner=nn.Linear(5, 3)),
        (normal(5),),
        (normal(4, 5),),
    ),
    "Convolution called twice": Layer(
        lambda: Uses(lambda m, x: m.inner(F.avg_pool2d(m.inner(x).tanh(), 2)), inner=nn.Conv2d(3, 3, 3, padding=1)),
        (normal(3, 6, 4),),
    ),
    "Weights by heads": Layer(
        lambda: Uses(
            lambda m, x: torch.einsum("bted,edf->btef", x, m.w) + x @ m.v, w=parameter(2, 5, 3), v=parameter(5, 3)
        ),
        (normal(4, 2, 5),),
    ),
    "Attention, learned mask": Layer(
        lambda: Uses(
            lambda m, x: F.scaled_dot_product_attention(x, x, m.inner(x), attn_mask=m.mask),
            inner=nn.Linear(6, 6),
            mask=parameter(1, 2, 5, 5),
        ),
        (normal(2, 5, 6),),
    ),
    "Mixture by einsum": Layer(
        lambda: Uses(lambda m, x: torch.einsum("btd,edf->btef", x, m.w).tanh(), w=parameter(2, 5, 3)), (normal(4, 5),)
    ),
}
