"""The drawings of the documentation: `python docs/site/drawings.py` writes them all into docs/images.

Blue is a layer's input x, orange gy, the gradient by its output, green what is made of both, purple a center. Dashed outlines
are never stored. Here are the drawings of ideas; those of kernels are in `kernel_drawings`.
"""

from collections.abc import Callable
from pathlib import Path

from canvas import Canvas
from kernel_drawings import KERNELS

IMAGES = Path(__file__).parents[1] / "images"


def implicit_matrix() -> Canvas:
    """Rows of samples, blocks of layers, and one block in factored form."""
    c = Canvas(
        "The implicit matrix of per-sample gradients",
        "A matrix with a row for each of B samples and a column for each of P parameters, in blocks of layers. It "
        "is never stored. The block of sample i and one layer is a sum of outer products of gy and x, which are.",
        442,
    )
    x0, y0, cell = 100, 72, 20
    widths, gap = (96, 180, 116), 4
    c.text(x0, 34, "G: B rows, P columns, never stored", 15, bold=True)
    left = x0
    for number, width in enumerate(widths, 1):
        c.text(left + width / 2, y0 - 10, f"layer {number}", 14, "middle", "muted")
        c.frame(left, y0, width, 6 * cell)
        left += width + gap
    for row, name in ((0, "sample 1"), (3, "sample i"), (5, "sample B")):
        c.text(x0 - 10, y0 + row * cell + 15, name, 14, "end", "muted")
    c.box(x0, y0 + 3 * cell, sum(widths) + 2 * gap, cell, "green", "gᵢ, one sample's gradient", 14)
    for k, (call, meaning) in enumerate((("sq_norms()", "‖gᵢ‖²"), ("G @ v", "⟨gᵢ, v⟩"), ("G.T @ w", "Σ wᵢ gᵢ"))):
        c.text(514, y0 + 18 + k * 44, call, 14, kind="muted")
        c.text(514, y0 + 37 + k * 44, meaning, 15)
    c.arrow([(x0 + 190, y0 + 4 * cell), (x0 + 190, 222), (100, 222), (100, 250)])
    c.text(x0 + 200, 226, "its part of layer 2, a matrix of O × I", 14, kind="muted")
    c.frame(40, 256, 120, 90, "green")
    c.text(100, 306, "Gᵢ", 17, "middle")
    c.text(185, 306, "=", 18, "middle")
    c.box(210, 256, 50, 90, "orange", "gyᵢ")
    c.text(235, 366, "O × T", 14, "middle", "muted")
    c.text(278, 306, "×", 18, "middle")
    c.box(296, 276, 140, 50, "blue", "xᵢ")
    c.text(366, 346, "T × I", 14, "middle", "muted")
    c.text(100, 366, "O × I", 14, "middle", "muted")
    c.text(462, 284, "Gᵢ = Σₜ gyₜ ⊗ xₜ", 16)
    c.text(462, 308, "over T positions", 14, kind="muted")
    c.text(40, 402, "Kept: T·(I + O) numbers a sample, which backpropagation has anyway.", 15)
    c.text(40, 422, "Never kept: the O·I numbers of Gᵢ, B times.", 15)
    return c


