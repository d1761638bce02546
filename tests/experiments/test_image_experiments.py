"""The experiments on images: what each draws, and that each runs from beginning to end."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from bootgrad.errors import DataError
from bootgrad.experiments import cnn, conduct, non_iid, small_data, underparameterized
from bootgrad.experiments.image_comparison import final
from bootgrad.experiments.image_runs import Diverged
from bootgrad.experiments.study import Options, Study
from bootgrad.experiments.table import Table
from bootgrad.training.data import ImageData

from .images import blobs, network, rows_of

NAMES = ("cnn", "small-data", "non-iid", "underparameterized", "window", "strength")


@pytest.mark.parametrize("name", NAMES)
def test_missing_data_are_named(name, tmp_path):
    with pytest.raises(DataError, match="there is no data set .*nowhere.* no file or folder of that name exists"):
        conduct.conduct(Options(name, data=str(tmp_path / "nowhere")), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty must hold train-images-idx3-ubyte, .* missing: download it, or give"):
        conduct.conduct(Options(name, data=str(tmp_path / "empty")), tmp_path / "out")


def test_large_batches_take_as_many_steps():
    for full, data in ((False, blobs(1437)), (True, blobs(1437)), (True, blobs(3000, shape=(1, 20, 20)))):
        small, large = cnn.problems(data, full)
        counts = {len(p.draw(0).train[1]) for p in (small, large)}
        (count,) = counts
        steps = [p.epochs * (count // p.batch) for p in (small, large)]
        assert steps[0] == steps[1] == round(steps[0]) and large.batch == 8 * small.batch


def test_one_class_is_in_excess():
    data = blobs(train=400, classes=4)
    found = non_iid.skewed(data, 80, seed=6)
    labels = torch.cat([found.train[1], found.validation[1]])
    assert torch.bincount(labels, minlength=4)[2] == 72 and len(labels) == 80 and len(found.validation[1]) == 20
    assert rows_of(found.train, found.validation) == 0
    assert torch.bincount(found.test[1]).tolist() == [15] * 4
    few = non_iid.skewed(data, 4000, seed=1)  # no more than there are
    assert len(few.train[1]) + len(few.validation[1]) == 100 + 11


def test_test_images_are_of_all_classes_alike():
    y = torch.tensor([0, 1, 0, 2, 2, 0, 1, 2])
    x = torch.arange(8.0)
    assert non_iid.balanced((x, y), 3)[0].tolist() == [0, 2, 1, 6, 3, 4]
    with pytest.raises(DataError, match="needs test images of every class"):
        non_iid.balanced((x, y), 4)
    with pytest.raises(DataError, match="at least 8 training images of every class; got 5 of class 0"):
        non_iid.skewed(blobs(train=20), 20, seed=3)


def test_every_class_in_excess_has_as_many():
    data = blobs(train=403, classes=4)
    few = ImageData(**{**vars(data), "x_train": data.x_train[1:], "y_train": data.y_train[1:]})  # 100, 101, 101 and 100
    sizes = {len(non_iid.skewed(few, 4000, seed).train[1]) for seed in range(4)}
    assert len(sizes) == 1


def test_one_class_is_not_searched_and_run():
    found = next(
        p for p in non_iid.problems(blobs(train=400, classes=10), True) if p.settings["problem"] == non_iid.SKEWED
    )
    assert not {seed % 10 for seed in found.search_seeds} & {seed % 10 for seed in range(5)}


def test_halves_are_of_one_image():
    data = blobs(shape=(1, 9, 6))
    found = non_iid.halves(data, 40, 0)
    assert found.train[0].shape == (40, 1, 4, 6) and found.test[0].shape == (60, 1, 4, 6)
    assert torch.equal(found.test[0], data.x_test[:, :, 5:])
    assert rows_of(found.train, (data.x_train[:, :, :4], data.y_train)) == 40
    with pytest.raises(DataError, match="images of at least 8 rows; got 7"):
        non_iid.halves(blobs(shape=(1, 7, 8)), 40, 0)


def test_labels_are_flipped_to_other_classes():
    y = torch.arange(1000) % 7
    found = underparameterized.flipped(y, 0.4, 7, torch.Generator().manual_seed(0))
    wrong = found != y
    assert wrong.sum() == 400 and found.min() == 0 and found.max() == 6
    moves = torch.bincount((found - y)[wrong] % 7, minlength=7)
    assert moves[0] == 0 and (moves[1:] > 40).all()  # 66.7 each, ± 7.5
    data = blobs()
    images = underparameterized.mislabelled(data, 80, 0.2, 3)
    true = dict(zip((x.numpy().tobytes() for x in data.x_train), data.y_train.tolist(), strict=True))
    for x, y in (images.train, images.validation):
        errors = sum(true[image.numpy().tobytes()] != label for image, label in zip(x, y.tolist(), strict=True))
        assert errors == round(0.2 * len(y))
    assert torch.equal(images.test[1], data.y_test)


def test_the_narrow_network_is_narrow():
    model = underparameterized.narrow_cnn((1, 8, 8), 10)
    assert sum(p.numel() for p in model.parameters()) == 266
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_estimates_of_a_covariance(monkeypatch):
    monkeypatch.setattr(small_data, "SAMPLES", (8, 32))
    data, model = blobs(train=300), network(torch.float64)
    x, y = data.x_train.double(), data.y_train
    parts = [(x[a:b], y[a:b]) for a, b in ((0, 100), (100, 200), (200, 300))]
    rows = small_data.estimates(model, *parts, seed=0)
    assert [(r["source"], r["sample"]) for r in rows] == [(s, n) for s in ("training", "fresh") for n in (8, 32)]
    assert all(0.5 < r["trace_ratio"] < 2 and 0 < r["overlap"] <= 1 for r in rows)
    by_size = {n: [r["error"] for r in rows if r["sample"] == n] for n in (8, 32)}
    assert max(by_size[32]) < min(by_size[8])
    assert [(r["source"], r["sample"]) for r in rows] == small_data.kinds(*parts[:2])


def test_a_training_run_that_diverged_is_counted(monkeypatch):
    """In two of five seeds: a row of nan for every mini-batch that there would be, and claims that are unclear."""

    def train(model, *args, seed, **options):
        if seed < 2:
            raise Diverged

    monkeypatch.setattr(small_data, "train", train)
    monkeypatch.setattr(small_data, "REPEATS", 2)
    data = blobs(train=400, classes=4)
    p = replace(small_data.problem(data, 64, False), network=lambda shape, classes: network())
    others = {**dict.fromkeys(small_data.COLUMNS, 0), **p.settings}
    table = Table(small_data.COLUMNS)
    for seed in range(5):
        found = small_data.along(data, p, 0.1, seed, 60, (small_data.START, small_data.END))
        table.rows += [{**others, "stage": "covariance", "seed": seed, **row} for row in found]
        table.rows.append({**others, "stage": "final", "way": "sgd", "seed": seed})
    monkeypatch.setattr(small_data, "WAYS", (small_data.SGD,))
    claims = small_data.claims(table)
    assert len(claims) == 3 and {(c.found.n, c.found.diverged, c.verdict) for c in claims} == {(3, 2, "unclear")}


def test_too_few_images_for_small_data(tmp_path, monkeypatch):
    monkeypatch.setattr(Study, "images", lambda self: blobs(train=300))
    with pytest.raises(DataError, match="small-data needs 427 training images; got 300"):
        conduct.conduct(Options("small-data"), tmp_path)


@pytest.mark.slow
def test_a_study_of_penalties_for_a_cnn(conducted):
    table, claims = conducted("cnn")
    ratios = [r for way in cnn.WAYS[1:] for r in final(table, way=way.name, batch=cnn.SMALL).column("ratio")]
    assert 1 < statistics.median(ratios) < 6  # each is a median of 4 pairs, and other processes may want the cores
    plain, longer = (final(table, way=way.name, batch=cnn.SMALL) for way in (cnn.SGD, cnn.same_time(cnn.REG1)))
    assert min(longer.column("steps")) > max(plain.column("steps"))
    assert (
        claims["reg1 ends at a lower test loss than SGD of equal time"].found.mean < 0
    )  # for in so few steps all learn
    assert final(table, batch=cnn.LARGE).values("way") == ["sgd", "reg1"]


@pytest.mark.slow
def test_a_study_of_small_data(conducted):
    table, _ = conducted("small-data")
    at = {"stage": "covariance", "moment": small_data.START, "sample": small_data.BATCH}
    for source in small_data.SOURCES:
        assert all(0.8 < ratio < 1.25 for ratio in table.where(**at, source=source).column("trace_ratio"))
    errors = {s: table.where(**{**at, "sample": s}, source="fresh").column("error") for s in (8, 32)}
    assert sum(errors[32]) < sum(errors[8])


@pytest.mark.slow
def test_a_study_of_shifted_distributions(conducted):
    table, _ = conducted("non-iid")
    for problem in (non_iid.SKEWED, non_iid.HALVES):
        rows = final(table, problem=problem, way="sgd")
        assert all(math.isfinite(row["test_loss"]) and row["gap"] > 0 for row in rows)


@pytest.mark.slow
def test_a_study_of_underparameterized_networks(conducted):
    table, claims = conducted("underparameterized")
    assert claims["the narrow CNN's training error stays above zero"].verdict == "holds"
    errors = [1 - a for a in final(table, problem="40 % wrong labels", way="sgd").column("train_accuracy")]
    assert min(errors) > 0.1
