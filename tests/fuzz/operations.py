"""Operations that programs are made of: which values they take, and a module for the shapes of these.

Shapes are told without the batch: (d) features, (T, d) sequences, (C, H, W) images, (T) tokens, whose dtype tells them apart.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st
from torch import nn

Shape = tuple[int, ...]
BOOL = st.booleans()
SIZE = st.sampled_from([3, 2, 4, 1])


@dataclass(frozen=True)
class Operation:
    """An operation.

    Attributes:
        takes: what each of its values is: a kind, or "same" for one of the first one's shape.
        make: makes its module, of the network, the values' shapes and options.
        options: what is drawn for it.
        smooth: whether finite differences tell its derivatives.
        refused: a pattern of the error by which it may be refused.
        weight: how often it is drawn.
    """

    takes: tuple[str, ...]
    make: Callable[..., nn.Module]
    options: dict[str, st.SearchStrategy]
    smooth: bool
    refused: str | None
    weight: int


OPERATIONS: dict[str, Operation] = {}
KINDS = {1: "features", 2: "sequence", 3: "image"}


def operation(
    *takes: str, smooth: bool = True, refused: str | None = None, weight: int = 2, **options: st.SearchStrategy
):
    """Register ``make(network, *shapes, **options)`` by its name."""

    def register(make):
        OPERATIONS[make.__name__] = Operation(takes, make, options, smooth, refused, weight)
        return make

    return register


def takes(wanted: str, shape: Shape, is_tokens: bool, first: Shape | None) -> bool:
    """Whether a value of this shape is what an operation wants."""
    if is_tokens or wanted == "tokens":
        return is_tokens and wanted == "tokens"
    if wanted == "same":
        return first is None or shape == first
    return wanted in ("any", KINDS[len(shape)]) or (wanted == "positions" and len(shape) > 1)
