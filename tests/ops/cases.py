"""Layers to run the ops on, and the comparison of a backend with the oracle.

Arguments are looked up by the names in an op's schema, so that one `Case` serves every op. Letters as in `ops.schema`.
"""

import dataclasses
import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from bootgrad import reference
from bootgrad.ops import schema

from ..tolerances import TOLERANCES

LINEAR_OPS = [name for name in schema.SCHEMAS if name.startswith("linear") and "rank1" not in name]
CONV_OPS = [name for name in schema.SCHEMAS if name.startswith("conv")]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A layer's (x, gy), its geometry, and a center, a direction v and weights w to go with them."""

    x: Tensor
    gy: Tensor
    center: Tensor | None
    v: Tensor
    w: Tensor | None
    kernel_size: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    padding: tuple[int, ...] | None = None
    dilation: tuple[int, ...] | None = None
    groups: int = 1
    mask: tuple[bool, bool, bool] = (True, True, True)

    @property
    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    def but(self, **changes) -> "Case":
        return dataclasses.replace(self, **changes)

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.x, self.gy, self.center, self.v, self.w) if t is not None]


def linear_case(B: int, T: int, I: int, O: int, dtype: torch.dtype, seed: int = 0) -> Case:  # noqa: E741
    return _case((B, T, I), (B, T, O), (O, I), dtype, seed)


def conv_case(B, C, S, O, K, stride, padding, dilation, groups, dtype: torch.dtype, seed: int = 0) -> Case:  # noqa: E741
    out = schema.output_size(S, K, stride, padding, dilation)
    case = _case((B, C, *S), (B, O, *out), (O, C // groups, *K), dtype, seed)
    return case.but(kernel_size=K, stride=stride, padding=padding, dilation=dilation, groups=groups)


def _case(x_shape, gy_shape, weight_shape, dtype, seed) -> Case:
    generator = torch.Generator().manual_seed(seed)
    accumulation = schema.accumulation_dtype(dtype)

    def random(*shape, dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, gy = random(*x_shape, dtype=dtype), random(*gy_shape, dtype=dtype)
    center, v = (random(*weight_shape, dtype=accumulation) for _ in range(2))
    return Case(x, gy, center, v, random(x_shape[0], dtype=accumulation))


@st.composite
def conv_shapes(draw) -> tuple:
    """Arguments of `conv_case`: one to three dimensions, with every stride, padding, dilation and grouping in reach."""
    n = draw(st.integers(1, 3))
    largest = {1: 19, 2: 9, 3: 5}[n]

    def numbers(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=n, max_size=n)))

    K, stride, dilation = numbers(1, 4 if n < 3 else 3), numbers(1, 3), numbers(1, 2)
    padding = tuple(draw(st.integers(0, k)) for k in K)
    # At least one output position: torch's own convolutions refuse less.
    S = tuple(
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), largest))
        for k, d, p in zip(K, dilation, padding, strict=True)
    )
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    C, O = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))  # noqa: E741
    return draw(st.integers(0, 4)), C, S, O, K, stride, padding, dilation, groups


# Weights w that a caller may have and that do not lie side by side.
WEIGHT_LAYOUTS = {
    "expanded": lambda w: w[:1].expand(w.shape),
    "every other": lambda w: w.repeat_interleave(2)[::2],
    "a matrix's column": lambda w: torch.stack((w, 1 - w), 1)[:, 0],
}


def takes(name: str, argument: str) -> bool:
    """Whether an op has an argument of this name."""
    return argument in _argument_names(name)


def arguments(name: str, case: Case, path: str = "direct") -> list:
    """The arguments of the raw op."""
    return [path if a == "path" else getattr(case, a) for a in _argument_names(name)]


def variants(name: str, case: Case) -> list[Case]:
    """The case with and without what an op may go without: a center, weights, either derivative."""
    optional = [a for a in ("center", "w") if takes(name, a) and f"Tensor? {a}" in schema.SCHEMAS[name]]
    cases = [case, *(case.but(**{a: None}) for a in optional)]
    if takes(name, "mask"):
        cases += [
            case.but(mask=mask)
            for mask in ((True, False, False), (False, True, True), (False, False, True), (False, False, False))
        ]
    return cases


def exact(name: str, case: Case) -> tuple[Tensor, ...]:
    """The oracle's results."""
    values = {a: getattr(case, a) for a in _argument_names(name) if a not in ("path", "mask")}
    options = {"mask": case.mask} if "mask" in inspect.signature(getattr(reference, name)).parameters else {}
    return _tuple(getattr(reference, name)(*values.values(), **options))


