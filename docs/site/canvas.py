"""Boxes, grids, text and arrows as SVG: what the documentation's drawings are made of.

Coordinates are numbers of a viewBox WIDTH wide, which scales to any screen. Colours are names of `COLOURS`, and each has a
light and a dark form that the reader's own setting chooses between.
"""

from collections.abc import Collection, Sequence
from html import escape

WIDTH = 640
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif'
# By name: fill and line in light, fill and line in dark.
COLOURS = {
    "grey": ("#edf0f4", "#8391a5", "#262d38", "#76859a"),
    "blue": ("#dbeafe", "#2563eb", "#1b3556", "#60a5fa"),
    "orange": ("#ffe8d1", "#c2570c", "#4a2d14", "#fb923c"),
    "green": ("#d9f5e0", "#15803d", "#163a23", "#4ade80"),
    "purple": ("#ebe5ff", "#7c3aed", "#33275a", "#a78bfa"),
}
# Paper, text, and text of less weight.
PLAIN = ("#ffffff", "#1b2430", "#566173"), ("#151a21", "#e8ecf1", "#a3afbf")


class Canvas:
    """A drawing in the making; each method adds something to it."""

    def __init__(self, title: str, description: str, height: float):
        """Begin with paper, a title, and a description for those who do not see it."""
        self.title, self.description, self.height = title, description, height
        self.parts: list[str] = []

    def box(
        self, x: float, y: float, w: float, h: float, colour: str = "grey", label: str = "", size: int = 15
    ) -> None:
        """A rectangle, with its label's lines in the middle."""
        lines = label.split("\n") if label else []
        first = y + h / 2 - (len(lines) - 1) * size * 0.6 + size * 0.35
        self.parts.append('<g class="box">')
        self.parts.append(f'<rect class="{colour}" {_place(x=x, y=y, width=w, height=h)} rx="4"/>')
        for k, line in enumerate(lines):
            self.text(x + w / 2, first + k * size * 1.2, line, size, "middle")
        self.parts.append("</g>")

    def frame(self, x: float, y: float, w: float, h: float, colour: str = "grey") -> None:
        """A dashed outline: something that is never stored, or a part of something."""
        self.parts.append(f'<rect class="{colour} hollow dashed" {_place(x=x, y=y, width=w, height=h)} rx="4"/>')

    def grid(
        self,
        x: float,
        y: float,
        rows: int,
        columns: int,
        cell: float,
        colour: str = "grey",
        marked: Collection[tuple[int, int]] = (),
        mark: str = "",
    ) -> None:
        """Cells of a matrix; those that are ``marked``, (row, column), in the colour ``mark``."""
        w, h = columns * cell, rows * cell
        self.parts.append(f'<rect class="{colour}" {_place(x=x, y=y, width=w, height=h)}/>')
        for row, column in sorted(marked):
            place = _place(x=x + column * cell, y=y + row * cell, width=cell, height=cell)
            self.parts.append(f'<rect class="{mark}" {place}/>')
        lines = [f"M{_n(x)} {_n(y + k * cell)}h{_n(w)}" for k in range(1, rows)]
        lines += [f"M{_n(x + k * cell)} {_n(y)}v{_n(h)}" for k in range(1, columns)]
        self.parts.append(f'<path class="{colour} hollow thin" d="{"".join(lines)}"/>')

    def text(
        self,
        x: float,
        y: float,
        content: str,
        size: int = 15,
        anchor: str = "start",
        kind: str = "ink",
        bold: bool = False,
    ) -> None:
        """One line of text on the baseline y."""
        weight = ' font-weight="600"' if bold else ""
        place = f'{_place(x=x, y=y)} font-size="{size}" text-anchor="{anchor}"{weight}'
        self.parts.append(f'<text class="{kind}" {place}>{escape(content)}</text>')

    def line(self, points: Sequence[tuple[float, float]], colour: str = "grey", dashed: bool = False) -> None:
        """Straight lines from point to point."""
        self._path(points, f"{colour} hollow{' dashed' if dashed else ''}")

    def arrow(self, points: Sequence[tuple[float, float]], dashed: bool = False) -> None:
        """The same with a head at its end."""
        self._path(points, f"arrow hollow{' dashed' if dashed else ''}", ' marker-end="url(#head)"')

    def dot(self, x: float, y: float, colour: str, radius: float = 5) -> None:
        """A point."""
        self.parts.append(f'<circle class="{colour} solid" cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"/>')

    def _path(self, points: Sequence[tuple[float, float]], kind: str, more: str = "") -> None:
        steps = " ".join(f"{'ML'[k > 0]}{_n(x)} {_n(y)}" for k, (x, y) in enumerate(points))
        self.parts.append(f'<path class="{kind}" d="{steps}"{more}/>')

    def svg(self) -> str:
        """The file's text."""
        size = f"{WIDTH} {_n(self.height)}"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" aria-labelledby="title desc">',
                f'<title id="title">{escape(self.title)}</title>',
                f'<desc id="desc">{escape(self.description)}</desc>',
                f"<style>\n{_style()}\n</style>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                'orient="auto"><path class="head" d="M0 0L8 4L0 8Z"/></marker></defs>',
                f'<rect class="paper" {_place(x=0, y=0, width=WIDTH, height=self.height)} rx="10"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def _style() -> str:
    light, dark = (_rules(scheme) for scheme in (0, 1))
    shapes = [
        f"text {{ font-family: {FONT}; }}",
        "rect, path, circle { stroke-width: 1.4; }",
        ".hollow { fill: none; }",
        ".thin { stroke-width: 0.6; }",
        ".dashed { stroke-dasharray: 5 4; }",
    ]
    dark = [f"  {rule}" for rule in dark]
    return "\n".join([*light, "@media (prefers-color-scheme: dark) {", *dark, "}", *shapes])


def _rules(scheme: int) -> list[str]:
    paper, ink, muted = PLAIN[scheme]
    rules = [f".paper {{ fill: {paper}; }}", f".ink, .head {{ fill: {ink}; }}", f".muted {{ fill: {muted}; }}"]
    rules.append(f".ink.hollow, .arrow {{ stroke: {ink}; }}")
    for name, colours in COLOURS.items():
        fill, line = colours[2 * scheme : 2 * scheme + 2]
        rules.append(f".{name} {{ fill: {fill}; stroke: {line}; }} .{name}.solid {{ fill: {line}; }}")
        rules.append(f"text.{name} {{ fill: {line}; stroke: none; }}")
    return rules


def _place(**places: float) -> str:
    return " ".join(f'{name}="{_n(value)}"' for name, value in places.items())


def _n(value: float) -> str:
    return f"{round(value, 1):g}"
