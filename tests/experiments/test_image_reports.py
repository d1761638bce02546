import pytest

from bootgrad.experiments.image_comparison import COLUMNS
from bootgrad.experiments.image_reports import against_sgd, intervals, lower, measured
from bootgrad.experiments.image_runs import MEASURES, Way
from bootgrad.experiments.table import Table

HERE = ("problem", *COLUMNS)


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
        ("test_loss", 1.0, "test loss of b, lr 0.1 − a, lr 0.3"),
        ("test_accuracy", 0.1, "test accuracy of a, lr 0.3 − b, lr 0.1"),
        ("gamma", 1.0, "log₁₀ Γ of b, lr 0.1 − a, lr 0.3"),
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


@pytest.mark.parametrize("times", [(), ("sgd, time of a",)], ids=["epochs", "times"])
def test_a_way_is_compared_with_what_was_run(times):
    table = Table(HERE, [row for way in ("a", "sgd", *times) for row in rows(way, 0.1, [1.0, 2.0])])
    found = against_sgd(table, [Way("a", reg1=1.0)], "4.2", {"problem": "p"}, "p: ")
    assert [claim.source for claim in found] == ["4.2", "4.2", "ours"] + 3 * len(times) * ["ours"]
    assert found[0].text == "p: a ends at a lower test loss than SGD of equal epochs"
    assert [claim.quantity.partition(" of ")[2] for claim in found] == [
        f"{pair}" for name in ("sgd", *times) for pair in (f"{name} − a", f"a − {name}", f"{name} − a")
    ]
