"""The experiment on rules for λ: what is compared, what its claims say, and its quick form."""

import math

import pytest
import torch

from bootgrad.experiments import sparse_regression as sparse
from bootgrad.experiments import strength
from bootgrad.experiments.image_comparison import final
from bootgrad.experiments.image_runs import MEASURES
from bootgrad.experiments.strength import COLUMNS, PICTURES, SPARSE, claims, needed, tables
from bootgrad.experiments.study import Options, Study
from bootgrad.experiments.table import Table
from bootgrad.strengths import Bound, LookAhead, Share

from .images import blobs, network


@pytest.fixture
def problem():
    return strength.cnn.problems(blobs(1437), full=True)[0]


def test_ways_on_images_have_what_their_names_say(problem):
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    found = {}
    for part, way in strength.cases(problem, 0.1, full=True):
        candidates = part.candidates(way)
        assert {c["lr"] for c in candidates} == {0.1}
        of_reg2 = way.name.startswith("reg2")
        found[way.name] = []
        for candidate in candidates:
            made = way.regularizer(network(), (None, None), optimizer, candidate["strength"], problem.batch).strengths
            taken, other = made["reg2" if of_reg2 else "reg1"], made["reg1" if of_reg2 else "reg2"]
            assert other == 0
            found[way.name].append(taken)
    for name, B in (("reg1", 1), ("reg2", problem.batch)):
        lambdas = pytest.approx([B * s for s in (0.0003, 0.001, 0.003, 0.01)])
        assert found[f"{name}, fixed λ"] == lambdas
        assert [rule.value for rule in found[f"{name}, look-ahead"]] == lambdas
        assert [rule.share for rule in found[f"{name}, share"]] == pytest.approx([0.03, 0.1, 0.3, 1])
        assert [rule.scale for rule in found[f"{name}, bound"]] == pytest.approx([0.1, 0.3, 1, 3])
        assert all(rule.rate is optimizer for rule in found[f"{name}, bound"])
        for rule, default in (("share", Share()), ("bound", Bound(optimizer)), ("look-ahead", LookAhead())):
            (untuned,) = found[f"{name}, {rule} untuned"]
            assert type(untuned) is type(default) and untuned.state_dict() == default.state_dict()
            options = {"share", "scale", "rate", "start", "every"} & set(vars(default))
            assert all(getattr(untuned, o) == getattr(default, o) for o in options)
    assert len(found) == 14


def test_ways_of_sparse_regression_are_searched_alike():
    ways = {name: (rule, values) for name, rule, values in strength._sparse_ways()}
    assert len(ways) == 8 and ways.pop("sgd")[1] == (0.0,)
    assert [len(values) for name, (_, values) in ways.items()] == [5] * 4 + [1] * 3
    for rule, value in strength.UNTUNED.items():
        assert ways[f"reg1 + reg2, {rule} untuned"] == (rule, (value,))
        assert value in ways[f"reg1 + reg2, {rule}"][1] or rule == "look-ahead"


def test_bounds_scale_in_sparse_regression_is_that_of_both_penalties():
    """At scale 1, λ (Γ/B + ½ Γ) is η Γ/(2B)."""
    lr, gamma, B = 0.04, 3.0, sparse.BATCH
    lam = strength._by_setting("bound", 1.0, lr).strength("reg2", 0)
    assert lam * (gamma / B + sparse.RATIO * gamma) == pytest.approx(lr * gamma / (2 * B))
    assert strength._by_setting("share", 0.3, lr).share == 0.3


class Counted(Study):
    """A study that counts what it was asked for, and what of that it computed."""

    asked = computed = total = 0

    def rows(self, settings, compute):
        def counted():
            self.computed += 1
            return compute()

        self.asked += 1
        return super().rows(settings, counted)

    def progress(self, total, what):
        self.total = total
        return super().progress(total, what)

    def images(self):
        return blobs(1437)


