"""The experiment on alignment: its parts, and its quick form."""

import math

import pytest
import torch
import torch.nn.functional as F

from bootgrad.errors import ArgumentError
from bootgrad.experiments import alignment
from bootgrad.experiments.conduct import conduct
from bootgrad.experiments.study import Options
from bootgrad.experiments.table import Table
from bootgrad.training.data import ImageData

DATA = ImageData(
    torch.randn(80, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.arange(80) % 3,
    torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(1)),
    torch.arange(30) % 3,
    3,
    0,
)
SGD = {"method": "sgd", "lr": 0.1, "strength": 0.0}
REG1 = {"method": "sgd + reg1", "lr": 0.1, "strength": 0.05}


def models(setting, points, seed=0):
    return [
        None if model is None else [p.detach().clone() for p in model.parameters()]
        for _, model in alignment.train(DATA, setting, seed, points[-1], points, False)
    ]


def test_parts_do_not_share_images():
    parts = alignment.split(DATA, True)
    assert [len(parts[name][0]) for name in ("train", "validation", "test")] == [67, 13, 30]
    assert torch.equal(torch.cat([parts["train"][0], parts["validation"][0]]), DATA.x_train)
    few = ImageData(DATA.x_train[:36], DATA.y_train[:36], DATA.x_test, DATA.y_test, 3, 0)
    with pytest.raises(ArgumentError, match="must have 32 training images or more, beside a sixth.*got 30"):
        alignment.split(few, True)


@pytest.mark.parametrize("setting", [SGD, REG1])
def test_training_is_sgd_on_the_penalized_loss(setting):
    before, after = models(setting, [0, 1])
    torch.manual_seed(0)
    model = alignment.make_model(DATA, False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    x, y = alignment.split(DATA, False)["train"]
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: alignment.BATCH]
    losses = F.cross_entropy(model(x[chosen]), y[chosen], reduction="none")
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(loss, parameters, create_graph=True) for loss in losses]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    gamma = (flat - flat.mean(0)).square().sum(1).mean()
    grads = torch.autograd.grad(losses.mean() + setting["strength"] * gamma, parameters)
    for p, g, q in zip(parameters, grads, after, strict=True):
        torch.testing.assert_close(p - 0.1 * g, q, rtol=1e-4, atol=1e-6)


def test_runs_begin_alike_and_are_repeated():
    first, again = models(SGD, [0, 5]), models(SGD, [0, 5])
    other = models(REG1, [0, 5])
    assert all(torch.equal(p, q) for p, q in zip(first[1], again[1], strict=True))
    assert all(torch.equal(p, q) for p, q in zip(first[0], other[0], strict=True))
    assert not torch.equal(first[1][0], other[1][0])


def test_a_diverged_run_has_rows_without_numbers():
    rows = alignment.follow(DATA, {**SGD, "lr": 1e6}, 0, 12, [0, 12], False, False)
    assert [row["progress"] for row in rows] == [0.0, 1.0]
    assert math.isfinite(rows[0]["train_loss"]) and math.isnan(rows[1]["train_loss"])


@pytest.mark.parametrize("lr", [1e9, 1e20, 1e30])
@pytest.mark.parametrize("setting", [SGD, REG1])
def test_a_run_that_blows_up_on_the_step_before_a_point_has_a_row(setting, lr):
    rows = alignment.follow(DATA, {**setting, "lr": lr}, 0, 1, [0, 1], False, detail=True)
    assert len(rows) == 2 and math.isfinite(rows[0]["covariance_trace"])
    assert not math.isfinite(rows[1]["ratio"]) and (lr < 1e20) == math.isfinite(rows[1]["train_loss"])


def row(method, seed, progress, ratio, product):
    measured = {"ratio": ratio, "hessian_noise_trace": product, "share": 0.5, "uniform_share": 0.1}
    settings = {"stage": "final", "method": method, "lr": 0.1, "strength": 0.0, "seed": seed, "progress": progress}
    return {**dict.fromkeys(alignment.COLUMNS, 1.0), **settings, **measured}


def test_claims_are_about_their_rows():
    rows = []
    for seed, wobble in enumerate((0.9, 1.0, 1.1)):
        rows += [row("sgd", seed, 0.0, 0.1, 9.0), row("sgd", seed, 0.5, 2 * wobble, 5.0)]
        rows += [
            row("sgd", seed, 1.0, 4 * wobble, 4.0 * wobble),
            row("sgd + reg1", seed, 1.0, 8 * wobble, 2.0 * wobble),
        ]
    found = alignment.claims(Table(alignment.COLUMNS, rows))
    means = [claim.found.mean for claim in found]
    assert means == pytest.approx([3, 1, 0.4, -1 / 3, 1 / 3])
    assert [claim.verdict for claim in found] == ["holds", "holds", "holds", "does not", "holds"]


def lowest_claim(ratios):
    """The claim on all times, of a point on the way with these ratios and one at the end that is well above 1."""
    rows = [row("sgd", seed, 0.5, ratio, 5.0) for seed, ratio in enumerate(ratios)]
    rows += [row(m, seed, 1.0, 4.0 + seed / 10, 4.0) for seed in range(len(ratios)) for m in alignment.METHODS]
    return alignment.claims(Table(alignment.COLUMNS, rows))[1]


def test_a_ratio_below_zero_counts_against_the_claim_and_none_is_passed_over():
    assert lowest_claim([2.0, 2.1, 2.2]).verdict == "holds"
    against = lowest_claim([-2.0, -2.1, -2.2])
    assert against.verdict == "does not" and against.found.mean == pytest.approx(-3.1) and against.found.n == 3
    assert lowest_claim([2.0, 2.1, -2.0]).verdict == "unclear"
    for missing in (math.nan, math.inf):
        found = lowest_claim([2.0, missing, 2.1]).found
        assert (found.n, found.diverged) == (2, 1)


def test_the_lowest_of_a_run_is_unknown_where_a_point_is():
    assert alignment._lowest((1.0, 0.5, 2.0)) == 0.5
    assert all(math.isnan(alignment._lowest(v)) for v in ((1.0, math.nan, 2.0), (math.nan, 1.0), (1.0, math.inf)))


@pytest.mark.parametrize("errors", [[math.nan] * 2, [0.25, math.nan], [0.25, math.inf]])
def test_tables_tell_the_largest_error_of_the_probes(errors):
    rows = [
        {**row(m, seed, 1.0, 4.0, 4.0), "probe_error": error}
        for m in alignment.METHODS
        for seed, error in enumerate(errors)
    ]
    text = alignment.tables(Table(alignment.COLUMNS, rows))
    largest = {math.nan: "25% at most", math.inf: "inf% at most"}.get(errors[1])
    assert ("is not known" if math.isnan(errors[0]) else largest) in text and "nan%" not in text


@pytest.mark.slow
def test_the_quick_form_runs_and_noise_is_aligned(tmp_path):
    summary = conduct(Options("alignment", seeds=2, threads=1), tmp_path)
    table = Table.read(tmp_path / "results.csv", alignment.COLUMNS)
    final = table.where(stage="final")
    assert len(final) == 2 * 2 * 4 and (tmp_path / "figure.png").stat().st_size > 10_000
    assert all(ratio > 1 for ratio in final.where(progress=1.0).column("ratio"))
    assert all(r["share"] > 3 * r["uniform_share"] for r in final.where(progress=1.0))
    assert all(0 < error < 0.5 for error in final.column("probe_error"))
    assert "Tr(HΣ)" in summary.read_text(encoding="utf-8")
