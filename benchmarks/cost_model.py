"""The cost model against the clock: predicted and measured time of every path over 40 layer shapes.

Each shape is timed for both purposes that steps have, ``statistics`` and ``grad``, by the path that the model chooses and by
the other one, all taking turns, shape by shape. Results of the two paths are compared before either is timed. Predicted
times are in multiply-adds; what is judged is their order (Spearman's rank correlation), how far the ratio of measured to
predicted time strays from its geometric mean, how often the chosen path was the quicker one, and what a wrong choice cost.
A path that is predicted to take more than `HOPELESS` times as long as the other one is not timed.

    python -m benchmarks.cost_model [--threads 2] [--rounds 9] [--csv FILE]
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bootgrad import planning
from bootgrad.costs import op_time
from bootgrad.ops.convolution import ConvProduct
from bootgrad.ops.linear import LinearProduct
from bootgrad.planning import ConvLayer, Layer, LinearLayer

from .results import FOLDER, append, setting

PURPOSES = ("statistics", "grad")
HOPELESS = 12.0
MULTIPLY_ADDS = 1.5e8  # of the forward product, by which a shape's batch is chosen
LINEARS = (
    ((1, 10, 10), (1, 256, 256), (1, 3136, 128), (1, 1024, 4096)),
    (
        (4, 512, 512),
        (16, 256, 1024),
        (49, 384, 384),
        (128, 64, 256),
        (196, 192, 192),
        (512, 128, 128),
    ),
)
# Channels in, out, image, kernel, stride, padding, dilation, groups.
CONVOLUTIONS = {
    "1×1": ((64, 128, 7, 1), (256, 64, 14, 1), (512, 512, 4, 1), (16, 96, 56, 1)),
    "3×3": (
        (3, 32, 32, 3, 1, 1),
        (16, 16, 56, 3, 1, 1),
        (64, 64, 28, 3, 1, 1),
        (64, 64, 14, 3, 1, 1),
        (64, 64, 7, 3, 1, 1),
        (256, 256, 8, 3, 1, 1),
        (512, 512, 4, 3, 1, 1),
    ),
    "5×5": ((3, 16, 28, 5, 1, 2), (32, 32, 14, 5, 1, 2), (128, 128, 7, 5, 1, 2)),
    "strided": ((3, 64, 56, 7, 2, 3), (64, 128, 28, 3, 2, 1), (64, 128, 14, 1, 2), (256, 512, 8, 3, 2, 1)),
    "grouped": (
        (64, 64, 28, 3, 1, 1, 1, 4),
        (64, 64, 14, 3, 1, 1, 1, 4),
        (256, 256, 8, 3, 1, 1, 1, 32),
        (512, 512, 4, 3, 1, 1, 1, 8),
    ),
    "depthwise": (
        (32, 32, 28, 3, 2, 1, 1, 32),
        (128, 128, 14, 3, 1, 1, 1, 128),
        (64, 64, 56, 3, 1, 1, 1, 64),
        (512, 512, 7, 5, 1, 2, 1, 512),
        (512, 512, 4, 3, 1, 1, 1, 512),
    ),
    "dilated": ((32, 32, 28, 3, 1, 2, 2), (64, 64, 14, 3, 1, 2, 2), (256, 256, 8, 3, 1, 4, 4)),
}


def shapes() -> list[tuple[str, Layer]]:
    """(family, layer) of all 40."""
    found: list[tuple[str, Layer]] = [
        (family, LinearLayer(_batch(T * inputs * outputs), T, inputs, outputs))
        for family, linears in zip(("linear T = 1", "linear"), LINEARS, strict=True)
        for T, inputs, outputs in linears
    ]
    for family, convolutions in CONVOLUTIONS.items():
        for C, O, S, *rest in convolutions:  # noqa: E741 — the letters of the formulas
            kernel, stride, padding, dilation, groups = (*rest, *(1, 1, 0, 1, 1)[len(rest) :])
            geometry = ((v,) * 2 for v in (kernel, stride, padding, dilation))
            one = ConvLayer(1, C, (S, S), O, *geometry, groups)
            found.append((family, ConvLayer(_batch(one.forward_operations), *tuple(vars(one).values())[1:])))
    return found


def _batch(multiply_adds: float) -> int:
    return max(4, min(128, round(MULTIPLY_ADDS / multiply_adds)))


def calls(layer: Layer) -> dict[tuple[str, str], Callable[[], tuple]]:
    """What computes each purpose by each path on random numbers: (‖G_i‖², …) of it comes first."""
    torch.manual_seed(0)
    if isinstance(layer, LinearLayer):
        x, gy = torch.randn(layer.B, layer.T, layer.I), torch.randn(layer.B, layer.T, layer.O)
    else:
        x, weight = torch.randn(layer.B, layer.C, *layer.S), torch.empty(layer.O, layer.C // layer.groups, *layer.K)
        conv = ConvProduct(layer.K, layer.stride, layer.padding, layer.dilation, layer.groups)
        gy = torch.randn(conv.output(x, weight).shape)
    ops, mask = torch.ops.bootgrad, [True, True, False]
    if layer.paths == ("rank1",):
        linear = LinearProduct()
        return {
            ("statistics", "rank1"): lambda: linear.statistics(x, gy, None)[1:],
            ("grad", "rank1"): lambda: linear.sq_norms_with_grad(x, gy, None, tuple(mask)),
        }
    kind, geometry = "linear", ()
    if isinstance(layer, ConvLayer):
        kind, geometry = "conv", (layer.K, layer.stride, layer.padding, layer.dilation, layer.groups)
    first_order, second_order = getattr(ops, f"{kind}_statistics"), getattr(ops, f"{kind}_sq_norms_with_grad")
    found: dict[tuple[str, str], Callable[[], tuple]] = {}
    for path in layer.paths:
        found["statistics", path] = lambda path=path: first_order(x, gy, None, *geometry, path)[1:]
        found["grad", path] = lambda path=path: second_order(x, gy, None, *geometry, path, mask)
    return found


def measure(layer: Layer, rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds by (purpose, path), of the paths that are worth timing.

    Raises:
        SystemExit: two paths disagree.
    """
    timed = calls(layer)
    for purpose in PURPOSES:
        best = min(planning.cost(layer, path, purpose).time for path in layer.paths)
        for path in layer.paths:
            if planning.cost(layer, path, purpose).time > HOPELESS * best:
                del timed[purpose, path]
    norms = {key: call()[0] for key, call in timed.items()}
    first = next(iter(norms.values()))
    for key, s in norms.items():
        if not torch.allclose(s, first, rtol=1e-3):
            sys.exit(f"{layer}: {key} gives other norms: not timed")
    times: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    for _ in range(rounds):
        for key, call in timed.items():
            start = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in times.items()}


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, of values without ties."""
    ranks = [[sorted(values).index(v) for v in values] for values in (a, b)]
    n, squares = len(a), sum((p - q) ** 2 for p, q in zip(*ranks, strict=True))
    return 1 - 6 * squares / (n * (n * n - 1))


def summary(rows: Sequence[dict]) -> list[str]:
    """What the rows say, in lines: all, and each family's geometric mean of measured to predicted time over all."""
    lines = []
    for chosen, title in ((True, "chosen paths"), (False, "all paths")):
        of = [row for row in rows if row["chosen"] == "yes" or not chosen]
        predicted, found = ([float(row[k]) for row in of] for k in ("predicted", "microseconds"))
        ratios = _relative(predicted, found)
        worst = max(range(len(of)), key=lambda k: abs(math.log(ratios[k])))
        lines.append(
            f"{title}: rank correlation {rank_correlation(predicted, found):.3f} over {len(of)}, worst ratio "
            f"{ratios[worst]:.2f} ({of[worst]['layer']}, {of[worst]['purpose']}, {of[worst]['path']})"
        )
    for purpose in PURPOSES:
        pairs = _pairs([row for row in rows if row["purpose"] == purpose])
        losses = [chosen / other for chosen, other in pairs if other]
        wrong = [loss for loss in losses if loss > 1]
        lost = math.exp(sum(map(math.log, wrong)) / len(pairs))
        lines.append(
            f"{purpose}: the choice was the quicker one of {len(losses) - len(wrong)} of {len(losses)} pairs that were timed "
            f"({len(pairs)} shapes); wrong ones cost {lost:.3f} over all shapes, {max(wrong, default=1.0):.2f} at worst"
        )
    ratios = _relative([float(row["predicted"]) for row in rows], [float(row["microseconds"]) for row in rows])
    of_family: dict[tuple[str, str, str], list[float]] = {}
    for row, ratio in zip(rows, ratios, strict=True):
        of_family.setdefault((row["family"], row["purpose"], row["path"]), []).append(ratio)
    lines += [
        f"{family:14}{purpose:12}{path:8}{math.exp(sum(map(math.log, values)) / len(values)):6.2f}"
        f"  ({min(values):.2f}–{max(values):.2f}, {len(values)})"
        for (family, purpose, path), values in of_family.items()
    ]
    return lines


def _relative(predicted: Sequence[float], found: Sequence[float]) -> list[float]:
    """Measured over predicted times, over their geometric mean."""
    logs = [math.log(f / p) for p, f in zip(predicted, found, strict=True)]
    return [math.exp(v - sum(logs) / len(logs)) for v in logs]


def _pairs(rows: Sequence[dict]) -> list[tuple[float, float | None]]:
    """(chosen, other) microseconds by layer, None where there is no other."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        times.setdefault((row["family"], row["layer"]), {})[row["chosen"]] = float(row["microseconds"])
    return [(found["yes"], found.get("no")) for found in times.values()]


def main() -> None:
    """Measure, append the rows, print what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path, default=FOLDER / "cost_model.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for family, layer in shapes():
        for (purpose, path), seconds in measure(layer, options.rounds).items():
            rows.append(
                setting()
                | {
                    "family": family,
                    "layer": str(layer),
                    "batch": layer.B,
                    "purpose": purpose,
                    "path": path,
                    "chosen": "yes" if path == planning.choose_path(layer, purpose) else "no",
                    "predicted": f"{op_time(layer, path, purpose):.4g}",
                    "microseconds": f"{1e6 * seconds:.1f}",
                }
            )
    append(options.csv, rows)
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
