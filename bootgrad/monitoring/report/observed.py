"""The parts of a page about what a `Monitor` has written."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..spikes import LEAST
from .charts import Line, chart, sparkline
from .courses import at_the_end, course, noise_chart, tile, tiles
from .folder import count_of, number_of
from .markup import Content, Markup, element, joined, number, table

Row = dict[str, Any]
_UNIT = "loss² / parameter²"
_QUANTITIES = {"covariance_trace": "Γ", "sq_mean_norm": "‖ḡ‖²", "largest_norm": "largest norm of a sample"}
_BEFORE = LEAST + 1  # observations that one is compared with: the first of them has none before it
_MOST_FLAGS, _MOST_LAYERS, _MOST_OUTLIERS = 50, 4, 50


@dataclass(frozen=True)
class Seen:
    """Of a page; what is None is not known."""

    tiles: Markup
    flags: Markup
    charts: list[Markup | None]
    layers: Markup | None
    outliers: Markup | None


def observed(rows: Sequence[Row], name: str, place: str = "") -> Seen:
    """The parts of a file's observations.

    Args:
        rows: of it.
        name: what elements' names begin with.
        place: what titles end with, where the page has others of the same kind.
    """
    charts, flags = list(_charts(rows, name, place)), _flags(rows, name, place)
    return Seen(
        joined([_watched(rows), _tiles(rows)]), flags, charts, _layers(rows, name, place), _outliers(rows, name, place)
    )


def _column(rows: Sequence[Row], *path: str) -> list[tuple[float, float]]:
    """Steps and values of a quantity, where it is known."""
    found = []
    for row in rows:
        value: Any = row
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found.append((float(row["step"]), number_of(value)))
    return found


def _watched(rows: Sequence[Row]) -> Markup | None:
    """What the numbers are about, where it is a part of the model."""
    names = rows[-1].get("watched")
    text = f"Watched: {', '.join(map(str, names or ()))}. All but the loss is of these parameters alone."
    return element("p", text) if names else None


def _tiles(rows: Sequence[Row]) -> Markup:
    flagged = [row["step"] for row in rows if count_of(row, "flags")]
    far = [count for row in rows if (count := count_of(row, "outliers")) is not None]
    return tiles(
        [
            at_the_end("Loss", _column(rows, "loss")),
            at_the_end("Γ", _column(rows, "covariance_trace")),
            at_the_end("Noise scale", _column(rows, "noise_scale"), "averaged over observations"),
            tile("Observations", str(len(rows)), f"steps {rows[0]['step']} to {rows[-1]['step']}"),
            tile(
                "Steps with flags",
                str(len(flagged)) if flagged or _are_judged(rows) else "–",
                f"the last at {flagged[-1]}"
                if flagged
                else "nothing far above its last values"
                if _are_judged(rows)
                else f"compared after {_BEFORE} observations",
            ),
            tile("Outlying samples", str(sum(far)), "gradients far longer than others") if far else None,
        ]
    )


def _charts(rows: Sequence[Row], name: str, place: str) -> Iterator[Markup | None]:
    loss, trace = _column(rows, "loss"), _column(rows, "covariance_trace")
    yield chart(f"{name}-loss", f"Loss{place}", "", [*course("loss", loss, 0), _marks(rows, "loss")])
    lines = [*course("Γ", trace, 2), _marks(rows, "covariance_trace")]
    yield chart(f"{name}-trace", f"Covariance trace Γ{place}", _UNIT, lines)
    noise = [(float(row["step"]), number_of(row.get("noise_scale"))) for row in rows]
    averaged = Line("averaged over observations", noise, 3)
    yield noise_chart(f"{name}-noise", f"Gradient noise scale{place}", [averaged], "observations")
    mean = [*course("‖ḡ‖²", _column(rows, "sq_mean_norm"), 0), _marks(rows, "sq_mean_norm")]
    yield chart(f"{name}-mean", f"Squared norm of the gradient, ‖ḡ‖²{place}", _UNIT, mean)
    yield chart(f"{name}-norms", f"Norms of the samples' gradients{place}", "loss / parameter", list(_quantiles(rows)))
    yield from _penalties(rows, name, place)
    courses = _by_size(rows)
    lines = [Line(layer, points, k) for k, (layer, points) in enumerate(list(courses.items())[:_MOST_LAYERS])]
    note = "" if len(courses) <= _MOST_LAYERS else f"The {_MOST_LAYERS} largest at the end; the table below has all."
    yield chart(f"{name}-of-layers", f"Γ by layer{place}", _UNIT, lines, note)


def _penalties(rows: Sequence[Row], name: str, place: str) -> Iterator[Markup | None]:
    """Penalties but those whose λ was 0 all along, and strengths that change; the others are told in words."""
    values = {penalty: _column(rows, penalty) for penalty in ("reg1", "reg2")}
    strengths: dict[str, list[tuple[float, float]]] = {penalty: [] for penalty in values}
    if any(row.get("strengths") for row in rows):  # those that are not there are 0
        for penalty in values:
            found = [row.get("strengths", {}).get(penalty, 0.0) for row in rows]
            strengths[penalty] = [
                (float(row["step"]), number_of(value)) for row, value in zip(rows, found, strict=True)
            ]
    distinct = {penalty: {value for _, value in points} for penalty, points in strengths.items()}
    lines = [Line(penalty, values[penalty], k) for k, penalty in enumerate(values) if distinct[penalty] != {0.0}]
    fixed = {penalty: min(found) for penalty, found in distinct.items() if len(found) == 1 and found != {0.0}}
    note = " ".join(f"λ of {penalty} is {number(value)}." for penalty, value in fixed.items())
    yield chart(f"{name}-penalties", f"Penalties, without λ{place}", _UNIT, lines, note)
    changing = [Line(f"λ of {p}", strengths[p], k) for k, p in enumerate(values) if len(distinct[p]) > 1]
    yield chart(f"{name}-strengths", f"Strengths of the penalties{place}", "λ", changing)


def _marks(rows: Sequence[Row], quantity: str) -> Line:
    """Observations at which a quantity of the whole model was flagged."""
    points = [
        (float(row["step"]), number_of(flag.get("value")))
        for row in rows
        for flag in row.get("flags", ())
        if flag.get("quantity") == quantity and flag.get("layer") is None
    ]
    return Line("flagged", points, 1, dots=True)


def _quantiles(rows: Sequence[Row]) -> Iterator[Line]:
    """Bands from the lowest to the highest and between the quartiles, and the median."""
    for low, high, name, faint in (("0", "1", "lowest to highest", True), ("0.25", "0.75", "quartiles", False)):
        both = [(float(row["step"]), *(number_of(row.get("norms", {}).get(q)) for q in (low, high))) for row in rows]
        known = [(step, a, b) for step, a, b in both if math.isfinite(a) and math.isfinite(b)]
        points = [(step, b) for step, _, b in known]
        yield Line(name, points, 0, faint, band=[a for _, a, _ in known])
    yield Line("median", _column(rows, "norms", "0.5"), 0)


def _by_size(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Γ over steps by layer, of the largest at the end first; those of which it is not known come last."""
    names = dict.fromkeys(layer for row in rows for layer in row.get("layers", {}))
    courses = [(layer, _column(rows, "layers", layer, "covariance_trace")) for layer in names]
    return dict(
        sorted(courses, key=lambda item: -math.inf if math.isnan(_last(item[1])) else _last(item[1]), reverse=True)
    )


