"""Layers of torch and ways to multiply by weights, as operations of programs."""

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import bootgrad

from ..layers import Uses, parameter
from .operations import BOOL, SIZE, operation
from .programs import TOKENS, fit
from .weights import make, weights


def uses(function, **members):
    """A module that calls ``function`` of itself and of the values."""
    return Uses(function, **{k: nn.ModuleList(v) if isinstance(v, list) else v for k, v in members.items()})


@operation("any", weight=10, out=SIZE, bias=BOOL)
def linear(network, x, out, bias):
    return nn.Linear(x[-1], out, bias)


_EINSUM = {1: "bi,oi->bo", 2: "bti,oi->bto", 3: "bcti,oi->bcto"}
_EINSUM_FRONT = {1: "oi,bi->bo", 2: "oi,bti->bot", 3: "oi,bcti->boct"}
PRODUCTS = {
    "F.linear": lambda x, w: F.linear(x, w),
    "x @ w.T": lambda x, w: x @ w.T,
    "matmul": lambda x, w: torch.matmul(x, w.mT),
    "x @ w.t()": lambda x, w: x.matmul(w.t()),
    "w @ x": lambda x, w: (w @ x.mT).mT if x.dim() > 2 else (w @ x.T).T,
    "w @ vector": lambda x, w: (w @ x.unsqueeze(-1)).squeeze(-1),
    "einsum": lambda x, w: torch.einsum(_EINSUM[x.dim() - 1], x, w),
    "einsum, weight first": lambda x, w: torch.einsum(_EINSUM_FRONT[x.dim() - 1], w, x).movedim(1, -1),
    "einsum, dots": lambda x, w: torch.einsum("...i,oi->...o", x, w),
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([-1], [1])),
    "merged": lambda x, w: F.linear(x.flatten(0, -2), w).unflatten(0, x.shape[:-1]),
    "mm": lambda x, w: x.reshape(-1, x.size(-1)).mm(w.t()).view(*x.shape[:-1], -1),
    "addmm": lambda x, w: torch.addmm(torch.ones(w.size(0), dtype=x.dtype), x.flatten(0, -2), w.t(), alpha=0.5)
    .unflatten(0, x.shape[:-1]),
    "product and sum": lambda x, w: (x.unsqueeze(-2) * w).sum(-1),
    "bmm": lambda x, w: torch.bmm(x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1), w.t().expand(len(x), -1, -1))
    .reshape(*x.shape[:-1], -1),
    "inner": torch.inner,
    "columns": lambda x, w: torch.stack([x @ w[k] for k in range(w.size(0))], -1),
    "chunks": lambda x, w: torch.cat([F.linear(x, v) for v in w.split(1)], -1),
    "halves of x": lambda x, w: F.linear(x[..., :1], w[:, :1]) + F.linear(x[..., 1:], w[:, 1:]),
    "convolution": lambda x, w: F.conv1d(x.flatten(1, -2).mT if x.dim() > 2 else x.unsqueeze(-1), w.unsqueeze(-1))
    .mT.reshape(*x.shape[:-1], -1),
    "distances": lambda x, w: (x.unsqueeze(-2) - w).square().sum(-1),
    "cosines": lambda x, w: F.linear(x / (x.square().sum(-1, keepdim=True) + 1).sqrt(), w / (w.square().sum(1, True) + 1)),
    "bilinear": lambda x, w: F.bilinear(x, x, w.unsqueeze(-1).expand(*w.shape, x.size(-1))),
}  # fmt: skip


@operation("any", weight=14, w=weights(), how=st.sampled_from(list(PRODUCTS)), out=SIZE)
def product(network, x, w, how, out):
    return uses(lambda m, x: PRODUCTS[how](x, m.w()), w=make(network, w, (out, x[-1])))


DISTANCES = {
    "cosine_similarity": lambda x, w: F.cosine_similarity(x.unsqueeze(-2), w, dim=-1),
    "cdist": lambda x, w: torch.cdist(x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1), w).reshape(
        *x.shape[:-1], -1
    ),
    "pairwise_distance": lambda x, w: F.pairwise_distance(x.unsqueeze(-2), w),
    "absolute": lambda x, w: (x.unsqueeze(-2) - w).abs().sum(-1),
    "normalized": lambda x, w: F.linear(F.normalize(x, dim=-1), F.normalize(w, dim=-1)),
    "largest": lambda x, w: (x.unsqueeze(-2) + w).amax(-1),
}


@operation("any", weight=3, smooth=False, w=weights(1), how=st.sampled_from(list(DISTANCES)), out=SIZE)
def distances(network, x, w, how, out):
    """From prototypes."""
    return uses(lambda m, x: DISTANCES[how](x, m.w()), w=make(network, w, (out, x[-1])))


@operation("any", weight=5, w=weights(1), b=weights(1), out=SIZE, scalar=BOOL)
def affine(network, x, w, b, out, scalar):
    shapes = (out, x[-1]), (() if scalar else (out,))
    return uses(lambda m, x: F.linear(x, m.w(), m.b()), w=make(network, w, shapes[0]), b=make(network, b, shapes[1]))


@operation("positions", w=weights(1), out=SIZE)
def positions_mixed(network, x, w, out):
    return uses(lambda m, x: (m.w() @ x.flatten(2)).unflatten(2, x.shape[2:]), w=make(network, w, (out, x[0])))


@operation("sequence", w=weights(1), out=SIZE)
def weight_per_position(network, x, w, out):
    return uses(lambda m, x: torch.einsum("bti,tio->bto", x, m.w()), w=make(network, w, (*x, out)))


@operation("any", w=weights(1))
def vector(network, x, w):
    return uses(lambda m, x: torch.stack([x @ m.w(), x.sum(-1)], -1), w=make(network, w, x[-1:]))


@operation("features", w=weights(1), how=st.sampled_from(["einsum", "unsqueeze", "matmul"]), out=SIZE)
def outer(network, x, w, how, out):
    function = {
        "einsum": lambda x, w: torch.einsum("bi,o->boi", x, w),
        "unsqueeze": lambda x, w: x[:, None] * w[:, None],
        "matmul": lambda x, w: w.unsqueeze(1) @ x.unsqueeze(1),
    }[how]
    return uses(lambda m, x: function(x, m.w()), w=make(network, w, (out,)))


@operation("any", "same", out=SIZE, bias=BOOL)
def bilinear(network, x, y, out, bias):
    return nn.Bilinear(x[-1], y[-1], out, bias)


_CONV = dict(
    out=SIZE,
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same"]),
    dilation=st.integers(1, 2),
    groups=SIZE,
    bias=BOOL,
)


def _grouped(channels, out, groups):
    groups = math.gcd(channels, groups)
    return groups, out if out % groups == 0 else groups


def _conv(kind, channels, out, kernel, stride, padding, dilation, groups, bias, mode="zeros"):
    groups, out = _grouped(channels, out, groups)
    fit(padding != "same" or stride == 1)
    return kind(channels, out, kernel, stride, padding, dilation, groups, bias, mode)


