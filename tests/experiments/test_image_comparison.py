import math
from functools import partial

import pytest

from bootgrad.experiments.image_comparison import COLUMNS, Grid, Problem, compare, compare_all, final
from bootgrad.experiments.image_draws import draw
from bootgrad.experiments.image_runs import MEASURES, REG1, SGD
from bootgrad.experiments.study import Options, Study

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
    problem = Problem(
        **{**vars(problem), "share": 0.5, "search_seeds": (1000, 1002), "grid": Grid((0.1,), (0.01, 0.1))}
    )
    study = Study(Options("trial", seeds=2), HERE, tmp_path)
    compare(study, problem, REG1, 6.0)
    searched = [(seed, False, 32, epochs) for epochs in (2.0, 2.0, 6.0) for seed in (1000, 1002)]
    assert seen == searched + [(seed, True, 64, 6.0) for seed in (0, 1)]
    assert study.table.where(stage="search 2").column("validation_loss") == [1001.0]


def test_a_single_candidate_is_not_searched(problem, tmp_path):
    study = Study(Options("trial", seeds=2), HERE, tmp_path)
    problem = Problem(**{**vars(problem), "grid": Grid((0.1,), (0.01,))})
    for way in (SGD, REG1):
        compare(study, problem, way)
    assert len(study.table) == problem.calls((SGD, REG1), 2) == 4
    rows = final(study.table, way=REG1.name).rows
    assert [(row["seed"], row["lr"], row["strength"], row["reg1"]) for row in rows] == [
        (k, 0.1, 0.01, 0.01) for k in (0, 1)
    ]


def test_plain_training_is_given_the_same_time(problem, tmp_path, monkeypatch):
    def told(way, images, network, *, final, seed, **options):
        return {**dict.fromkeys(MEASURES, 1.0), "ratio": math.nan if way.is_plain else 3.0, "steps": options["epochs"]}

    monkeypatch.setattr("bootgrad.experiments.image_comparison.run", told)
    study = Study(Options("trial", seeds=2), HERE, tmp_path)
    other = Problem(**{**vars(problem), "settings": {"problem": "others"}})
    compare_all(study, [problem, other], (SGD, REG1), timed=(REG1,))
    assert study.table.values("way") == ["sgd", "reg1", "sgd, time of reg1"]
    for name in ("blobs", "others"):
        epochs = [final(study.table, problem=name, way=way).column("steps") for way in study.table.values("way")]
        assert epochs == [[2, 2], [2, 2], [6, 6]]
    assert len(study.table) == sum(p.calls((SGD, REG1, SGD), 2) for p in (problem, other))


def test_a_way_that_always_diverged_is_given_no_more_time(problem, tmp_path, monkeypatch):
    def told(way, images, network, *, final, seed, **options):
        return {**dict.fromkeys(MEASURES, math.inf), "ratio": math.nan, "steps": options["epochs"]}

    monkeypatch.setattr("bootgrad.experiments.image_comparison.run", told)
    study = Study(Options("trial", seeds=2), HERE, tmp_path)
    compare_all(study, [problem], (REG1,), timed=(REG1,))
    assert final(study.table, way="sgd, time of reg1").column("steps") == [2, 2]
