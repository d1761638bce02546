"""The page of kernels: its contents are the schema's, its files exist, and its numbers are those that are stored."""

import csv
import re
from pathlib import Path

import pytest

from bootgrad.ops import schema
from bootgrad.ops.backends import triton

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks/results"
HEADERS = "csrc/include/bootgrad"
FOLDERS = ("bootgrad/ops/backends", HEADERS, "kernels", HEADERS)  # of plain torch, C++, Triton and CUDA


def table(text: str) -> list[list[str]]:
    """The cells of the first table in a text, without its head."""
    rows = re.search(r"(?:^\|.*\n?)+", text, re.MULTILINE).group().splitlines()
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]


def marked(name: str) -> list[tuple[list[str], list[list[str]]]]:
    """What is said in the marks of a file, and the table that follows each."""
    marks = re.finditer(rf"<!-- {re.escape(name)}(?:: (.*))? -->\n", PAGE)
    found = [((m.group(1) or "").split(", "), table(PAGE[m.end() :])) for m in marks]
    assert found, name
    return found


def stored(name: str) -> list[dict]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents() -> dict[str, list[list[str]]]:
    """By op, the files of each form."""
    part = re.search(r"<!-- ops: begin -->(.*)<!-- ops: end -->", PAGE, re.DOTALL).group(1)
    rows = table(part)
    found = {row[0].strip("`"): [re.findall(r"`([^`]+)`", cell) for cell in row[1:]] for row in rows}
    assert len(found) == len(rows)
    return found


def registered(folder: str) -> set[str]:
    """The ops that a library's sources register."""
    files = [path for pattern in ("*.cpp", "*.cu") for path in (ROOT / folder).glob(pattern)]
    return {name for path in files for name in re.findall(r'm\.impl\("(\w+)"', path.read_text(encoding="utf-8"))}


def test_the_contents_are_the_schema():
    schemas = [value for name, value in vars(schema).items() if name.endswith("SCHEMAS")]
    assert list(contents()) and set(contents()) == {name for of_some in schemas for name in of_some}


def test_the_forms_of_an_op_are_those_that_are_registered():
    for op, forms in contents().items():
        has = True, op in registered("csrc/cpu"), hasattr(triton, op), op in registered("csrc/cuda")
        assert tuple(bool(files) for files in forms) == has, op


def test_the_files_of_the_contents_are_there():
    for op, forms in contents().items():
        for folder, files in zip(FOLDERS, forms, strict=True):
            for name in files:
                assert (ROOT / folder / name).is_file(), (op, name)
        for name in forms[0]:
            assert re.search(rf"^def {op}\(", (ROOT / FOLDERS[0] / name).read_text(encoding="utf-8"), re.MULTILINE), op


def test_files_of_the_text_are_there():
    names = set(re.findall(r"`([\w/]+\.(?:py|hpp|cuh|csv))`", PAGE))
    assert names
    places = (*FOLDERS, "", "bootgrad/ops", "benchmarks/results")
    assert [name for name in sorted(names) if not any((ROOT / place / name).is_file() for place in places)] == []


def test_measured_products_are_stored():
    rows = stored("ceilings.csv")
    for (date, device, threads), cells in marked("ceilings.csv"):
        for layer, batch, op, path, *numbers in cells:
            of_op = [
                [row[name] for name in ("milliseconds", "gigaflops", "percent_of_rate")]
                for row in rows
                if (row["date"], row["device"], row["threads"]) == (date, device, threads)
                and (row["layer"], row["batch"], row["op"], row["path"]) == (layer, batch, op, path.strip("–"))
            ]
            assert numbers in of_op, (layer, op)


def test_rates_of_multiply_adds_are_stored():
    rates = {
        row["gigaflops"] for row in stored("ceilings.csv") if row["op"] == "multiply-adds" and row["threads"] == "1"
    }
    assert set(re.search(r"is ([\d.]+) GFLOP/s .*? and ([\d.]+) on", PAGE.replace("\n", " ")).groups()) <= rates


def test_measured_steps_are_stored():
    rows = stored("training_step.csv")
    for (date, model), cells in marked("training_step.csv"):
        for step, milliseconds, ratio, between in cells:
            of_step = [
                [row[name] for name in ("milliseconds", "ratio", "ratio_low", "ratio_high")]
                for row in rows
                if (row["date"], row["model"], row["step"]) == (date, model, step)
            ]
            assert [milliseconds, ratio, *between.split(" and ")] in of_step, (model, step)


def test_predictions_are_those_of_the_page_on_gpus():
    lines = (ROOT / "docs/gpu.md").read_text(encoding="utf-8").splitlines()
    pages = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    for _, cells in marked("gpu.md"):
        for layer, op, path, size, work, h100, h200 in cells:
            row = [layer, op, path.strip("–"), size, work, h100]
            assert any(page[:6] == row and page[7] == h200 for page in pages if len(page) == 10), (layer, op)


def test_what_kernels_take_is_stored():
    rows = [list(row.values()) for row in stored("kernel_resources.csv")]
    for (architecture,), cells in marked("kernel_resources.csv"):
        for kernel, numbers, *taken in cells:
            assert [kernel.strip("`"), numbers, architecture, *taken] in rows, kernel


@pytest.mark.parametrize("name", ["Gram matrices", "Attention", "Group norm", "Embeddings", "Max pooling"])
def test_a_family_has_a_drawing(name):
    section = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    (image,) = re.findall(r"!\[[^\]]+\]\((images/[\w-]+\.svg)\)", section)
    assert (ROOT / "docs" / image).is_file()
