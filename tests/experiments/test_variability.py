"""The experiment on variability: its parts, and its quick form."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bootgrad
from bootgrad.errors import DataError
from bootgrad.experiments import variability
from bootgrad.experiments.conduct import conduct
from bootgrad.experiments.ensembles import TwoLayers
from bootgrad.experiments.study import Options
from bootgrad.experiments.table import Table
from bootgrad.experiments.variability import BATCH, HIDDEN, SAMPLES, VALIDATION, Draws, measure, train
from bootgrad.training.data import ImageData

POOL = SAMPLES + VALIDATION + 12
NETWORK = TwoLayers(4, HIDDEN, 3)


def images(count=POOL):
    x = torch.randn(count + 20, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y = (x.flatten(1)[:, :2] > 0).sum(1)
    return ImageData(x[:count], y[:count], x[count:], y[count:], 3, 0)


def setting(method, lr=0.1, strength=0.0):
    return {"method": method, "lr": lr, "strength": strength}


def after(data, at, steps, draws=2):
    ((_, theta),) = train(NETWORK, data, draws, at, [steps])
    return theta


def modules(row):
    model = nn.Sequential(nn.Linear(4, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 3))
    nn.utils.vector_to_parameters(row, model.parameters())
    return model


def test_a_copy_has_one_sample_of_its_own_and_no_part_has_anothers():
    data = Draws(images(), range(3), 5)
    assert data.chosen.shape == (3, 1, 6, SAMPLES)
    for s in range(3):
        first, *others = data.chosen[s, 0]
        fresh = set()
        for i, copy in enumerate(others):
            assert (copy != first).nonzero().flatten().tolist() == [i]
            assert torch.equal(data.replaced[0][s, 0, i, 0], data.x[first[i]])
            fresh.add(int(copy[i]))
        validation = data.validation[0][s, 0, 0]
        assert len(set(first.tolist()) | fresh) == SAMPLES + 5 and len(validation) == VALIDATION
        used = data.x[torch.cat([first, torch.tensor(sorted(fresh))])]
        assert not (used[:, None] == validation).all(-1).any()
    assert not torch.equal(data.chosen[0], data.chosen[1])


def test_too_few_images_are_an_error_that_says_how_many():
    with pytest.raises(DataError, match=f"at least {SAMPLES + 5 + VALIDATION} training images; got 500"):
        Draws(images(500), [0], 5)


@pytest.mark.parametrize("method", ["sgd", "sgd + reg1", "sgd + reg2"])
def test_each_copy_is_trained_as_if_alone(method):
    at, data = setting(method, strength=0.0 if method == "sgd" else 0.5), Draws(images(), range(2), 2)
    theta = after(data, at, 3)
    generator = torch.Generator().manual_seed(0)
    starts = torch.stack([NETWORK.start(generator) for _ in range(4)]).view(2, 2, -1)
    batches = [torch.randint(SAMPLES, (2, 2, 1, BATCH), generator=generator) for _ in range(3)]
    for s, r, c in ((0, 0, 0), (1, 1, 2)):
        model = modules(starts[s, r])
        reg = None
        if at["strength"]:
            center = {"reg1": "batch_mean", "reg2": bootgrad.centers.EmaMean(variability.DECAY)}
            penalties = {name: at["strength"] for name in ("reg1", "reg2") if name in method}
            reg = bootgrad.GradientRegularizer(model, **penalties, center=center)
        optimizer = torch.optim.SGD(model.parameters(), lr=at["lr"])
        for places in batches:
            x, y = data.at(data.chosen[s, 0, c][places[s, r, 0]])
            optimizer.zero_grad()
            with reg.record() if reg else nullcontext():
                losses = F.cross_entropy(model(x), y, reduction="none")
            reg.backward(losses) if reg else losses.mean().backward()
            optimizer.step()
        expected = nn.utils.parameters_to_vector(model.parameters())
        torch.testing.assert_close(theta[s, r, c], expected.detach(), rtol=1e-4, atol=1e-5)


def test_gradient_descent_takes_all_samples():
    data = Draws(images(), [4], 1)
    theta = after(data, setting("gd"), 1, draws=1)
    model = modules(NETWORK.start(torch.Generator().manual_seed(0)))
    x, y = data.at(data.chosen[0, 0, 1])
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    expected = [(p - 0.1 * g).flatten() for p, g in zip(model.parameters(), grads, strict=True)]
    torch.testing.assert_close(theta[0, 0, 1], torch.cat(expected).detach())


def test_measures_are_those_of_the_copies():
    data = Draws(images(), range(2), 3)
    theta = after(data, setting("sgd"), 20)
    found = measure(NETWORK, data, theta)
    for s in range(2):
        expected = dict.fromkeys(found, 0.0)
        for r in range(2):
            first, *others = (modules(row) for row in theta[s, r])

            def loss(model, x, y):
                return F.cross_entropy(model(x), y).item()

            x, y = data.at(data.chosen[s, 0, 0])
            fit, test = loss(first, x, y), loss(first, *data.test)
            validation = loss(first, *(part[s, 0, 0] for part in data.validation))
            one = [(x[i : i + 1], y[i : i + 1]) for i in range(3)]
            left_out = [loss(model, *z) - loss(first, *z) for model, z in zip(others, one, strict=True)]
            moved = (theta[s, r, 1:] - theta[s, r, 0]).square().sum(1).mean().item()
            values = (fit, validation, test, test - fit, sum(left_out) / 3, moved)
            for name, value in zip(found, values, strict=True):
                expected[name] += value / 2
        for name, value in expected.items():
            assert found[name][s].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_the_gap_by_replaced_samples_is_the_gap():
    """On many small data sets, so that both means are sharp."""
    data = Draws(images(), range(60), 12)
    found = measure(NETWORK, data, after(data, setting("sgd"), 60, draws=1))
    # fresh samples for the gap: the validation's, many more than those of the test
    off = found["replaced_gap"] - (found["validation_loss"] - found["train_loss"])
    assert off.mean().abs() < 4.5 * off.std() / 60**0.5
    assert (
        found["replaced_gap"].mean() > 4.5 * found["replaced_gap"].std() / 60**0.5
    )  # there is a gap to be right about


def test_a_diverged_run_has_rows_without_numbers():
    data = Draws(images(), range(2), 2)
    found = measure(NETWORK, data, after(data, setting("sgd + reg1", lr=1e6, strength=1.0), 10))
    assert not found["variability"].isfinite().any() and not found["gap"].isfinite().any()


def made():
    rows = []
    for k, method in enumerate(variability.METHODS):
        for share in variability.SHARES if method in variability.STRENGTHS else (1.0,):
            for seed in range(3):
                for step in range(1, 9):
                    moved = step * (k + share) * (1 + seed / 10)
                    numbers = {"gap": 2 * moved, "variability": moved + 0.1 * (step % 2), "test_loss": 3.0 + k}
                    at = {"stage": f"share {share:g}", "method": method, "lr": 0.1, "strength": share, "seed": seed}
                    rows.append({**dict.fromkeys(variability.COLUMNS, 1.0), **at, "step": step, **numbers})
    search = {**rows[0], "stage": "search 2", "seed": -1, "step": 99, "gap": math.nan, "variability": math.nan}
    return Table(variability.COLUMNS, [search, *rows])


def test_claims_are_about_the_end_of_training():
    found = variability.claims(made())
    along, over, *lower = found
    assert 0.99 < along.found.mean < 1 and along.found.n == 3 and "8 checkpoints" in along.quantity
    assert over.found.diverged == 3 and "8 ways" in over.quantity  # r = 1
    means = [claim.found.mean for claim in lower]
    k = {method: k for k, method in enumerate(variability.METHODS)}
    ratios = [(k["sgd"], k["gd"]), (k["sgd"], k["gd"])] + [(k[m], k["sgd"]) for m in variability.STRENGTHS] * 2
    assert means[:6] == pytest.approx([1 - (a + 1) / (b + 1) for a, b in ratios])
    assert means[6:] == pytest.approx([1 - (3 + k[m]) / 4 for m in variability.STRENGTHS])
    assert all(claim.verdict == "does not" for claim in lower)
    assert variability.tables(made()).count("sgd + reg1") == 4


@pytest.mark.slow
def test_the_quick_form_runs_and_variability_grows_with_the_gap(tmp_path):
    summary = conduct(Options("variability", seeds=3, threads=1), tmp_path).read_text(encoding="utf-8")
    table = Table.read(tmp_path / "results.csv", variability.COLUMNS)
    along = variability.claims(table)[0]
    assert along.found.mean > 0.4 and along.found.n == 3
    for method in variability.METHODS:
        for seed in range(3):
            rows = variability.finals(table, method=method, stage="share 1", seed=seed)
            assert len(rows) == variability.CHECKPOINTS
            moved, gap = rows.column("variability"), rows.column("gap")
            assert moved[-1] > 5 * moved[0] and gap[-1] > gap[0]
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and "gap by replacing" in summary