def plain(name: str, case: Case) -> tuple[Tensor, ...]:
    """What plain torch makes of it in the accumulation dtype: each sample's gradient by a backward pass, then sums."""
    dtype = schema.accumulation_dtype(case.x.dtype)
    x, gy = (t.detach().to(dtype).requires_grad_() for t in (case.x, case.gy))
    weight = torch.zeros_like(case.v).requires_grad_()
    convolution = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    rows = x.new_zeros(x.size(0), *weight.shape)
    if x.numel() and gy.numel():
        parts = []
        for x_i, gy_i in zip(x.split(1), gy.split(1), strict=True):
            y = F.linear(x_i, weight) if case.kernel_size is None else convolution(x_i, weight, None, *case.geometry)
            parts.append(torch.autograd.grad(y, weight, gy_i, create_graph=True)[0])
        rows = torch.stack(parts)
    flat = rows.flatten(1)
    deviation = (flat if case.center is None else flat - case.center.flatten()).square().sum(1)
    if name.endswith("with_grad"):
        zero = 0 * (x.sum() + gy.sum())
        grads = torch.autograd.grad(deviation.sum() + zero, (x, gy))
        return deviation.detach(), *(
            g if wanted else g.new_zeros(0) for g, wanted in zip((*grads, rows.detach().sum(0)), case.mask, strict=True)
        )
    if name.endswith("deviation_sq_norms"):
        return (deviation.detach(),)
    if name.endswith("sq_norms"):
        return (flat.square().sum(1).detach(),)
    if name.endswith("jvp"):
        return ((flat * case.v.flatten()).sum(1).detach(),)
    if name.endswith("weighted_sum"):
        w = x.new_ones(x.size(0)) if case.w is None else case.w
        return (torch.tensordot(w, rows.detach(), 1),)
    positions = gy.sum(1) if case.kernel_size is None else gy.flatten(2).sum(2)
    deviation = flat.new_zeros(0) if case.center is None else deviation
    return tuple(t.detach() for t in (rows.sum(0), flat.square().sum(1), deviation, positions))


def check(backend: str, name: str, case: Case, ours, path: str = "direct") -> None:
    """Compare an op's results with the oracle and with plain torch; see `tolerances`."""
    dtype = case.x.dtype
    tolerance = TOLERANCES[backend, dtype]
    expected = exact(name, case)
    theirs = expected if dtype == torch.float64 else plain(name, case)
    for index, (a, b, c) in enumerate(zip(_tuple(ours), expected, theirs, strict=True)):
        derivative = name.endswith("with_grad") and index in (1, 2)
        assert a.dtype == (dtype if derivative else schema.accumulation_dtype(dtype)), f"result {index}: {a.dtype}"
        assert a.shape == b.shape and a.is_contiguous(), f"result {index}: {a.shape}, {a.stride()} for {b.shape}"
        scale = _scale(name, index, case, b, path)
        error, of_torch = _error(a, b, scale), _error(c, b, scale)
        bound = tolerance.factor * of_torch + (tolerance.derivatives if derivative else tolerance.sums)
        assert error <= bound, f"result {index} of {name}, {path}, {dtype}: {error:.1e} > {bound:.1e}"


def _scale(name: str, index: int, case: Case, expected: Tensor, path: str) -> Tensor:
    """What an error is relative to, per sample or for all: the exact result's norm, but where that may cancel."""
    if not expected.numel():
        return expected.new_zeros(())
    x, gy = (t.double().flatten(1).norm(dim=1) for t in (case.x, case.gy))
    T = max(1, math.prod(case.gy.shape[1:-1] if case.v.dim() == 2 else case.gy.shape[2:]))
    # What ‖G_i‖² is for positions that have nothing to do with each other; by chance it is far less.
    incoherent = (x * gy).square() / T
    if name.endswith("jvp"):
        return incoherent.sqrt() * case.v.double().norm()
    if name.endswith("statistics") and index == 3:
        return gy
    if (name, index) in _DEVIATIONS and case.center is not None:
        return expected + (incoherent + case.center.double().square().sum() if path == "gram" else 0)
    if (name, index) in _DEVIATIONS + _SQ_NORMS:
        return expected + incoherent
    if name.endswith("weighted_sum") or name.endswith("statistics") or (name.endswith("with_grad") and index == 3):
        return expected.norm()
    return expected.flatten(1).norm(dim=1)


_KINDS = ("linear", "conv")
_DEVIATIONS = [
    (f"{kind}_{op}", index)
    for kind in _KINDS
    for op, index in (("deviation_sq_norms", 0), ("statistics", 2), ("sq_norms_with_grad", 0))
]
_SQ_NORMS = [(f"{kind}_{op}", index) for kind in _KINDS for op, index in (("sq_norms", 0), ("statistics", 1))]
_SQ_NORMS.append(("linear_rank1_sq_norms", 0))


def _error(ours: Tensor, exact: Tensor, scale: Tensor) -> float:
    difference = (ours.double() - exact).abs()
    if not difference.numel():
        return 0.0
    difference = difference.norm() if scale.dim() == 0 else difference.reshape(len(difference), -1).norm(dim=1)
    # Where the exact result is zero, so must ours be.
    relative = torch.where(difference == 0, 0.0, difference / scale)
    return float("nan") if relative.isnan().any() else relative.max().item()


def _argument_names(name: str) -> list[str]:
    return [a.name for a in getattr(torch.ops.bootgrad, name).default._schema.arguments]


def _tuple(results) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
