"""Drawings of what kernels do with their operands: tiles, windows, passes. Colours as in `drawings`."""

from collections.abc import Callable

from canvas import Canvas


def micro_kernel() -> Canvas:
    """The register tile of every matrix product on CPUs."""
    c = Canvas(
        "The micro-kernel of the CPU's products",
        "A tile of 6 rows by 4 vectors is held in registers. A's numbers are found by the sum of two offsets and "
        "broadcast, B's rows are vectors. When the sum is complete an epilogue uses the tile where it is.",
        392,
    )
    c.text(28, 36, "C[m, n] = Σₖ a[row[m] + depth[k]] · b[k, n]", 16, bold=True)
    c.box(28, 112, 148, 132, "blue", "A: patches of x,\nread in place", 14)
    c.text(102, 264, "row[m] + depth[k]", 14, "middle", "muted")
    c.text(102, 284, "two short tables", 14, "middle", "muted")
    for k in range(4):
        c.box(250 + k * 52, 60, 46, 30, "orange", f"b{'₀₁₂₃'[k]}")
    c.text(466, 72, "row k of B, gy:", 14, kind="muted")
    c.text(466, 90, "4 vectors", 14, kind="muted")
    c.arrow([(180, 178), (240, 178)])
    c.text(210, 168, "broadcast", 13, "middle", "muted")
    for row in range(6):
        for k in range(4):
            c.box(250 + k * 52, 112 + row * 22, 46, 18, "green")
    c.arrow([(352, 92), (352, 108)])
    c.text(466, 130, "6 × 4 vectors stay in", 14, kind="muted")
    c.text(466, 148, "registers while k runs", 14, kind="muted")
    c.line([(352, 248), (352, 292)], "ink")
    _share(c, 292, 306)
    c.text(368, 276, "the sum is complete: an epilogue", 14, kind="muted")
    for k, name in enumerate(("store it", "square it", "take c off, square", "add it to Σ wᵢGᵢ")):
        c.box(28 + k * 148, 308, 140, 30, "grey", name, 14)
    c.text(28, 372, "AVX-512, float32: vectors of 16, tiles of 9 × 1 to 6 × 4. AVX2: vectors of 8, 6 × 2.", 14)
    return c


def direct_path() -> Canvas:
    """A tile of G_i, walking along positions and then samples."""
    c = Canvas(
        "The direct path",
        "A tile of a sample's gradient is summed over its positions, block by block. At the sample's end it is "
        "squared, with and without the center, added to the weight gradient, kept if derivatives are wanted, and "
        "forgotten; then comes the next sample.",
        454,
    )
    c.text(28, 36, "One tile of Gᵢ, all of a sample's positions", 16, bold=True)
    c.grid(28, 70, 3, 10, 22, "orange", {(1, k) for k in range(3, 5)}, "green")
    c.text(28, 62, "gyᵢ: O × T", 14, kind="muted")
    c.grid(28, 172, 4, 10, 22, "blue", {(2, k) for k in range(3, 5)}, "green")
    c.text(28, 164, "Uᵢ: I·K × T", 14, kind="muted")
    c.arrow([(50, 280), (246, 280)])
    c.text(28, 302, "BLOCK_T positions at a time", 14, kind="muted")
    c.frame(340, 70, 176, 190, "green")
    c.text(528, 88, "Gᵢ:", 14, kind="muted")
    c.text(528, 106, "O × I·K", 14, kind="muted")
    c.box(384, 122, 74, 66, "green", "tile, in\nregisters", 14)
    c.arrow([(254, 103), (378, 138)])
    c.arrow([(254, 226), (378, 172)])
    c.line([(421, 192), (421, 314)], "ink")
    _share(c, 314, 328)
    c.text(434, 290, "at the end of each sample", 14, kind="muted")
    names = (
        "square it:\n‖Gᵢ‖²",
        "take c off,\nsquare it",
        "add wᵢ times it\nto Σ wᵢGᵢ",
        "keep D = Gᵢ − c\nfor two products",
    )
    for k, name in enumerate(names):
        c.box(28 + k * 148, 332, 140, 50, ("green", "purple", "green", "grey")[k], name, 14)
    c.text(28, 412, "The two products are ∂s/∂gy = 2 D ∗ x and ∂s/∂x = 2 Dᵀ ∗ gy. With another", 14)
    c.text(28, 432, "input h in the place of x or gy they are the ops conv_applied and conv_displaced.", 14)
    return c


