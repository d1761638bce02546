"""The parts of a page about runs of ``bootgrad train``, one or several beside each other."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...training.figures import smooth
from .charts import Line, chart
from .folder import Experiment, Run
from .markup import Content, Markup, element, number, table

_GAMMA = ("Covariance trace Γ", "loss² / parameter²")
_NOISE = ("Gradient noise scale", "samples")
_NAMES = {"reg1": "Reg1, without λ₁", "reg2": "Reg2, without λ₂"}


@dataclass(frozen=True)
class Parts:
    """Of a page.

    Attributes:
        tiles: the numbers at the end.
        charts: pictures over steps.
        tables: of epochs, or of the runs.
    """

    tiles: Markup
    charts: list[Markup | None]
    tables: list[Markup]


def trained(runs: Sequence[Run]) -> Parts:
    """The parts of one run, or of several."""
    if len(runs) == 1:
        return Parts(_tiles_of_one(runs[0]), _charts_of_one(runs[0]), [_epochs(runs[0])])
    return Parts(_tiles_of_many(runs), _charts_of_many(runs), [_ends(runs)])


def tile(name: str, value: Content, since: str = "") -> Markup:
    """A number at a glance: its name, itself, and what is to be said beside."""
    parts = element("span", value, class_="value"), Markup("<br>"), element("span", since, class_="since")
    return element("div", element("dt", name), element("dd", parts), class_="tile")


def tiles(found: Iterable[Markup | None]) -> Markup:
    """Several of them."""
    return element("dl", (one for one in found if one is not None), class_="tiles")


def since_the_beginning(name: str, points: Sequence[tuple[float, float]], unit: str = "") -> Markup | None:
    """A tile of a quantity at the end, and at the beginning; None where it is not known."""
    known = [value for _, value in points if not math.isnan(value)]
    if not known:
        return None
    first, last = _ends_of(known)
    return tile(name, number(last, 3), f"{unit}{', ' if unit else ''}at the beginning {number(first, 3)}")


def _ends_of(values: Sequence[float]) -> tuple[float, float]:
    """The first value, and the last ones' smoothed."""
    return values[0], smooth(list(values))[-1] if all(map(math.isfinite, values)) else values[-1]


def _tiles_of_one(run: Run) -> Markup:
    tests = run.points("test_loss")
    accuracy = run.points("test_accuracy")
    cost = run.record.get("seconds_per_step", {})
    return tiles(
        [
            since_the_beginning("Training loss", run.points("loss"), "smoothed"),
            tile("Test loss", number(tests[-1][1], 3), f"lowest {number(min(v for _, v in tests), 3)}")
            if tests
            else None,
            tile("Test accuracy", f"{100 * accuracy[-1][1]:.2f} %") if accuracy else None,
            since_the_beginning("Γ", run.points("covariance_trace"), "smoothed"),
            since_the_beginning("Noise scale", run.points("noise_scale"), "averaged"),
            tile("Time of a step", f"{number(cost['ratio'], 3)}×", "of a plain step") if cost.get("ratio") else None,
        ]
    )


def _charts_of_one(run: Run) -> list[Markup | None]:
    strengths = {name: float(run.settings.get(name) or 0) for name in _NAMES}
    return [
        chart("loss", "Loss", "", [*_batches(run, "loss", 0, "training"), _tests(run)]),
        chart("trace", *_GAMMA, _batches(run, "covariance_trace", 2, "Γ")),
        chart("noise", *_NOISE, [Line("averaged over steps", run.points("noise_scale"), 3)]),
        chart("sq-mean", "Squared norm of the gradient, ‖ḡ‖²", _GAMMA[1], _batches(run, "sq_mean_norm", 0, "‖ḡ‖²")),
        *(
            chart(name, title, _GAMMA[1], _batches(run, name, k, name), f"λ is {number(strengths[name])}.")
            for k, (name, title) in enumerate(_NAMES.items())
            if strengths[name]
        ),
    ]


def _batches(run: Run, column: str, colour: int, name: str) -> list[Line]:
    """A column at each step, and smoothed."""
    points = run.points(column)
    values = [value for _, value in points]
    lines = [Line(f"{name}, each batch", points, colour, faint=True)]
    if all(map(math.isfinite, values)):
        smoothed = list(zip((step for step, _ in points), smooth(values), strict=True))
        lines.append(Line(f"{name}, smoothed", smoothed, colour))
    return lines


def _tests(run: Run) -> Line:
    return Line("test images", run.points("test_loss"), 1, dots=True)


