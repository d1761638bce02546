"""The images of a run: drawn at random from a data set, to train on, to validate on, and to test on.

Validation images are split off the training set. The test images are the data set's own.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from ..training.data import ImageData

_VALIDATION, _MAX_VALIDATION = 0.25, 1000  # of the images for training
_MAX_PIXELS, _FEW_PIXELS = 256, 100

Pair = tuple[Tensor, Tensor]  # images (N, C, H, W), labels (N,)


@dataclass(frozen=True)
class Draw:
    """The images of a run; ``rest`` are images of the training set that are neither trained nor validated on."""

    train: Pair
    validation: Pair
    test: Pair
    classes: int
    rest: Pair | None = None


def shrunk(data: ImageData) -> ImageData:
    """Large images by the averages of squares of 2×2 pixels.

    That is repeated until they have 256 pixels at most, as CIFAR's then have: so an experiment takes an hour for all of them.
    """
    while data.image_shape[1] * data.image_shape[2] > _MAX_PIXELS:
        data = replace(data, x_train=F.avg_pool2d(data.x_train, 2), x_test=F.avg_pool2d(data.x_test, 2))
    return data


def is_small(data: ImageData) -> bool:
    """Whether images are of at most 100 pixels, as digits are: with others fewer steps are taken in the same time."""
    return data.image_shape[1] * data.image_shape[2] <= _FEW_PIXELS


def draw(data: ImageData, size: int, seed: int) -> Draw:
    """Images at random: a quarter of the training set, at most 1000, to validate on, ``size`` others to train on.

    Raises:
        DataError: there are too few.
    """
    order = torch.randperm(len(data.y_train), generator=torch.Generator().manual_seed(seed))
    held = min(_MAX_VALIDATION, int(_VALIDATION * len(order)))
    parts = order[:held], order[held : held + size], order[held + size :]
    if min(len(parts[0]), len(parts[1])) < 2:
        raise DataError(f"the experiment needs at least 8 training images; got {len(order)}: give it more by --data")
    validation, train, rest = ((data.x_train[index], data.y_train[index]) for index in parts)
    return Draw(train, validation, (data.x_test, data.y_test), data.classes, rest)