def pixel_gram() -> Canvas:
    """Shifted windows of the pixel Gram add up to the patch Gram."""
    c = Canvas(
        "The pixel Gram",
        "The products of all pairs of pixels are made once. The products of all pairs of patches are sums of that "
        "matrix, shifted once for each kernel position, and are multiplied entry by entry with those of gy.",
        438,
    )
    c.text(28, 36, "(U Uᵀ)[t, t′] = Σₖ P[t + k, t′ + k]", 16, bold=True)
    cell, n = 18, 9
    windows = {(r, r2) for r in range(1, 8) for r2 in range(1, 8)}
    c.text(28, 68, "P = X Xᵀ over pixels, N × N", 14, kind="muted")
    c.grid(28, 78, n, n, cell, "blue")
    for shift, colour in ((0, "purple"), (1, "green"), (2, "orange")):
        c.frame(28 + shift * cell, 78 + shift * cell, 7 * cell, 7 * cell, colour)
    c.text(28, 262, "K windows, each shifted", 14, kind="muted")
    c.text(28, 280, "along the diagonal", 14, kind="muted")
    c.arrow([(198, 159), (252, 159)])
    c.text(225, 150, "add up", 14, "middle", "muted")
    lower = {(r, k) for r, k in ((r - 1, k - 1) for r, k in windows) if k < r}
    c.grid(260, 96, 7, 7, cell, "green", lower, "grey")
    c.text(323, 242, "U Uᵀ, T × T", 14, "middle", "muted")
    c.text(402, 165, "∘", 20, "middle")
    c.grid(420, 96, 7, 7, cell, "orange", lower, "grey")
    c.text(483, 242, "gyᵀ gy, T × T", 14, "middle", "muted")
    c.text(562, 156, "Σ = ‖Gᵢ‖²", 15)
    c.text(260, 280, "grey: the mirror image, counted and not made", 14, kind="muted")
    c.line([(28, 300), (612, 300)])
    c.text(28, 326, "Derivatives, with the same matrices:", 15, bold=True)
    c.box(28, 340, 280, 34, "green", "∂s/∂gy = 2 (U Uᵀ) gy", 15)
    c.box(328, 340, 284, 34, "blue", "∂s/∂x = 2 Q x", 15)
    c.text(28, 400, "Q[p, p′] = Σₖ (gyᵀ gy)[p − k, p′ − k]: the sum of windows, gone back.", 14)
    c.text(28, 420, "For a linear layer pixels are positions: U Uᵀ is P, and Q is gyᵀ gy.", 14)
    return c


def planes() -> Canvas:
    """Vectors along positions of padded planes, where a tap is a shift."""
    c = Canvas(
        "Positions in vectors",
        "A plane of x with margins of zeros lies in one line. A kernel position is one shift of that line for all "
        "outputs, so a vector of neighbouring outputs is a sum of shifted vectors, each times one weight.",
        372,
    )
    c.text(28, 36, "A tap is one shift of a padded plane", 16, bold=True)
    cell = 24
    inside = {(r, k) for r in range(1, 5) for k in range(1, 7)}
    c.grid(28, 58, 6, 8, cell, "grey", inside, "blue")
    c.text(28, 222, "a plane of x, margins of zeros", 14, kind="muted")
    c.frame(28, 58 + 2 * cell, 4 * cell, cell, "green")
    c.frame(28 + 2 * cell, 58 + 3 * cell, 4 * cell, cell, "orange")
    c.text(262, 78, "y[o, p …] = Σ over c and k of", 15)
    taps = (104, "green", "W[o, c, 3]", "x[c, p + 8 …]"), (144, "orange", "W[o, c, 8]", "x[c, p + 18 …]")
    for y, colour, weight, name in taps:
        c.box(262, y, 92, 28, "grey", weight, 14)
        c.text(368, y + 20, "×", 16, "middle")
        c.box(382, y, 150, 28, colour, name, 14)
    c.text(546, 148, "+ …", 16)
    c.text(262, 198, "here p = 8, in lines of 8; vectors of outputs", 14, kind="muted")
    c.text(262, 216, "that are neighbours, as they lie in memory", 14, kind="muted")
    c.line([(28, 244), (612, 244)])
    c.text(28, 272, "Stride 2: planes of pixels that agree modulo the stride", 15, bold=True)
    pairs = (("blue", "orange"), ("green", "purple"))
    odd = {(0, k) for k in range(1, 10, 2)}
    for row in range(4):
        even_columns, odd_columns = pairs[row % 2]
        c.grid(28, 286 + row * 18, 1, 10, 18, even_columns, odd, odd_columns)
    c.arrow([(216, 322), (250, 322)])
    for row, pair in enumerate(pairs):
        for k, colour in enumerate(pair):
            c.grid(260 + k * 102, 290 + row * 34, 2, 5, 15, colour)
    c.text(470, 308, "again a tap is one", 14, kind="muted")
    c.text(470, 326, "shift, in one of the", 14, kind="muted")
    c.text(470, 344, "four planes", 14, kind="muted")
    return c


