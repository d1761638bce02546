"""The CPU's ceilings, and how near each op comes to them, layer by layer.

    bound of an op = max(operations / rate of multiply-adds, bytes / bandwidth of a copy)

The rate is that of multiply-adds on registers (`ceilings.c`, compiled for this processor), in float32 as all here; the
bandwidth that of a copy, bytes read and written, of a small buffer for ops that move little and stay in caches, else of a
large one. Operations, two for each multiply-add, and bytes are `traffic`'s, by the path that the cost model chooses; symmetric
products count half. Norms with adjoints come with Σ_i G_i, as a step with a penalty takes them. Times are the best of the
rounds, in which a layer's ops take turns, and freed memory is kept as in training. More than 100 % is possible: products
with padding zeros are counted, and oneDNN leaves them out; so are those that minimal filtering saves. Torch's own three stand
beside ours.

Results are compared with plain torch's first; a wrong one is not timed. It needs a C compiler, ``cc`` or what CC names.

    python -m benchmarks.ceilings [--threads 1 2] [--rounds 9] [--csv FILE]
"""

import argparse
import ctypes
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bootgrad import planning
from bootgrad.heap import keep_freed_memory
from bootgrad.ops.convolution import ConvProduct
from bootgrad.ops.linear import LinearProduct
from bootgrad.ops.product import Product
from bootgrad.planning import ConvLayer, Layer, LinearLayer

from . import traffic
from .results import FOLDER, append, setting

MULTIPLY_ADDS = 3_000_000  # rounds of a call, 20 ms
SMALL, LARGE = 2**22, 2**28  # bytes of a buffer that is copied
CACHED = 2**24  # bytes: an op that moves no more finds them in caches
TOLERANCE = 1e-3
# By name: the op whose work `traffic` counts, and whether it is about a center. A product that is no op of ours costs what
# Σ_i w_i G_i does: the same operations, on tensors of the same sizes.
OPS = {
    "forward, torch": ("weighted_sum", False),
    "input gradient, torch": ("weighted_sum", False),
    "weight gradient, torch": ("weighted_sum", False),
    "forward": ("weighted_sum", False),
    "input gradient": ("weighted_sum", False),
    "weighted sum": ("weighted_sum", False),
    "statistics": ("statistics", False),
    "norms with adjoints": ("sq_norms_with_grad", False),
    "the same about a center": ("sq_norms_with_grad", True),
    "inner products": ("jvp", False),
}


def _conv(B: int, C: int, O: int, size: int, stride: int = 1) -> ConvLayer:  # noqa: E741 — the letters of the formulas
    return ConvLayer(B, C, (size, size), O, (3, 3), (stride, stride), (1, 1), (1, 1))


# Of the reference CNN, and of ResNet-18 on 32×32. The first one's derivatives by x are timed, too, which no training asks for.
LAYERS: tuple[Layer, ...] = (
    _conv(128, 1, 32, 28),
    _conv(128, 32, 64, 14),
    _conv(128, 64, 64, 7),
    LinearLayer(128, 1, 3136, 128),
    _conv(64, 64, 64, 32),
    _conv(64, 64, 128, 32, stride=2),
    _conv(64, 128, 128, 16),
    _conv(64, 256, 256, 8),
    _conv(64, 512, 512, 4),
)


class Ceilings(NamedTuple):
    """Operations per second, and bytes per second within caches and beyond them, of some threads together."""

    rate: float
    cached: float
    memory: float

    def seconds(self, work: traffic.Work) -> float:
        """The bound."""
        return max(work.operations / self.rate, work.bytes / (self.cached if work.bytes <= CACHED else self.memory))


