"""Tiles of the products on tensor cores, by the shape of a layer: three tables, to be swept on a machine that has them.

    direct    G [BLOCK_O, BLOCK_R]      over positions       BLOCK_T at a time
    output    y [BLOCK_O, BLOCK_T]      over rows            BLOCK_R at a time
    input     gx [BLOCK_C, BLOCK_T]     over (tap, O)        BLOCK_O at a time

A configuration is the first whose limits hold the layer. It depends on the layer and the dtype, never on ``B``. Families of
architectures: ``sm80`` (8.x and 12.x: multiplies from registers, some have 99 KiB of shared memory), ``sm90`` (Hopper:
multiplies from shared memory, 64 rows or more on four warps), ``sm100`` (Blackwell: accumulates in tensor memory).
"""

import functools
from typing import NamedTuple

import torch

from . import allows_tf32


class DirectConfig(NamedTuple):
    """A tile of a gradient."""

    BLOCK_O: int
    BLOCK_R: int
    BLOCK_T: int
    num_warps: int
    num_stages: int


class OutputConfig(NamedTuple):
    """A tile of an output."""

    BLOCK_O: int
    BLOCK_T: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


class InputConfig(NamedTuple):
    """A tile of an input's gradient."""

    BLOCK_C: int
    BLOCK_T: int
    BLOCK_O: int
    num_warps: int
    num_stages: int


# Kinds of products: "half", factors of two bytes; "tf32", float32 factors on tensor cores; "ieee", float32 without them,
# where every factor passes through registers, so tiles are small.
KINDS = ("half", "tf32", "ieee")

# Rows: (largest M, largest N, M, N, depth, warps, stages) for a tile of M×N numbers; None: no limit.
_Row = tuple[int | None, int | None, int, int, int, int, int]
_SMALL: tuple[_Row, ...] = (
    (16, 16, 16, 16, 64, 1, 3),
    (16, 32, 16, 32, 64, 2, 3),
    (16, None, 16, 64, 64, 4, 3),
    (32, 16, 32, 16, 64, 2, 3),
    (32, 32, 32, 32, 64, 4, 3),
    (32, None, 32, 64, 64, 4, 3),
    (None, 16, 64, 16, 64, 4, 3),
    (None, 32, 64, 32, 64, 4, 3),
)
_SMALL_TF32: tuple[_Row, ...] = tuple((m, n, M, N, 32, warps, 3) for m, n, M, N, _, warps, _ in _SMALL)
_IEEE: tuple[_Row, ...] = (
    (16, 16, 16, 16, 16, 1, 3),
    (16, None, 16, 64, 16, 4, 3),
    (32, 32, 32, 32, 16, 4, 3),
    (32, None, 32, 64, 16, 4, 3),
    (None, 16, 64, 16, 16, 4, 3),
    (None, 32, 64, 32, 16, 4, 3),
    (None, None, 64, 64, 16, 8, 3),
)
# Tiles of gradients, beside which their sum over samples is kept: two accumulators.
DIRECT: dict[tuple[str, str], tuple[_Row, ...]] = {
    ("sm80", "half"): (
        *_SMALL[:-2],
        (None, 16, 64, 16, 32, 4, 3),
        (None, 32, 64, 32, 64, 4, 3),
        (64, None, 64, 64, 32, 4, 4),
        (None, 64, 128, 64, 32, 8, 3),
        (None, None, 64, 128, 32, 8, 3),
    ),
    ("sm90", "half"): (
        *_SMALL,
        (64, 64, 64, 64, 64, 4, 3),
        (64, None, 64, 128, 64, 8, 3),
        (None, None, 128, 64, 64, 8, 3),
    ),
    ("sm100", "half"): (
        *_SMALL,
        (64, 64, 64, 64, 32, 4, 3),
        (64, None, 64, 128, 64, 8, 3),
        (None, None, 128, 64, 64, 8, 3),
    ),
    ("sm80", "tf32"): (*_SMALL_TF32, (64, None, 64, 64, 32, 4, 3), (None, None, 128, 64, 32, 8, 3)),
    ("sm90", "tf32"): (*_SMALL_TF32, (64, None, 64, 64, 32, 4, 3), (None, None, 128, 64, 32, 8, 3)),
    ("sm100", "tf32"): (*_SMALL_TF32, (64, None, 64, 64, 32, 4, 3), (None, None, 128, 64, 32, 8, 3)),
    ("sm80", "ieee"): _IEEE,
    ("sm90", "ieee"): _IEEE,
    ("sm100", "ieee"): _IEEE,
}
# Tiles of outputs and of inputs' gradients.
PRODUCTS: dict[tuple[str, str], tuple[_Row, ...]] = {
    ("sm80", "half"): (
        *_SMALL,
        (64, None, 64, 64, 32, 4, 4),
        (None, 64, 128, 64, 32, 4, 3),
        (None, None, 128, 128, 32, 8, 3),
    ),
    ("sm90", "half"): (
        *_SMALL,
        (64, None, 64, 128, 64, 8, 3),
        (None, 64, 128, 64, 64, 4, 3),
        (None, None, 128, 128, 64, 8, 3),
    ),
    ("sm100", "half"): (
        *_SMALL,
        (64, None, 64, 128, 64, 8, 3),
        (None, 64, 128, 64, 64, 4, 3),
        (None, None, 128, 128, 64, 8, 3),
    ),
    ("sm80", "tf32"): (*_SMALL_TF32, (64, None, 64, 64, 32, 4, 3), (None, None, 128, 64, 32, 8, 3)),
    ("sm90", "tf32"): (*_SMALL_TF32, (64, None, 64, 64, 32, 4, 3), (None, None, 128, 64, 32, 8, 3)),
    ("sm100", "tf32"): (*_SMALL_TF32, (64, None, 64, 64, 32, 4, 3), (None, None, 128, 64, 32, 8, 3)),
    ("sm80", "ieee"): _IEEE,
    ("sm90", "ieee"): _IEEE,
    ("sm100", "ieee"): _IEEE,
}