def _last(points: Sequence[tuple[float, float]]) -> float:
    return points[-1][1] if points else math.nan


def _layers(rows: Sequence[Row], name: str, place: str) -> Markup | None:
    courses = _by_size(rows)
    if not courses:
        return None
    total = sum(_last(points) for points in courses.values() if points)
    cells: list[list[Content]] = []
    for layer, points in courses.items():
        share = f"{100 * _last(points) / total:.1f} %" if points and 0 < total < math.inf else "–"
        noise = _last(_column(rows, "layers", layer, "noise_scale"))
        course = (
            sparkline(points, f"Γ of {layer} from {number(points[0][1], 3)} to {number(points[-1][1], 3)}")
            if points
            else ""
        )
        first = points[0][1] if points else math.nan
        cells.append([layer, first, _last(points), share, noise, Markup(course)])
    header = ("layer", "Γ, first", "Γ, last", "share, last", "noise scale", "Γ over steps")
    caption = f"What each layer's parameters have of Γ, the largest share first{place}"
    return table(f"{name}-layers-table", caption, header, cells)


def _flags(rows: Sequence[Row], name: str, place: str) -> Markup:
    """A row of each step with flags: what the whole model has, and which layers."""
    found = [row for row in rows if row.get("flags")]
    if not found:
        steps = [str(row["step"]) for row in rows if count_of(row, "flags")]
        some = "" if len(steps) <= _MOST_FLAGS else f", the last {_MOST_FLAGS} of {len(steps)}"
        if steps:
            text = (
                f"Steps at which something was far above its last values{some}: {', '.join(steps[-_MOST_FLAGS:])}. What it "
                "was is not in a CSV file; a JSONL file has it."
            )
        elif _are_judged(rows):
            text = f"No quantity was far above its last values, from the {_BEFORE + 1}th observation on."
        else:
            text = (
                f"Nothing is compared with its last values before {_BEFORE} observations; here are {_compared(rows)}."
            )
        kind = "finding" if steps else "finding none" if _are_judged(rows) else "finding unjudged"
        return element("div", element("div", element("p", text), class_=kind), class_="findings")
    cells: list[list[Content]] = []
    for row in reversed(found):
        whole = [flag for flag in row["flags"] if flag.get("layer") is None]
        layers = list(dict.fromkeys(str(flag["layer"]) for flag in row["flags"] if flag.get("layer") is not None))
        most = max(_times(flag) for flag in row["flags"])
        named = (
            (_QUANTITIES.get(str(flag.get("quantity")), flag.get("quantity")), flag.get("value")) for flag in whole
        )
        quantities = ", ".join(f"{quantity} {_worded(number_of(value))}" for quantity, value in named)
        more = f" and {len(layers) - _MOST_LAYERS} more" if len(layers) > _MOST_LAYERS else ""
        cells.append(
            [str(row["step"]), quantities or "–", ", ".join(layers[:_MOST_LAYERS]) + more or "–", f"{number(most, 3)}×"]
        )
    some = "" if len(cells) <= _MOST_FLAGS else f", the last {_MOST_FLAGS} of {len(cells)} steps"
    caption = f"Steps at which something was far above its last values, the latest first{some}{place}"
    header = ("step", "whole model", "layers whose Γ was", "furthest, times the usual")
    return table(f"{name}-flags-table", caption, header, cells[:_MOST_FLAGS], words=True)


