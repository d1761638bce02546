"""The cost model: what each way to the per-sample norms costs for a layer's shape, and which one to take.

    rank-1    ‖u‖² ‖gy‖², one position only
    direct    form G_i = Σ_t gy_t ⊗ u_t, square, add
    Gram      ⟨U Uᵀ, Gy Gyᵀ⟩ over T×T; for a convolution U Uᵀ comes from the patches, or as shifted
              sums of the pixel Gram P = X Xᵀ:  (U Uᵀ)[t, t'] = Σ_o P[s·t + o, s·t' + o]

Counts are multiply-adds per sample, with symmetric products counted half. Purposes: ``norms``, ‖G_i − c‖² alone;
``grad``, with the derivatives by x and gy; ``statistics``, with the weight gradient Σ_i G_i, which the direct path's
tiles add up to anyway; ``applied``, G_i times another input instead of a norm. ``centered`` says that c is not zero: a
subtraction on the direct path, else the product c ∗ x, and cᵀ ∗ gy for the derivative.

Letters: ``B`` samples, ``T`` positions, ``N`` pixels, ``I`` in, ``O`` out, ``C`` channels in, ``K`` kernel positions,
``S`` space, c a center. No torch here: shapes in, numbers out.
"""

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

PURPOSES = ("norms", "grad", "statistics", "applied")

# Seconds per multiply-add of a path, relative to the direct path's tiles.
RELATIVE_TIME = {
    "rank1": 1.0,
    "direct": 1.0,
    # Counted half by symmetry, but a matrix product makes both halves.
    "gram": 2.0,
}
# An intermediate number (an entry of a tile or a Gram matrix) is written, read and squared: as long as this many
# multiply-adds of a matrix product, whose operands stay in cache.
ENTRY_TIME = 8.0
# With these, over 22 shapes and the three purposes on an AVX-512 processor, the chosen path took 1 % longer than the
# better of the two with the compiled kernels (geometric mean), and 6 % longer with plain torch.

# What GPUs run. Per-sample gradients and Gram matrices are kept for as many samples at a time as fit an L2 of 40 to 50 MiB
# beside x and gy; samples of more than so many positions are cut into segments of equal length.
GPU_WORKSPACE_BYTES = 32 * 2**20
GPU_SEGMENT = 4096
# (start of an op's name, dtypes or any, backends in the order of preference), the first row that fits. Until a GPU has
# timed them: Triton where there are products for tensor cores, compiled CUDA where memory is the bound.
_HALF = ("bfloat16", "float16")
GPU_BACKENDS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("", ("float64",), ("cuda",)),
    ("linear_rank1", (*_HALF, "float32"), ("cuda", "triton")),
    ("linear", (*_HALF, "float32"), ("triton", "cuda")),
    ("conv", (*_HALF, "float32"), ("triton", "cuda")),
    ("group_norm", (*_HALF, "float32"), ("triton",)),
    ("embedding", (*_HALF, "float32"), ("triton",)),
)


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer: x (B, T, I), gy (B, T, O)."""

    B: int
    T: int
    I: int  # noqa: E741 — the letter of the formulas
    O: int  # noqa: E741

    def __str__(self) -> str:
        """The shapes in and out."""
        return f"linear {self.I}→{self.O}, T = {self.T}"

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that there are."""
        return ("rank1",) if self.T == 1 else ("direct", "gram")

    @property
    def forward_operations(self) -> int:
        """Multiply-adds of the layer itself, per sample: the unit that costs are compared with."""
        return self.T * self.O * self.I

    @property
    def unpadded(self) -> float:
        """The share of the forward products that are with entries of x: all of them."""
        return 1.0

    @property
    def weight_entries(self) -> int:
        """Entries of the weight, and of a G_i."""
        return self.O * self.I

    def rank1(self, grad: bool) -> tuple[float, float]:
        """(operations, intermediate numbers) of the rank-1 path."""
        return (1 + grad) * (self.I + self.O), 0

    def gram(self, grad: bool) -> tuple[float, float]:
        """(operations, intermediate numbers) of the Gram path."""
        return (0.5 + grad) * self.T**2 * (self.I + self.O), 2 * self.T**2


