"""How a quantity went: its curve and its tile, which tell the same numbers.

What single batches have is drawn as it is and smoothed, and the tile has the end of the smoothed curve. Few values, or some
that are not finite, are not smoothed: the tile has the last of them then. Averages, as noise scales are, are left as they are.
"""

import math
from collections.abc import Iterable, Sequence

from ...training.figures import smooth
from .charts import Line, chart, undrawn
from .markup import Content, Markup, element, number

Points = Sequence[tuple[float, float]]
LEAST = 10  # values that are smoothed: twice as many as the running mean is about
_INFINITE = (
    "at which it is infinite, because the averaged estimate of the gradient's squared norm is not positive: the gradient is "
    "lost in the noise"
)
_UNKNOWN = "at which it is not known: it takes a batch of two samples or more whose Γ is known and not zero"


def smoothed(points: Points) -> list[tuple[float, float]] | None:
    """A curve smoothed; None where there is nothing to smooth."""
    values = [value for _, value in points]
    if len(values) < LEAST or not all(map(math.isfinite, values)):
        return None
    return list(zip((step for step, _ in points), smooth(values), strict=True))


def course(name: str, points: Points, colour: int) -> list[Line]:
    """A quantity of each batch, and smoothed."""
    mean = smoothed(points)
    each = Line(f"{name}, each batch", points, colour, faint=mean is not None)
    return [each] if mean is None else [each, Line(f"{name}, smoothed", mean, colour)]


def at_the_end(name: str, points: Points, how: str = "") -> Markup | None:
    """A tile of a quantity at the end of its curve, and at the beginning; None where it is not known.

    Args:
        name: of it.
        points: of each batch, or of averages.
        how: it was averaged, where it was.
    """
    known = [point for point in points if not math.isnan(point[1])]
    if not known:
        return None
    mean = None if how else smoothed(points)
    how = how or ("of the last batch" if mean is None else "smoothed")
    first = f", at the beginning {number(known[0][1], 3)}" if len(known) > 1 else ""
    return tile(name, number((mean or known)[-1][1], 3), how + first)


def noise_chart(name: str, title: str, lines: Sequence[Line], kind: str) -> Markup | None:
    """A chart of noise scales, with what it leaves out in words.

    Args:
        name: as of `chart`.
        title: as of `chart`.
        lines: with a point for each of what there is, nan where it is not known.
        kind: what points are of, ``"steps"`` or ``"observations"``.
    """
    told = [(line.name, left_out([y for _, y in line.points], kind)) for line in lines]
    note = " ".join(text if len(lines) == 1 else f"{whose}: {text}" for whose, text in told if text)
    return chart(name, title, "samples", lines, note) or (undrawn(name, title, note) if note else None)


def left_out(values: Sequence[float], kind: str) -> str:
    """How many of the values of a noise scale have no place in a chart, and why; nothing where all have one."""
    counts = {_INFINITE: sum(map(math.isinf, values)), _UNKNOWN: sum(map(math.isnan, values))}
    reasons = "; ".join(f"{count} {why}" for why, count in counts.items() if count)
    return f"Not drawn, of {len(values)} {kind}: {reasons}." if reasons else ""


def tile(name: str, value: Content, since: str = "") -> Markup:
    """A number at a glance: its name, itself, and what is to be said beside."""
    parts = element("span", value, class_="value"), Markup("<br>"), element("span", since, class_="since")
    return element("div", element("dt", name), element("dd", parts), class_="tile")


def tiles(found: Iterable[Markup | None]) -> Markup:
    """Several of them."""
    return element("dl", (one for one in found if one is not None), class_="tiles")