def direct_kind(dtype: torch.dtype) -> str:
    """The kind of the product of gy and patches of ``dtype``: exact for float32, unless torch's products may use TF32."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if allows_tf32(dtype) else "ieee"


def product_kind(dtype: torch.dtype) -> str:
    """The kind of the product of gradients with patches or gy.

    Beside float16 the gradients stay float32 and are multiplied in TF32, which has float16's digits and float32's range:
    unscaled they would leave float16's.
    """
    return "tf32" if dtype == torch.float16 else direct_kind(dtype)


def direct_config(kind: str, device: torch.device, Og: int, Cg: int, taps: int, T: int) -> DirectConfig:
    """The tile of a gradient: M is O, N the rows, the depth T."""
    # Blocks of one tap have a group's channels for rows, if these are many.
    M, N, depth, *rest = choose("direct", family_of(device), kind, Og, Cg if Cg > 16 else Cg * taps, T)
    return DirectConfig(M, N, depth, *rest)


def output_config(kind: str, device: torch.device, Og: int, Cg: int, taps: int, T: int) -> OutputConfig:
    """The tile of an output: M is O, N the positions, the depth the rows."""
    M, N, depth, *rest = choose("products", family_of(device), kind, Og, T, Cg if Cg > 16 else Cg * taps)
    return OutputConfig(M, N, depth, *rest)


def input_config(kind: str, device: torch.device, Og: int, Cg: int, pixels: int) -> InputConfig:
    """The tile of an input's gradient: M is C, N the pixels of a phase, the depth O."""
    M, N, depth, *rest = choose("products", family_of(device), kind, Cg, pixels, Og)
    return InputConfig(M, N, depth, *rest)


@functools.lru_cache(maxsize=4096)
def choose(table: str, family: str, kind: str, m: int, n: int, depth: int) -> tuple[int, int, int, int, int]:
    """The tile (M, N, depth, warps, stages) for a product of that size."""
    rows = (DIRECT if table == "direct" else PRODUCTS)[family, kind]
    M, N, K, warps, stages = next(
        row[2:] for row in rows if (row[0] is None or m <= row[0]) and (row[1] is None or n <= row[1])
    )
    # No deeper than there is to add up; 16 at least, which is what a product on tensor cores takes.
    while K > 16 and K >= 2 * depth:
        K //= 2
    return M, N, K, warps, stages


@functools.lru_cache
def family_of(device: torch.device) -> str:
    """The family of architectures of a device; of the interpreter's CPU, sm80."""
    return family_name(torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0))


def family_name(capability: tuple[int, int]) -> str:
    """The family that a compute capability belongs to; consumer Blackwell, 12.x, multiplies like sm80."""
    major = capability[0]
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")