@dataclass(frozen=True)
class ConvLayer:
    """A convolution: x (B, C, *S), gy (B, O, *S'), weights (O, C/groups, *K); one number per dimension of space."""

    B: int
    C: int
    S: tuple[int, ...]
    O: int  # noqa: E741 — the letter of the formulas
    K: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def __str__(self) -> str:
        """The shapes in and out."""
        size, kernel = ("×".join(map(str, v)) for v in (self.S, self.K))
        grouped = f", groups = {self.groups}" if self.groups > 1 else ""
        return f"conv {kernel}, {self.C}→{self.O}, {size}, T = {self.T}{grouped}"

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that there are."""
        return ("direct", "gram")

    @property
    def P(self) -> tuple[int, ...]:
        """Size of the output."""
        geometry = zip(self.S, self.K, self.stride, self.padding, self.dilation, strict=True)
        return tuple((s + 2 * p - d * (k - 1) - 1) // st + 1 for s, k, st, p, d in geometry)

    @property
    def T(self) -> int:
        """Output positions."""
        return math.prod(self.P)

    @property
    def unpadded(self) -> float:
        """The share of the forward products that are with pixels, and not with the zeros around them."""
        share = 1.0
        for s, k, stride, p, d in zip(self.S, self.K, self.stride, self.padding, self.dilation, strict=True):
            n, inside = (s + 2 * p - d * (k - 1) - 1) // stride + 1, 0
            for j in range(k):  # positions i with 0 ≤ i·stride + j·d − p < s
                first, end = (max(0, -(-(edge + p - j * d) // stride)) for edge in (0, s))
                inside += max(0, min(n, end) - first)
            share *= inside / max(1, k * n)
        return share

    @property
    def weight_entries(self) -> int:
        """Entries of the weight, and of a G_i."""
        return self.O * (self.C // self.groups) * math.prod(self.K)

    @property
    def forward_operations(self) -> int:
        """Multiply-adds of the layer itself, per sample: the unit that costs are compared with."""
        return self.T * self.weight_entries

    def pixel_gram(self, grad: bool) -> tuple[float, float]:
        """(operations, intermediate numbers) of the Gram path by way of the pixel Gram."""
        TT, NN = self.T**2, math.prod(self.S) ** 2
        shifts = (0.5 + 0.5 * grad) * self.groups * TT * math.prod(self.K)
        return (0.5 + grad) * (TT * self.O + NN * self.C) + shifts, self.groups * (2 * TT + (1 + grad) * NN)

    def patch_gram(self, grad: bool) -> tuple[float, float]:
        """(operations, intermediate numbers) of the Gram path with the patches U written out."""
        T, patch = self.T, self.C * math.prod(self.K)
        return (0.5 + grad) * T**2 * (self.O + patch), 2 * self.groups * T**2 + (1 + grad) * T * patch

    @property
    def pixels_first(self) -> bool:
        """Whether the pixel Gram is the cheaper way to U Uᵀ: it is not where strides leave most pixels unused."""
        return _time("gram", *self.pixel_gram(False)) <= _time("gram", *self.patch_gram(False))

    def gram(self, grad: bool) -> tuple[float, float]:
        """(operations, intermediate numbers) of the Gram path, by pixels or by patches, whichever is cheaper."""
        return self.pixel_gram(grad) if self.pixels_first else self.patch_gram(grad)


Layer = LinearLayer | ConvLayer


@dataclass(frozen=True)
class Cost:
    """What a path takes for one sample.

    Attributes:
        operations: multiply-adds.
        bytes: working memory beside x, gy and the results, in the accumulation dtype: the tile or the Gram matrices.
        time: the estimate that paths are compared by, in multiply-adds of the direct path.
    """

    operations: float
    bytes: float
    time: float


def cost(
    layer: Layer,
    path: str,
    purpose: str = "norms",
    centered: bool = False,
    summed: bool = False,
    itemsize: int = 4,
) -> Cost:
    """The cost of a path for one sample of a layer.

    Args:
        layer: the layer's shape.
        path: ``"rank1"`` (a linear layer with T = 1), ``"direct"`` or ``"gram"``.
        purpose: ``"norms"``, ``"grad"``, ``"statistics"`` or ``"applied"``.
        centered: norms of G_i − c rather than of G_i.
        summed: the weight gradient Σ_i G_i is wanted, too; ``"statistics"`` always does.
        itemsize: bytes of a number of the accumulation dtype.

    Raises:
        ValueError: an unknown purpose, or a path that the layer does not have.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"purpose must be one of {', '.join(PURPOSES)}; got {purpose!r}")
    if path not in layer.paths:
        raise ValueError(f"path of {layer} must be one of {', '.join(layer.paths)}; got {path!r}")
    return _cost(layer, path, purpose, centered, summed, itemsize)


def as_number(size: Any) -> int:
    """A size as a number; of one that a compiler leaves open, its present one, of which plans may be made, and no results."""
    return size if isinstance(size, int) else size.node.hint


def choose_path(layer: Layer, purpose: str = "norms", centered: bool = False, summed: bool = False) -> str:
    """The quickest path by the estimate: ``"rank1"``, ``"direct"`` or ``"gram"``. Arguments as `cost`."""
    if purpose not in PURPOSES:
        raise ValueError(f"purpose must be one of {', '.join(PURPOSES)}; got {purpose!r}")
    return _quickest(layer, purpose, centered, summed)


@functools.lru_cache(maxsize=4096)
def cpu_product(layer: ConvLayer, product: str) -> str:
    """What makes a product of a convolution on a CPU, in float32.

    Args:
        layer: the layer's shape.
        product: ``"output"``, ``"input_grad"`` or ``"weight_grad"``.

    Returns:
        ``"minimal_filtering"``, ``"planes"``, kernels with vectors along positions, or ``"default"``: torch's own product,
        for the weight gradient tiles of G_i.
    """
    if product == "weight_grad":
        return "minimal_filtering" if minimal_filtering(layer, True) else "default"
    turned = layer
    if product == "input_grad" and len(layer.K) == 2 and max(layer.padding) <= 2:  # a convolution of gy
        turned = replace(layer, C=layer.O, O=layer.C, S=layer.P, padding=tuple(2 - p for p in layer.padding))
    if (turned is not layer or product == "output") and minimal_filtering(turned):
        return "minimal_filtering"
    return "planes" if _by_planes(layer, product == "input_grad") else "default"