def winograd() -> Canvas:
    """A tile of 2×2 outputs by 16 products."""
    c = Canvas(
        "Minimal filtering of 3×3 kernels",
        "Four by four pixels and three by three weights are transformed by additions to sixteen numbers each. "
        "Sixteen products, summed over channels, are transformed to two by two outputs, which otherwise take "
        "thirty-six.",
        368,
    )
    c.text(28, 36, "Y = Aᵀ [ (G g Gᵀ) ∘ (Bᵀ d B) ] A", 16, bold=True)
    c.grid(28, 76, 4, 4, 22, "blue")
    c.text(28, 68, "d, 4 × 4 pixels", 14, kind="muted")
    c.grid(39, 206, 3, 3, 22, "grey")
    c.text(28, 198, "g, 3 × 3 taps", 14, kind="muted")
    for y, name in ((120, "Bᵀ d B"), (239, "G g Gᵀ")):
        c.arrow([(126, y), (206, y)])
        c.text(166, y - 8, name, 14, "middle", "muted")
    c.text(166, 142, "adds", 13, "middle", "muted")
    c.text(166, 261, "adds, halves", 13, "middle", "muted")
    c.grid(216, 76, 4, 4, 22, "blue")
    c.grid(216, 195, 4, 4, 22, "grey")
    c.text(328, 184, "∘", 20, "middle")
    c.arrow([(310, 130), (372, 168)])
    c.arrow([(310, 229), (372, 190)])
    c.grid(380, 135, 4, 4, 22, "green")
    c.text(424, 246, "16 products,", 14, "middle", "muted")
    c.text(424, 264, "summed over channels", 14, "middle", "muted")
    c.arrow([(474, 179), (536, 179)])
    c.text(505, 171, "Aᵀ · A", 14, "middle", "muted")
    c.grid(546, 157, 2, 2, 22, "green")
    c.text(568, 224, "Y, 2 × 2", 14, "middle", "muted")
    c.text(28, 312, "Each of the 16 places is one matrix product over channels, for a run of tiles.", 14)
    c.text(28, 332, "Plainly the four outputs take 36 products for each channel: 16/36 = 4/9.", 14)
    c.text(28, 352, "Neighbouring tiles of d overlap by two pixels.", 14)
    return c


def one_read() -> Canvas:
    """Sums at the speed of memory: partial sums in a fixed order."""
    c = Canvas(
        "One read, and sums in a fixed order",
        "Programs read runs of numbers block by block. Every column of the block has its own partial sum. Partial "
        "sums are written, and a second kernel adds them in their order.",
        330,
    )
    c.text(28, 36, "Bound by memory: one read, sums in a fixed order", 16, bold=True)
    for k, colour in enumerate(("blue", "blue", "orange", "orange")):
        y = 62 + k * 38
        c.grid(28, y, 1, 12, 26, colour)
        c.arrow([(344, y + 13), (384, y + 13)])
        c.grid(392, y, 1, 4, 26, "green")
        c.arrow([(500, y + 13), (536, y + 13)])
        c.dot(552, y + 13, "green", 6)
    c.text(28, 228, "a row, or a run of one: a", 14, kind="muted")
    c.text(28, 246, "program each, a block at a time", 14, kind="muted")
    c.text(444, 228, "a sum for each", 14, "middle", "muted")
    c.text(444, 246, "place in the block", 14, "middle", "muted")
    c.text(560, 228, "a partial", 14, "middle", "muted")
    c.arrow([(560, 236), (560, 276)])
    c.text(28, 294, "No atomic additions: a second kernel adds the partial sums", 14)
    c.text(28, 312, "in their order, so that the same numbers give the same bits.", 14)
    c.box(508, 282, 104, 30, "green", "result")
    return c


