"""The Markdown of summaries as HTML: headings, paragraphs, lists, tables, bold, code; what is else in it stays text."""

import re
from collections.abc import Callable, Iterator

from .markup import Markup, element, joined, table

_INLINE = re.compile(r"\*\*(.+?)\*\*|`([^`]+)`|\[([^\]]+)\]\([^)]*\)")
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)$")


def html(text: str, name: str, picture: Callable[[str, str], Markup | None], level: int = 1) -> Markup:
    """A page of Markdown.

    Args:
        text: of it.
        name: that elements' names begin with.
        picture: of an alternative text and a path, the image's element.
        level: that is added to the headings'.
    """
    return joined(_blocks(text.splitlines(), name, picture, level))


def _blocks(lines: list[str], name: str, picture: Callable[[str, str], Markup | None], level: int) -> Iterator[Markup]:
    k = tables = 0
    heading = "Table"
    while k < len(lines):
        line = lines[k].strip()
        if not line:
            k += 1
        elif found := re.match(r"(#+) +(.*)", line):
            heading = found[2]
            yield element(f"h{min(6, len(found[1]) + level)}", inline(heading))
            k += 1
        elif line.startswith("|"):
            rows, k = _taken(lines, k, "|")
            tables += 1
            yield _table(rows, f"{name}-{tables}", heading)
        elif line.startswith("- "):
            items, k = _taken(lines, k, "- ")
            yield element("ul", (element("li", inline(item[2:])) for item in items))
        elif image := _IMAGE.match(line):
            shown = picture(image[1], image[2])
            if shown is not None:
                yield shown
            k += 1
        else:
            words, k = _paragraph(lines, k)
            yield element("p", inline(" ".join(words)))


def _taken(lines: list[str], k: int, start: str) -> tuple[list[str], int]:
    end = k
    while end < len(lines) and lines[end].strip().startswith(start):
        end += 1
    return [line.strip() for line in lines[k:end]], end


def _paragraph(lines: list[str], k: int) -> tuple[list[str], int]:
    end = k + 1
    while end < len(lines) and lines[end].strip() and not re.match(r"#+ |\||- |!\[", lines[end].strip()):
        end += 1
    return [line.strip() for line in lines[k:end]], end


def _table(lines: list[str], name: str, caption: str) -> Markup:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header, body = rows[0], [row for row in rows[1:] if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    return table(
        name, _bare(caption), [_bare(cell) for cell in header], ([_cell(cell) for cell in row] for row in body)
    )


def _cell(text: str) -> str | Markup:
    return inline(text) if _INLINE.search(text) else text


def _bare(text: str) -> str:
    return _INLINE.sub(lambda found: next(filter(None, found.groups())), text)


def inline(text: str) -> Markup:
    """A line's words, bold and code in it; of links the words."""
    parts: list[str | Markup] = []
    end = 0
    for found in _INLINE.finditer(text):
        bold, code, link = found.groups()
        parts += [
            text[end : found.start()],
            element("strong", bold) if bold else element("code", code) if code else link,
        ]
        end = found.end()
    return joined([*parts, text[end:]])
