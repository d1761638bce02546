"""Programs: descriptions of small architectures, whose repr is Python that makes them again, and the networks built of them.

A program has inputs, nodes and a loss. Its values are numbered, inputs first, then one for each node; a node takes some of
the values before it. Shapes are told without the batch, dimension 0 of everything.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

TOKENS = 5  # different ones
LARGEST = 120  # entries of a value, of one sample


class Unfit(Exception):
    """A node that the values it takes do not allow."""


def fit(condition: Any) -> None:
    """Give the node up unless ``condition`` holds."""
    if not condition:
        raise Unfit


@dataclass(frozen=True)
class W:
    """A weight: a parameter, or a function of parameters; see `weights`."""

    kind: str
    of: tuple["W", ...]
    options: dict[str, Any] = field(compare=False)

    def __init__(self, kind: str, *of: "W", **options: Any):
        for name, value in (("kind", kind), ("of", of), ("options", options)):
            object.__setattr__(self, name, value)

    def kinds(self) -> set[str]:
        """Its kind and those of what it is made of."""
        return {self.kind}.union(*(w.kinds() for w in self.of))

    def __repr__(self) -> str:
        return f"W({_call(self.kind, self.of, self.options)})"


@dataclass(frozen=True)
class Node:
    """One operation: its name, the values it takes, what it is called with, how it is called, and what of it is frozen."""

    op: str
    of: tuple[int, ...]
    options: dict[str, Any] = field(compare=False)
    call: str = "plain"
    frozen: str = ""

    def __init__(self, op: str, *of: int, call: str = "plain", frozen: str = "", **options: Any):
        for name, value in (("op", op), ("of", of), ("options", options), ("call", call), ("frozen", frozen)):
            object.__setattr__(self, name, value)

    def weights(self) -> set[str]:
        """The kinds of the weights that it uses."""
        return set().union(*(w.kinds() for w in self.options.values() if isinstance(w, W)))

    def __repr__(self) -> str:
        ways = {"call": self.call} if self.call != "plain" else {}
        ways |= {"frozen": self.frozen} if self.frozen else {}
        return f"Node({_call(self.op, self.of, self.options | ways)})"


@dataclass(frozen=True)
class Loss:
    """How losses (B,) are made of some of the values; see `losses`."""

    kind: str
    of: tuple[int, ...]
    weighted: bool = False
    penalty: bool = False

    def __init__(self, kind: str, *of: int, weighted: bool = False, penalty: bool = False):
        for name, value in (("kind", kind), ("of", of), ("weighted", weighted), ("penalty", penalty)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        ways = {name: True for name in ("weighted", "penalty") if getattr(self, name)}
        return f"Loss({_call(self.kind, self.of, ways)})"


@dataclass(frozen=True)
class Program:
    """An architecture, a batch for it and a loss.

    Attributes:
        inputs: shapes; of tokens ("tokens", T).
        leaf_inputs: whether the inputs require grad.
        functional: whether the whole network is called by `torch.func.functional_call`.
    """

    inputs: tuple[tuple, ...]
    nodes: tuple[Node, ...]
    loss: Loss
    batch: int = 3
    seed: int = 0
    leaf_inputs: bool = False
    functional: bool = False

    def __repr__(self) -> str:
        ways = {"batch": self.batch, "seed": self.seed}
        ways |= {name: True for name in ("leaf_inputs", "functional") if getattr(self, name)}
        nodes = "".join(f"        {node!r},\n" for node in self.nodes)
        rest = "".join(f"    {name}={value!r},\n" for name, value in ways.items())
        return f"Program(\n    {self.inputs!r},\n    (\n{nodes}    ),\n    {self.loss!r},\n{rest})"


def _call(kind: str, of: tuple, options: dict[str, Any]) -> str:
    return ", ".join([repr(kind), *map(repr, of), *(f"{name}={value!r}" for name, value in options.items())])


class Network(nn.Module):
    """What a program describes, in float64, built node by node; the values are made along, to know their shapes."""

    def __init__(self, inputs: tuple[tuple, ...], batch: int, seed: int, leaf_inputs: bool = False):
        super().__init__()
        self.batch, self.seed = batch, seed
        self.nodes: list[Node] = []
        self.modules_of = nn.ModuleList()
        torch.manual_seed(seed)
        self.inputs = [
            torch.randint(TOKENS, (batch, *shape[1:]))
            if shape[0] == "tokens"
            else torch.randn(batch, *shape, dtype=torch.float64).requires_grad_(leaf_inputs)
            for shape in inputs
        ]
        self.values: list[Tensor] = [x.detach().clone() for x in self.inputs]

    def shape(self, value: int) -> tuple[int, ...]:
        """Of one of the values, without the batch."""
        return tuple(self.values[value].shape[1:])

    def add(self, node: Node, make: Callable[..., nn.Module]) -> None:
        """Take a node in, whose module ``make`` makes of the network, the shapes of what it takes, and its options.

        Raises:
            Unfit: the node does not go with the values. Nothing has changed.
        """
        torch.manual_seed(1000 * self.seed + len(self.nodes))
        module = make(self, *map(self.shape, node.of), **node.options).double()
        _freeze(module, node.frozen)
        torch.manual_seed(self.seed)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                out = self._run(node, module, [self.values[k].clone() for k in node.of])
            except (RuntimeError, ValueError, IndexError) as error:
                raise Unfit from error
        fit(isinstance(out, Tensor) and out.dtype == torch.float64 and 2 <= out.dim() <= 4)
        fit(out.size(0) == self.batch and 0 < out.numel() <= LARGEST * self.batch)
        fit(bool(out.isfinite().all()) and float(out.abs().max()) < 1e3)
        self.nodes.append(node)
        self.modules_of.append(module)
        self.values.append(out)

    def _run(self, node: Node, module: nn.Module, values: list[Tensor]) -> Tensor:
        if node.call == "plain":
            return module(*values)
        parameters = dict(module.named_parameters())
        made = {name: CALLS[node.call](p) for name, p in parameters.items()}
        return functional_call(module, made, tuple(values))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """All values."""
        values = [x.clone() for x in inputs]  # which a node may change in place
        for node, module in zip(self.nodes, self.modules_of, strict=True):
            values.append(self._run(node, module, [values[k] for k in node.of]))
        return values


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "functional": lambda p: p,
    "halved": lambda p: p / 2,
    "squashed": torch.tanh,
    "detached": lambda p: p.detach(),
}


def _freeze(module: nn.Module, frozen: str) -> None:
    for k, p in enumerate(module.parameters()):
        if frozen == "all" or (frozen == "first" and k == 0) or (frozen == "rest" and k):
            p.requires_grad_(False)
