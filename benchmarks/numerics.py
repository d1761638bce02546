"""How far from float64 the fused ops are, by dtype and backend, over B, T and P; and Γ where samples agree or cancel.

Inputs are drawn in float64, rounded to the dtype, and taken in float64 by the oracle, which forms every G_i: what is measured
is the arithmetic alone. Errors are relative: of values per sample, the largest |s − s*| / |s*| (of inner products, relative
to ‖G_i‖‖v‖); of tensors, ‖t − t*‖ / ‖t*‖. Each backend runs in a process of its own.

    python -m benchmarks.numerics

Letters: B samples, T positions, I in, O out, P = O·I·K weights.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bootgrad
from bootgrad import ops

from .results import FOLDER, setting, write

IMAGES = Path(__file__).parents[1] / "docs/images"
BACKENDS = {  # name: environment
    "eager": {"BOOTGRAD_BACKEND": "eager"},
    "baseline": {"BOOTGRAD_ISA": "baseline"},
    "avx2": {"BOOTGRAD_ISA": "avx2"},
    "avx512": {"BOOTGRAD_ISA": "avx512"},
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = {"B": (1, 4, 16, 64, 256), "T": (1, 4, 16, 64, 256, 1024), "P": (2**8, 2**10, 2**12, 2**14, 2**16)}
SIZE = {"B": 8, "T": 64, "P": 2**12}  # of the other two, and of the table


@dataclass(frozen=True)
class Layer:
    """A kind of layer: its inputs, and its G_i in float64, (B, O, ·)."""

    name: str
    draw: Callable[[int, int, int], tuple[Tensor, Tensor]]
    rows: Callable[[Tensor, Tensor], Tensor]
    sq_norms: Callable[[Tensor, Tensor], Tensor]
    deviation: Callable[[Tensor, Tensor, Tensor], Tensor]
    jvp: Callable[[Tensor, Tensor, Tensor], Tensor]
    weighted_sum: Callable[[Tensor, Tensor, Tensor], Tensor]


def _linear_pair(B: int, T: int, P: int) -> tuple[Tensor, Tensor]:
    width = round(P**0.5)
    return normal(B, T, width), normal(B, T, width)


def _conv_pair(B: int, T: int, P: int) -> tuple[Tensor, Tensor]:
    height = 2 ** ((T.bit_length() - 1) // 2)
    space, channels = (height, T // height), max(1, round((P / 9) ** 0.5))
    return normal(B, channels, *space), normal(B, channels, *space)


def _embedding_pair(B: int, T: int, P: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(P // 16, (B, T), generator=generator), normal(B, T, 16)


def normal(*shape: int) -> Tensor:
    """Normal numbers in float64, the same in every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _conv_rows(x: Tensor, gy: Tensor) -> Tensor:
    patches = F.unfold(x, 3, padding=1)  # (B, C·9, T)
    return torch.einsum("bot,bit->boi", gy.flatten(2), patches).unflatten(2, (x.size(1), 3, 3))


def _embedding_rows(tokens: Tensor, gy: Tensor) -> Tensor:
    rows = gy.new_zeros(len(tokens), int(tokens.max()) + 1, gy.size(2))
    return rows.scatter_add(1, tokens.unsqueeze(2).expand_as(gy), gy)


LAYERS = (
    Layer(
        "linear",
        _linear_pair,
        lambda x, gy: torch.einsum("bto,bti->boi", gy, x),
        ops.linear_sq_norms,
        ops.linear_deviation_sq_norms,
        ops.linear_jvp,
        ops.linear_weighted_sum,
    ),
    Layer(
        "conv 3×3",
        _conv_pair,
        _conv_rows,
        lambda x, gy: ops.conv_sq_norms(x, gy, 3, padding=1),
        lambda x, gy, c: ops.conv_deviation_sq_norms(x, gy, c, padding=1),
        lambda x, gy, v: ops.conv_jvp(x, gy, v, padding=1),
        lambda x, gy, w: ops.conv_weighted_sum(x, gy, w, 3, padding=1),
    ),
    Layer(
        "embedding",
        _embedding_pair,
        _embedding_rows,
        ops.embedding_sq_norms,
        ops.embedding_deviation_sq_norms,
        ops.embedding_jvp,
        lambda x, gy, w: ops.embedding_weighted_sum(x, gy, int(x.max()) + 1, w),
    ),
)


def errors(layer: Layer, B: int, T: int, P: int, dtype: torch.dtype) -> dict[str, float]:
    """The error of each op of a layer, by name."""
    x, gy = (t.to(dtype) if t.is_floating_point() else t for t in layer.draw(B, T, P))
    exact_x, exact_gy = (t.double() if t.is_floating_point() else t for t in (x, gy))
    rows = layer.rows(exact_x, exact_gy)
    near = rows.mean(0) * 1.01
    center, w = near.to(dtype), torch.linspace(-1, 1, B, dtype=torch.float64).to(dtype)
    flat, v = rows.flatten(1), center.double().flatten()
    norms, size = flat.square().sum(1), flat.norm(dim=1) * v.norm()
    found = {
        "sq_norms": ((layer.sq_norms(x, gy).double() - norms) / norms).abs().max(),
        "deviation_sq_norms": _relative(layer.deviation(x, gy, center), (flat - v).square().sum(1), norms + v @ v),
        "jvp": _relative(layer.jvp(x, gy, center), flat @ v, size),
        "weighted_sum": _relative_tensor(layer.weighted_sum(x, gy, w), (w.double() @ flat).view_as(rows[0])),
    }
    pair = [t for t in (x, gy) if t.is_floating_point()]
    exact_pair = [t for t in (exact_x, exact_gy) if t.is_floating_point()]
    for t in (*pair, *exact_pair):
        t.requires_grad_()
    grads = torch.autograd.grad(layer.sq_norms(x, gy).sum(), pair)
    exact = torch.autograd.grad(layer.rows(exact_x, exact_gy).square().sum(), exact_pair)
    found["gradient of sq_norms"] = max(_relative_tensor(g, e) for g, e in zip(grads, exact, strict=True))
    return {name: float(error) for name, error in found.items()}