def embedding() -> Canvas:
    """Look-ups of one token are added up, and their sums squared."""
    c = Canvas(
        "Norms of an embedding's gradients",
        "A sample's look-ups are brought together by token, rows of gy with one token are added up, and the sums "
        "are squared. Nothing is of the size of the table.",
        346,
    )
    c.text(28, 36, "‖Eᵢ‖² = Σ over tokens v of ‖ Σ of gy where the token is v ‖²", 16, bold=True)
    tokens = (7, 3, 7, 9, 3, 7)
    colours = {7: "blue", 3: "orange", 9: "purple"}
    c.text(28, 70, "look-ups", 14, kind="muted")
    c.text(84, 292, "gy, D columns", 14, kind="muted")
    c.text(280, 70, "by token", 14, kind="muted")
    for k, token in enumerate(tokens):
        c.box(28, 80 + k * 32, 40, 26, colours[token], str(token), 14)
        c.grid(78, 84 + k * 32, 1, 6, 18, colours[token])
    order = sorted(range(6), key=lambda k: (tokens.index(tokens[k]), k))
    for k, source in enumerate(order):
        token = tokens[source]
        y = 80 + k * 32
        c.line([(192, 93 + source * 32), (272, y + 13)], colours[token])
        c.grid(280, y + 4, 1, 6, 18, colours[token])
    for first, count, token in ((0, 3, 7), (3, 2, 3), (5, 1, 9)):
        y = 93 + (first + (count - 1) / 2) * 32
        c.arrow([(394, y), (430, y)])
        c.grid(438, y - 9, 1, 6, 18, colours[token])
        c.text(556, y + 5, "square", 14)
    c.text(438, 292, "their sums", 14, kind="muted")
    c.text(28, 328, "Groups are found by hashing (CPU) or by sorting (Triton). gy is read once.", 14)
    return c


def group_norm() -> Canvas:
    """Two passes over one group, which stays on the chip between them."""
    c = Canvas(
        "Group norm backward, and its adjoint",
        "One group of one sample is read from memory once. A first pass makes sums, from which the means are known;"
        " a second pass over the group, which is still in cache or in registers, makes the results.",
        342,
    )
    c.text(28, 36, "One group of one sample, read once", 16, bold=True)
    c.text(28, 66, "memory", 14, kind="muted")
    for k, (colour, name) in enumerate((("blue", "x"), ("orange", "gy"), ("purple", "u"))):
        c.box(28, 76 + k * 44, 120, 34, colour, name)
    c.text(28, 224, "u in the adjoint alone", 14, kind="muted")
    c.arrow([(154, 137), (196, 137)])
    c.frame(204, 54, 268, 158)
    c.text(338, 232, "cache of a core, or registers", 14, "middle", "muted")
    c.box(220, 72, 236, 48, "grey", "first pass: Σ gy, Σ gy x̂,\nand Σ u, Σ u x̂, Σ u gy", 14)
    c.arrow([(338, 124), (338, 144)])
    c.box(220, 150, 236, 48, "green", "second pass: r P(γ gy),\nor the two of the adjoint", 14)
    c.arrow([(476, 96), (508, 96)])
    c.text(514, 92, "rows of γ, β", 14)
    c.text(514, 110, "for each sample", 14, kind="muted")
    c.arrow([(476, 174), (508, 174)])
    c.text(514, 170, "gradient by x,", 14)
    c.text(514, 188, "and by gy", 14, kind="muted")
    c.text(28, 270, "P(w) = w − mean(w) − x̂ mean(w x̂), means over the group", 15)
    c.text(28, 302, "Backward: 2 reads and 1 write of an entry. Adjoint: 3 reads and 2 writes.", 14)
    c.text(28, 322, "With a ReLU behind the norm its output is read, too: gy counts where that is above 0.", 14)
    return c


