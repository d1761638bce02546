"""What a release says of itself, in every place where it says so."""

import re

import yaml

import bootgrad

from .docs.test_blocks import ROOT


def test_the_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", bootgrad.__version__)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == bootgrad.__version__ and citation["license"] == "BSD-3-Clause"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert re.search(
        r"^version = \{ attr = \"bootgrad.__version__\" \}$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )


def test_the_changelog_begins_with_what_is_next_or_with_this_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] in ("Unreleased", bootgrad.__version__) and len(headings) == len(set(headings))


def test_the_licence_is_named_and_there():
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("BSD 3-Clause License")
    assert 'license = "BSD-3-Clause"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_wheels_are_tried_on_every_supported_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text(encoding="utf-8"))
    tried = workflow["jobs"]["try"]["strategy"]["matrix"]
    lowest = re.search(r'requires-python = ">=(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    assert tried["python"][0] == lowest and tried["torch"][0] == "torch==2.11.*" and len(tried["python"]) == 4
