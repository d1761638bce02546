"""Line charts of SVG: lines stretch with the page, and words beside them keep their size.

The drawing is 1000 by 400 units, stretched to its box; strokes are not, so that lines are as wide everywhere. Ticks are HTML at
percentages of the box. A logarithmic axis is taken where values span more than a factor of five.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from .markup import Content, Markup, element, joined, number, table

WIDTH, HEIGHT = 1000, 400
MOST_POINTS = 300  # of a line, two for each
_LETTERS, _MARGIN = 27, 2.5  # of labels, that a phone has room for below a drawing, and to its right
_LEAST, _MOST = 1e-280, 1e280  # beyond them ticks and spans would be
_DASHES = (None, "7 4", "2 4", "10 4 2 4")


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: in the legend.
        points: x and y; those whose y is not finite, or beyond 1e±280, are gaps.
        colour: number of the page's colour; lines of one colour are one thing.
        faint: whether it is behind, as single batches are behind their mean.
        dots: whether its points are marked and not joined, as of epochs.
        band: the lower edge, by x as the points: the area between is filled.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    faint: bool = False
    dots: bool = False
    band: Sequence[float] = ()


def chart(name: str, title: str, unit: str, lines: Sequence[Line], note: str = "") -> Markup | None:
    """A figure with a title, a legend and its numbers; None where nothing is to be drawn.

    Args:
        name: of the page's element, a word.
        title: what is drawn.
        unit: of the y axis.
        lines: of it, those behind first.
        note: what else is to be said.
    """
    lines = [line for line in lines if any(_is_drawn(y) for _, y in line.points)]
    if not lines:
        return None
    axes, dashes = _Axes(lines), _dashes(lines)
    drawing = element(
        "svg",
        (element("path", d=f"M0 {axes.y(tick):.1f}H{WIDTH}", class_="grid") for tick in axes.y_ticks),
        (_drawn(line, axes, dash) for line, dash in zip(lines, dashes, strict=True)),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{title}. {' '.join(map(_described, (line for line in lines if not line.faint)))}",
    )
    y_labels, x_labels = labels(axes.y_ticks, 3), labels(axes.x_ticks, 6)
    ys = (
        element("span", label, style=f"top:{100 * axes.y(tick) / HEIGHT:.2f}%")
        for tick, label in zip(axes.y_ticks, y_labels, strict=True)
    )
    xs = (
        element("span", label, style=f"left:{100 * axes.x(tick) / WIDTH:.2f}%")
        for tick, label in zip(axes.x_ticks, x_labels, strict=True)
    )
    plot = element(
        "div",
        element("div", ys, class_="ys", aria_hidden="true"),
        element("div", drawing, class_="box"),
        element("div", xs, class_="xs", aria_hidden="true"),
        class_="plot",
        style=f"--ys:{max(map(len, y_labels)) + 1}ch",
    )
    legend = element(
        "ul",
        (element("li", _swatch(line, dash), line.name) for line, dash in zip(lines, dashes, strict=True)),
        class_="legend",
    )
    scale = ", ".join(filter(None, (unit, "logarithmic" if axes.is_log else "")))
    heading = element("h3", title, " ", element("span", scale, class_="unit"), id=name)
    return element(
        "figure", heading, plot, legend, element("p", note, class_="note") if note else None, _numbers(name, title, lines),
        class_="chart", aria_labelledby=name,
    )  # fmt: skip


def _is_drawn(y: float) -> bool:
    return y == 0 or _LEAST < abs(y) < _MOST


def undrawn(name: str, title: str, why: str) -> Markup:
    """What stands in the place of a figure that has nothing to draw."""
    return element(
        "figure", element("h3", title, id=name), element("p", why, class_="note"), class_="chart", aria_labelledby=name
    )


def sparkline(points: Sequence[tuple[float, float]], label: str) -> Markup:
    """A line without axes, for a cell of a table; logarithmic where its values are positive."""
    known = [(x, y) for x, y in points if _is_drawn(y) and y > 0]
    if len(known) < 2:
        return Markup("")
    line = Line(label, known)
    return element(
        "svg",
        element("path", d=_path([thinned(known)], _Axes([line], bare=True)), class_="line c0"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
        class_="spark",
    )


class _Axes:
    """Where a value is in the drawing, and where ticks are."""

    def __init__(self, lines: Sequence[Line], bare: bool = False):
        xs = [x for line in lines for x, y in line.points if _is_drawn(y)]
        ys = [y for line in lines for y in (*(y for _, y in line.points), *line.band) if _is_drawn(y)]
        positive = [y for y in ys if y > 0]
        self.is_log = len(positive) == len(ys) and (bare or max(ys) > 5 * min(ys))
        low, high = (math.log10(min(ys)), math.log10(max(ys))) if self.is_log else (min(ys), max(ys))
        is_flat = high - low <= 1e-6 * max(abs(low), abs(high))  # what float32 does not tell apart
        room = (0.1 * abs(high) or 0.5) if is_flat else 0.05 * (high - low)
        self._y = low - room, high + room
        self._x = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)
        self.y_ticks = self._log_ticks() if self.is_log else _ticks(*self._y, 5)
        self.x_ticks = self._steps(xs[0])

    def x(self, value: float) -> float:
        return WIDTH * (value - self._x[0]) / (self._x[1] - self._x[0])

    def y(self, value: float) -> float:
        at = math.log10(value) if self.is_log else value
        return HEIGHT * (1 - (at - self._y[0]) / (self._y[1] - self._y[0]))

    def _steps(self, first: float) -> list[float]:
        """Whole numbers whose labels lie beside each other on a phone, the last one's within the figure."""
        for most in (5, 4, 3, 2):
            found = [tick for tick in _ticks(*self._x, most) if tick == int(tick)] or [first]
            texts = labels(found, 6)
            if sum(len(text) + 1 for text in texts) <= _LETTERS:
                break
        beyond = len(texts[-1]) / 2 - _MARGIN - _LETTERS * (1 - self.x(found[-1]) / WIDTH)
        return found[:-1] if beyond > 0 and len(found) > 1 else found

    def _log_ticks(self) -> list[float]:
        low, high = self._y
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [d * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for d in digits]
            found = [tick for tick in found if low <= math.log10(tick) <= high]
            if len(found) <= 6:
                return found if len(found) > 1 else [10**v for v in _ticks(low, high, 4)]
        return found[:: -(-len(found) // 6)]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two, at most so many."""
    span = (high - low) / most
    size = 10.0 ** math.floor(math.log10(span))
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if size * k >= span)
    first = math.ceil(low / step)
    return [step * k for k in range(first, math.floor(high / step) + 1)]


def labels(ticks: Sequence[float], least: int) -> list[str]:
    """Ticks in so many digits, or as many more as it takes for each to be where it says, to a hundredth of a gap."""
    gaps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    nearest = [min(pair) for pair in zip([math.inf, *gaps], [*gaps, math.inf], strict=True)]

    def are_exact(digits: int) -> bool:
        return all(abs(float(f"{t:.{digits}g}") - t) <= gap / 100 for t, gap in zip(ticks, nearest, strict=True))

    digits = next(filter(are_exact, range(least, 17)), 17)
    return [number(tick, digits) for tick in ticks]


def _dashes(lines: Sequence[Line]) -> list[str | None]:
    """How each is broken: the first not at all, others for who does not see its colour."""
    named = [line for line in lines if not (line.faint or line.dots or line.band)]
    return [_DASHES[named.index(line) % len(_DASHES)] if line in named else None for line in lines]


def _drawn(line: Line, axes: _Axes, dash: str | None) -> Markup:
    kind = f"c{line.colour}{' faint' if line.faint else ''}"
    if line.dots:
        return element("path", d=_dots(line.points, axes), class_=f"dots {kind}")
    if line.band:
        upper = [f"{axes.x(x):.1f} {axes.y(y):.1f}" for x, y in line.points]
        lower = [f"{axes.x(x):.1f} {axes.y(y):.1f}" for (x, _), y in zip(line.points, line.band, strict=True)]
        return element("path", d=f"M{'L'.join([*upper, *reversed(lower)])}Z", class_=f"band {kind}")
    pieces = _pieces(thinned(line.points))
    alone = [piece[0] for piece in pieces if len(piece) == 1]  # of which a line shows nothing
    drawn = element("path", d=_path(pieces, axes), class_=f"line {kind}", stroke_dasharray=dash)
    dots = element("path", d=_dots(alone, axes), class_=f"dots {kind}")
    return joined([drawn if len(alone) < len(pieces) else None, dots if alone else None])


def _dots(points: Sequence[tuple[float, float]], axes: _Axes) -> str:
    return "".join(f"M{axes.x(x):.1f} {axes.y(y):.1f}h0" for x, y in points if _is_drawn(y))


def _pieces(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """What is finite, in parts between gaps."""
    groups = groupby(points, key=lambda point: _is_drawn(point[1]))
    return [list(piece) for is_known, piece in groups if is_known]


def _path(pieces: Sequence[Sequence[tuple[float, float]]], axes: _Axes) -> str:
    return "".join(
        "M" + "L".join(f"{axes.x(x):.1f} {axes.y(y):.1f}" for x, y in piece) for piece in pieces if len(piece) > 1
    )


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lowest and the highest of consecutive ones, where there are many: what a line looks like from afar."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 2:
        return list(points)
    out = []
    for k in range(0, len(points), size):
        part = [point for point in points[k : k + size] if _is_drawn(point[1])]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])} if part else {points[k]}
        out += sorted(ends)
    return out


