"""The tables of docs/numerics.md are the stored measurements'."""

import csv
import re

from .test_blocks import ROOT

DTYPES = ("float64", "float32", "bfloat16", "float16")


def stored(name: str) -> list[dict]:
    with (ROOT / "benchmarks/results" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rows_of_page(columns: int) -> list[list[str]]:
    text = (ROOT / "docs/numerics.md").read_text(encoding="utf-8")
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.MULTILINE)
    ]
    return [cells for cells in lines if len(cells) == columns and re.fullmatch(r"\d\.\de[+-]\d\d", cells[-1])]


def test_errors_of_the_ops():
    rows = [row for row in stored("numerics.csv") if not row["over"]]
    kinds = dict.fromkeys((row["layer"], row["op"]) for row in rows)
    expected = [
        [layer, op, *(f"{worst(rows, layer=layer, op=op, dtype=dtype):.1e}" for dtype in DTYPES)] for layer, op in kinds
    ]
    assert len(expected) == 15 and rows_of_page(6) == expected
    assert {row["backend"] for row in rows} == {"eager", "C++ baseline", "C++ avx2", "C++ avx512"}


def worst(rows: list[dict], **where: str) -> float:
    return max(float(row["error"]) for row in rows if where.items() <= row.items())


def test_errors_of_the_trace():
    rows = [row for row in stored("numerics_agreement.csv") if row["backend"] == "C++ avx512"]
    shown = rows_of_page(5)
    assert len(shown) == 8
    for ratio, *cells in shown:
        ways = [(path, way) for path in ("rank-1", "direct") for way in ("no center", "about ḡ")]
        assert cells == [f"{worst(rows, ratio=ratio, path=path, way=way):.1e}" for path, way in ways], ratio