@functools.cache
def compiled() -> ctypes.CDLL:
    """`ceilings.c`, for this processor."""
    source = Path(__file__).with_suffix(".c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "ceilings.so")
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CC", "cc"), *flags, str(source), "-o", str(library)], check=True)
        found = ctypes.CDLL(str(library))
    found.multiply_adds.argtypes = (ctypes.c_long, ctypes.c_float, ctypes.c_float)
    found.multiply_adds.restype = ctypes.c_float
    return found


def measure_ceilings(threads: int, rounds: int) -> Ceilings:
    """The ceilings of as many threads, which torch uses from here on.

    Raises:
        SystemExit: the multiply-adds come to a wrong sum.
    """
    torch.set_num_threads(threads)
    library = compiled()
    entries = ctypes.c_int.in_dll(library, "entries").value

    def run(_):
        return library.multiply_adds(MULTIPLY_ADDS, 0.5, 1.0)

    with ThreadPoolExecutor(threads) as pool:
        if set(pool.map(run, range(threads))) != {2.0 * entries}:  # a = a/2 + 1
            sys.exit("multiply-adds are wrong: not timed")
        seconds = best([lambda: list(pool.map(run, range(threads)))], rounds)[0]
    copies = (copy_bandwidth(size, rounds) for size in (SMALL, LARGE))
    return Ceilings(2.0 * threads * entries * MULTIPLY_ADDS / seconds, *copies)


def copy_bandwidth(size: int, rounds: int) -> float:
    """Bytes read and written per second, copying a buffer of so many bytes by torch's threads."""
    source = torch.rand(size // 4)
    target = torch.empty_like(source)
    times = max(1, LARGE // (8 * size))  # so that a small copy, too, takes milliseconds

    def run():
        for _ in range(times):
            target.copy_(source)

    return 2 * size * times / best([run], rounds)[0]


def best(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The least seconds of each call; all take turns, once without counting."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [min(taken[1:]) for taken in times]


class Case(NamedTuple):
    """A layer's product on random numbers, v of the weight's shape, and weights w of the samples."""

    product: Product
    x: Tensor
    gy: Tensor
    v: Tensor
    w: Tensor


def case(layer: Layer) -> Case:
    """Random numbers for a layer."""
    torch.manual_seed(0)
    product: Product
    if isinstance(layer, LinearLayer):
        product, x = LinearProduct(), torch.randn(layer.B, layer.T, layer.I)
        v = torch.randn(layer.O, layer.I)
    else:
        product = ConvProduct(layer.K, layer.stride, layer.padding, layer.dilation, layer.groups)
        x, v = torch.randn(layer.B, layer.C, *layer.S), torch.randn(layer.O, layer.C // layer.groups, *layer.K)
    return Case(product, x, torch.randn(product.output(x, v).shape), v, torch.rand(layer.B))


def derivative(of: Case, index: int) -> Tensor:
    """Torch's own gradient by x, 0, or by the weight, 1."""
    product, x, gy, v, _ = of
    if isinstance(product, ConvProduct):
        mask = [index == 0, index == 1, False]
        geometry = (product.stride, product.padding, product.dilation, False, [0] * len(product.stride), product.groups)
        return torch.ops.aten.convolution_backward(gy, x, v, None, *geometry, mask)[index]
    return gy @ v if index == 0 else gy.flatten(0, -2).T @ x.flatten(0, -2)


def forward(of: Case) -> Tensor:
    """Torch's own output."""
    product, x, _, v, _ = of
    if isinstance(product, ConvProduct):
        return F.conv2d(x, v, None, product.stride, product.padding, product.dilation, product.groups)
    return F.linear(x, v)


def calls(of: Case) -> dict[str, Callable[[], tuple]]:
    """What computes each of `OPS`."""
    product, x, gy, v, w = of
    everything = (True, True, True)
    return {
        "forward, torch": lambda: (forward(of),),
        "input gradient, torch": lambda: (derivative(of, 0),),
        "weight gradient, torch": lambda: (derivative(of, 1),),
        "forward": lambda: (product.output(x, v),),
        "input gradient": lambda: (product.input_grad(gy, v, x),),
        "weighted sum": lambda: (product.weight_grad(x, gy, w),),
        "statistics": lambda: product.statistics(x, gy, None)[:2],
        "norms with adjoints": lambda: product.sq_norms_with_grad(x, gy, None, everything),
        "the same about a center": lambda: product.sq_norms_with_grad(x, gy, v, everything),
        "inner products": lambda: (product.jvp(x, gy, v),),
    }


def check(layer: Layer, of: Case) -> None:
    """Stop unless ops agree with plain torch: in sums over all samples, and in what they say of the first two.

    Raises:
        SystemExit: one does not.
    """
    product, x, gy, v, w = of
    weight = v.clone().requires_grad_()
    weighted = gy * w.view(-1, *[1] * (gy.dim() - 1))
    y = product.output(x.double(), weight.double())
    total, weighted = (torch.autograd.grad(y, weight, g.double(), retain_graph=True)[0] for g in (gy, weighted))
    gx = product.input_grad(gy.double(), v.double(), x.double())
    x, gy, v = x[:2].double(), gy[:2].double(), v.double()
    G = product.rows(x, gy)

    def about(center):
        D = G - center
        pairs = list(zip(x.split(1), gy.split(1), 2 * D, strict=True))
        dx = torch.cat([product.input_grad(g, d, t) for t, g, d in pairs])
        dgy = torch.cat([product.output(t, d) for t, _, d in pairs])
        return D.flatten(1).square().sum(1), dx, dgy, total

    found = calls(of)
    for name, right in {
        "forward, torch": (y.detach(),),
        "input gradient, torch": (gx,),
        "weight gradient, torch": (total,),
        "forward": (y.detach(),),
        "input gradient": (gx,),
        "weighted sum": (weighted,),
        "statistics": (total, G.flatten(1).square().sum(1)),
        "norms with adjoints": about(0.0),
        "the same about a center": about(v),
        "inner products": ((G * v).flatten(1).sum(1),),
    }.items():
        for ours, expected in zip(found[name](), right, strict=True):
            error = (ours[: len(expected)] - expected).norm() / expected.norm()
            if not error <= TOLERANCE:
                sys.exit(f"{layer}: {name} is wrong by {error:.1e}: not timed")


def work_of(layer: Layer, name: str) -> tuple[str, traffic.Work]:
    """(path, work) of one of `OPS`; no path where there is nothing to choose."""
    stem, centered = OPS[name]
    op = ("linear_" if isinstance(layer, LinearLayer) else "conv_") + stem
    path = ""
    if stem not in ("weighted_sum", "jvp"):
        path = planning.choose_path(layer, traffic.op_purpose(op), centered, stem == "sq_norms_with_grad")
    return path, traffic.op_work(op, layer, centered, itemsize=4)


def ceiling_rows(ceilings: Ceilings) -> list[dict]:
    """A row of each ceiling."""
    copies = ((SMALL, ceilings.cached), (LARGE, ceilings.memory))
    rate = row("", "", "multiply-adds", "", ceilings.rate, None)
    return [rate, *(row("", "", f"copy of {size / 2**20:.3g} MiB", "", None, found) for size, found in copies)]


def op_rows(layer: Layer, times: Sequence[float], ceilings: Ceilings) -> list[dict]:
    """A row of each op on a layer, from the seconds that they took."""
    rows = []
    for name, seconds in zip(calls(case(layer)), times, strict=True):
        path, work = work_of(layer, name)
        found = row(str(layer), layer.B, name, path, work.operations / seconds, work.bytes / seconds)
        rows.append(
            found
            | {
                "milliseconds": f"{1e3 * seconds:.3f}",
                "percent_of_rate": f"{100 * work.operations / seconds / ceilings.rate:.0f}",
                "percent_of_bound": f"{100 * ceilings.seconds(work) / seconds:.0f}",
            }
        )
    return rows


def row(layer: str, batch: int | str, op: str, path: str, rate: float | None, bandwidth: float | None) -> dict:
    """Everything that rows of ceilings and of ops have in common."""
    gigaflops, gigabytes = ("" if v is None else f"{1e-9 * v:.1f}" for v in (rate, bandwidth))
    found = {"layer": layer, "batch": batch, "op": op, "path": path, "milliseconds": "", "gigaflops": gigaflops}
    return setting() | found | {"gigabytes_per_second": gigabytes, "percent_of_rate": "", "percent_of_bound": ""}


def show(rows: Sequence[dict]) -> None:
    """The rows of some threads as a table, layer by layer."""
    print(f"\n{rows[0]['device']}, {rows[0]['threads']} threads, {rows[0]['backend']}")
    print(f"{'':26}{'path':8}{'ms':>10}{'GFLOP/s':>9}{'GB/s':>7}{'% of rate':>11}{'% of bound':>12}")
    layer = ""
    for r in rows:
        if r["layer"] != layer:
            layer = r["layer"]
            print(f"{layer}, B = {r['batch']}")
        print(
            f"  {r['op']:24}{r['path']:8}{r['milliseconds']:>10}{r['gigaflops']:>9}{r['gigabytes_per_second']:>7}"
            f"{r['percent_of_rate']:>11}{r['percent_of_bound']:>12}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, append to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path, default=FOLDER / "ceilings.csv")
    options = parser.parse_args(argv)
    keep_freed_memory()
    for layer in LAYERS:
        check(layer, case(layer))
    for threads in options.threads:
        # The ceilings are measured beside every layer, for a shared machine has slow moments, and the best is taken, as of ops.
        found, times = [measure_ceilings(threads, options.rounds)], []
        for layer in LAYERS:
            times.append(best(list(calls(case(layer)).values()), options.rounds))
            found.append(measure_ceilings(threads, options.rounds))
        ceilings = Ceilings(*map(max, zip(*found, strict=True)))
        rows = ceiling_rows(ceilings)
        for layer, seconds in zip(LAYERS, times, strict=True):
            rows += op_rows(layer, seconds, ceilings)
        show(rows)
        append(options.csv, rows)


if __name__ == "__main__":
    main()
