"""Weights: parameters, and functions of parameters alone. Each kind is made for a shape that is asked of it."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from ..layers import Uses, parameter
from .programs import Network, W, fit

KINDS: dict[str, Callable] = {}
TAKES: dict[str, int] = {}  # how many weights a kind is made of
OPTIONS: dict[str, dict[str, st.SearchStrategy]] = {}


def kind(takes: int = 1, **options: st.SearchStrategy):
    """Register ``make(network, shape, *weights, **options)``, which returns a module that is called without arguments."""

    def register(make):
        KINDS[make.__name__], TAKES[make.__name__], OPTIONS[make.__name__] = make, takes, options
        return make

    return register


def make(network: Network, weight: W, shape: tuple[int, ...]) -> nn.Module:
    """A module whose call without arguments gives the weight, in this shape."""
    return KINDS[weight.kind](network, tuple(shape), *weight.of, **weight.options)


def _uses(function: Callable, *made: nn.Module, **members) -> nn.Module:
    """A module that calls ``function`` of the values of ``made``, and of buffers, parameters and the like by name."""
    own = Uses(function, inner=nn.ModuleList(made))
    for name, member in members.items():
        if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
            own.register_buffer(name, member)
        else:
            setattr(own, name, member)
    return own


def _of(function: Callable, *made: nn.Module) -> nn.Module:
    return _uses(lambda m: function(*(inner() for inner in m.inner)), *made)


@kind(takes=0)
def new(network, shape):
    return _uses(lambda m: m.p, p=parameter(*shape))


@kind(takes=0, k=st.integers(0, 9))
def shared(network, shape, k):
    """One that is there already, or as many of its entries as are needed."""
    there = [p for p in network.parameters() if p.numel() >= math.prod(shape)]
    fit(there)
    p, reverse = there[-1 - k % len(there)], shape[::-1]

    def entries(m):
        if m.p.shape == shape:
            return m.p
        if m.p.shape == reverse:
            return m.p.permute(*reversed(range(len(shape))))
        return m.p.flatten()[: math.prod(shape)].view(shape)

    return _uses(entries, p=p)


@kind(takes=0)
def frozen(network, shape):
    return _uses(lambda m: m.p, p=nn.Parameter(torch.randn(shape), requires_grad=False))


@kind(how=st.sampled_from(["permute", "transpose", "T", "contiguous", "einsum"]))
def transposed(network, shape, of, how):
    n = len(shape)
    fit(n > 1 and (n == 2 or how in ("permute", "transpose")))
    order = list(reversed(range(n))) if how == "permute" else [*range(n - 2), n - 1, n - 2]
    turn = {
        "permute": lambda u: u.permute(order),
        "transpose": lambda u: u.transpose(-1, -2),
        "T": lambda u: u.T,
        "contiguous": lambda u: u.t().contiguous(),
        "einsum": lambda u: torch.einsum("ij->ji", u),
    }[how]
    return _of(turn, make(network, of, tuple(shape[k] for k in order)))


@kind(how=st.sampled_from(["slice", "narrow", "every second", "ellipsis", "index", "select", "split", "unbind"]))
def part(network, shape, of, how):
    n = shape[0] if shape else 1
    take = {
        "slice": (lambda u: u[1:], (n + 1, *shape[1:])),
        "narrow": (lambda u: u.narrow(0, 0, n), (n + 1, *shape[1:])),
        "every second": (lambda u: u[::2], (2 * n, *shape[1:])),
        "ellipsis": (lambda u: u[..., 1], (*shape, 2)),
        "index": (lambda u: u[[*range(1, n), 0]], (n + 1, *shape[1:])),
        "select": (lambda u: u[1], (2, *shape)),
        "split": (lambda u: u.split([1, n])[1], (n + 1, *shape[1:])),
        "unbind": (lambda u: u.unbind(0)[0], (2, *shape)),
    }
    fit(shape or how in ("ellipsis", "select", "unbind"))
    function, larger = take[how]
    return _of(function, make(network, of, larger))


@kind(how=st.sampled_from(["mul", "rmul", "where", "masked_fill", "tril"]))
def masked(network, shape, of, how):
    mask = torch.rand(shape) < 0.6
    fit(how != "tril" or len(shape) > 1)
    function = {
        "mul": lambda u, mask: u * mask,
        "rmul": lambda u, mask: mask.to(u) * u,
        "where": lambda u, mask: torch.where(mask, u, 0.5),
        "masked_fill": lambda u, mask: u.masked_fill(mask, 0.0),
        "tril": lambda u, mask: u.tril(),
    }[how]
    return _uses(lambda m: function(m.inner[0](), m.mask), make(network, of, shape), mask=mask)


@kind(takes=2, rank=st.integers(1, 2))
def low_rank(network, shape, left, right, rank):
    fit(shape)
    rest = math.prod(shape[1:])
    left, right = make(network, left, (shape[0], rank)), make(network, right, (rank, rest))
    return _of(lambda a, b: (a @ b).reshape(shape), left, right)


@kind(takes=2, how=st.sampled_from(["add", "sub", "mul", "div", "lerp", "addcmul", "cat", "stack", "outer", "kron"]))
def joined(network, shape, first, second, how):
    n = len(shape)
    if how in ("cat", "stack"):
        fit(n and shape[0] == 2 if how == "stack" else n and shape[0] > 1)
        shapes = [shape[1:]] * 2 if how == "stack" else [(1, *shape[1:]), (shape[0] - 1, *shape[1:])]
    elif how == "outer":
        fit(n == 2)
        shapes = [shape[:1], shape[1:]]
    elif how == "kron":
        fit(n == 2 and shape[0] % 2 == 0)
        shapes = [(2, 1), (shape[0] // 2, shape[1])]
    else:
        shapes = [shape, shape[1:] if n > 1 and how in ("add", "mul") else shape]
    function = {
        "add": torch.add,
        "sub": lambda a, b: torch.sub(a, b, alpha=0.5),
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / (b.cosh() + 1),
        "lerp": lambda a, b: torch.lerp(a, b, 0.3),
        "addcmul": lambda a, b: torch.addcmul(a, b, b, value=0.5),
        "cat": lambda a, b: torch.cat([a, b]),
        "stack": lambda a, b: torch.stack([a, b]),
        "outer": lambda a, b: torch.einsum("i,j->ij", a, b),
        "kron": torch.kron,
    }[how]
    return _of(function, *(make(network, w, s) for w, s in zip((first, second), shapes, strict=True)))


FUNCTIONS = {
    "tanh": torch.tanh,
    "exp": lambda u: u.clamp(max=2).exp(),
    "softmax": lambda u: F.softmax(u, -1),
    "normalize": lambda u: F.normalize(u, dim=-1, eps=0.1),
    "standardize": lambda u: (u - u.mean()) / (u.std(correction=0) + 0.5),
    "clone": torch.clone,
    "times two": lambda u: 2 * u,
    "flip": lambda u: u.flip(0),
    "roll": lambda u: u.roll(1, -1),
    "cumsum": lambda u: u.cumsum(-1),
    "add one": lambda u: 1 + u,
    "minus": lambda u: -u,
    "square": lambda u: u**2,
    "reshape twice": lambda u: u.reshape(-1).reshape(u.shape),
    "flat and back": lambda u: u.flatten().unflatten(0, u.shape),
    "dropped": lambda u: F.dropout(u, 0.0),
}


@kind()
def half_detached(network, shape, of):
    return _of(lambda u: u + 0.5 * u.detach(), make(network, of, shape))


@kind(name=st.sampled_from(list(FUNCTIONS)))
def function(network, shape, of, name):
    fit(shape)
    return _of(FUNCTIONS[name], make(network, of, shape))


@kind(takes=2)
def scaled(network, shape, of, by):
    return _of(lambda u, s: u * s.exp(), make(network, of, shape), make(network, by, ()))


@kind()
def symmetric(network, shape, of):
    fit(len(shape) == 2 and shape[0] == shape[1])
    return _of(lambda u: u + u.T, make(network, of, shape))


@kind(how=st.sampled_from(["expand", "repeat", "view"]))
def repeated(network, shape, of, how):
    fit(len(shape) > 1)
    function = {
        "expand": lambda u: u.expand(shape),
        "repeat": lambda u: u.repeat(shape[0], *[1] * (len(shape) - 1)),
        "view": lambda u: u.view(1, *shape[1:]).expand(shape),
    }[how]
    return _of(function, make(network, of, shape[1:] if how == "view" else (1, *shape[1:])))


@kind(how=st.sampled_from(["index_select", "list", "embedding", "gather"]))
def looked_up(network, shape, of, how):
    """Rows by number, some more than once."""
    fit(shape and (how != "embedding" or len(shape) == 2))
    index = torch.randint(shape[0] + 1, (shape[0],))
    function = {
        "index_select": lambda u, i: u.index_select(0, i),
        "list": lambda u, i: u[i],
        "embedding": lambda u, i: F.embedding(i, u),
        "gather": lambda u, i: u.gather(0, i.view(-1, *[1] * (u.dim() - 1)).expand(-1, *u.shape[1:])),
    }[how]
    inner = make(network, of, (shape[0] + 1, *shape[1:]))
    return _uses(lambda m: function(m.inner[0](), m.index), inner, index=index)


@kind()
def beside_frozen(network, shape, of):
    """A change of a frozen weight, as adapters have it."""
    return _uses(lambda m: m.base + m.inner[0](), make(network, of, shape), base=torch.randn(shape))


@kind(takes=2)
def network_of(network, shape, hidden, out):
    """A weight that a network puts out, of a constant."""
    fit(shape)
    hidden, out = make(network, hidden, (3, 2)), make(network, out, (math.prod(shape), 3))
    code = torch.randn(1, 2)
    return _uses(
        lambda m: F.linear(F.linear(m.code, m.inner[0]()).tanh(), m.inner[1]()).view(shape), hidden, out, code=code
    )


def weights(depth: int = 2) -> st.SearchStrategy[W]:
    """A weight, mostly a new parameter."""
    plain = st.just(W("new"))
    if not depth:
        return plain
    names = st.sampled_from([name for name in KINDS if name not in ("new", "shared")])
    others = names.flatmap(lambda name: weights_of(name, depth))
    return st.one_of(plain, weights_of("shared", depth), plain, others)


def weights_of(kind: str, depth: int) -> st.SearchStrategy[W]:
    """A weight of a kind."""
    inner = [weights(depth - 1)] * TAKES[kind]
    options = st.fixed_dictionaries(OPTIONS[kind])
    return st.tuples(options, *inner).map(lambda drawn: W(kind, *drawn[1:], **drawn[0]))
