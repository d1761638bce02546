"""The report for people, in Markdown."""

from collections import defaultdict
from typing import Any

from .rows import COLUMNS, WRONG, Row

TITLES = {
    "correctness": "Right or wrong",
    "ceilings": "Ceilings",
    "ops": "Ops",
    "steps": "Whole steps",
    "capture": "CUDA graphs",
    "tune": "Configurations",
    "sanitize": "compute-sanitizer",
}
NAMES = {"microseconds": "µs", "percent": "% of ceiling", "memory_mib": "MiB", "memory_ratio": "memory ratio"}
SHOWN = {
    "ops": "subject case backend dtype status microseconds low high bytes operations percent ratio detail",
    "steps": "subject case backend status microseconds ratio ratio_low ratio_high memory_mib memory_ratio error detail",
    "ceilings": "subject case dtype status microseconds bytes operations detail",
}


def render(machine: dict[str, Any], rows: list[Row]) -> str:
    """The whole page."""
    lines = [f"# bootgrad on {machine['device']}", ""]
    lines += _table(("what", "value"), [[str(name), str(value)] for name, value in machine.items()])
    sections = dict.fromkeys([*TITLES, *(row["section"] for row in rows)])
    for section in sections:
        own = [row for row in rows if row["section"] == section]
        if own:
            lines += ["", f"## {TITLES.get(section, section)}", ""]
            lines += _correctness(own) if section == "correctness" else _plain(own, section)
    return "\n".join(lines) + "\n"


def _correctness(rows: list[Row]) -> list[str]:
    """One line for each op, backend and dtype, and every row that is not right."""
    groups = defaultdict(list)
    for row in rows:
        if row["status"] == "ok":
            groups[row["subject"], row["backend"], row["dtype"]].append(row)
    lines = _table(
        ("op", "backend", "dtype", "cases", "largest error", "bound"),
        [
            [*key, str(len(own)), max((r["error"] for r in own), key=float), own[0]["bound"]]
            for key, own in groups.items()
        ],
    )
    others = [row for row in rows if row["status"] != "ok"]
    wrong = sum(row["status"] in WRONG for row in others)
    lines += ["", f"{len(rows) - len(others)} cases right, {wrong} wrong, {len(others) - wrong} not computed."]
    return lines + ["", *_plain(others, "correctness")] if others else lines


def _plain(rows: list[Row], section: str) -> list[str]:
    default = [name for name in COLUMNS[COLUMNS.index("subject") :] if any(row[name] for row in rows)]
    names = SHOWN[section].split() if section in SHOWN else default
    names = [name for name in names if any(row[name] for row in rows)]
    return _table([NAMES.get(name, name) for name in names], [[row[name] for name in names] for row in rows])


def _table(header, rows) -> list[str]:
    lines = [list(header), ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