def three_paths() -> Canvas:
    """Rank-1, direct and Gram, one above the other."""
    c = Canvas(
        "Three ways to a squared norm",
        "Rank-1: the product of two squared norms. Direct: a tile of the gradient is formed, squared, added up and "
        "forgotten. Gram: two matrices of T times T are multiplied entry by entry.",
        516,
    )
    for y, name, when in (
        (18, "rank-1", "one position"),
        (154, "direct", "many positions"),
        (342, "Gram", "few positions"),
    ):
        c.text(28, y + 22, name, 17, bold=True)
        c.text(28, y + 43, when, 14, kind="muted")
        if y > 18:
            c.line([(28, y - 8), (612, y - 8)])
    c.box(180, 34, 120, 26, "blue", "x")
    c.box(180, 76, 80, 26, "orange", "gy")
    c.arrow([(304, 47), (412, 60)])
    c.arrow([(264, 89), (412, 76)])
    c.box(418, 46, 130, 44, "green", "‖x‖² · ‖gy‖²")
    c.text(180, 130, "I + O multiply-adds", 15, kind="green")

    c.box(180, 172, 46, 100, "orange", "gy")
    c.text(203, 290, "O × T", 14, "middle", "muted")
    c.text(241, 227, "×", 17, "middle")
    c.box(256, 199, 120, 46, "blue", "U")
    c.text(316, 264, "T × I·K", 14, "middle", "muted")
    c.arrow([(382, 222), (412, 222)])
    c.frame(418, 172, 130, 100, "green")
    c.box(458, 192, 46, 40, "green", "tile")
    c.text(483, 262, "Gᵢ", 15, "middle")
    c.text(418, 290, "square, add, forget", 14, kind="muted")
    c.text(180, 316, "T·O·I·K, as the weight gradient, which is their sum", 15, kind="green")

    c.box(180, 358, 46, 66, "orange", "gy")
    c.arrow([(230, 391), (258, 391)])
    c.grid(264, 358, 4, 4, 16.5, "orange", {(r, k) for r in range(4) for k in range(r)}, "grey")
    c.text(297, 442, "gyᵀ gy", 14, "middle", "muted")
    c.text(348, 396, "∘", 20, "middle")
    c.grid(366, 358, 4, 4, 16.5, "blue", {(r, k) for r in range(4) for k in range(r)}, "grey")
    c.text(399, 442, "U Uᵀ", 14, "middle", "muted")
    c.arrow([(466, 391), (438, 391)])
    c.box(470, 358, 46, 66, "blue", "U")
    c.text(536, 386, "add up all", 14)
    c.text(536, 404, "products", 14)
    c.text(180, 474, "T²·(I·K + O)/2, half by symmetry; by pixels", 15, kind="green")
    c.text(180, 496, "T²·O/2 + N²·C/2 + T²·K/2", 15, kind="green")
    return c


def centers() -> Canvas:
    """What Reg1 and Reg2 measure, and where a center may be."""
    c = Canvas(
        "Centers, and what is measured from them",
        "Left, Reg1: the mean squared length from a center c to every sample's gradient. Right, Reg2: the squared "
        "length from c to their mean. A center of the past is an average of earlier mini-batches' means.",
        392,
    )
    points = [(66, 96), (102, 58), (140, 118), (176, 70), (206, 138), (120, 168), (178, 180)]
    mean = tuple(sum(v) / len(points) for v in zip(*points, strict=True))
    at = (226, 246)
    for dx, name, formula in ((0, "Reg1", "mean of ‖gᵢ − c‖²"), (320, "Reg2", "‖ḡ − c‖²")):
        c.text(30 + dx, 34, name, 16, bold=True)
        c.text(86 + dx, 34, formula, 15, kind="muted")
        center = at[0] + dx, at[1]
        if not dx:
            for point in points:
                c.line([point, center], "purple")
        for x, y in points:
            c.dot(x + dx, y, "grey" if dx else "green")
        if dx:
            c.line([(mean[0] + dx, mean[1]), center], "purple")
            c.dot(mean[0] + dx, mean[1], "green", 7)
            c.text(mean[0] + dx - 12, mean[1] + 8, "ḡ", 16, "end")
        c.dot(*center, "purple", 7)
        c.text(center[0] + 12, center[1] + 8, "c", 16)
    c.text(40, 86, "gᵢ", 16)
    for k, (x, y) in enumerate(((598, 182), (606, 232), (572, 282), (508, 290))):
        c.dot(x, y, "orange", 4)
        if k:
            c.line([((598, 606, 572)[k - 1], (182, 232, 282)[k - 1]), (x, y)], "orange", dashed=True)
    c.text(472, 318, "earlier means, whose", 14, "start", "muted")
    c.text(472, 336, "average c may be", 14, "start", "muted")
    c.line([(320, 20), (320, 340)])
    c.text(30, 318, "c = ḡ: Reg1 is Γ", 14, kind="muted")
    c.text(30, 336, "c = 0: Reg1 is the mean of ‖gᵢ‖²", 14, kind="muted")
    c.text(30, 374, "Any other c is known before the step and constant in it: ema, window, full, or given.", 14)
    return c


# Units of a step in a layer of each path: (name, forward and δ, back through both, ΣG and ḡ, norms' visit, center's products).
STEPS = (
    ("plain", (2, 0, 1, 0, 0), (2, 0, 1, 0, 0)),
    ("rec.backward", (2, 0, 1, 0, 0), (2, 0, 0, 1, 0)),
    ("reg1 zero", (2, 4, 1, 0, 0), (2, 4, 0, 3, 0)),
    ("reg1 ema", (2, 4, 1, 0, 2), (2, 4, 0, 3, 0)),
    ("reg1 batch_mean", (2, 4, 1, 0, 2), (2, 4, 1, 3, 0)),
    ("reg2 ema", (2, 4, 1, 0, 2), (2, 4, 0, 1, 2)),
)
_PARTS = (
    ("grey", "forward, δ"),
    ("orange", "back through both"),
    ("blue", "Σ Gᵢ, ḡ"),
    ("green", "tiles of Gᵢ, used"),
    ("purple", "center or direction × x, gy"),
)


