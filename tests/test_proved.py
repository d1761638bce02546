import json
from types import SimpleNamespace

import pytest

from . import proved


def item(name, marked=True):
    return SimpleNamespace(
        nodeid=name, get_closest_marker=lambda mark: object() if marked and mark == proved.MARK else None
    )


@pytest.fixture
def record(tmp_path, monkeypatch):
    path = tmp_path / "proved.json"
    monkeypatch.setattr(proved, "RECORD", path)
    return path


ITEMS = [
    item("a.py::plain", marked=False),
    *(item(f"a.py::f[{k}]") for k in range(20)),
    item("a.py::g[0]"),
    item("a.py::h"),
]


def write(path, **changed):
    path.write_text(json.dumps({"digest": proved.digest(), "triton": proved._triton()} | changed))


def test_all_run_where_nothing_is_known_or_something_changed(record):
    assert proved.select(ITEMS, False) == (ITEMS, [])
    for changed in ({"digest": "0" * 64}, {"triton": "1.0"}):
        write(record, **changed)
        assert proved.select(ITEMS, False) == (ITEMS, [])


def test_some_of_each_test_run_where_all_have_passed(record):
    write(record)
    run, left = proved.select(ITEMS, False)
    names = [each.nodeid for each in run]
    assert names == ["a.py::plain", "a.py::f[0]", "a.py::f[8]", "a.py::f[16]", "a.py::g[0]", "a.py::h"]
    assert len(run) + len(left) == len(ITEMS)
    assert proved.select(ITEMS, True) == (ITEMS, [])


def test_the_digest_is_of_the_files(monkeypatch, tmp_path):
    for folder in ("kernels", "tests/kernels", "tests/cuda"):
        (tmp_path / folder).mkdir(parents=True)
    kernel = tmp_path / "kernels/a.py"
    kernel.write_text("x = 1")
    monkeypatch.setattr(proved, "ROOT", tmp_path)
    first = proved.digest()
    assert proved.digest() == first
    kernel.write_text("x = 2")
    second = proved.digest()
    kernel.rename(tmp_path / "kernels/b.py")
    assert len({first, second, proved.digest()}) == 3
