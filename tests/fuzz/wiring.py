"""Operations without parameters: activations, views, reductions, and what joins several values."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from .layers import uses
from .operations import OPERATIONS, operation
from .programs import fit

SMOOTH = {
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": lambda x: x.sin(),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "logsumexp kept": lambda x: x - x.logsumexp(-1, keepdim=True),
    "standardized": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 0.1).sqrt(),
    "squared": lambda x: x.tanh() ** 2,
    "cumsum": lambda x: x.cumsum(-1) / 2,
    "glu": lambda x: F.glu(torch.cat([x, x], -1), -1),
    "divided": lambda x: x / (1 + x.square()),
    "fft": lambda x: torch.fft.fft(x).real,
    "dropout": lambda x: F.dropout(x, 0.4),
}
KINKED = {
    "relu": torch.relu,
    "abs": torch.abs,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "sorted": lambda x: x.sort(-1)[0],
    "maximum": lambda x: torch.maximum(x, x.flip(-1)),
    "masked": lambda x: x.masked_fill(x > 1, 0.0),
    "where": lambda x: torch.where(x > 0, x.sin(), x),
    "straight through": lambda x: x + (x.round() - x).detach(),
    "hooked": lambda x: _hooked(x * 1.0),
    "half detached": lambda x: x + x.detach().sin(),
}
IN_PLACE = {
    "relu_": lambda x: F.relu(x, inplace=True),
    "tanh_": lambda x: x.tanh_(),
    "elu_": lambda x: F.elu(x, inplace=True),
    "sigmoid_": torch.sigmoid_,
    "mul_": lambda x: x.mul_(0.7),
    "+=": lambda x: x.__iadd__(0.3),
    "part": lambda x: (x[..., :1].tanh_(), x)[1],
    "view": lambda x: (x.view(x.shape[0], -1).mul_(0.5), x)[1],
    "item": lambda x: (x.__setitem__((slice(None), 0), 0.5), x)[1],
    "clone": lambda x: x.clone().tanh_(),
    "masked_fill_": lambda x: x.masked_fill_(x > 0.5, 0.5),
}


def _hooked(x):
    if x.requires_grad:
        x.register_hook(lambda g: 0.5 * g)
    return x


@operation("any", weight=14, name=st.sampled_from(list(SMOOTH)))
def activation(network, x, name):
    return uses(lambda m, x: SMOOTH[name](x))


@operation("any", weight=4, smooth=False, name=st.sampled_from(list(KINKED)))
def kinked(network, x, name):
    return uses(lambda m, x: KINKED[name](x))


CHANGED = r"changed in place after the call"


@operation("any", weight=5, smooth=False, refused=CHANGED, name=st.sampled_from(list(IN_PLACE)))
def in_place(network, x, name):
    return uses(lambda m, x: IN_PLACE[name](x))


@operation("any", "same", weight=2, refused=CHANGED, how=st.sampled_from(["+=", "*=", "sub_", "part"]))
def joined_in_place(network, x, y, how):
    def run(m, x, y):
        if how == "part":
            x[:, :1] += y[:, :1]
            return x
        return {"+=": x.__iadd__, "*=": x.__imul__, "sub_": x.sub_}[how](y)

    return uses(run)


@operation(
    "any", "same", weight=10, how=st.sampled_from(["+", "-", "*", "lerp", "addcmul", "where", "gate", "cat", "stack"])
)
def joined(network, x, y, how):
    function = {
        "+": torch.add,
        "-": torch.sub,
        "*": torch.mul,
        "lerp": lambda x, y: torch.lerp(x, y, 0.3),
        "addcmul": lambda x, y: torch.addcmul(x, x, y),
        "where": lambda x, y: torch.where(torch.arange(x.size(-1)) % 2 == 0, x, y),
        "gate": lambda x, y: x * y.sigmoid(),
        "cat": lambda x, y: torch.cat([x, y], -1),
        "stack": lambda x, y: torch.stack([x, y], 1),
    }[how]
    return uses(lambda m, x, y: function(x, y))


@operation("sequence", "features", weight=4, how=st.sampled_from(["+", "*", "cat", "before"]))
def features_to_positions(network, x, y, how):
    fit(x[1] == y[0] or how == "cat")
    function = {
        "+": lambda x, y: x + y[:, None],
        "*": lambda x, y: x * y.unsqueeze(1),
        "cat": lambda x, y: torch.cat([x, y[:, None].expand(-1, x.size(1), -1)], -1),
        "before": lambda x, y: torch.cat([y[:, None], x], 1),
    }[how]
    return uses(lambda m, x, y: function(x, y))


@operation("sequence", "sequence", weight=3, how=st.sampled_from(["bmm", "einsum", "attend", "cat"]))
def sequences(network, x, y, how):
    fit(how == "einsum" or x[1] == y[1])
    function = {
        "bmm": lambda x, y: torch.bmm(x, y.mT),
        "einsum": lambda x, y: torch.einsum("bti,bsj->bij", x, y),
        "attend": lambda x, y: (x @ y.mT).softmax(-1) @ y,
        "cat": lambda x, y: torch.cat([x, y], 1),
    }[how]
    return uses(lambda m, x, y: function(x, y))


@operation("features", "features", weight=3, how=st.sampled_from(["outer", "cat", "kron"]))
def features(network, x, y, how):
    function = {
        "outer": lambda x, y: x[:, :, None] * y[:, None],
        "cat": lambda x, y: torch.cat([x, y], 1),
        "kron": lambda x, y: torch.einsum("bi,bj->bij", x, y).flatten(1),
    }[how]
    return uses(lambda m, x, y: function(x, y))


VIEWS = {
    "flatten": lambda x: x.flatten(1),
    "merged and back": lambda x: x.flatten(0, 1).unflatten(0, x.shape[:2]),
    "turned": lambda x: x.transpose(-1, -2),
    "turned and copied": lambda x: x.mT.contiguous(),
    "channels last": lambda x: x.movedim(1, -1),
    "one more": lambda x: x.unsqueeze(1),
    "expanded": lambda x: x.unsqueeze(1).expand(-1, 2, *x.shape[1:]),
    "halves": lambda x: x.unflatten(1, (-1, 2)) if x.size(1) % 2 == 0 else x,
    "first": lambda x: x[:, 0],
    "last": lambda x: x.select(1, -1),
    "rest": lambda x: x[:, 1:],
    "narrow": lambda x: x.narrow(-1, 0, 1),
    "every second": lambda x: x[..., ::2],
    "flip": lambda x: x.flip(1),
    "roll": lambda x: torch.roll(x, 1, 1),
    "chunk": lambda x: x.chunk(2, -1)[0],
    "windows": lambda x: x.unfold(-1, 2, 1),
    "diagonal": lambda x: x.diagonal(dim1=-1, dim2=-2),
    "mean": lambda x: x.mean(1),
    "sum of last": lambda x: x.sum(-1),
    "spatial mean": lambda x: x.flatten(2).mean(2),
    "permuted": lambda x: x.permute(0, *range(x.dim() - 1, 0, -1)),
    "rows by number": lambda x: x[:, [0, 0]],
    "two ways": lambda x: x.reshape(x.size(0), -1, x.size(1)),
    "padded": lambda x: F.pad(x, (1, 0)),
    "split": lambda x: torch.cat(x.split(1, 1)[::-1], 1),
    "unbind": lambda x: torch.stack(x.unbind(1), -1),
    "one sample after the other": lambda x: torch.stack([row * 1.0 for row in x]),
    "samples reversed twice": lambda x: x.flip(0).sin().flip(0),
}


@operation("any", weight=10, name=st.sampled_from(list(VIEWS)))
def view(network, x, name):
    fit(len(x) > 1 or name not in ("turned", "turned and copied", "diagonal"))
    return uses(lambda m, x: VIEWS[name](x))


POOLINGS = {
    "avg": lambda x: F.avg_pool2d(x, 2, 1),
    "avg, strided": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (1, 2)),
    "upsampled": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "bilinear": lambda x: F.interpolate(x, size=(3, 3), mode="bilinear"),
    "unfold": lambda x: F.unfold(x, 2).mT,
    "shuffle": lambda x: F.pixel_shuffle(torch.cat([x] * 4, 1), 2),
    "response norm": lambda x: F.local_response_norm(x, 2),
}
MAX_POOLINGS = {
    "max": lambda x: F.max_pool2d(x, 2, 1),
    "max, padded": lambda x: F.max_pool2d(x, 3, 2, 1),
    "relu and max": lambda x: F.max_pool2d(x.relu(), 2),
    "max and relu": lambda x: F.max_pool2d(x, 2, 1).relu(),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, 2),
    "amax": lambda x: x.amax((2, 3)),
}


@operation("image", weight=4, name=st.sampled_from(list(POOLINGS)))
def pooling(network, x, name):
    return uses(lambda m, x: POOLINGS[name](x))


@operation("image", weight=3, smooth=False, name=st.sampled_from(list(MAX_POOLINGS)))
def max_pooling(network, x, name):
    return uses(lambda m, x: MAX_POOLINGS[name](x))


COUPLED = r"samples are coupled after|rows in dimension 0 for|batch_norm in training mode"
COUPLINGS = {
    "centered": lambda x: x - x.mean(0),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "sum": lambda x: x + 0.1 * x.sum(0, keepdim=True).sin(),
    "shifted": lambda x: x.roll(1, 0),
    "softmax": lambda x: x.softmax(0),
    "similarities": lambda x: (x.flatten(1) @ x.flatten(1).T).softmax(-1) @ x.flatten(1),
}


@operation("any", weight=1, refused=COUPLED, name=st.sampled_from(list(COUPLINGS)))
def coupling(network, x, name):
    return uses(lambda m, x: COUPLINGS[name](x))


@operation("positions", weight=1, refused=COUPLED)
def time_major(network, x):
    """Samples in dimension 1 of a layer."""
    return uses(lambda m, x: m.inner(x.transpose(0, 1)).transpose(0, 1), inner=nn.Linear(x[-1], 2))


@operation("positions", weight=1, refused=COUPLED)
def merged_by_position(network, x):
    """Positions of all samples, merged into the batch in another order than samples have."""
    return uses(
        lambda m, x: m.inner(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.size(1), -1)).transpose(0, 1),
        inner=nn.Linear(x[-1], 2),
    )


@operation("any", weight=6, k=st.integers(0, 9))
def again(network, x, k):
    """A module that is there already, on another value."""
    there = [
        m for m, node in zip(network.modules_of, network.nodes, strict=True) if len(OPERATIONS[node.op].takes) == 1
    ]
    fit(there)
    module = there[-1 - k % len(there)]
    fit(any(True for _ in module.parameters()))
    return module


@operation("any", weight=1, smooth=False)
def without_gradients(network, x):
    """A module's output as a target that nothing is learned through."""

    def run(m, x):
        with torch.no_grad():
            y = m.inner(x)
        return x * y

    return uses(run, inner=nn.Linear(x[-1], x[-1]))
