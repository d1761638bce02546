"""What tests of experiments share."""

import matplotlib.image
import pytest

from bootgrad.experiments import conduct
from bootgrad.experiments.image_comparison import final
from bootgrad.experiments.image_runs import MEASURES
from bootgrad.experiments.study import RESULTS, Options
from bootgrad.experiments.table import Table


@pytest.fixture(scope="module")
def conducted(tmp_path_factory):
    """A function that runs the quick form of an experiment with two seeds, and gives its table and its claims by text."""

    def run(name):
        out = tmp_path_factory.mktemp(name)
        page = conduct.conduct(Options(name, seeds=2, threads=1), out).read_text()
        experiment = conduct.find(name)
        table = Table.read(out / RESULTS, experiment.COLUMNS)
        claims = {claim.text: claim for claim in experiment.claims(table)}
        assert page.startswith(f"# {name}: ") and page.count("| **") == len(claims)
        assert matplotlib.image.imread(out / "figure.png").std() > 0
        assert all(set(MEASURES) < set(row) and row["seed"] in (0, 1) for row in final(table))
        return table, claims

    return run
