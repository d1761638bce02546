"""NPZ and IDX files: what good ones hold is read to the byte, and bad ones are refused in words."""

import gzip
import io
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bootgrad import BootgradError
from bootgrad.errors import DataError
from bootgrad.training.files import NPZ_ARRAYS, read_idx, read_npz

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def assert_equal(read, images):
    for got, expected in zip(read, images.values(), strict=True):
        expected = expected[..., None] if expected.ndim == 3 else expected
        np.testing.assert_array_equal(got, expected)
    assert [a.dtype for a in read] == [np.uint8, np.int64, np.uint8, np.int64]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_grey_images(tmp_path, images, save):
    save(tmp_path / "d.npz", **images, extra=np.zeros(3))
    assert_equal(read_npz(tmp_path / "d.npz"), images)


def test_npz_of_colour_images_with_column_labels_in_fortran_order(tmp_path, images):
    rng = np.random.default_rng(0)
    images["x_train"] = np.asfortranarray(rng.integers(0, 256, (20, 8, 6, 3), dtype=np.uint8))
    images["x_test"] = rng.integers(0, 256, (8, 8, 6, 3), dtype=np.uint8)
    columns = {k: v[:, None].astype(">i4") if k[0] == "y" else v for k, v in images.items()}
    np.savez(tmp_path / "d.npz", **columns)
    assert_equal(read_npz(tmp_path / "d.npz"), images)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_idx(images, write_idx, zipped, dotted):
    assert_equal(read_idx(write_idx(images, zipped, dotted)), images)


def test_idx_zipped_without_the_ending(images, write_idx):
    folder = write_idx(images)
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert_equal(read_idx(folder), images)