def _epochs(run: Run) -> Markup:
    steps = {int(step): k for k, step in enumerate(run.columns["step"])}
    rows: list[list[Content]] = []
    for step, loss in run.points("test_loss"):
        k = steps[int(step)]
        accuracy = run.columns["test_accuracy"][k]
        numbers = [run.columns[name][k] for name in ("loss", "covariance_trace", "noise_scale")]
        epoch = int(run.columns["epoch"][k]) if "epoch" in run.columns else len(rows) + 1
        rows.append([str(epoch), int(step), loss, f"{100 * accuracy:.2f} %", *numbers])
    header = (
        "epoch",
        "last step",
        "test loss",
        "test accuracy",
        "loss of the last batch",
        "Γ of the last batch",
        "noise scale",
    )
    return table("epochs-table", "The run at the end of each epoch", header, rows)


def _tiles_of_many(runs: Sequence[Run]) -> Markup:
    ends = [(points[-1][1], run.name) for run in runs if (points := run.points("test_loss"))]
    lowest = [tile("Lowest test loss at the end", number(loss, 3), f"of {name}") for loss, name in sorted(ends)[:1]]
    return tiles([*lowest, *(tile(f"Test loss, {name}", number(loss, 3)) for loss, name in ends)])


def _charts_of_many(runs: Sequence[Run]) -> list[Markup | None]:
    def lines(column: str, smoothed: bool = True) -> list[Line]:
        found = []
        for k, run in enumerate(runs):
            points = run.points(column)
            values = [value for _, value in points]
            if smoothed and all(map(math.isfinite, values)):
                points = list(zip((step for step, _ in points), smooth(values), strict=True))
            found.append(Line(run.name, points, k % 5))
        return found

    return [
        chart("loss", "Training loss, smoothed", "", lines("loss")),
        chart("test-loss", "Test loss", "", lines("test_loss", smoothed=False)),
        chart("trace", f"{_GAMMA[0]}, smoothed", _GAMMA[1], lines("covariance_trace")),
        chart("noise", *_NOISE, lines("noise_scale", smoothed=False)),
        *(chart(name, f"{title}, smoothed", _GAMMA[1], lines(name)) for name, title in _NAMES.items()),
    ]


def _ends(runs: Sequence[Run]) -> Markup:
    rows: list[list[Content]] = []
    for run in runs:
        tests, accuracy = run.points("test_loss"), run.points("test_accuracy")
        ends = [
            _ends_of([v for _, v in points])[1] if (points := run.points(name)) else math.nan
            for name in ("loss", "covariance_trace")
        ]
        noise = run.points("noise_scale")
        rows.append(
            [
                run.name,
                f"{run.settings.get('reg1', 0):g}",
                f"{run.settings.get('reg2', 0):g}",
                len(run.columns["step"]),
                ends[0],
                tests[-1][1] if tests else math.nan,
                f"{100 * accuracy[-1][1]:.2f} %" if accuracy else "–",
                ends[1],
                noise[-1][1] if noise else math.nan,
            ]
        )
    header = ("run", "λ₁", "λ₂", "steps", "training loss", "test loss", "test accuracy", "Γ", "noise scale")
    return table("runs-table", "The runs at their end; training loss and Γ are smoothed", header, rows)


def settings_table(runs: Sequence[Run], experiment: Experiment | None) -> Markup:
    """Settings, and what they were run on."""
    if experiment is not None:
        options = experiment.record.get("experiment", {})
        rows = [[str(name), _text(value)] for name, value in options.items()]
        places = experiment.record.get("places", [])
        options_table = table("settings-table", "Options of the experiment", ("option", "value"), rows, words=True)
        return element("div", options_table, _places(places), class_="pair")
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    header = ("setting", *(["value"] if len(runs) == 1 else [run.name for run in runs]))
    rows = [[name, *(_text(run.settings.get(name)) for run in runs)] for name in names]
    found = table("settings-table", "How it was run", header, rows, words=True)
    return element("div", found, _places([run.record for run in runs if run.record]), class_="pair")


def _places(places: Sequence[dict[str, Any]]) -> Markup | None:
    if not places:
        return None
    names = list(dict.fromkeys(name for place in places for name in _environment(place)))
    header = ("what", *(str(place.get("date", k + 1)) for k, place in enumerate(places)))
    rows = [[name, *(_environment(place).get(name, "–") for place in places)] for name in names]
    return table("places-table", "What it was run on", header, rows, words=True)


def _environment(place: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in ("device", "data", "versions"):
        values = place.get(part)
        if isinstance(values, dict):
            found |= {
                f"{part}: {name}" if part == "data" else str(name): _text(value) for name, value in values.items()
            }
    if "parameters" in place:
        found["parameters"] = _text(place["parameters"])
    return found


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
