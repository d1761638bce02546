"""The reference CNN on which this project trains and measures."""

from torch import nn


def reference_cnn(image_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """Three 3×3 convolutions of 32, 64 and 64 channels, two of them pooled, then 128 and ``classes`` units.

    Args:
        image_shape: (C, H, W) of one image, H and W at least 4.
        classes: number of outputs.
    """
    c, h, w = image_shape
    return nn.Sequential(
        nn.Conv2d(c, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * (h // 4) * (w // 4), 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )
