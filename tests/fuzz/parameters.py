"""Parameters that are used outside of layers: scales, shifts, positions, class tokens, queries."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from ..layers import parameter
from .layers import uses
from .operations import BOOL, SIZE, operation
from .programs import fit
from .weights import make, weights

ELEMENTWISE = {
    "x + w": lambda x, w: x + w,
    "w + x": lambda x, w: w + x,
    "x - w": lambda x, w: x - w,
    "w - x": lambda x, w: w - x,
    "add alpha": lambda x, w: torch.add(x, w, alpha=0.5),
    "rsub": lambda x, w: torch.rsub(x, w),
    "x * w": lambda x, w: x * w,
    "w * x": lambda x, w: w * x,
    "x / w": lambda x, w: x / (w.cosh() + 1),
    "w / x": lambda x, w: w / (x.cosh() + 1),
    "power": lambda x, w: (x.square() + 1) ** w,
    "exponential": lambda x, w: (w.square() + 1) ** x,
    "lerp": lambda x, w: torch.lerp(x, w, 0.3),
    "lerp by w": lambda x, w: torch.lerp(x, x.sin(), w),
    "addcmul": lambda x, w: torch.addcmul(x, x, w, value=0.5),
    "addcdiv": lambda x, w: torch.addcdiv(w, x, x.cosh()),
    "where": lambda x, w: torch.where(torch.arange(x.size(-1)) % 2 == 0, x, w),
    "where by x": lambda x, w: torch.where(x > 0, x, w),
    "masked": lambda x, w: torch.where(x > 0, w, 0.0),
    "atan2": lambda x, w: torch.atan2(x, w.exp()),
    "hypot": lambda x, w: torch.hypot(x, w.exp()),
    "logaddexp": lambda x, w: torch.logaddexp(x, w),
    "xlogy": lambda x, w: torch.xlogy(w, x.cosh()),
    "gate": lambda x, w: x * torch.sigmoid(w) + (1 - w.sigmoid()) * x.sin(),
    "swish": lambda x, w: x * torch.sigmoid(x * w),
    "masked fill": lambda x, w: x.masked_fill(x > 1, 0) * w.masked_fill(w > 1, 0.5),
    "expand_as": lambda x, w: x * w.expand_as(x),
    "broadcast": lambda x, w: x * w.broadcast_to(x.shape),
    "zeros plus w": lambda x, w: (torch.zeros_like(x) + w).sin() * x,
    "new tensor": lambda x, w: x + x.new_ones(x.shape) * w,
    "loss of w": lambda x, w: x + w.square().sum(),
    "norm of w": lambda x, w: x / (w.norm() + 1),
    "item by item": lambda x, w: torch.stack([x[..., k] * (w if w.dim() == 0 else w[..., -1]) for k in range(x.size(-1))], -1),
    "quadratic": lambda x, w: w * x * w + w,
    "two uses": lambda x, w: (x * w).tanh() + w,
    "+=": lambda x, w: x.clone().__iadd__(w),
    "mul_": lambda x, w: x.sin().mul_(w),
    "add_ alpha": lambda x, w: x.sin().add_(w, alpha=0.3),
    "in place on a view": lambda x, w: _changed(x.clone(), lambda y: y[:].mul_(w)),
    "product in place": lambda x, w: (x * w).tanh_(),
    "sum in place": lambda x, w: (x + w).mul_(0.5),
    "mse": lambda x, w: F.mse_loss(x, w.expand_as(x), reduction="none"),
    "huber": lambda x, w: F.huber_loss(x, w.expand(x.shape), reduction="none", delta=9.0),
    "cross": lambda x, w: F.binary_cross_entropy_with_logits(x, torch.ones_like(x), pos_weight=w.exp(), reduction="none"),
    "gelu of scaled": lambda x, w: F.gelu(x * w),
    "pow int": lambda x, w: x * w**2,
    "clamped": lambda x, w: x.clamp(max=w.exp() + 5),
    "softplus": lambda x, w: F.softplus(x * w) / (F.softplus(w) + 1),
    "rms": lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1) * (1 + w),
    "split": lambda x, w: torch.cat([x[..., :1] * w.reshape(-1)[0], x[..., 1:]], -1),
}  # fmt: skip


def _changed(x, change):
    change(x)
    return x


@operation(
    "any",
    weight=16,
    name=st.sampled_from(list(ELEMENTWISE)),
    shape=st.sampled_from(["last", "all", "scalar", "one", "first", "rows of one", "channels"]),
    w=weights(1),
)
def elementwise(network, x, name, shape, w):
    shapes = {
        "last": x[-1:],
        "all": x,
        "scalar": (),
        "one": (1,),
        "first": (x[0], *[1] * (len(x) - 1)),
        "rows of one": (1, *x),
        "channels": (1, x[0], *[1] * (len(x) - 1)),
    }
    return uses(lambda m, x: ELEMENTWISE[name](x, m.w()), w=make(network, w, shapes[shape]))


TOKEN_FORMS = {
    "expand": lambda x, w: w.expand(len(x), -1, -1),
    "expand_as": lambda x, w: w.expand_as(x[:, : w.size(1)]),
    "repeat": lambda x, w: w.repeat(len(x), 1, 1),
    "tile": lambda x, w: w.tile((len(x), 1, 1)),
    "repeat_interleave": lambda x, w: w.repeat_interleave(len(x), 0),
    "cat": lambda x, w: torch.cat([w] * len(x)),
    "stack": lambda x, w: torch.stack([w[0] for _ in x]),
    "ones": lambda x, w: torch.ones(len(x), 1, 1, dtype=x.dtype) * w,
    "new_ones": lambda x, w: x.new_ones(len(x), 1, 1) @ w,
    "zeros_like": lambda x, w: torch.zeros_like(x[:, :1]) + w,
    "broadcast_to": lambda x, w: torch.broadcast_to(w, (len(x), *w.shape[1:])),
    "index": lambda x, w: w[torch.zeros(len(x), dtype=torch.long)],
    "expand and view": lambda x, w: w.expand(len(x), -1, -1).reshape(len(x), -1).unflatten(1, (w.size(1), -1)),
    "function": lambda x, w: w.expand(len(x), -1, -1).tanh() * 2,
    "contiguous": lambda x, w: w.expand(len(x), -1, -1).contiguous(),
}


@operation(
    "sequence", weight=6, how=st.sampled_from(list(TOKEN_FORMS)), w=weights(1), number=st.integers(1, 2), end=BOOL
)
def class_token(network, x, how, w, number, end):
    fit(how != "expand_as" or number <= x[0])
    fit(how != "zeros_like" or number == 1)

    def run(m, x):
        parts = [TOKEN_FORMS[how](x, m.w()), x]
        return torch.cat(parts[::-1] if end else parts, 1)

    return uses(run, w=make(network, w, (1, number, x[1])))


@operation("any", w=weights(1), size=st.integers(1, 2))
def shared_features(network, x, w, size):
    """Features that all samples have, beside their own."""
    return uses(lambda m, x: torch.cat([x, m.w().expand(*x.shape[:-1], -1)], -1), w=make(network, w, (size,)))


@operation(
    "sequence", weight=4, w=weights(1), how=st.sampled_from(["slice", "arange", "embedding", "module", "gather", "pad"])
)
def positions(network, x, w, how):
    T, d = x
    function = {
        "slice": lambda w, x: w[: x.size(1)],
        "arange": lambda w, x: w[torch.arange(x.size(1))],
        "embedding": lambda w, x: F.embedding(torch.arange(x.size(1)), w),
        "module": lambda w, x: F.embedding(torch.arange(x.size(1)).unsqueeze(0), w),
        "gather": lambda w, x: w.index_select(0, torch.arange(x.size(1)).flip(0)),
        "pad": lambda w, x: F.pad(w, (0, 0, 0, -1)),
    }[how]
    return uses(lambda m, x: x + function(m.w(), x), w=make(network, w, (T + 1, d)))


@operation("sequence", size=SIZE)
def relative_positions(network, x, size):
    """A bias of scores, by distance."""
    T = x[0]

    def run(m, x):
        distance = torch.arange(T)[:, None] - torch.arange(T) + T - 1
        scores = x @ x.mT + m.table[distance]
        return scores.softmax(-1) @ x

    return uses(run, table=parameter(2 * T - 1))


@operation("sequence", weight=3, number=st.integers(1, 2), how=st.sampled_from(["matmul", "expand", "einsum", "sdpa"]))
def learned_queries(network, x, number, how):
    function = {
        "matmul": lambda x, q: (q @ x.mT).softmax(-1) @ x,
        "expand": lambda x, q: torch.bmm(torch.bmm(q.expand(len(x), -1, -1), x.mT).softmax(-1), x),
        "einsum": lambda x, q: torch.einsum("bqt,bti->bqi", torch.einsum("qi,bti->bqt", q, x).softmax(-1), x),
        "sdpa": lambda x, q: F.scaled_dot_product_attention(q.expand(len(x), -1, -1), x, x),
    }[how]
    return uses(lambda m, x: function(x, m.q), q=parameter(number, x[1]))


@operation("any", first=BOOL, size=SIZE)
def low_rank_of_data(network, x, first, size):
    """A parameter between two values of data: x A x."""
    return uses(
        lambda m, x: (x @ m.a) * x if first else x * (m.a @ x.unsqueeze(-1)).squeeze(-1), a=parameter(x[-1], x[-1])
    )


@operation("features", experts=st.integers(2, 3))
def chosen_weights(network, x, experts):
    """A weight for each sample, chosen by its features."""
    return uses(
        lambda m, x: torch.bmm(m.w[(x[:, 0] > 0).long()], x.unsqueeze(-1)).squeeze(-1), w=parameter(experts, 2, x[0])
    )


@operation("any", w=weights(1))
def unused(network, x, w):
    """A parameter that is used, and whose use is thrown away."""

    def run(m, x):
        (x * m.w()).tanh()
        return x * 1.0

    return uses(run, w=make(network, w, x[-1:]))


HIDDEN = (
    "outside of the recorded operations|coupled after|has no rule|in dimension 0|hides how|in place|several tensors"
)
HIDING = {
    "assigned": lambda x, w: _changed(x.clone(), lambda y: y.__setitem__((slice(None), 0), w)),
    "parameter first, in place": lambda x, w: w.expand_as(x).clone().mul_(x),
    "buffer": lambda x, w: x * torch.zeros_like(w).add_(w),
    "changed weight": lambda x, w: x * _changed(w.clone(), lambda v: v.mul_(2)),
    "copied": lambda x, w: _changed(x.clone(), lambda y: y.copy_(w.expand_as(y))) * x,
    "set to zeros": lambda x, w: x * _changed(torch.zeros(w.shape, dtype=w.dtype), lambda v: v.__setitem__((), w)),
    "several": lambda x, w: torch.broadcast_tensors(x, w)[1] * x,
    "index_put": lambda x, w: x + torch.zeros_like(x[0]).index_put((torch.tensor([0]),), w.sum()),
}


@operation("any", weight=2, refused=HIDDEN, name=st.sampled_from(list(HIDING)), scalar=BOOL)
def hiding(network, x, name, scalar):
    """What may be refused."""
    return uses(lambda m, x: HIDING[name](x, m.w), w=parameter(*(() if scalar else x[-1:])))


@operation("any", weight=1, smooth=False)
def module_hooks(network, x):
    inner = nn.Linear(x[-1], x[-1])
    inner.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    inner.register_forward_hook(lambda m, args, out: out.sin())
    inner.register_full_backward_hook(lambda m, gx, gy: (0.5 * gx[0],) if gx[0] is not None else None)
    return inner