def _swatch(line: Line, dash: str | None) -> Markup:
    kind = "band" if line.band else "dots" if line.dots else "line"
    shape = "M2 3H26V11H2Z" if line.band else "M14 7h0" if line.dots else "M1 7H27"
    look = f"{kind} c{line.colour}{' faint' if line.faint else ''}"
    path = element("path", d=shape, class_=look, stroke_dasharray=dash)
    return element("svg", path, viewBox="0 0 28 14", class_="swatch", aria_hidden="true")


def _described(line: Line) -> str:
    known = [point for point in line.points if _is_drawn(point[1])]
    values = [y for _, y in known]
    return (
        f"{line.name}: {number(values[0], 3)} at {number(known[0][0], 6)}, "
        f"{number(values[-1], 3)} at {number(known[-1][0], 6)}, "
        f"lowest {number(min(values), 3)}, highest {number(max(values), 3)}."
    )


def _numbers(name: str, title: str, lines: Sequence[Line]) -> Markup:
    """A table of ends and extremes of each line, which a picture only shows."""
    rows: list[list[Content]] = []
    for line in lines:
        values = [y for _, y in line.points if _is_drawn(y)]
        lost = len(line.points) - len(values)
        rows.append([line.name, values[0], values[-1], min(values), max(values), len(values), lost])
    header = ("line", "first", "last", "lowest", "highest", "points", "not finite")
    return element(
        "details",
        element("summary", "Numbers", element("span", f" of {title}", class_="hidden")),
        table(f"{name}-numbers", f"{title}: numbers", header, rows),
    )


def gallery(charts: Sequence[Markup | None]) -> Markup:
    """Charts side by side where there is room."""
    shown = [one for one in charts if one is not None]
    return element("div", joined(shown), class_="charts") if shown else Markup("")
