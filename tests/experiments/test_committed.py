"""The committed long forms: their pages are what their tables say, and what docs quote of them."""

import json
import re
from pathlib import Path

import matplotlib.image
import pytest

from bootgrad.experiments import conduct
from bootgrad.experiments.study import RECORD, RESULTS, Options, Study

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "benchmarks" / "results" / "experiments"
PAGE, ADVICE = ROOT / "docs" / "experiments.md", ROOT / "docs" / "worth.md"
FOLDERS = sorted(path.name for path in RUNS.iterdir() if (path / "summary.md").exists())


def verdicts(text):
    """{(claim, mean and interval): verdict} of the rows of tables that end in a verdict."""
    rows = (line.strip("| \n").split(" | ") for line in text.splitlines() if line.endswith("** |"))
    return {(cells[0], cells[-2]): cells[-1] for cells in rows}


@pytest.fixture(params=FOLDERS)
def folder(request):
    return RUNS / request.param


def test_a_page_is_what_its_table_says(folder, tmp_path):
    """Nothing is computed anew: a call for a row that is not stored would fail for want of a setting."""
    (tmp_path / RESULTS).write_bytes((folder / RESULTS).read_bytes())
    (tmp_path / RECORD).write_bytes((folder / RECORD).read_bytes())
    options = Options(**json.loads((folder / RECORD).read_text())["experiment"] | {"threads": None})
    experiment = conduct.find(options.name)
    study = Study(options, experiment.COLUMNS, tmp_path)
    page = conduct.summary(experiment, study)
    assert page == (folder / "summary.md").read_text()
    assert all(line.count("|") == 6 for line in page.splitlines() if line.endswith("** |"))
    assert options.full and options.seeds >= 5
    assert matplotlib.image.imread(folder / "figure.png").std() > 0


def test_nothing_of_the_machine_is_told_but_its_kind(folder):
    text = (folder / RECORD).read_text() + (folder / "summary.md").read_text()
    assert not re.search(r"/(work|home|root|tmp|opt)/", text)


def sections():
    parts = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {match[1]: part for part in parts if (match := re.match(r"`([\w-]+)`", part))}


def test_every_page_is_quoted(folder):
    own = [part for part in sections().values() if f"experiments/{folder.name}/summary.md" in part]
    assert len(own) == 1 and f"experiments/{folder.name}/figure.png" in own[0]


@pytest.mark.parametrize("name", conduct.EXPERIMENTS)
def test_quotations_are_right(name):
    part = sections()[name]
    quoted = verdicts(part)
    found = {}
    for path in re.findall(r"experiments/([\w-]+)/summary\.md", part):
        found |= verdicts((RUNS / path / "summary.md").read_text())
    assert quoted and quoted.items() <= found.items()


def test_advice_rests_on_what_was_measured():
    found = {}
    for folder in FOLDERS:
        found |= verdicts((RUNS / folder / "summary.md").read_text())
    quoted = verdicts(ADVICE.read_text())
    assert quoted and quoted.items() <= found.items()