def step_cost() -> Canvas:
    """Steps as rows of unit blocks, for a layer of rank one and one by tiles."""
    c = Canvas(
        "What a step costs, in forward-sized products",
        "Rows of unit blocks. A plain step has 3. With rank-1 norms, statistics have 3, Reg1 about zero 7, about a "
        "moving average or the batch mean 9. With tiles: 3, 9, 9 and 10. Reg2 has 9 both ways.",
        506,
    )
    unit, x0, h = 34, 216, 22
    c.text(x0, 28, "one block: one forward-sized product of a layer", 14, kind="muted")
    for k, (name, *both) in enumerate(STEPS):
        y = 44 + k * 66
        c.text(24, y + 32, name, 15, bold=True)
        for j, (path, parts) in enumerate(zip(("rank-1", "tiles"), both, strict=True)):
            top, left = y + j * (h + 6), x0
            c.text(x0 - 8, top + 16, path, 13, "end", "muted")
            for (colour, _), count in zip(_PARTS, parts, strict=True):
                for _ in range(count):
                    c.box(left, top, unit - 3, h, colour)
                    left += unit
            c.text(left + 8, top + 16, str(sum(parts)), 15)
    for k, (colour, meaning) in enumerate(_PARTS):
        x, y = ((24, 190, 400)[k % 3], 448 + k // 3 * 28)
        c.box(x, y, 18, 18, colour)
        c.text(x + 26, y + 14, meaning, 14)
    return c


def recording() -> Canvas:
    """A recorded operation, forward and backward."""
    c = Canvas(
        "A recorded operation",
        "Forward: the mode sees a call that is handed a parameter, and runs an operation of its own, with a row of "
        "zeros called a probe as a further input. Backward: the operation returns the usual gradients, and squared "
        "norms as the probe's gradient.",
        382,
    )
    c.text(28, 36, "forward", 16, bold=True)
    c.box(28, 56, 104, 34, "blue", "x")
    c.box(28, 102, 104, 34, "grey", "W, parameter", 14)
    c.box(28, 148, 104, 34, "green", "probe, zeros", 14)
    for y in (73, 119, 165):
        c.arrow([(136, y), (214, y)])
    c.box(220, 56, 176, 126, "grey", "F.linear(x, W),\nseen by the mode,\nrun as an operation\nthat keeps x", 14)
    c.arrow([(400, 119), (438, 119)])
    c.box(444, 102, 62, 34, "grey", "y")
    c.arrow([(510, 119), (538, 119)])
    c.box(544, 102, 68, 34, "grey", "losses")
    c.text(444, 158, "its edge is kept,", 14, kind="muted")
    c.text(444, 176, "not the tensor", 14, kind="muted")
    c.line([(28, 202), (612, 202)])
    c.text(28, 232, "backward", 16, bold=True)
    c.box(544, 274, 68, 34, "grey", "Σ ℓᵢ")
    c.arrow([(540, 291), (512, 291)])
    c.box(444, 274, 62, 34, "orange", "gy")
    c.arrow([(440, 291), (402, 291)])
    c.box(220, 248, 176, 86, "grey", "one visit of (x, gy),\nby the planned path", 14)
    for k, (colour, name) in enumerate(
        (("blue", "gradient of x"), ("grey", "of W: Σ Gᵢ"), ("green", "of probe: ‖Gᵢ‖²"))
    ):
        y = 246 + k * 32
        c.box(28, y, 134, 26, colour, name, 14)
        c.arrow([(216, y + 13), (168, y + 13)])
    c.text(28, 360, ".grad and the norms come out of the same pass.", 15)
    return c


DRAWINGS: dict[str, Callable[[], Canvas]] = {
    "implicit-matrix": implicit_matrix,
    "three-paths": three_paths,
    "centers": centers,
    "step-cost": step_cost,
    "recording": recording,
    **KERNELS,
}


def main() -> None:
    """Write all drawings."""
    for name, draw in DRAWINGS.items():
        (IMAGES / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
