"""Data sets by name: numbers after standardization, the digits' split, torchvision's layout, and refusals."""

import sys
import types

import numpy as np
import pytest
import torch

from bootgrad.errors import DataError
from bootgrad.training.data import load


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = load("digits")
    assert data.image_shape == (1, 8, 8) and data.classes == 10
    assert len(data.x_train) == 1437 and len(data.x_test) == 360
    original = load_digits()
    pixels = torch.cat([data.x_train, data.x_test]).flatten(1)
    levels = pixels.unique()
    assert len(levels) == 17  # the seventeen greys of the original
    greys = torch.searchsorted(levels, pixels).numpy()
    labels = torch.cat([data.y_train, data.y_test]).numpy()
    ours, theirs = (np.lexsort(np.c_[x, y].T) for x, y in ((greys, labels), (original.data, original.target)))
    np.testing.assert_array_equal(greys[ours], original.data[theirs])
    np.testing.assert_array_equal(labels[ours], original.target[theirs])


def test_standardized_by_the_training_images(tmp_path, images):
    rng = np.random.default_rng(1)
    images["x_train"] = rng.integers(0, 256, (20, 8, 6, 3), dtype=np.uint8)
    images["x_train"][..., 2] = 7
    images["x_test"] = rng.integers(0, 256, (8, 8, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", **images)
    data = load(str(tmp_path / "d.npz"))
    mean = images["x_train"].astype(np.float64).mean((0, 1, 2))
    deviation = images["x_train"].astype(np.float64).std((0, 1, 2))
    deviation[2] = 1  # a constant channel
    for got, x in ((data.x_train, images["x_train"]), (data.x_test, images["x_test"])):
        expected = ((x - mean) / deviation).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert data.image_shape == (3, 8, 6) and data.classes == 3


def test_a_folder_and_a_file_of_the_same_images_are_the_same_data(tmp_path, images, write_idx):
    folder = load(str(write_idx(images)))
    np.savez(tmp_path / "d.npz", **images)
    file = load(str(tmp_path / "d.npz"))
    assert torch.equal(folder.x_train, file.x_train) and torch.equal(folder.y_test, file.y_test)
    assert folder.fingerprint == file.fingerprint
    images["x_test"][3, 2, 1] ^= 1
    np.savez(tmp_path / "d.npz", **images)
    assert load(str(tmp_path / "d.npz")).fingerprint != file.fingerprint


def test_torchvision_sets_are_taken_from_data_and_targets(monkeypatch, images):
    calls = []

    class MNIST:
        def __init__(self, root, train, download):
            calls.append((root, train, download))
            part = "train" if train else "test"
            self.data = torch.from_numpy(images[f"x_{part}"])
            self.targets = images[f"y_{part}"].tolist()

    package, module = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    module.MNIST = MNIST
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    data = load("torchvision:MNIST", root="there")
    assert calls == [("there", True, True), ("there", False, True)]
    assert data.y_train.tolist() == images["y_train"].tolist()
    mean, deviation = images["x_train"].mean(), images["x_train"].std()
    np.testing.assert_allclose(data.x_test[:, 0].numpy(), (images["x_test"] - mean) / deviation, rtol=1e-5, atol=1e-5)


def test_a_torchvision_set_that_cannot_be_got_is_refused(monkeypatch):
    def offline(root, train, download):
        raise RuntimeError("no network")

    module = types.ModuleType("torchvision.datasets")
    module.CIFAR10 = offline
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    with pytest.raises(DataError, match="could not get CIFAR10 into here: no network"):
        load("torchvision:CIFAR10", root="here")


@pytest.mark.parametrize("module", ["sklearn.datasets", "torchvision.datasets"])
def test_a_missing_package_is_named(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    source, package = {"s": ("digits", "scikit-learn"), "t": ("torchvision:MNIST", "torchvision")}[module[0]]
    with pytest.raises(DataError, match=f"--data {source} needs {package}, .*: install {package}"):
        load(source)


@pytest.mark.parametrize("source", ["nothing", "no/such.npz", "", "a\0b", "x" * 5000, "torchvision:ImageNet", "\udcff"])
def test_unknown_sources_are_refused(source):
    with pytest.raises(DataError, match="--data takes|torchvision:NAME takes|no path that can be read|must hold"):
        load(source)
