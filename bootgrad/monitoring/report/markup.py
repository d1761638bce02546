"""HTML in which nothing that comes from outside is markup: text is escaped unless it was made here.

Tables can be scrolled by keyboard, and have a caption; numbers are short, and aligned.
"""

import math
import re
from collections.abc import Iterable, Sequence
from html import escape

_EMPTY = {"img", "meta", "path", "line", "br", "rect"}
_NUMBER = re.compile(r"[-−–∞\d][-−–∞\d.,e+·⁻⁰¹²³⁴-⁹ %×\[\]]*")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Markup(str):
    """Text that is HTML."""

    def __html__(self) -> "Markup":
        """Itself."""
        return self


Content = str | float | None
Nested = Content | Iterable["Nested"]


def element(name: str, /, *children: Nested, **attributes: Content) -> Markup:
    """An element, its children and attributes escaped where they are not `Markup`.

    ``class_`` is the attribute class, and other underscores are hyphens; an attribute of None is left out.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = "".join(f' {key}="{escape(str(value))}"' for key, value in given.items())
    if name in _EMPTY:
        return Markup(f"<{name}{opening}>" if name in ("img", "meta", "br") else f"<{name}{opening}/>")
    return Markup(f"<{name}{opening}>{joined(children)}</{name}>")


def joined(children: Iterable[Nested]) -> Markup:
    """Children one after the other."""
    parts = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(str(child))
        elif child is None:
            continue
        elif isinstance(child, str | float | int):
            parts.append(escape(str(child)))
        else:
            parts.append(joined(child))
    return Markup("".join(parts))


def number(value: float | None, digits: int = 4) -> str:
    """A number in so many significant digits; a dash where it is not known."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}g}"
    mantissa, _, exponent = text.partition("e")
    if exponent and 0 < int(exponent) < 6:
        return f"{float(text):,.0f}".replace("-", "−")
    if exponent:
        return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}".replace("-", "−")
    return text.replace("-", "−")


def table(
    name: str, caption: str, header: Sequence[str], rows: Iterable[Sequence[Content]], words: bool = False
) -> Markup:
    """A table whose first cells name the rows.

    Args:
        name: of the page's element, a word.
        caption: what is in it.
        header: the columns' names.
        rows: cells: text, numbers or markup.
        words: whether cells are words, or of all kinds, so that none is put to the right.
    """
    rows = list(rows)
    right = [not words and _are_numbers(row[k] for row in rows) for k in range(len(header))]
    classes = ["n" if is_right and k else None for k, is_right in enumerate(right)]
    head = element("tr", (element("th", h, scope="col", class_=c) for h, c in zip(header, classes, strict=True)))
    body = (
        element(
            "tr",
            element("th", row[0], scope="row"),
            (element("td", _shown(cell), class_=c) for cell, c in zip(row[1:], classes[1:], strict=True)),
        )
        for row in rows
    )
    label = f"{name}-caption"
    whole = element(
        "table", element("caption", element("span", caption), id=label), element("thead", head), element("tbody", body)
    )
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_labelledby=label)


def _shown(cell: Content) -> Content:
    return number(cell) if cell is None or isinstance(cell, float) else cell


def _are_numbers(cells: Iterable[Content]) -> bool:
    """Whether all cells of a column are numbers or dashes, as intervals are, too."""
    return all(not isinstance(cell, str) or bool(_NUMBER.fullmatch(cell)) for cell in cells)


def details(summary: str, *children: Nested) -> Markup:
    """What is shown on demand."""
    return element("details", element("summary", summary), children)