@operation("sequence", weight=5, **_CONV, mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
def conv1d(network, x, **options):
    return _conv(nn.Conv1d, x[0], **options)


@operation("image", weight=8, **_CONV, mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
def conv2d(network, x, **options):
    return _conv(nn.Conv2d, x[0], **options)


@operation("image", **_CONV)
def conv3d(network, x, **options):
    return uses(lambda m, x: m.inner(x.unsqueeze(1)).flatten(1, 2), inner=_conv(nn.Conv3d, 1, **options))


@operation("sequence", **_CONV)
def conv1d_merged(network, x, **options):
    """Each position a sequence of its own, merged into the batch."""
    inner = _conv(nn.Conv1d, 1, **options)
    return uses(lambda m, x: m.inner(x.reshape(-1, 1, x.size(2))).reshape(*x.shape[:2], -1), inner=inner)


@operation("image", weight=3, w=weights(1), out=SIZE, size=st.integers(1, 2), padding=st.integers(0, 1))
def conv_by_weight(network, x, w, out, size, padding):
    kernel = (out, x[0], size, size)
    return uses(lambda m, x: F.conv2d(x, m.w(), padding=padding), w=make(network, w, kernel))


@operation("positions", weight=3, out=SIZE, kernel=st.integers(1, 3), stride=st.integers(1, 2), groups=SIZE, bias=BOOL)
def conv_transpose(network, x, out, kernel, stride, groups, bias):
    kind = nn.ConvTranspose1d if len(x) == 2 else nn.ConvTranspose2d
    groups, out = _grouped(x[0], out, groups)
    return kind(x[0], out, kernel, stride, padding=kernel // 2, output_padding=stride - 1, groups=groups, bias=bias)


@operation("image", size=st.integers(1, 3), out=SIZE)
def patches(network, x, size, out):
    return uses(lambda m, x: m.inner(x).flatten(2).mT, inner=nn.Conv2d(x[0], out, size, stride=size))


@operation("positions", groups=SIZE, affine=BOOL)
def group_norm(network, x, groups, affine):
    fit(math.prod(x) > math.gcd(x[0], groups))  # more than one entry to a group
    return nn.GroupNorm(math.gcd(x[0], groups), x[0], eps=0.1, affine=affine)


def _laid_out(norm):
    """A norm whose gradient arrives contiguous, for torch's batch norm of one sample is wrong where it lies otherwise."""
    return uses(lambda m, x: m.inner(x).reshape(-1).view(x.shape), inner=norm)


@operation("positions", affine=BOOL)
def instance_norm(network, x, affine):
    return _laid_out((nn.InstanceNorm1d if len(x) == 2 else nn.InstanceNorm2d)(x[0], eps=0.1, affine=affine))


@operation("any", weight=4, dims=st.integers(1, 2), affine=BOOL, bias=BOOL, w=st.none() | weights(1))
def layer_norm(network, x, dims, affine, bias, w):
    if w is None:
        return nn.LayerNorm(x[-dims:], eps=0.1, elementwise_affine=affine, bias=bias)
    return uses(lambda m, x: F.layer_norm(x, x.shape[-1:], m.w(), eps=0.1), w=make(network, w, x[-1:]))


@operation("any", dims=st.integers(1, 2), affine=BOOL)
def rms_norm(network, x, dims, affine):
    return nn.RMSNorm(x[-dims:], eps=0.1, elementwise_affine=affine)


@operation("any", affine=BOOL)
def batch_norm_in_eval_mode(network, x, affine):
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(x)]
    norm = kind(x[0], affine=affine).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return _laid_out(norm)


@operation("any", smooth=False, channels=BOOL)
def prelu(network, x, channels):
    return nn.PReLU(x[0] if channels else 1)


@operation("tokens", weight=6, size=SIZE, w=st.none() | weights(1), padding=st.sampled_from([None, 0]))
def embedding(network, x, size, w, padding):
    if w is None:
        return nn.Embedding(TOKENS, size, padding_idx=padding)
    return uses(lambda m, x: F.embedding(x, m.w(), padding_idx=padding), w=make(network, w, (TOKENS, size)))


@operation("tokens", size=SIZE, how=st.sampled_from(["[]", "index_select", "one hot", "gather", "take"]))
def looked_up(network, x, size, how):
    function = {
        "[]": lambda x, w: w[x],
        "index_select": lambda x, w: w.index_select(0, x.flatten()).view(*x.shape, -1),
        "one hot": lambda x, w: F.one_hot(x, TOKENS).to(w) @ w,
        "gather": lambda x, w: w.expand(len(x), -1, -1).gather(1, x.unsqueeze(-1).expand(*x.shape, w.size(1))),
        "take": lambda x, w: torch.take(w, x).unsqueeze(-1),
    }[how]
    return uses(lambda m, x: function(x, m.w), w=parameter(TOKENS, size))


@operation("tokens", size=SIZE, mode=st.sampled_from(["mean", "sum"]))
def embedding_bag(network, x, size, mode):
    return nn.EmbeddingBag(TOKENS, size, mode=mode)


@operation("any", out=SIZE, tied=BOOL)
def tokens_of(network, x, out, tied):
    """Tokens that are made on the way, of the values' signs."""
    inner = nn.Embedding(2, out)
    head = inner.weight if tied else parameter(2, out)
    return uses(
        lambda m, x: m.inner((x.mean(-1) > 0).long()) + (x.mean(-1, keepdim=True).tanh() * m.head[1]),
        inner=inner,
        head=head,
    )


@operation("sequence", heads=st.integers(1, 2), weights=BOOL, causal=BOOL, padded=BOOL, bias=BOOL, added=BOOL)
def attention(network, x, heads, weights, causal, padded, bias, added):
    T, d = x
    fit(d % heads == 0)
    inner = nn.MultiheadAttention(d, heads, bias=bias, add_bias_kv=added, add_zero_attn=added, batch_first=True)

    def run(m, x):
        mask = torch.ones(T, T).triu(1).bool() if causal else None
        padding = torch.arange(T) > torch.arange(len(x))[:, None] if padded else None
        return m.inner(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=weights)[0]

    return uses(run, inner=inner)


@operation("sequence", "sequence", weights=BOOL)
def cross_attention(network, x, y, weights):
    inner = nn.MultiheadAttention(x[1], 1, kdim=y[1], vdim=y[1], batch_first=True)
    return uses(lambda m, x, y: m.inner(x, y, y, need_weights=weights)[0], inner=inner)


@operation("sequence", "sequence", causal=BOOL)
def scaled_dot_products(network, x, y, causal):
    fit(x[1] == y[1])
    return uses(lambda m, x, y: F.scaled_dot_product_attention(x, y, y, is_causal=causal))


@operation("sequence", first=BOOL, activation=st.sampled_from(["gelu", "relu"]), bias=BOOL)
def transformer_layer(network, x, first, activation, bias):
    return nn.TransformerEncoderLayer(
        x[1], 1, 3, 0.0, activation, batch_first=True, norm_first=first, bias=bias, layer_norm_eps=0.1
    )


@operation("sequence", "sequence")
def transformer_decoder_layer(network, x, y):
    fit(x[1] == y[1])
    return nn.TransformerDecoderLayer(x[1], 1, 3, 0.0, F.gelu, batch_first=True, layer_norm_eps=0.1)


@operation("sequence", kind=st.sampled_from(["RNN", "GRU", "LSTM"]), size=SIZE, both=BOOL, layers=st.integers(1, 2))
def recurrent(network, x, kind, size, both, layers):
    inner = getattr(nn, kind)(x[1], size, layers, batch_first=True, bidirectional=both)
    return uses(lambda m, x: m.inner(x)[0], inner=bootgrad.replace_rnn(inner))


@operation("sequence", kind=st.sampled_from(["RNNCell", "GRUCell", "LSTMCell"]), size=SIZE, learned=BOOL)
def cells(network, x, kind, size, learned):
    """A cell over the positions, from zeros or from a learned state."""

    def run(m, x):
        state = None
        if learned:
            state = m.first.expand(len(x), -1)
            state = (state, state.tanh()) if kind == "LSTMCell" else state
        for t in range(x.size(1)):
            state = m.cell(x[:, t], state)
        return state[0] if kind == "LSTMCell" else state

    return uses(run, cell=getattr(nn, kind)(x[1], size), first=parameter(size))


class Skew(nn.Module):
    """As parametrizations are written: the upper triangle minus its transpose."""

    def forward(self, w):
        return w.triu(1) - w.triu(1).mT


class Halves(nn.Module):
    """A parametrization by several parameters."""

    def forward(self, first, second):
        return first + second

    def right_inverse(self, w):
        return 0.3 * w, 0.7 * w


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer).eval(),
    "orthogonal": parametrizations.orthogonal,
    "skew": lambda layer: parametrize.register_parametrization(layer, "weight", Skew()),
    "halves": lambda layer: parametrize.register_parametrization(layer, "weight", Halves()),
}


