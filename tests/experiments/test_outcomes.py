import math

import pytest

from bootgrad.experiments import conduct
from bootgrad.experiments.conduct import EXPERIMENTS
from bootgrad.experiments.outcomes import compare, outcomes
from bootgrad.experiments.table import Table

COLUMNS = ("size", "stage", "way", "lr", "strength", "seed", "step", "validation_loss", "test_loss")


def row(size, stage, way, setting, seed, loss, step=1, validation=0.0):
    values = (size, stage, way, *setting, seed, step, validation, loss)
    return dict(zip(COLUMNS, values, strict=True))


def two_ways(first, second):
    """A problem of two ways, with test losses by seed."""
    rows = [row(1, "final", way, (0.1, 0.0), s, x) for way, by in (("a", first), ("b", second)) for s, x in by.items()]
    (problem,) = outcomes(Table(COLUMNS, rows))
    return problem


def test_losses_by_problem_way_setting_and_seed():
    rows = [
        row(size, "final", "sgd", (0.1, 0.0), seed, loss, step)
        for size, losses in ((8, (5.0, 1.0)), (16, (6.0, 2.0)))
        for seed in (3, 0)
        for step, loss in zip((1, 2), losses, strict=True)
    ]
    rows.append(row(8, "search 1", "sgd", (0.3, 0.0), 1000, 0.0))
    rows.append(row(8, "covariance", "sgd", (0.1, 0.0), 7, math.nan))
    small, large = outcomes(Table(COLUMNS, rows))
    assert (small.where, large.where, small.names) == ("size 8", "size 16", ("lr", "strength"))
    assert small.losses == {"sgd": {(0.1, 0.0): {3: 1.0, 0: 1.0}}}
    assert large.of("sgd") == {3: 2.0, 0: 2.0}
    assert outcomes(Table(COLUMNS, rows[-2:])) == []


def test_runs_of_which_none_has_a_loss_are_final_all_the_same():
    (problem,) = outcomes(Table(COLUMNS, [row(8, "final", "sgd", (0.1, 0.0), 0, math.nan)]))
    assert problem.where == "" and math.isnan(problem.of("sgd")[0])


def test_the_chosen_setting_is_that_of_the_last_round_of_the_search():
    a, b, c = (0.1, 0.0), (0.3, 0.0), (1.0, 0.0)
    rows = [row(8, "search 1", "sgd", setting, 0, 0.0, validation=v) for setting, v in ((a, 1.0), (b, 2.0), (c, 3.0))]
    rows += [
        row(8, "search 2", "sgd", setting, s, 0.0, validation=v) for setting, v in ((a, 2.0), (b, 1.0)) for s in (0, 1)
    ]
    rows += [row(8, "final", "sgd", setting, 0, loss) for setting, loss in ((c, 0.1), (a, 0.2), (b, 0.3))]
    (problem,) = outcomes(Table(COLUMNS, rows))
    assert problem.chosen("sgd") == {"lr": 0.3, "strength": 0.0} and problem.of("sgd") == {0: 0.3}
    assert problem.of("sgd", lr=1.0) == {0: 0.1}


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        ({"gd": 0.0, "gd + reg1": 0.1, "sgd 4": 0.0}, {"gd + reg1": "gd"}),
        ({"sgd": 0.0, "sgd, time of reg1": 0.0, "reg1": 0.1, "reg1 + reg2, share": 0.3},
         {"reg1": "sgd", "reg1 + reg2, share": "sgd"}),
        ({"reg1": 0.1, "both": 0.1}, {}),
    ],
)  # fmt: skip
def test_what_a_penalty_is_added_to(ways, expected):
    rows = [row(8, "final", way, (0.1, strength), 0, 1.0) for way, strength in ways.items()]
    (problem,) = outcomes(Table(COLUMNS, rows))
    assert {way: other for way in ways if (other := problem.without(way))} == expected


def test_the_best_is_of_those_that_did_not_diverge():
    problem = two_ways({0: 0.1, 1: math.inf}, {0: 2.0, 1: 3.0})
    assert problem.best(problem.losses) == "b"
    assert problem.best(["a"]) is None


def test_the_best_is_chosen_by_scores_where_all_have_them():
    rows = [row(8, "final", way, (0.1, 0.0), 0, loss) for way, loss in (("a", 1.0), ("b", 2.0))]
    searches = [
        row(8, "search 1", way, (0.1, 0.0), 1000, math.nan, validation=v) for way, v in (("a", 2.0), ("b", 1.0))
    ]
    for searched, best in ((searches, "b"), (searches[:1], "a"), ([], "a")):
        (problem,) = outcomes(Table(COLUMNS, [*rows, *searched]))
        assert problem.best(["a", "b"]) == best


def test_ways_are_compared_on_the_seeds_of_both():
    found = compare(two_ways({0: 1.0, 1: 2.0, 2: 4.0}, {2: 2.0, 1: 1.0, 3: 9.0}), "a", "b")
    assert (found.difference.mean, found.difference.n, found.scale) == (1.5, 2, 1.5)
    assert found.log_ratio.mean == found.log_ratio.low == pytest.approx(math.log(2))
    assert found.is_worse and found.is_apart and not found.is_alike and not found.is_no_worse
    assert compare(two_ways({0: 1.0, 1: 2.0}, {1: 2.0, 2: 2.0}), "a", "b") is None
    assert compare(two_ways({0: 1.0, 1: math.nan}, {0: 2.0, 1: 2.0}), "a", "b") is None


def test_losses_that_are_not_positive_have_no_ratio():
    found = compare(two_ways({0: -1.0, 1: -2.0, 2: 0.0}, {0: 0.0, 1: -1.0, 2: 1.0}), "a", "b")
    assert found.log_ratio.n == 0 and found.difference.mean == -1.0
    assert found.is_apart and not found.is_worse and "ratio" not in str(found)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_columns_in_the_order_that_is_read(name):
    columns = conduct.find(name).COLUMNS
    way = "method" if "method" in columns else "way"
    places = [columns.index(column) for column in ("stage", way, "lr", "strength", "seed", "test_loss")]
    assert places == sorted(places)


def test_a_table_of_other_columns_is_refused():
    with pytest.raises(ValueError, match="it lacks method, seed, validation_loss, test_loss"):
        outcomes(Table(("stage", "trace"), []))
