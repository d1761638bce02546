"""The experiment on averages as centers: what it watches and takes, and its quick form."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from bootgrad import GradientRegularizer
from bootgrad.centers import EmaMean, WindowMean, Zero
from bootgrad.experiments import window
from bootgrad.experiments.image_comparison import Grid, Problem, compare, final
from bootgrad.experiments.image_draws import draw
from bootgrad.experiments.image_runs import MEASURES, SGD, Diverged, losses_of, train
from bootgrad.experiments.study import Options, Study
from bootgrad.experiments.table import Table
from bootgrad.experiments.underparameterized import narrow_cnn

from .images import blobs, network, per_sample

OPTIONS = {"lr": 0.1, "strength": 0.02, "batch": 16, "seed": 7}


@pytest.fixture
def images():
    found = draw(blobs(), 64, 0)
    return found.train[0].double(), found.train[1]


@pytest.fixture
def problem():
    return Problem({}, partial(draw, blobs(), 64), 16, 7.5, Grid((0.1,), (0.01,)), narrow_cnn,
                   others=dict.fromkeys(window.BIAS, math.nan))  # fmt: skip


def watched(model, images, center, every=8):
    return window.Watched(center, window.full_gradient(model, images), every)


def test_a_watched_center_is_as_it_was(images):
    """Bit by bit the run of the way itself, and asked once a step for both penalties."""
    ends = []
    for wrapped in (False, True):
        model, center = network(torch.float64), WindowMean(4)
        given = watched(model, images, center, every=3) if wrapped else center
        way = replace(window.WINDOWS[4], center=lambda model, images, given=given: given)
        train(model, images, way, epochs=3, **OPTIONS)
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
    assert given.steps == 12 and [step for step, *_ in given.found] == [3, 6, 9]  # at step 0 nothing is known yet
    assert all(0 < error < 10 and -1 <= cosine <= 1 for _, error, cosine in given.found)


@pytest.mark.parametrize("center", [Zero(), WindowMean(2), EmaMean(0.9)], ids=lambda center: type(center).__name__)
def test_values_are_passed_on(images, center):
    model = network(torch.float64)
    parameters = dict(model.named_parameters())
    seen = watched(model, images, center, every=2)
    for _ in range(3):
        value, expected = seen.value(parameters), center.value(parameters)
        assert type(value) is type(expected)
        assert value is None or all(torch.equal(value[name], expected[name]) for name in parameters)
        seen.update({name: torch.randn_like(p) for name, p in parameters.items()})
    assert [step for step, *_ in seen.found] == ([0, 2] if isinstance(center, Zero) else [2])


def test_the_error_is_that_from_the_gradient_of_all_images(images):
    """Gradients by vmap at the parameters of the step, in float64."""
    model, center = network(torch.float64), WindowMean(2)
    seen = watched(model, images, center, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = GradientRegularizer(model, reg1=0.02, reg2=0.3, center=seen, statistics=False)
    expected, previous = [], []
    for part in range(4):
        parameters = dict(model.named_parameters())
        G = per_sample(model, parameters, *images).detach()
        rows = slice(16 * part, 16 * (part + 1))
        if previous:
            c, g = torch.stack(previous[-2:]).mean(0), G.mean(0)
            expected.append((part, float((c - g).norm() / g.norm()), float(F.cosine_similarity(c, g, 0))))
        previous.append(G[rows].mean(0))
        optimizer.zero_grad()
        penalty.backward(partial(losses_of, model), images[0][rows], images[1][rows])
        optimizer.step()
    assert len(seen.found) == len(expected) == 3
    for found, known in zip(seen.found, expected, strict=True):
        assert found == pytest.approx(known, rel=1e-9)


def test_zero_and_the_full_gradient_have_the_errors_that_they_are_said_to_have(images):
    for way, known in ((window.ZERO, 1.0), (window.EXACT, 0.0)):
        model = network(torch.float64)
        center = Zero() if way is window.ZERO else way.center(model, images)
        seen = watched(model, images, center)
        train(model, images, replace(way, center=lambda model, images, seen=seen: seen), epochs=5, **OPTIONS)
        assert [(step, error) for step, error, _ in seen.found] == [(0, known), (8, known), (16, known)]
    assert all(cosine == pytest.approx(1) for *_, cosine in seen.found)


def test_no_watched_step_is_timed():
    """`train` times steps 4, 12, …: a pass over all images would be in their seconds."""
    assert not set(range(0, 1000, window.WATCHED_EVERY)) & set(range(4, 1000, 8))


def test_steps_about_the_full_gradient_are_those_of_plain_autograd(images):
    """Three steps against per-sample gradients by vmap, in float64; c is that of all images, and constant."""
    B, lr, s = 16, OPTIONS["lr"], OPTIONS["strength"]
    x, y = images
    model = network(torch.float64)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(OPTIONS["seed"]))
    for k in range(3):
        index = order[k * B : (k + 1) * B]
        for p in parameters.values():
            p.requires_grad_()
        c = per_sample(model, parameters, x, y).mean(0).detach()
        G = per_sample(model, parameters, x[index], y[index])
        total = F.cross_entropy(functional_call(model, parameters, (x[index],)), y[index])
        total = total + s * (G - c).square().sum(1).mean() + s * B * (G.mean(0) - c).square().sum()
        slopes = torch.autograd.grad(total, list(parameters.values()))
        parameters = {n: (p - lr * g).detach() for (n, p), g in zip(parameters.items(), slopes, strict=True)}
    found = train(model, images, window.EXACT, epochs=0.75, **OPTIONS)
    assert found["steps"] == 3 and (found["reg1"], found["reg2"]) == (s, B * s)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), parameters[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [1, 4, 16, 64])
def test_windows_are_of_their_lengths(images, k):
    model, way = network(), window.WINDOWS[k]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    centers = way.regularizer(model, images, optimizer, 0.01, 16).centers
    assert centers["reg1"] is centers["reg2"] and centers["reg1"].k == k and way.name == f"window of {k}"


def test_thirds_have_medians():
    found = [(8, 1.0, 0.1), (16, 5.0, 0.2), (24, 2.0, 0.9), (30, 7.0, 0.3), (80, 4.0, -0.1), (88, 6.0, 0.5)]
    row = window.thirds(found, 90)
    assert (row["error_early"], row["cosine_early"]) == (2.0, 0.2)
    assert (row["error_middle"], row["cosine_middle"]) == (7.0, 0.3)
    assert (row["error_late"], row["cosine_late"]) == (5.0, pytest.approx(0.2))
    row = window.thirds(found[:4], 90)
    assert set(row) == set(window.BIAS) and math.isnan(row["error_late"]) and math.isnan(row["cosine_late"])


def test_a_biased_run_is_the_final_one(problem, tmp_path, monkeypatch):
    """Its model ends with the training loss of the row that `compare` stored."""
    study, ends = Study(Options("trial", seeds=2), window.COLUMNS, tmp_path), []
    compare(study, problem, window.WINDOWS[4])
    row = final(study.table, way="window of 4").rows[1]

    def followed(model, images, *args, **kwargs):
        found = train(model, images, *args, **kwargs)
        with torch.no_grad():
            ends.append(float(F.cross_entropy(model(images[0]), images[1])))
        return found

    monkeypatch.setattr(window, "train", followed)
    (found,) = window.bias(problem, window.WINDOWS[4], row["lr"], row["strength"], 1)
    assert ends == [row["train_loss"]] and set(found) == set(window.COLUMNS) - {"stage", "way", "seed"}
    assert all(math.isnan(found[name]) for name in MEASURES)
    assert all(0.1 < found[f"error_{third}"] < 10 for third in window.THIRDS)
    assert found["lr"] == 0.1 and found["strength"] == 0.01


def test_a_run_that_diverges_has_no_bias(problem):
    with pytest.raises(Diverged):
        train(network(), problem.draw(0).train, SGD, epochs=2, **{**OPTIONS, "lr": 1e38})
    (found,) = window.bias(problem, window.MOVING, 1e38, 0.01, 0)
    assert all(math.isnan(found[name]) for name in (*window.BIAS, *MEASURES))


def test_training_takes_as_many_steps_as_there_are_to_be():
    for full, data, steps in (
        (True, blobs(1437), 600),
        (False, blobs(1437), 30),
        (True, blobs(3000, shape=(1, 16, 16)), 300),
    ):
        p = window.problem(data, full)
        count = len(p.draw(0).train[1])
        assert count == (512 if full else 256) and round(p.epochs * (count // p.batch)) == steps


def table_of(losses, errors):
    """Final rows of ways by their test losses, bias rows by their errors; three seeds."""
    rows = []
    for way, loss in losses.items():
        strength = 0.0 if way.startswith("sgd") else 0.01
        settings = {**dict.fromkeys(window.COLUMNS, 1.0), "way": way, "lr": 0.1, "strength": strength}
        for seed, wobble in enumerate((0.99, 1.0, 1.01)):
            at = {"seed": seed, "test_loss": loss * wobble, **dict.fromkeys(window.BIAS, math.nan)}
            rows.append({**settings, "stage": "final", **at})
            if way in errors:
                measured = dict(zip(window.BIAS, [*errors[way], 0.5, 0.5, 0.5], strict=True))
                rows.append(
                    {**settings, **dict.fromkeys(MEASURES, math.nan), "stage": "bias", "seed": seed, **measured}
                )
    return Table(window.COLUMNS, rows)


def test_claims_are_about_their_rows():
    losses = {"sgd": 1.5, "window of 1": 1.2, "window of 16": 1.05, "full gradient": 1.0, "moving average": 0.9,
              "sgd, time of window of 16": 0.8}  # fmt: skip
    errors = {"window of 1": (2.0, 2.0, 2.0), "window of 16": (0.5, 0.7, 1.25), "moving average": (0.6, 0.6, 0.6)}
    claims = {claim.text: claim for claim in window.claims(table_of(losses, errors))}

    def verdicts(text):
        return {claim.text.split(text)[0].strip(): claim.verdict for claim in claims.values() if text in claim.text}

    margins = verdicts("ends at a test loss at most a tenth above the full gradient's")
    assert margins == {
        "sgd": "does not", "window of 1": "does not", "window of 16": "holds", "moving average": "holds",
    }  # fmt: skip
    found = claims["window of 16 ends at a test loss at most a tenth above the full gradient's"].found
    assert found.mean == pytest.approx(1.1 - 1.05)
    lower = verdicts("ends at a lower test loss than the full gradient")
    assert lower == {"window of 1": "does not", "window of 16": "does not", "moving average": "holds"}
    near = {
        third: verdicts(f"is nearer to the full gradient than zero is in the {third} third")
        for third in ("early", "late")
    }
    assert near["early"] == {"window of 1": "does not", "window of 16": "holds", "moving average": "holds"}
    assert near["late"] == {"window of 1": "does not", "window of 16": "does not", "moving average": "holds"}
    of_sgd = verdicts("ends at a lower test loss than SGD of equal")
    assert of_sgd == {"window of 16": "does not", "moving average": "holds", "full gradient": "holds"}
    assert claims["window of 16 ends at a lower test loss than SGD of equal epochs"].verdict == "holds"


def test_what_diverged_is_shown_as_such():
    errors = {"window of 1": (2.0, math.nan, 2.0), "window of 16": (0.5, 0.7, 1.25)}
    table = table_of({"sgd": 1.5, "window of 1": math.inf, "window of 16": 1.0, "full gradient": math.inf}, errors)
    for row in table.where(stage="bias", way="window of 16").rows[1:]:
        row["error_late"] = math.nan
    text = window.tables(table)
    assert "| window of 1 | 2 [2, 2] | – (3 of 3 diverged) | 2 [2, 2] |" in text
    assert {c.verdict for c in window.claims(table) if "full gradient" in c.quantity} == {"unclear"}
    axes = window.draw(table).axes
    assert [ax.get_title().split(":")[0] for ax in axes] == [
        "Test loss",
        "Accuracy",
        "Bias of the center",
        "Time of a step",
    ]
    assert axes[2].get_yscale() == "linear"  # an unbounded interval is none
    assert all(math.isfinite(limit) for ax in axes for limit in (*ax.get_xlim(), *ax.get_ylim()))


@pytest.mark.slow
def test_the_full_gradient_is_dearer_than_an_average(conducted):
    table, claims = conducted("window")
    assert final(table).values("way") == [way.name for way in window.QUICK_WAYS] + ["sgd, time of window of 16"]
    lrs = {row["lr"] for row in final(table) if "time of" not in row["way"]}
    assert len(lrs) == 1
    ratios = {way: sum(final(table, way=way).column("ratio")) for way in ("window of 16", "full gradient")}
    assert 2 < ratios["window of 16"] < ratios["full gradient"]
    found = table.where(stage="bias")
    assert len(found) == 2 * 2 and all(0.2 < row[f"error_{third}"] < 20 for row in found for third in window.THIRDS)
    longer = found.where(way="window of 16").column("error_late")
    assert max(longer) < min(found.where(way="window of 1").column("error_late"))
    assert claims["window of 16 ends at a lower test loss than SGD of equal time"].found.mean < 0