@operation("any", weight=4, name=st.sampled_from(list(PARAMETRIZATIONS)), conv=BOOL, twice=BOOL)
def parametrized(network, x, name, conv, twice):
    """A layer under a parametrization, called once or twice, each time with the weight made anew or kept."""
    fit(not conv or len(x) == 3)
    layer = nn.Conv2d(x[0], x[0], 1) if conv else nn.Linear(x[-1], x[-1])
    fit(name in ("weight_norm", "halves") or not conv)
    inner = PARAMETRIZATIONS[name](layer)

    def run(m, x):
        if not twice:
            return m.inner(x)
        with parametrize.cached():
            return m.inner(m.inner(x).tanh())

    return uses(run, inner=inner)


@operation("sequence", experts=st.integers(2, 3), out=SIZE)
def mixture(network, x, experts, out):
    def run(m, x):
        gate = m.gate(x).softmax(-1)
        return torch.einsum("bte,bteo->bto", gate, torch.einsum("bti,eio->bteo", x, m.w).tanh())

    return uses(run, gate=nn.Linear(x[1], experts), w=parameter(experts, x[1], out))


@operation("features", "features", out=SIZE)
def hypernetwork(network, x, z, out):
    """Weights for each sample, from a layer."""
    return uses(
        lambda m, x, z: torch.bmm(m.inner(z).view(len(x), out, -1), x.unsqueeze(-1)).squeeze(-1),
        inner=nn.Linear(z[0], out * x[0]),
    )


@operation("any", rank=st.integers(1, 2), merged=BOOL, out=SIZE)
def adapter(network, x, rank, merged, out):
    base = nn.Linear(x[-1], out).requires_grad_(False)

    def run(m, x):
        if merged:
            return F.linear(x, m.base.weight + m.up @ m.down, m.base.bias)
        return m.base(x) + F.linear(F.linear(x, m.down), m.up)

    return uses(run, base=base, down=parameter(rank, x[-1]), up=parameter(out, rank))