@pytest.mark.parametrize("full", [True, False], ids=["full", "quick"])
def test_all_are_run_at_the_learning_rate_of_sgd_and_go_on_where_they_were_stopped(full, tmp_path, monkeypatch):
    def told(way, images, network, *, final, seed, lr, strength, batch, epochs):
        steps = round(epochs * (len(images.train[1]) // batch))
        loss = 1 + abs(math.log(lr / 0.1)) + abs(math.log(abs(strength or 1) / 0.3))
        return {**dict.fromkeys(MEASURES, loss), "steps": steps, "ratio": 1.0 if way.is_plain else 2.0}

    def evaluated(make, seeds, grid, steps):
        measures = dict.fromkeys(MEASURES, math.nan)
        return [
            {**measures, **s, "seed": seed, "validation_loss": s["lr"] + s["strength"], "steps": steps}
            for s in grid
            for seed in seeds
        ]

    monkeypatch.setattr("bootgrad.experiments.image_comparison.run", told)
    monkeypatch.setattr(strength, "evaluate", evaluated)
    study = Counted(Options("strength", full=full, seeds=2), COLUMNS, tmp_path)
    strength.run(study)
    assert study.asked == study.total
    lr = 0.1 if full else 0.2
    mine = study.table.where(problem=PICTURES)
    assert all(row["lr"] == lr for row in mine if not str(row["way"]).startswith("sgd"))
    assert final(mine, way="reg1, share").values("strength") == [0.3 if full else 0.1]
    longer, plain = (final(mine, way=way).column("steps") for way in ("sgd, time of reg2, fixed λ", "sgd"))
    assert longer == [2 * steps for steps in plain]
    runs = {way: needed(mine, way=way) for way in mine.values("way")}
    for rule in strength.MAKE:
        assert runs[f"reg1, {rule}"] == runs["reg1, fixed λ"] > 2.5 and runs[f"reg1, {rule} untuned"] == 1
    if full:
        assert runs["reg2, share"] == pytest.approx(1 + 4 / 3 + 2, rel=1e-3) and runs["sgd"] == 4
    of_sparse = study.table.where(problem=SPARSE)
    counts = (25, 5) if full else (10, 2)
    for way in of_sparse.values("way"):
        alone = way == "sgd" or way.endswith("untuned")
        assert needed(of_sparse, way=way) == 1 + counts[alone]
        ends = final(of_sparse, way=way)
        assert len(ends) == 2 and ends.values("lr") == [min(strength.LRS[full])]
    again = Counted(Options("strength", full=full, seeds=2), COLUMNS, tmp_path)
    strength.run(again)
    assert study.computed == study.asked == again.asked and again.computed == 0


LOSSES = {
    "fixed λ": 2.0, "share": 1.5, "bound": 2.5, "look-ahead": 1.0,
    "share untuned": 2.1, "bound untuned": 2.3, "look-ahead untuned": 1.9,
}  # fmt: skip


@pytest.fixture
def made():
    """A table of final runs; the seeds' test losses are apart by more than the ways'."""
    rows = []

    def add(problem, way, loss, **others):
        for seed in (2, 0, 1):
            at = {"stage": "final", "problem": problem, "way": way, "lr": 0.1, "strength": 0.5, "seed": seed}
            found = {"test_loss": loss * (1 + seed), "steps": 640, "reg1": 0.01, "reg2": 0.02 * (1 + seed)}
            rows.append({**dict.fromkeys(MEASURES, math.nan), **at, **found, **others})

    for problem, penalties in strength.PENALTIES.items():
        add(problem, "sgd", 3.0)
        for penalty in penalties:
            for rule, loss in LOSSES.items():
                add(problem, f"{penalty}, {rule}", loss, ratio=math.nan if problem == SPARSE else 2.5)
            if problem == PICTURES:
                add(problem, f"sgd, time of {penalty}, fixed λ", 1.8)
    return Table(COLUMNS, rows)


@pytest.mark.parametrize("kind", ["sparse regression, reg1 + reg2", "images, reg1", "images, reg2"])
def test_claims_are_above_zero_where_they_are_true(made, kind):
    found = {claim.text: claim.found for claim in claims(made)}
    assert len(found) == len(claims(made)) == 12 + 13 + 13
    expected = {"the best fixed λ ends at a lower test loss than SGD of equal steps": 1.0}
    if kind.startswith("images"):
        expected["the best fixed λ ends at a lower test loss than SGD of equal time"] = -0.2
    for rule in strength.MAKE:
        untuned = LOSSES[f"{rule} untuned"]
        expected[f"{rule}, tuned, ends at a lower test loss than the best fixed λ"] = 2 - LOSSES[rule]
        expected[f"{rule}, untuned, ends at a lower test loss than the best fixed λ"] = 2 - untuned
        expected[f"{rule}, untuned, is at most a tenth worse than the best fixed λ"] = 2.2 - untuned
        if rule != "share":
            expected[f"{rule}, tuned, ends at a lower test loss than share, tuned"] = 1.5 - LOSSES[rule]
    mine = {text.removeprefix(f"{kind}: "): f.mean for text, f in found.items() if text.startswith(f"{kind}: ")}
    assert mine == pytest.approx({text: 2 * value for text, value in expected.items()})  # 1 + seed is 2 on average


def test_tables_say_what_was_not_measured(made):
    text = tables(made)
    assert "| sparse regression: reg1 + reg2, share | 0.5 | 0.1 | 0.01 | 0.04 | 3 [" in text
    line = next(line for line in text.splitlines() if line.startswith("| sparse regression: reg1 + reg2, share |"))
    assert line.endswith("] | – | 640 | 1 | – |")
    assert "| – | 640 | 1 | 2.5 [2.5, 2.5] |" in text and text.endswith("At an edge of what was searched: nothing.")


@pytest.mark.slow
def test_a_study_of_rules(conducted):
    table, found = conducted("strength")
    assert len(found) == 38
    of_sparse = table.where(problem=SPARSE)
    assert all(math.isfinite(row["test_loss"]) and row["reg1"] == row["reg2"] / 2 for row in final(of_sparse))
    plain, fixed = (final(of_sparse, way=way).column("test_loss") for way in ("sgd", "reg1 + reg2, fixed λ"))
    assert sum(fixed) < sum(plain)
    for way in ("reg1, bound untuned", "reg2, bound untuned"):
        name, unit = ("reg1", strength.cnn.SMALL) if way.startswith("reg1") else ("reg2", 1)
        assert final(table, way=way).column(name) == pytest.approx([0.2 / (2 * unit)] * 2)
    longer = final(table, way="sgd, time of reg1, fixed λ").column("steps")
    assert min(longer) > 16 == final(table, problem=PICTURES, way="sgd").column("steps")[0]
