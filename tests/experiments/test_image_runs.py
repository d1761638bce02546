import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from bootgrad.centers import EmaMean
from bootgrad.errors import DataError
from bootgrad.experiments.image_draws import draw
from bootgrad.experiments.image_runs import (
    BOTH,
    LOSSES,
    MEASURES,
    REG1,
    REG2,
    SGD,
    UNCENTERED,
    Best,
    Way,
    evaluate,
    gamma,
    run,
    train,
)
from bootgrad.strengths import Bound
from bootgrad.training.model import reference_cnn

from .images import blobs, network, per_sample, rows_of, same

OPTIONS = {"lr": 0.1, "strength": 0.01, "batch": 16, "epochs": 2}


@pytest.fixture
def images():
    return draw(blobs(), 64, 0)


def alike(image_shape, classes):
    return network()


def test_images_are_drawn_apart_and_again_alike():
    data = blobs(train=100)
    found, again, other = draw(data, 60, 3), draw(data, 60, 3), draw(data, 60, 4)
    assert [len(p[1]) for p in (found.train, found.validation, found.rest, found.test)] == [60, 25, 15, 60]
    parts = [found.train, found.validation, found.rest]
    assert all(rows_of(a, b) == (len(a[1]) if a is b else 0) for a in parts for b in parts)
    assert sum(rows_of(part, (data.x_train, data.y_train)) for part in parts) == 100
    assert same(found.train, again.train) and not same(found.train, other.train)
    assert same(found.test, (data.x_test, data.y_test))


def test_too_few_images_are_refused():
    with pytest.raises(DataError, match="needs at least 8 training images; got 7: give it more by --data"):
        draw(blobs(train=7), 4, 0)


@pytest.mark.parametrize("way", [SGD, REG1, REG2, UNCENTERED, BOTH], ids=lambda way: way.name)
def test_steps_are_those_of_plain_autograd(images, way):
    """Three steps against per-sample gradients by vmap, in float64, the penalties' derivatives by double backward."""
    B, lr, s = 16, 0.1, 0.02
    x, y = images.train[0].double(), images.train[1]
    model = network(torch.float64)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    moving, weight = 0.0, 0.0
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(7))
    for k in range(3):
        index = order[k * B : (k + 1) * B]
        for p in parameters.values():
            p.requires_grad_()
        G = per_sample(model, parameters, x[index], y[index])
        mean = G.mean(0)
        total = F.cross_entropy(functional_call(model, parameters, (x[index],)), y[index])
        c = {"zero": torch.zeros_like(mean), "batch_mean": mean, "ema": moving / weight if weight else None}[way.center]
        if way.reg1:
            total = total + s * (G - (mean if c is None else c)).square().sum(1).mean()
        if way.reg2 and c is not None:
            total = total + s * B * (mean - c).square().sum()
        slopes = torch.autograd.grad(total, list(parameters.values()))
        moving, weight = 0.9 * moving + 0.1 * mean.detach(), 0.9 * weight + 0.1
        parameters = {n: (p - lr * g).detach() for (n, p), g in zip(parameters.items(), slopes, strict=True)}
    found = train(model, (x, y), way, lr=lr, strength=s, batch=B, epochs=0.75, seed=7)
    assert found["steps"] == 3 and (found["reg1"], found["reg2"]) == (way.reg1 * s, way.reg2 * B * s)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), parameters[name], rtol=1e-10, atol=1e-12)


def test_strengths_are_of_the_batch(images):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = Way("w", reg1=2.0, reg2=3.0, center="ema").regularizer(model, images.train, optimizer, 0.01, 16)
    assert regularizer.strengths == {"reg1": 0.02, "reg2": pytest.approx(0.48)}
    assert SGD.regularizer(model, images.train, optimizer, 0.01, 16) is None


def test_a_way_may_have_a_center_and_rules_of_its_own(images):
    model, seen = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def center(model, images):
        seen.append(images)
        return EmaMean(0.5)

    def rule(name, value, optimizer):
        seen.append((name, value))
        return Bound(optimizer, scale=value)

    way = Way("w", reg1=2.0, reg2=3.0, center=center, rule=rule)
    regularizer = way.regularizer(model, images.train, optimizer, 0.01, 16)
    assert regularizer.centers["reg2"].decay == 0.5
    assert (
        {name: r.scale for name, r in regularizer.strengths.items()} == dict(seen[1:]) == {"reg1": 0.02, "reg2": 0.48}
    )
    assert seen[0] is images.train
    only = Way("w", reg1=2.0, rule=rule).regularizer(model, images.train, optimizer, 0.01, 16)
    assert only.strengths["reg2"] == 0
    found = train(model, images.train, way, lr=0.1, strength=0.01, batch=16, epochs=1, seed=0)
    assert found["reg1"] == pytest.approx(0.02 * 0.1 / 32) and found["reg2"] == pytest.approx(0.48 * 0.1 / 2)