def _by_planes(layer: ConvLayer, input_grad: bool) -> bool:
    """Whether so few products make an entry that what oneDNN does beside them, its blocked layouts, takes the longer.

    Samples are what threads share. Over 20 shapes on an AVX-512 processor these took 0.16 to 1.3 of oneDNN's time, in the
    mean two thirds.
    """
    K = math.prod(layer.K)
    ins, outs = layer.C // layer.groups, layer.O // layer.groups
    terms = outs * K if input_grad else ins * K
    few = terms <= (256 if K == 1 else 128) or (input_grad and ins <= 4)
    return layer.B >= 16 and layer.T > 1 and few


@functools.lru_cache(maxsize=4096)
def minimal_filtering(layer: ConvLayer, summed: bool = False) -> bool:
    """Whether a CPU is quicker with 16 products for each tile of 2×2 outputs, and transforms, than with up to 36.

    For 3×3 kernels with stride 1, with a vector of channels on both sides at least, where few tiles stick out or see
    padding alone, and where there are enough of them for the transform of the weights, or, ``summed``, for the traffic of
    the sum Σ_i w_i G_i, which is read and written for every run of tiles.
    """
    if layer.K != (3, 3) or layer.stride + layer.dilation != (1, 1, 1, 1) or layer.groups != 1:
        return False
    tiles = math.prod((p + 1) // 2 for p in layer.P)
    fits = max(layer.padding) <= 2 and min(layer.C, layer.O) >= 16 and 16 * tiles <= 0.72 * 9 * layer.T * layer.unpadded
    return fits and layer.B * tiles >= max(64, (8 if summed else 2) * max(layer.C, layer.O))


@functools.lru_cache(maxsize=4096)
def _quickest(layer: Layer, purpose: str, centered: bool, summed: bool) -> str:
    return min(layer.paths, key=lambda path: _cost(layer, path, purpose, centered, summed).time)


def gpu_backend(op: str, dtype: str, backend: str = "auto", usable: Collection[str] = ("cuda", "triton")) -> str:
    """What runs an op on a GPU: ``"cuda"``, ``"triton"`` or ``"eager"``.

    Args:
        op: an op's name.
        dtype: its inputs' dtype, ``"bfloat16"``.
        backend: ``"auto"``, or one that is to run whatever it can; plain torch runs the rest.
        usable: the backends other than plain torch that have the op on this machine.
    """
    order = next((order for start, dtypes, order in GPU_BACKENDS if op.startswith(start) and dtype in dtypes), ())
    return next((b for b in order if b in usable and backend in ("auto", b)), "eager")


def gpu_workspace(layer: Layer, purpose: str = "grad", dtype: str = "float32") -> int:
    """Bytes of per-sample gradients that Triton's direct path keeps at a time, for all samples together.

    None for the norms of samples with up to GPU_SEGMENT positions, which never leave the registers; else as many samples'
    as fit GPU_WORKSPACE_BYTES, one at least. Arguments as `cost`; ``dtype`` is that of x and gy.
    """
    at_most = max(1, GPU_WORKSPACE_BYTES // (4 * max(1, layer.weight_entries)) - 1)  # segments, and their sum
    segments = min(math.ceil(layer.T / GPU_SEGMENT), at_most)
    bytes_per_entry = 4 * segments if segments > 1 else 0
    if purpose == "grad":
        bytes_per_entry += 2 if dtype == "bfloat16" else 4
    sample = bytes_per_entry * layer.weight_entries
    return min(layer.B, max(1, GPU_WORKSPACE_BYTES // sample)) * sample if sample else 0


def _cost(layer: Layer, path: str, purpose: str, centered: bool, summed: bool, itemsize: int = 4) -> Cost:
    grad, unit = purpose == "grad", float(layer.forward_operations)
    if path == "direct":
        operations = (1 + 2 * grad + (purpose == "applied")) * unit
        entries, products = float(layer.weight_entries), 0.0
    else:
        count = layer.rank1 if isinstance(layer, LinearLayer) and path == "rank1" else layer.gram
        operations, entries = count(grad)
        if purpose == "applied":  # a Gram matrix of x with another input has no symmetry: as the derivatives alone
            operations, entries = count(True)[0] - operations, count(True)[1]
            path = "direct"  # every operation is made once
        # The weight gradient, c ∗ x and cᵀ ∗ gy are whole forward-sized products here; those with margins take no time.
        products = unit * ((summed or purpose == "statistics") + centered * (1 + grad))
    time = _time(path, operations, entries) + products * layer.unpadded
    return Cost(operations + products, itemsize * entries, time)


def _time(path: str, operations: float, entries: float) -> float:
    return RELATIVE_TIME[path] * operations + ENTRY_TIME * entries
