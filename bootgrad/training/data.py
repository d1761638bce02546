"""Image data sets for training, as tensors: N images (N, C, H, W), standardized per channel, and labels (N,).

Every source is brought to uint8 first and goes through the same checks. Mean and deviation are the training set's.
"""

import zlib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .files import Images, check_images, read_idx, read_npz

TORCHVISION_SETS = ("MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100")
_DIGITS_TEST = 360  # of 1797


@dataclass(frozen=True)
class ImageData:
    """Labelled images, with a fingerprint by which a later run knows them again."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    fingerprint: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, c, h, w = self.x_train.shape
        return c, h, w


def load(source: str, *, root: str = "data") -> ImageData:
    """Load images by name.

    Args:
        source: ``digits`` (scikit-learn's, no download), ``torchvision:NAME``, the path of an NPZ file in the Keras
            layout, or of a folder with the four IDX files of MNIST.
        root: folder in which torchvision keeps its downloads.

    Returns:
        The images, standardized by the training set's mean and deviation of each channel.

    Raises:
        DataError: the data are missing, damaged or of another form.
    """
    if source == "digits":
        return _standardize(_digits())
    if source.startswith("torchvision:"):
        return _standardize(_torchvision(source.removeprefix("torchvision:"), root))
    path = Path(source)
    try:
        if path.is_dir():
            return _standardize(read_idx(path))
        if path.is_file():
            return _standardize(read_npz(path))
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source!r} is no path that can be read: {error}") from error
    raise DataError(
        f"there is no data set {source!r}: --data takes digits, torchvision:NAME, an NPZ file (x_train, y_train, "
        "x_test, y_test) or a folder of IDX files; no file or folder of that name exists"
    )


def _standardize(images: Images) -> ImageData:
    x_train, y_train, x_test, y_test = images
    pixels = x_train.reshape(-1, x_train.shape[3])
    mean = pixels.mean(0, dtype=np.float64).astype(np.float32)
    deviation = pixels.std(0, dtype=np.float64).astype(np.float32)
    deviation[deviation == 0] = 1.0

    def as_tensor(x: np.ndarray) -> Tensor:
        standard = (x.astype(np.float32) - mean) / deviation
        return torch.from_numpy(np.ascontiguousarray(standard.transpose(0, 3, 1, 2)))

    fingerprint = 0
    for array in images:
        fingerprint = zlib.crc32(np.ascontiguousarray(array).data, fingerprint)
    return ImageData(
        as_tensor(x_train),
        torch.from_numpy(y_train),
        as_tensor(x_test),
        torch.from_numpy(y_test),
        classes=int(y_train.max()) + 1,
        fingerprint=fingerprint,
    )


def _digits() -> Images:
    datasets = _require("sklearn.datasets", "scikit-learn", "digits")
    x, y = datasets.load_digits(return_X_y=True)
    images = np.round(x.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(y))
    train, test = order[_DIGITS_TEST:], order[:_DIGITS_TEST]
    return check_images(images[train], y[train], images[test], y[test], origin="digits")


def _torchvision(name: str, root: str) -> Images:
    if name not in TORCHVISION_SETS:
        raise DataError(f"torchvision:NAME takes {', '.join(TORCHVISION_SETS)}; got {name!r}")
    datasets = _require("torchvision.datasets", "torchvision", f"torchvision:{name}")
    arrays: list[np.ndarray] = []
    try:
        for train in (True, False):
            images = getattr(datasets, name)(root, train=train, download=True)
            arrays += [np.asarray(images.data), np.asarray(images.targets)]
    except (OSError, RuntimeError) as error:
        raise DataError(f"torchvision could not get {name} into {root}: {error}") from error
    return check_images(*arrays, origin=f"torchvision:{name}")


def _require(module: str, package: str, source: str):
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(
            f"--data {source} needs {package}, which could not be imported ({error}): install {package}, "
            "or give --data an NPZ file or a folder of IDX files"
        ) from error