def test_gamma_is_the_covariance_trace_of_all_images():
    data, model = blobs(train=1100), network(torch.float64)
    x, y = data.x_train.double(), data.y_train
    G = per_sample(model, dict(model.named_parameters()), x[:1000], y[:1000]).detach()
    expected = (G - G.mean(0)).square().sum(1).mean()
    assert gamma(model, (x, y)) == pytest.approx(float(expected), rel=1e-10)
    assert all(p.grad is None for p in model.parameters())


def test_losses_and_accuracy_are_means_over_all_images():
    data, model = blobs(train=1100), network()
    loss, accuracy = evaluate(model, (data.x_train, data.y_train))
    outputs = model(data.x_train)
    assert loss == pytest.approx(float(F.cross_entropy(outputs, data.y_train).detach()))
    assert accuracy == pytest.approx(float((outputs.argmax(1) == data.y_train).double().mean()))


def test_reg1_lowers_gamma(images):
    options = {**OPTIONS, "strength": 0.1, "epochs": 10}
    plain, penalized = (run(way, images, alike, final=True, seed=3, **options)["gamma"] for way in (SGD, REG1))
    assert penalized < 0.8 * plain


def test_a_run_is_measured_and_repeats_itself(images):
    row, again = (run(REG1, images, alike, final=True, seed=3, **OPTIONS) for _ in range(2))
    assert set(row) == set(MEASURES) and row["steps"] == 8
    assert {**row, "ratio": 0} == {**again, "ratio": 0}
    assert row["gap"] == row["test_loss"] - row["train_loss"] and row["ratio"] > 0
    assert 0 < row["train_accuracy"] <= 1 and row["gamma"] > 0


def test_a_search_does_not_look_at_the_test_images(images, monkeypatch):
    looked = []

    def watched(model, pair):
        looked.append(pair)
        return evaluate(model, pair)

    monkeypatch.setattr("bootgrad.experiments.image_runs.evaluate", watched)
    row = run(SGD, images, alike, final=False, seed=3, **OPTIONS)
    assert not any(pair is images.test for pair in looked) and len(looked) == 4
    unknown = {name for name in MEASURES if math.isnan(row[name])}
    assert unknown == {"test_loss", "test_accuracy", "gap", "stopped_loss", "gamma"}


@pytest.mark.parametrize("way", [SGD, BOTH], ids=lambda way: way.name)
def test_a_run_that_diverges_is_a_row(images, way):
    row = run(way, images, reference_cnn, final=True, seed=0, **{**OPTIONS, "lr": 1e38})
    assert set(row) == set(MEASURES)
    assert all(math.isinf(row[name]) if name in LOSSES else math.isnan(row[name]) for name in MEASURES)


def test_the_best_parameters_are_kept(images):
    model = network()
    best = Best(model, images.validation)
    first = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[3].weight.mul_(100)
    best.look()
    assert best.last > best.loss and torch.equal(best.state["3.weight"], first["3.weight"])
    model.load_state_dict(first)
    train(model, images.train, SGD, **{**OPTIONS, "epochs": 10}, seed=0)
    best.look()
    assert best.last == best.loss and torch.equal(best.state["3.weight"], model[3].weight)


def test_fewer_images_than_a_batch_are_one_batch(images):
    few = images.train[0][:5], images.train[1][:5]
    found = train(network(), few, SGD, lr=0.1, strength=0.0, batch=16, epochs=2, seed=0)
    assert found["steps"] == 2 and math.isnan(found["ratio"])


def test_a_penalty_takes_longer_than_a_plain_step(images):
    torch.manual_seed(0)
    model = reference_cnn((1, 8, 8), 4)
    found = train(model, images.train, BOTH, lr=0.01, strength=0.01, batch=32, epochs=24, seed=0)
    assert 1 < found["ratio"] < 10
