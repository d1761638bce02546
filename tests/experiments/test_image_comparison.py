import math
from functools import partial

import pytest

from bootgrad.experiments.image_comparison import COLUMNS, Grid, Problem, compare, final, intervals, lower, measured
from bootgrad.experiments.image_draws import draw
from bootgrad.experiments.image_runs import MEASURES, REG1, SGD
from bootgrad.experiments.study import Options, Study
from bootgrad.experiments.table import Table

from .images import blobs, network

HERE = ("problem", *COLUMNS)


def alike(image_shape, classes):
    return network()


@pytest.fixture
def problem():
    drawn = partial(draw, blobs(), 64)
    return Problem({"problem": "blobs"}, drawn, 16, 2, Grid((0.01, 0.1), (0.01, 0.1)), alike)


def test_a_way_is_searched_and_run(problem, tmp_path):
    study = Study(Options("trial", seeds=2), HERE, tmp_path)
    for way in (SGD, REG1):
        compare(study, problem, way)
    assert len(study.table) == problem.calls((SGD, REG1), 2) == (2 + 2) + (4 + 2 + 2)
    for way, rounds in ((SGD, (2, 0)), (REG1, (4, 2))):
        found = [study.table.where(way=way.name, stage=f"search {k}") for k in (1, 2)]
        assert tuple(map(len, found)) == rounds
        best = min(found[1] if len(found[1]) else found[0], key=lambda row: row["validation_loss"])
        rows = final(study.table, way=way.name)
        assert [row["seed"] for row in rows] == [0, 1]
        assert all((row["lr"], row["strength"]) == (best["lr"], best["strength"]) for row in rows)
        assert all(math.isnan(row["test_loss"]) for table in found for row in table)
        assert {row["steps"] for row in found[0]} == {8 if way is SGD else 3} and {row["steps"] for row in rows} == {8}


def test_a_search_may_have_part_of_the_images_and_several_seeds(problem, tmp_path, monkeypatch):
    seen = []

    def told(way, images, network, *, final, seed, **options):
        seen.append((seed, final, len(images.train[1]), options["epochs"]))
        return dict.fromkeys(MEASURES, float(seed))

    monkeypatch.setattr("bootgrad.experiments.image_comparison.run", told)
    problem = Problem(**{**vars(problem), "share": 0.5, "search_seeds": (1000, 1002), "grid": Grid((0.1,), (0.01,))})
    study = Study(Options("trial", seeds=2), HERE, tmp_path)
    compare(study, problem, REG1, 6.0)
    searched = [(seed, False, 32, epochs) for epochs in (2.0, 6.0) for seed in (1000, 1002)]
    assert seen == searched + [(seed, True, 64, 6.0) for seed in (0, 1)]
    assert study.table.where(stage="search 2").column("validation_loss") == [1001.0]


def rows(way, lr, losses, stage="final"):
    measures = dict.fromkeys(MEASURES, 0.5)
    return [
        {
            "stage": stage,
            "problem": "p",
            "way": way,
            "lr": lr,
            "strength": 0.0,
            "seed": k,
            **measures,
            "test_loss": loss,
        }
        | {"test_accuracy": 1 - loss / 10, "gamma": 10.0**loss}
        for k, loss in enumerate(losses)
    ]


@pytest.fixture
def table():
    searched = [row for lr in (0.01, 0.1, 0.3) for way in ("a", "b") for row in rows(way, lr, [1.0], "search 1")]
    return Table(HERE, [*searched, *rows("a", 0.3, [3.0, 1.0, 2.0])[::-1], *rows("b", 0.1, [4.1, 2.0, 2.9])])


@pytest.mark.parametrize(
    ("column", "mean", "quantity"),
    [
        ("test_loss", 1.0, "test loss of b − a"),
        ("test_accuracy", 0.1, "test accuracy of a − b"),
        ("gamma", 1.0, "log₁₀ Γ of b − a"),
    ],
)
def test_what_is_better_is_above_zero(table, column, mean, quantity):
    claim = lower(table, {"way": "a"}, {"way": "b"}, text="", source="ours", column=column)
    assert claim.found.mean == pytest.approx(mean) and claim.found.low > 0 and claim.quantity == quantity


def test_tables_show_all_and_say_where_a_search_ended_at_an_edge(table):
    text = measured(table, ("problem",))
    assert "| p | a | 0.3 | 0 | 2 [-0.484, 4.48] |" in text
    assert text.endswith("At an edge of what was searched: learning rate of p a.")
    assert {way: found.mean for way, found in intervals(table, "test_loss").items()} == pytest.approx({"a": 2, "b": 3})
