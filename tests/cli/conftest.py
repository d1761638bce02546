"""Images to train on."""

import numpy as np
import pytest


@pytest.fixture
def data(tmp_path):
    """The path of an NPZ file with 17 + 9 images of 8×6 pixels in 3 classes."""
    rng = np.random.default_rng(5)
    np.savez(
        tmp_path / "images.npz",
        x_train=rng.integers(0, 256, (17, 8, 6), dtype=np.uint8),
        y_train=np.arange(17) % 3,
        x_test=rng.integers(0, 256, (9, 8, 6), dtype=np.uint8),
        y_test=np.arange(9) % 3,
    )
    return str(tmp_path / "images.npz")
