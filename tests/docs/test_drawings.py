"""The pages' drawings are what their script writes, text has room, and the units of steps are those of the cost model."""

import importlib.util
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bootgrad.costs import STEPS, Use
from bootgrad.planning import ConvLayer, LinearLayer

ROOT = Path(__file__).parents[2]
IMAGES, SCRIPT = ROOT / "docs/images", ROOT / "docs/site/drawings.py"
SVG = "{http://www.w3.org/2000/svg}"
WIDTH = 0.5  # of a letter of a narrow sans serif, to its size
ROOM = 6  # between text and an edge


@pytest.fixture(scope="module")
def drawings():
    """The script as a module; its neighbours are imported as they are when it runs."""
    spec = importlib.util.spec_from_file_location("docs_drawings", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


def names() -> list[str]:
    return sorted(path.stem for path in IMAGES.glob("*.svg"))


def parsed(name: str) -> ElementTree.Element:
    return ElementTree.parse(IMAGES / f"{name}.svg").getroot()


def extent(text: ElementTree.Element) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a text, at the least."""
    size, x, y = (float(text.get(name)) for name in ("font-size", "x", "y"))
    w = WIDTH * size * len(text.text)
    left = x - {"start": 0, "middle": w / 2, "end": w}[text.get("text-anchor")]
    return left, y - 0.7 * size, left + w, y


def place(shape: ElementTree.Element) -> tuple[float, float, float, float]:
    """The same of a rectangle."""
    x, y, w, h = (float(shape.get(name)) for name in ("x", "y", "width", "height"))
    return x, y, x + w, y + h


def inside(a, b, room: float = 0) -> bool:
    return a[0] >= b[0] + room and a[1] >= b[1] and a[2] <= b[2] - room and a[3] <= b[3]


def overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_the_images_are_what_the_script_writes(drawings, tmp_path, monkeypatch):
    monkeypatch.setattr(drawings, "IMAGES", tmp_path)
    drawings.main()
    written = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert written == {f"{name}.svg": (IMAGES / f"{name}.svg").read_text(encoding="utf-8") for name in names()}


@pytest.mark.parametrize("name", names())
def test_a_drawing_tells_what_it_shows_in_both_schemes(name):
    root = parsed(name)
    assert root.tag == f"{SVG}svg" and root.get("width") is None  # it scales
    labels = root.get("aria-labelledby").split()
    told = [next(e for e in root if e.get("id") == label) for label in labels]
    assert [e.tag for e in told] == [f"{SVG}title", f"{SVG}desc"]
    assert all(len(e.text) > 8 for e in told)
    style = root.find(f"{SVG}style").text
    light, _, dark = style.partition("@media (prefers-color-scheme: dark)")
    used = {c for e in root.iter() for c in e.get("class", "").split()}
    defined = set(re.findall(r"\.([a-z]+)", style.partition("text { font-family")[0]))
    assert used - defined <= {"box", "hollow", "dashed", "thin", "solid"}
    for kind in sorted(used & defined):
        assert re.search(rf"\.{kind}\b", light) and re.search(rf"\.{kind}\b", dark), kind


@pytest.mark.parametrize("name", names())
def test_text_has_room(name):
    root = parsed(name)
    page = tuple(map(float, root.get("viewBox").split()))
    texts = [(e.text, extent(e)) for e in root.iter(f"{SVG}text")]
    assert texts
    for text, of_text in texts:
        assert inside(of_text, page, ROOM), text
    for k, (text, of_text) in enumerate(texts):
        for other, of_other in texts[:k]:
            assert not overlap(of_text, of_other), (text, other)
    for group in root.iter(f"{SVG}g"):
        for text in group.iter(f"{SVG}text"):
            assert inside(extent(text), place(group.find(f"{SVG}rect")), 2), text.text
    labels = {id(text) for group in root.iter(f"{SVG}g") for text in group.iter(f"{SVG}text")}
    shapes = [place(r) for r in root.iter(f"{SVG}rect")]
    for text in root.iter(f"{SVG}text"):
        for shape in shapes:  # beside a shape or in it, and not across its edge
            if id(text) not in labels:
                assert inside(extent(text), shape) or not overlap(extent(text), shape), text.text


def test_every_image_is_on_a_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    assert [name for name in names() if f"images/{name}.svg)" not in pages] == []


def test_the_units_of_steps_are_those_of_the_cost_model(drawings):
    by_name = {step.name: step for step in STEPS}
    rank1 = Use(LinearLayer(4096, 1, 8192, 8192))
    tiles = Use(ConvLayer(256, 256, (256, 256), 256, (3, 3), (1, 1), (1, 1), (1, 1)))
    for name, *drawn in drawings.STEPS:
        for use, parts in zip((rank1, tiles), drawn, strict=True):
            assert by_name[name].time(use) / use.unit == pytest.approx(sum(parts), abs=0.1), name
