"""Small labelled images, and writers of the files that strangers ship them in."""

import gzip
import struct

import numpy as np
import pytest

IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture
def images():
    """20 + 8 random grey images of 8×6 pixels in 3 classes, under the names of the Keras layout."""
    rng = np.random.default_rng(7)
    return {
        "x_train": rng.integers(0, 256, (20, 8, 6), dtype=np.uint8),
        "y_train": (np.arange(20) % 3).astype(np.uint8),
        "x_test": rng.integers(0, 256, (8, 8, 6), dtype=np.uint8),
        "y_test": (np.arange(8) % 3).astype(np.uint8),
    }


@pytest.fixture
def write_idx(tmp_path):
    """A function that writes images as four IDX files and returns their folder."""

    def write(images, zipped=False, dotted=False):
        for name, array in zip(IDX_NAMES, images.values(), strict=True):
            content = idx_bytes(array)
            name = name.replace("-idx", ".idx") if dotted else name
            path = tmp_path / (name + ".gz" if zipped else name)
            path.write_bytes(gzip.compress(content) if zipped else content)
        return tmp_path

    return write


def idx_bytes(array):
    """An array of uint8 as an IDX file."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