def _are_judged(rows: Sequence[Row]) -> bool:
    """Whether there is a past that the last observation can be compared with."""
    return _compared(rows) > _BEFORE


def _compared(rows: Sequence[Row]) -> int:
    """Observations that have something to be compared."""
    return max(len(_column(rows, quantity)) for quantity in ("loss", "covariance_trace"))


def _worded(value: float) -> str:
    return "nan" if math.isnan(value) else number(value, 3)


def _times(flag: Row) -> float:
    """How many times the usual a flagged value is."""
    value, usual = number_of(flag.get("value")), number_of(flag.get("usual"))
    return value / usual if usual > 0 and math.isfinite(value) else math.inf


def _outliers(rows: Sequence[Row], name: str, place: str) -> Markup | None:
    by_id: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for sample in row.get("outliers", ()):
            name_of_it = sample.get("id")
            if name_of_it is None:  # of each batch another one has this number
                name_of_it = f"number {sample.get('index')} in the batch of step {row['step']}"
            by_id.setdefault(str(name_of_it), []).append((row["step"], number_of(sample.get("norm"))))
    if not by_id:
        return None
    order = sorted(by_id.items(), key=lambda item: (-len(item[1]), -max(norm for _, norm in item[1])))
    cells: list[list[Content]] = [
        [sample, len(times), max(norm for _, norm in times), times[-1][0]] for sample, times in order[:_MOST_OUTLIERS]
    ]
    some = "" if len(order) <= _MOST_OUTLIERS else f", the first {_MOST_OUTLIERS} of {len(order)}"
    caption = f"Samples whose gradient was far longer than those of their batch{some}{place}"
    return table(f"{name}-outliers-table", caption, ("sample", "times", "largest norm", "last at step"), cells)
