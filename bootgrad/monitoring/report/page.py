"""A folder's page: what there is to know at a glance, what is wrong, then pictures and tables of all of it.

The page asks for nothing from outside, which its own policy says, too, and has no scripts.
"""

import base64
import math
from collections.abc import Iterator
from pathlib import Path

from ...errors import ArgumentError
from ...training.checkpoint import replacing
from ..writers import first_line
from .charts import gallery
from .folder import FIGURE, Experiment, Folder, read
from .markdown import html
from .markup import Content, Markup, details, element, joined, number, table
from .observed import observed
from .style import STYLE
from .trained import settings_table, trained

REPORT = "report.html"
_DOCTYPE = "<!DOCTYPE html>"
_FOOTER = (
    "Made by bootgrad report. Γ is the trace of the covariance of the per-sample gradients; the noise scale is Γ by "
    "the squared norm of the gradient, from unbiased parts averaged over steps."
)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Section:
    """A part of the page, with a name for links."""

    def __init__(self, name: str, title: str, *children: Content):
        """Keep them."""
        self.name, self.title, self.children = name, title, children


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        folder: as ``bootgrad train``, ``compare`` or ``experiment`` has left it, or with a JSONL or CSV file of a `Monitor`; or
            such a file.
        out: the page's file; when None ``report.html`` in the folder, or beside a file one of its name that ends in ``.html``.

    Returns:
        The file.

    Raises:
        DataError: the folder or file holds no run, or one that cannot be read; the page cannot be written.
        ArgumentError: the page would take the place of a file that is none.
    """
    source = Path(folder)
    text = report(source)
    beside = source.with_suffix(".html") if source.is_file() else source / REPORT
    path = Path(out) if out is not None else beside
    if path.is_file() and not first_line(path).startswith(_DOCTYPE):
        raise ArgumentError(f"{path} is there, and is no page: choose another file, by --out")
    with replacing(path) as file:
        file.write(text.encode())
    return path


def report(folder: str | Path) -> str:
    """The page of a run, as HTML."""
    found = read(Path(folder))
    sections = list(_sections(found))
    title = found.experiment.name if found.experiment else found.path.resolve().name
    kind, lead = _lead(found)
    links = (element("li", element("a", s.title, href=f"#{s.name}")) for s in sections)
    body = (
        element("a", "Skip to the content", href="#content", class_="skip"),
        element(
            "header",
            element("p", kind, class_="kicker"),
            element("h1", title),
            element("p", lead, class_="lead"),
            element("nav", element("ul", links), aria_label="Sections"),
        ),
        element("main", map(_section, sections), id="content", tabindex="-1"),
        element("footer", element("p", _FOOTER)),
    )
    head = (
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title}: bootgrad report"),
        element("style", Markup(STYLE)),
    )
    return f"{_DOCTYPE}\n" + element("html", element("head", head), element("body", body), lang="en") + "\n"


def _section(section: Section) -> Markup:
    title = f"{section.name}-title"
    heading = element("h2", section.title, id=title)
    return element("section", heading, section.children, id=section.name, aria_labelledby=title)


def _lead(found: Folder) -> tuple[str, str]:
    """What kind of folder it is, and a sentence about it."""
    if found.experiment:
        options = found.experiment.record.get("experiment", {})
        form = "in its long form" if options.get("full") else "in its quick form"
        return (
            "bootgrad experiment",
            f"{found.experiment.count} rows of results, {options.get('seeds', '?')} seeds, {form}.",
        )
    if found.runs:
        names = ", ".join(run.name for run in found.runs)
        steps = max(len(run.columns["step"]) for run in found.runs)
        if len(found.runs) > 1:
            return "bootgrad compare", f"{len(found.runs)} runs of up to {steps} steps each: {names}."
        s = found.runs[0].settings
        return (
            "bootgrad train",
            f"{steps} steps on {s.get('data')}, batches of {s.get('batch_size')}, {s.get('optimizer')} at {s.get('lr')}.",
        )
    rows = [row for file in found.observations.values() for row in file]
    numbers = [row["step"] for row in rows]
    if len(rows) == 1:
        return "bootgrad monitor", f"1 observation, of step {numbers[0]}."
    return "bootgrad monitor", f"{len(rows)} observations of steps {min(numbers)} to {max(numbers)}."


def _sections(found: Folder) -> Iterator[Section]:
    if found.runs:
        parts = trained(found.runs)
        yield Section("overview", "Overview", parts.tiles)
        yield Section("findings", "Findings", _findings(found.path))
        yield Section("course", "Course of the run", gallery(parts.charts))
        yield Section("epochs", "Epochs" if len(found.runs) == 1 else "Runs at their end", *parts.tables)
    if found.experiment:
        yield Section("findings", "Findings", _findings(found.path))
        yield Section("summary", "Summary", _summary(found.path, found.experiment))
        yield Section("results", "Results", _results(found.experiment))
    for k, (name, rows) in enumerate(found.observations.items()):
        prefix = "monitor" if k == 0 else f"monitor-{k + 1}"
        is_alone = len(found.observations) == 1
        title = "Monitor" if is_alone else f"Monitor, {name}"
        seen = observed(rows, prefix, "" if is_alone and not found.runs else f", {name}")
        yield Section(prefix, title, seen.tiles, element("div", gallery(seen.charts), class_="course"))
        yield Section(f"{prefix}-flags", f"{title}: flags", seen.flags)
        if seen.layers:
            yield Section(f"{prefix}-layers", f"{title}: layers", seen.layers)
        if seen.outliers:
            yield Section(f"{prefix}-outliers", f"{title}: outlying samples", seen.outliers)
    if found.runs or found.experiment:
        yield Section("settings", "Settings", settings_table(found.runs, found.experiment))


def _findings(folder: Path) -> Markup:
    """What ``bootgrad diagnose`` finds."""
    try:
        from ...diagnosis import SIGNATURES, diagnose
    except ImportError as error:
        raise ArgumentError(f"the findings of a run need {error.name}: pip install 'bootgrad[cli]'") from error
    found = diagnose(folder)
    if not found:
        text = "No signature of failure was found by bootgrad diagnose."
        return element("div", element("div", element("p", text), class_="finding none"), class_="findings")
    cards = []
    *_, not_judged = SIGNATURES  # the last one is of what was not looked for
    for finding in found:
        meaning, advice = SIGNATURES[finding.signature]
        kind = "finding unjudged" if finding.signature == not_judged else "finding"
        title = f"{finding.where}: {finding.signature}" if finding.where else finding.signature
        words = (("Seen", finding.seen), ("Meaning", meaning), ("Try", advice))
        lines = (element("p", element("strong", f"{name}: "), text) for name, text in words)
        cards.append(element("div", element("h3", title), lines, class_=kind))
    return element("div", cards, class_="findings")


def _summary(folder: Path, experiment: Experiment) -> Markup:
    if not experiment.summary:
        return element("p", "The experiment has not come to its end, which writes a summary.")

    def picture(alternative: str, path: str) -> Markup | None:
        file = folder / FIGURE
        if path != FIGURE or not file.is_file():
            return None
        data = base64.b64encode(file.read_bytes()).decode()
        text = f"Figure of the experiment {experiment.name}: the numbers of the tables under “Measured”, drawn"
        return element("p", element("img", src=f"data:image/png;base64,{data}", alt=text))

    lines = experiment.summary.splitlines()
    title = lines[0].lstrip("# ") if lines[:1] and lines[0].startswith("#") else ""
    rest = html("\n".join(lines[1:] if title else lines), "summary", picture)
    return joined([element("p", element("strong", title)) if title else None, rest])


def _results(experiment: Experiment) -> Markup:
    shown = len(experiment.rows)
    some = "" if shown == experiment.count else f", the first {shown} of {experiment.count}"
    rows = [[_short(cell) for cell in row] for row in experiment.rows]
    whole = table("results-table", f"Rows of results.csv{some}", experiment.header, rows)
    return details(f"Rows of results.csv ({experiment.count})", whole)


def _short(cell: str) -> str:
    try:
        value = float(cell)
    except ValueError:
        return cell or "–"
    return cell if math.isfinite(value) and value == int(value) and "." not in cell else number(value)