BAD_ARRAYS = {
    "float images": ({"x_train": np.zeros((20, 8, 6))}, r"x_train .*must be uint8 in 0…255; got float64: convert it"),
    "signed images": ({"x_test": np.zeros((8, 8, 6), np.int8)}, r"x_test .*must be uint8 .*got int8"),
    "channels first": (
        {"x_train": np.zeros((20, 3, 32, 32), np.uint8)},
        r"got \(20, 3, 32, 32\): move the channels last",
    ),
    "flat images": ({"x_train": np.zeros((20, 48), np.uint8)}, r"must be \(N, H, W\) or \(N, H, W, C\)"),
    "tiny images": ({"x_train": np.zeros((20, 3, 8), np.uint8)}, r"at least 4×4 pixels"),
    "other test shape": ({"x_test": np.zeros((8, 9, 6), np.uint8)}, r"one shape; got \(8, 6, 1\) and \(9, 6, 1\)"),
    "unequal lengths": ({"y_train": np.zeros(19, np.uint8)}, r"one length; got 20 images and 19 labels"),
    "no images": ({"x_train": np.zeros((0, 8, 6), np.uint8), "y_train": np.zeros(0, np.uint8)}, r"x_train .*is empty"),
    "float labels": ({"y_train": np.arange(20.0)}, r"y_train .*must be integer labels .*got float64"),
    "one-hot labels": ({"y_test": np.zeros((8, 3), np.uint8)}, r"y_test .*must be integer labels .*\(8, 3\)"),
    "negative labels": ({"y_train": np.arange(20, dtype=np.int64) - 1}, r"y_train .*labels in 0…999; got -1"),
    "huge labels": ({"y_train": np.arange(20, dtype=np.uint64) + 2**63}, r"labels in 0…999; got 9223372036854775827"),
    "one class": ({"y_train": np.zeros(20, np.uint8)}, r"labels 0…K−1 with 2 ≤ K ≤ 1000; the largest is 0"),
    "unknown test class": ({"y_test": np.full(8, 3, np.uint8)}, r"y_test .*in 0…2, those of y_train; got 3"),
    "objects": ({"y_train": np.array([{}] * 20, object)}, r"y_train .*Python objects.*unpickling can run code"),
    "records": ({"y_train": np.zeros(20, [("a", "u1")])}, r"y_train .*must be an array of numbers"),
    "strings": ({"y_train": np.array(["a"] * 20)}, r"y_train .*must be an array of numbers"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused(tmp_path, images, case):
    changes, message = BAD_ARRAYS[case]
    np.savez(tmp_path / "d.npz", **{**images, **changes})
    with pytest.raises(DataError, match=message):
        read_npz(tmp_path / "d.npz")


def test_missing_and_misnamed(tmp_path, images):
    with pytest.raises(DataError, match=r"there is no data file .*none.npz: check the path"):
        read_npz(tmp_path / "none.npz")
    np.savez(tmp_path / "d.npz", x_train=images["x_train"], labels=images["y_train"])
    with pytest.raises(DataError, match=r"y_train, x_test, y_test missing among labels, x_train: save it by"):
        read_npz(tmp_path / "d.npz")


def test_a_header_that_lies_about_its_size_costs_no_memory(tmp_path, images):
    def npy(array, shape):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": array.dtype.str, "fortran_order": False, "shape": shape})
        return file.getvalue() + array.tobytes()

    for shape, message in (((10**12, 8, 6), "more than its"), ((19, 8, 6), "is cut off|one length|bytes expected")):
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            for name in NPZ_ARRAYS:
                archive.writestr(f"{name}.npy", npy(images[name], shape if name == "x_train" else images[name].shape))
        with pytest.raises(DataError, match=message):
            read_npz(tmp_path / "d.npz")


def test_idx_files_that_are_wrong(images, write_idx):
    folder = write_idx(images)
    path = folder / "train-images-idx3-ubyte"
    good = path.read_bytes()
    lying = good[:4] + struct.pack(">I", 2**32 - 1) * 3
    for content, message in (
        (good[:-1], r"must hold \(20, 8, 6\) = 960 bytes; got 959"),
        (good + b"\0", r"= 960 bytes; got more"),
        (good[:9], r"cut off within its header"),
        (b"", r"must begin with 00 00 08 03, IDX of uint8 in 3 dimensions; got nothing"),
        (b"\0\0\x0d\x03" + good[4:], r"must begin with 00 00 08 03.*got 00 00 0d 03"),
        ((folder / "train-labels-idx1-ubyte").read_bytes(), r"got 00 00 08 01: is it the right file"),
        (lying, r"more than is read"),
        (gzip.compress(good)[:-9], r"could not be read \(EOFError.*copy or download it again"),
        (gzip.compress(good)[:-8] + bytes(8), r"could not be read \(BadGzipFile"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_idx(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte is missing: download it"):
        read_idx(folder)


damage = st.tuples(
    st.floats(0, 1),  # what is kept
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),  # (where, new byte)
    st.booleans(),  # whether to cut
)


def damaged(content, how):
    kept, flips, cut = how
    content = bytearray(content)
    for where, value in flips:
        content[int(where * len(content))] = value
    return bytes(content[: int(kept * len(content))] if cut else content)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@fuzz
@given(how=damage)
def test_a_damaged_npz_is_read_or_refused(tmp_path, images, save, how):
    path = tmp_path / "d.npz"
    save(path, **images)
    path.write_bytes(damaged(path.read_bytes(), how))
    try:
        read = read_npz(path)
    except BootgradError:
        return
    assert_equal(read, images)  # the archive's checksums let no changed pixel through


@fuzz
@given(how=damage, header=st.booleans(), data=st.data())
def test_a_damaged_npy_header_is_read_or_refused(tmp_path, images, how, header, data):
    """Damage inside of a member of an archive whose checksums are right."""
    file = io.BytesIO()
    np.save(file, images["x_train"])
    content = file.getvalue()
    head = content[:128]
    changed = damaged(head, how) + (content[128:] if header else b"")
    path = tmp_path / "d.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", changed)
        for name in NPZ_ARRAYS[1:]:
            file = io.BytesIO()
            np.save(file, images[name])
            archive.writestr(f"{name}.npy", file.getvalue())
    try:
        read = read_npz(path)
    except BootgradError:
        return
    np.testing.assert_array_equal(np.sort(read[0].ravel()), np.sort(images["x_train"].ravel()))


@pytest.mark.parametrize("zipped", [False, True])
@fuzz
@given(how=damage, which=st.integers(0, 3))
def test_a_damaged_idx_is_read_or_refused(images, write_idx, zipped, how, which):
    folder = write_idx(images, zipped)
    path = sorted(folder.iterdir())[which]
    path.write_bytes(damaged(path.read_bytes(), how))
    try:
        x_train, y_train, x_test, y_test = read_idx(folder)
    except BootgradError:
        return
    assert x_train.shape == (20, 8, 6, 1) and x_test.shape == (8, 8, 6, 1)
    assert y_train.max() < 1000 and y_test.max() <= y_train.max()