def attention() -> Canvas:
    """A block of queries against all keys of a head, four tiles in cache."""
    c = Canvas(
        "Attention's second derivative",
        "A head's queries are taken in blocks. For a block, four matrices of queries by keys are made by products, "
        "changed in place by sweeps over rows, multiplied again, and never leave the cache.",
        392,
    )
    c.text(28, 36, "One head, a block of queries at a time", 16, bold=True)
    for k in range(5):
        c.box(28, 74 + k * 34, 84, 28, "blue" if k == 1 else "grey", "18 or more" if k == 1 else "", 13)
    c.text(28, 262, "queries: Q,", 14, kind="muted")
    c.text(28, 280, "u_Q and gO", 14, kind="muted")
    c.arrow([(116, 122), (150, 122)])
    c.text(160, 66, "keys, all of them: K, V, u_K, u_V", 14, kind="muted")
    for k in range(8):
        c.box(160 + k * 36, 74, 32, 22, "blue")
    for k, name in enumerate(("scores, then P", "T, then P′", "A, then gS", "gO u_Vᵀ, then hS")):
        c.box(160, 110 + k * 38, 284, 32, "green", name)
    c.text(456, 132, "4 tiles in cache:", 14, kind="muted")
    c.text(456, 150, "five products make", 14, kind="muted")
    c.text(456, 168, "them, three sweeps", 14, kind="muted")
    c.text(456, 186, "change them, and", 14, kind="muted")
    c.text(456, 204, "seven products use", 14, kind="muted")
    c.text(456, 222, "them", 14, kind="muted")
    c.arrow([(302, 262), (302, 296)])
    names = ("by gO: block", "by q: block", "by k: Σ blocks", "by v: Σ blocks")
    for k, name in enumerate(names):
        c.box(28 + k * 148, 302, 140, 30, "grey", name, 14)
    c.text(28, 358, "No matrix of all queries by all keys is written to memory. Under a causal mask", 14)
    c.text(28, 376, "the keys behind a block's last query are left out.", 14)
    return c


def max_pool() -> Canvas:
    """A vector of neighbouring windows at a time."""
    c = Canvas(
        "Max pooling",
        "A vector holds the same place of neighbouring windows. Comparing place after place leaves the maxima and "
        "where they are, which both adjoints read.",
        322,
    )
    c.text(28, 36, "A vector of neighbouring windows, place by place", 16, bold=True)
    cell = 26
    c.grid(28, 62, 4, 12, cell, "blue", {(0, k) for k in range(0, 12, 2)}, "orange")
    for k in range(6):
        c.frame(28 + 2 * k * cell + 2, 64, 2 * cell - 4, 2 * cell - 4, "green")
    c.text(28, 188, "x, windows of 2 × 2, stride 2;", 14, kind="muted")
    c.text(28, 206, "orange: one place of all windows", 14, kind="muted")
    c.arrow([(346, 88), (386, 88)])
    c.text(394, 68, "larger, or NaN: take it", 14, kind="muted")
    c.grid(394, 78, 1, 6, 26, "green")
    c.text(394, 124, "maximum", 14, kind="muted")
    c.grid(394, 136, 1, 6, 26, "grey")
    c.text(394, 182, "and where it is", 14, kind="muted")
    c.line([(28, 226), (612, 226)])
    c.box(28, 242, 284, 32, "grey", "backward: scatter gy to those places", 14)
    c.box(328, 242, 284, 32, "grey", "its adjoint: gather h from them", 14)
    c.text(28, 302, "A ReLU before it is gone through at once: maxima of zero pass nothing.", 14)
    return c


def _share(c: Canvas, y: float, end: float) -> None:
    """Arrows from a line at y to four boxes side by side."""
    c.line([(98, y), (542, y)], "ink")
    for k in range(4):
        c.arrow([(98 + k * 148, y), (98 + k * 148, end)])


KERNELS: dict[str, Callable[[], Canvas]] = {
    "micro-kernel": micro_kernel,
    "direct-path": direct_path,
    "pixel-gram": pixel_gram,
    "planes": planes,
    "winograd": winograd,
    "one-read": one_read,
    "embedding": embedding,
    "group-norm": group_norm,
    "attention": attention,
    "max-pool": max_pool,
}