def _relative(value: Tensor, exact: Tensor, scale: Tensor) -> Tensor:
    return ((value.double() - exact).abs() / scale).max()


def _relative_tensor(value: Tensor, exact: Tensor) -> Tensor:
    return (value.double() - exact).norm() / exact.norm()


def measured() -> Iterator[dict]:
    """Rows of this process's backend: every op at the size of the table, and over each size."""
    for layer in LAYERS:
        for dtype in DTYPES:
            for over, sizes in (("", (0,)), *SIZES.items()):
                for n in sizes:
                    size = SIZE | ({over: n} if over else {})
                    for op, error in errors(layer, size["B"], size["T"], size["P"], dtype).items():
                        yield {
                            "layer": layer.name,
                            "op": op,
                            "dtype": str(dtype).removeprefix("torch."),
                            "over": over,
                            **size,
                            "error": f"{error:.2e}",
                        }


def agreement() -> Iterator[dict]:
    """Errors of Γ in float32 where samples agree more and more, or cancel: Γ/‖ḡ‖² from 1e-14 to 1e8.

    A linear layer I = 32, O = 8 under losses ⟨A, W x_i⟩ with constant A (T, O), so that G_i = Aᵀ x_i: T = 1 is summed by the
    rank-1 path, T = 16 by the direct one.
    """
    B, width, out = 64, 32, 8
    for path, T in (("rank-1", 1), ("direct", 16)):
        for exponent in range(-14, 9, 2):
            common, own, A = normal(T, width), normal(B, T, width), normal(T, out)
            own = own - own.mean(0)
            by_common, by_own = A.T @ common, A.T @ own
            own *= (by_common.square().sum() * 10.0**exponent / by_own.square().sum((1, 2)).mean()).sqrt()
            x, A = (common + own).float(), A.float()
            rows = A.double().T @ x.double()
            exact = float(rows.var(0, correction=0).sum())
            for way, center in (("no center", None), ("about ḡ", {"weight": rows.mean(0).float()})):
                layer = nn.Linear(width, out, bias=False)
                with bootgrad.record(layer) as rec:
                    losses = (layer(x) * A).sum((1, 2))
                value = float(rec.backward(losses, center=center).covariance_trace)
                error = abs(value - exact) / exact
                yield {"path": path, "ratio": f"1e{exponent}", "way": way, "error": f"{error:.2e}"}


def main() -> None:
    """Measure each backend in a process of its own, write the tables, and draw them."""
    if sys.argv[1:] == ["worker"]:
        torch.set_num_threads(1)
        json.dump({"place": setting(), "rows": list(measured()), "agreement": list(agreement())}, sys.stdout)
        return
    rows, agreements = [], []
    for backend, environment in BACKENDS.items():
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, "worker"],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
        name = found["place"]["backend"].removeprefix("C++ ")
        if name != backend:
            print(f"{backend} is not to be had here", file=sys.stderr)
            continue
        rows += [found["place"] | row for row in found["rows"]]
        agreements += [found["place"] | row for row in found["agreement"]]
    write(FOLDER / "numerics.csv", rows)
    write(FOLDER / "numerics_agreement.csv", agreements)
    draw(rows, agreements)


def draw(rows: list[dict], agreements: list[dict]) -> None:
    """Errors over B, T and P, and of Γ over Γ/‖ḡ‖²."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = dict(
        zip(("float64", "float32", "bfloat16", "float16"), ("#1b9e77", "#7570b3", "#d95f02", "#666666"), strict=True)
    )
    backends = dict(zip(dict.fromkeys(row["backend"] for row in rows), ("-", ":", "--", "-."), strict=False))
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharey="row", layout="constrained")
    for line, (layer, op) in zip(axes, (("linear", "sq_norms"), ("conv 3×3", "gradient of sq_norms")), strict=True):
        for axis, over in zip(line, SIZES, strict=True):
            for dtype, color in colors.items():
                for backend, style in backends.items():
                    chosen = [
                        row
                        for row in rows
                        if (row["layer"], row["op"], row["over"], row["dtype"], row["backend"])
                        == (layer, op, over, dtype, backend)
                    ]
                    axis.plot(
                        [int(row[over]) for row in chosen],
                        [max(float(row["error"]), 1e-17) for row in chosen],
                        style,
                        color=color,
                        label=f"{dtype}, {backend.removeprefix('C++ ')}",
                    )
            axis.set(xscale="log", yscale="log", xlabel=over, title=f"{layer}: {op}")
            axis.grid(alpha=0.3)
        line[0].set_ylabel("relative error")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / "numerics_sizes.png", dpi=110)
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    last = [row for row in agreements if row["backend"] == agreements[-1]["backend"]]
    lines = dict.fromkeys((row["path"], row["way"]) for row in last)
    for (path, way), color in zip(lines, colors.values(), strict=True):
        chosen = [row for row in last if (row["path"], row["way"]) == (path, way)]
        ratios, found = ([float(row[name]) for row in chosen] for name in ("ratio", "error"))
        axis.plot(ratios, [max(error, 1e-9) for error in found], "o-", color=color, label=f"{path}, {way}")
    axis.set(
        xscale="log", yscale="log", xlabel="Γ / ‖ḡ‖²", ylabel="relative error of Γ", title="Γ in float32, 64 samples"
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(IMAGES / "numerics_agreement.png", dpi=110)


if __name__ == "__main__":
    main()
