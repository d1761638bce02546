"""What ways of training compared on images say: claims, tables and figures of final runs."""

import math
from collections.abc import Iterable, Mapping, Sequence

from ..intervals import Interval, interval
from .conduct import markdown
from .evidence import Claim, difference
from .image_comparison import final, same_time
from .image_runs import SGD, Way
from .table import Table, Value

_HEADER = ("way", "learning rate", "s", "test loss", "accuracy", "gap", "test loss, stopped early", "training accuracy",
           "Γ", "time of a step")  # fmt: skip


def lower(table: Table, first: Mapping[str, Value], second: Mapping[str, Value], *, text: str, source: str,
          column: str = "test_loss") -> Claim:  # fmt: skip
    """A claim that a column is lower, or an accuracy higher, in the final rows of ``first`` than in those of ``second``.

    Γ, which spans decades, is compared by its logarithm. Learning rates are named where they differ.
    """
    rows = [final(table, **settings) for settings in (first, second)]
    columns = [own.column(column) for own in rows]
    kinds = [{**settings, "lr": own.rows[0]["lr"]} for settings, own in zip((first, second), rows, strict=True)]
    differing = [name for name in kinds[0] if name != "way" and kinds[0][name] != kinds[1][name]]
    names = [", ".join([str(kind["way"]), *(f"{n} {kind[n]}" for n in differing)]) for kind in kinds]
    name = column.replace("_", " ")
    if column == "gamma":
        columns = [[math.log10(value) if value > 0 else math.nan for value in values] for values in columns]
        name = "log₁₀ Γ"
    if column.endswith("accuracy"):
        columns, names = columns[::-1], names[::-1]
    return Claim(text, source, f"{name} of {names[1]} − {names[0]}", difference(columns[1], columns[0]))


def against_sgd(
    table: Table, ways: Iterable[Way], source: str, settings: Mapping[str, Value], prefix: str = ""
) -> list[Claim]:
    """Claims that each way does better than SGD of equal epochs, and than that of equal time where it was run.

    Args:
        table: of all rows.
        ways: to be compared with SGD.
        source: of the claims at the end of equal epochs; the others are ours.
        settings: the columns by which the problem is known.
        prefix: of the texts.
    """
    found = []
    for way in ways:
        for plain, when in ((SGD, "equal epochs"), (same_time(way), "equal time")):
            mine, theirs = ({**settings, "way": w.name} for w in (way, plain))
            if not len(final(table, **theirs)):
                continue
            kinds = [("test_loss", f"{way.name} ends at a lower test loss than SGD of {when}")]
            kinds.append(("test_accuracy", f"{way.name} ends at a higher accuracy than SGD of {when}"))
            kinds.append(("stopped_loss", f"{way.name} is better than SGD of {when} where validation stops both"))
            for column, text in kinds:
                from_them = plain is SGD and column != "stopped_loss"
                said = source if from_them else "ours"
                found.append(lower(table, mine, theirs, text=prefix + text, source=said, column=column))
    return found


def measured(table: Table, by: Sequence[str] = ()) -> str:
    """The final rows as Markdown: means over seeds of each way, for each value of the columns ``by``.

    Says of which ways the values lie at an edge of what was searched.
    """
    rows = []
    for settings in _kinds(table, (*by, "way")):
        mine = final(table, **settings)
        chosen = mine.rows[0]
        found = [interval(mine.column(name)) for name in ("test_loss", "test_accuracy", "gap", "stopped_loss")]
        found += [interval(mine.column(name)) for name in ("train_accuracy", "gamma", "ratio")]
        rows.append((*settings.values(), f"{chosen['lr']:g}", f"{chosen['strength']:g}", *found))
    return f"{markdown((*by, *_HEADER), rows)}\n\n{edges(table, by)}"


def edges(table: Table, by: Sequence[str] = (), strength: str = "s") -> str:
    """Says of which ways the final runs' values lie at an edge of what was searched; ``strength`` is what that is called."""
    found = []
    for settings in _kinds(table, (*by, "way")):
        chosen, searched = final(table, **settings).rows[0], table.where(stage="search 1", **settings)
        for name, symbol in (("lr", "learning rate"), ("strength", strength)):
            values = searched.column(name)
            if len(set(values)) > 1 and chosen[name] in (min(values), max(values)):
                found.append(f"{symbol} of {' '.join(str(value) for value in settings.values())}")
    return f"At an edge of what was searched: {', '.join(found) or 'nothing'}."


def draw_intervals(ax, found: Mapping[str, Interval], title: str, unit: str) -> None:
    """Means and intervals, one below the other; each its own marker and colour, in turn."""
    from ..training.figures import COLOURS

    markers = "osD^v<>P"
    for place, (name, at) in enumerate(found.items()):
        if math.isfinite(at.mean):
            error = [[at.mean - at.low], [at.high - at.mean]] if math.isfinite(at.low) else None
            style = {"color": COLOURS[place % len(COLOURS)], "marker": markers[place % len(markers)]}
            ax.errorbar([at.mean], [place], xerr=error, capsize=3, linestyle="", label=name, **style)
    ax.set(title=title, xlabel=unit, yticks=range(len(found)), yticklabels=list(found))
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.grid(True, axis="x", alpha=0.25)


def draw_problems(table: Table):
    """A figure of test losses and accuracies of all ways, a column for each problem of a table."""
    from ..training.figures import panels

    problems = final(table).values("problem")
    figure, axes = panels(2, len(problems), (5 * len(problems), 7), shared=False)
    for row, (column, title, unit) in enumerate(
        (("test_loss", "Test loss", "nats"), ("test_accuracy", "Accuracy", "share"))
    ):
        for ax, problem in zip(axes[row * len(problems) :], problems, strict=False):
            draw_intervals(ax, intervals(table, column, problem=problem), f"{title}: {problem}", unit)
    return figure


def intervals(table: Table, column: str, **settings: Value) -> dict[str, Interval]:
    """Mean and interval of a column of each way's final rows."""
    ways = final(table, **settings).values("way")
    return {str(way): interval(final(table, way=way, **settings).column(column)) for way in ways}


def _kinds(table: Table, columns: Sequence[str]) -> list[dict[str, Value]]:
    rows = table.where(stage="final")
    return [
        dict(zip(columns, key, strict=True)) for key in dict.fromkeys(tuple(row[c] for c in columns) for row in rows)
    ]
