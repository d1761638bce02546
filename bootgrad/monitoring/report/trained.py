"""The parts of a page about runs of ``bootgrad train``, one or several beside each other."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .charts import Line, chart
from .courses import Points, at_the_end, course, noise_chart, smoothed, tile, tiles
from .folder import Experiment, Run
from .markup import Content, Markup, element, number, table

_GAMMA = ("Covariance trace Γ", "loss² / parameter²")
_NOISE = "Gradient noise scale"
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


def _tiles_of_one(run: Run) -> Markup:
    tests = run.points("test_loss")
    accuracy = run.points("test_accuracy")
    cost = run.record.get("seconds_per_step", {})
    return tiles(
        [
            at_the_end("Training loss", run.points("loss")),
            tile("Test loss", number(tests[-1][1], 3), f"lowest {number(min(v for _, v in tests), 3)}")
            if tests
            else None,
            tile("Test accuracy", f"{100 * accuracy[-1][1]:.2f} %") if accuracy else None,
            at_the_end("Γ", run.points("covariance_trace")),
            at_the_end("Noise scale", run.points("noise_scale"), "averaged over steps"),
            tile("Time of a step", f"{number(cost['ratio'], 3)}×", "of a plain step") if cost.get("ratio") else None,
        ]
    )


def _charts_of_one(run: Run) -> list[Markup | None]:
    return [
        chart("loss", "Loss", "", [*course("training", run.points("loss"), 0), _tests(run)]),
        chart("trace", *_GAMMA, course("Γ", run.points("covariance_trace"), 2)),
        noise_chart("noise", _NOISE, [Line("averaged over steps", run.all_points("noise_scale"), 3)], "steps"),
        chart(
            "sq-mean", "Squared norm of the gradient, ‖ḡ‖²", _GAMMA[1], course("‖ḡ‖²", run.points("sq_mean_norm"), 0)
        ),
        *(
            chart(name, title, _GAMMA[1], course(name, run.points(name), k), f"λ is {number(_strength(run, name))}.")
            for k, (name, title) in enumerate(_NAMES.items())
            if _strength(run, name)
        ),
    ]


def _strength(run: Run, penalty: str) -> float:
    return float(run.settings.get(penalty) or 0)


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
    def of_batches(name: str, title: str, unit: str, column: str) -> Markup | None:
        points, are_smooth = _alike(runs, column)
        lines = [Line(runs[k].name, found, k % 5) for k, found in points.items()]
        return chart(name, f"{title}, {'smoothed' if are_smooth else 'each batch'}", unit, lines)

    tests = [Line(run.name, run.points("test_loss"), k % 5) for k, run in enumerate(runs)]
    noise = [Line(run.name, run.all_points("noise_scale"), k % 5) for k, run in enumerate(runs)]
    return [
        of_batches("loss", "Training loss", "", "loss"),
        chart("test-loss", "Test loss", "", tests),
        of_batches("trace", *_GAMMA, "covariance_trace"),
        noise_chart("noise", _NOISE, noise, "steps"),
        *(of_batches(name, title, _GAMMA[1], name) for name, title in _NAMES.items()),
    ]


def _alike(runs: Sequence[Run], column: str) -> tuple[dict[int, Points], bool]:
    """A column by the numbers of the runs that have it, smoothed where all can be, and whether it is."""
    asked = [k for k, run in enumerate(runs) if column not in _NAMES or _strength(run, column)]
    each: dict[int, Points] = {k: points for k in asked if (points := runs[k].points(column))}
    means: dict[int, Points] = {k: mean for k, points in each.items() if (mean := smoothed(points))}
    return (means, True) if each and len(means) == len(each) else (each, False)


def _ends(runs: Sequence[Run]) -> Markup:
    rows: list[list[Content]] = []
    losses, are_losses_smooth = _alike(runs, "loss")
    traces, are_traces_smooth = _alike(runs, "covariance_trace")
    for k, run in enumerate(runs):
        tests, accuracy = run.points("test_loss"), run.points("test_accuracy")
        loss, trace = (found[k][-1][1] if k in found else math.nan for found in (losses, traces))
        noise = run.points("noise_scale")
        rows.append(
            [
                run.name,
                f"{run.settings.get('reg1', 0):g}",
                f"{run.settings.get('reg2', 0):g}",
                len(run.columns["step"]),
                loss,
                tests[-1][1] if tests else math.nan,
                f"{100 * accuracy[-1][1]:.2f} %" if accuracy else "–",
                trace,
                noise[-1][1] if noise else math.nan,
            ]
        )
    header = ("run", "λ₁", "λ₂", "steps", "training loss", "test loss", "test accuracy", "Γ", "noise scale")
    smooth = [name for name, is_so in (("training loss", are_losses_smooth), ("Γ", are_traces_smooth)) if is_so]
    some = f"; smoothed: {' and '.join(smooth)}" if smooth else ""
    return table("runs-table", f"The runs at their end{some}", header, rows)


def settings_table(runs: Sequence[Run], experiment: Experiment | None) -> Markup:
    """Settings, and what they were run on."""
    if experiment is not None:
        options = experiment.record.get("experiment", {})
        rows = [[str(name), _text(value)] for name, value in options.items()]
        places = [(str(found.get("date", k)), found) for k, found in enumerate(experiment.record.get("places", []), 1)]
        options_table = table("settings-table", "Options of the experiment", ("option", "value"), rows, words=True)
        return element("div", options_table, _places(places), class_="pair")
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    header = ("setting", *(["value"] if len(runs) == 1 else [run.name for run in runs]))
    rows = [[name, *(_text(run.settings.get(name)) for run in runs)] for name in names]
    found = table("settings-table", "How it was run", header, rows, words=True)
    return element("div", found, _places([(run.name, run.record) for run in runs if run.record]), class_="pair")


def _places(records: Sequence[tuple[str, dict[str, Any]]]) -> Markup | None:
    """What runs of these names were run on: in one column where that is the same."""
    if not records:
        return None
    places = [_environment(record) for _, record in records]
    names = [name for name, _ in records]
    if all(place == places[0] for place in places):
        places, names = places[:1], ["value"]
    parts = list(dict.fromkeys(part for place in places for part in place))
    rows = [[part, *(place.get(part, "–") for place in places)] for part in parts]
    return table("places-table", "What it was run on", ("what", *names), rows, words=True)


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
