"""Image files as strangers ship them: NPZ in the Keras layout, IDX as MNIST has it.

Both readers return uint8 images (N, H, W, C) and int64 labels (N,), for training and for testing, and trust nothing
that a file says of itself: a size is compared with the bytes that are there before memory is asked for, pickled objects
are never loaded, and whatever is wrong becomes a `DataError` that says what was expected, what came and what to do.
"""

import gzip
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import DataError

NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MAX_CLASSES = 1000
_MAX_CHANNELS = 4
_MAX_IDX_BYTES = 1 << 32

Images = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def read_npz(path: str | Path) -> Images:
    """Read ``x_train, y_train, x_test, y_test`` from an NPZ file: uint8 images NHW or NHWC, integer labels.

    Raises:
        DataError: the file is missing, damaged or of another form.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            missing = [name for name in NPZ_ARRAYS if name not in names]
            if missing:
                raise DataError(
                    f"{path} must hold the arrays {', '.join(NPZ_ARRAYS)}; {', '.join(missing)} missing among "
                    f"{', '.join(sorted(names)) or 'none'}: save it by numpy.savez(path, x_train=…, y_train=…, …)"
                )
            arrays = [_read_npy(archive, names[name], f"{name} in {path}") for name in NPZ_ARRAYS]
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"there is no data file {path}: check the path given to --data") from None
    except Exception as error:  # a damaged archive makes zipfile, zlib, lzma and tokenize raise nearly anything
        raise DataError(f"{path} is not a whole NPZ file ({_cause(error)}): copy or download it again") from error
    return check_images(*arrays, origin=str(path))


def read_idx(folder: str | Path) -> Images:
    """Read the four IDX files of MNIST's layout from ``folder``, gzipped or not.

    Raises:
        DataError: a file is missing, damaged or of another form.
    """
    folder = Path(folder)
    arrays = []
    for name, dimensions in zip(IDX_FILES, (3, 1, 3, 1), strict=True):
        stems = (name, name.replace("-idx", ".idx"))
        found = [p for stem in stems for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()]
        if not found:
            raise DataError(
                f"{folder} must hold {', '.join(IDX_FILES)}, each as it is or with .gz; {name} is missing: "
                "download it, or give --data the folder that holds it"
            )
        arrays.append(_read_idx_file(found[0], dimensions))
    return check_images(*arrays, origin=str(folder))


def check_images(
    x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, *, origin: str
) -> Images:
    """Return the arrays as uint8 (N, H, W, C) and int64 (N,), or raise `DataError` if they are no labelled images."""
    x_train, y_train = _check_split(x_train, y_train, "train", origin)
    x_test, y_test = _check_split(x_test, y_test, "test", origin)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"x_train and x_test in {origin} must hold images of one shape; "
            f"got {x_train.shape[1:]} and {x_test.shape[1:]}"
        )
    classes = int(y_train.max()) + 1
    if not 2 <= classes <= MAX_CLASSES:
        raise DataError(
            f"y_train in {origin} must hold labels 0…K−1 with 2 ≤ K ≤ {MAX_CLASSES}; the largest is {classes - 1}: "
            "number the classes from 0"
        )
    if int(y_test.max()) >= classes:
        raise DataError(
            f"y_test in {origin} must hold labels in 0…{classes - 1}, those of y_train; got {int(y_test.max())}: "
            "remove these images or add their class to the training set"
        )
    return x_train, y_train, x_test, y_test


def _check_split(x: np.ndarray, y: np.ndarray, split: str, origin: str) -> tuple[np.ndarray, np.ndarray]:
    name = f"x_{split} in {origin}"
    if x.dtype != np.uint8:
        raise DataError(
            f"{name} must be uint8 in 0…255; got {x.dtype}: convert it, "
            "for images in 0…1 by (255 * x).round().astype('uint8')"
        )
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or not 1 <= x.shape[3] <= _MAX_CHANNELS:
        raise DataError(
            f"{name} must be (N, H, W) or (N, H, W, C) with C ≤ {_MAX_CHANNELS}; got {x.shape}: move the channels last"
        )
    if min(x.shape[1:3]) < 4:
        raise DataError(
            f"{name} must hold images of at least 4×4 pixels, since the CNN halves them twice; got {x.shape}"
        )
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise DataError(f"y_{split} in {origin} must be integer labels (N,) or (N, 1); got {y.dtype} {y.shape}")
    if len(x) != len(y):
        raise DataError(
            f"x_{split} and y_{split} in {origin} must have one length; got {len(x)} images and {len(y)} labels"
        )
    if len(x) == 0:
        raise DataError(f"x_{split} in {origin} is empty: at least one image is needed")
    if int(y.min()) < 0 or int(y.max()) >= MAX_CLASSES:
        bad = int(y.min()) if int(y.min()) < 0 else int(y.max())
        raise DataError(f"y_{split} in {origin} must hold labels in 0…{MAX_CLASSES - 1}; got {bad}")
    return x, y.astype(np.int64)


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> np.ndarray:
    with archive.open(info) as file:
        shape, fortran, dtype = _npy_header(file, info, name)
        data = file.read()  # the archive checks its CRC at the end of the member
    count = int(np.prod(shape, dtype=object))
    if len(data) != count * dtype.itemsize:
        raise DataError(f"{name} is cut off: {count * dtype.itemsize} bytes expected, {len(data)} found")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _npy_header(file: IO[bytes], info: zipfile.ZipInfo, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise DataError(
            f"{name} is an array of Python objects, which only unpickling could read, and unpickling can run code: "
            "save plain uint8 images and integer labels"
        )
    if dtype.fields or dtype.subdtype or dtype.kind not in "iufb" or any(n < 0 for n in shape):
        raise DataError(f"{name} must be an array of numbers; got {dtype} {shape}")
    if int(np.prod(shape, dtype=object)) * dtype.itemsize > info.file_size:
        raise DataError(f"{name} says it is {dtype} {shape}, more than its {info.file_size} bytes: save it again")
    return shape, fortran, dtype


def _read_idx_file(path: Path, dimensions: int) -> np.ndarray:
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            head = file.read(4 + 4 * dimensions)
            expected = bytes((0, 0, 8, dimensions))
            if head[:4] != expected:
                raise DataError(
                    f"{path} must begin with {expected.hex(' ')}, IDX of uint8 in {dimensions} dimensions; "
                    f"got {head[:4].hex(' ') or 'nothing'}: is it the right file?"
                )
            if len(head) < 4 + 4 * dimensions:
                raise DataError(f"{path} is cut off within its header: copy or download it again")
            shape = [int(n) for n in np.frombuffer(head, ">u4", offset=4)]
            size = int(np.prod(shape, dtype=object))
            if size > _MAX_IDX_BYTES:
                raise DataError(f"{path} says it holds {tuple(shape)} bytes, more than is read: is it damaged?")
            data = _read_at_most(file, size + 1)
    except DataError:
        raise
    except Exception as error:  # gzip and zlib raise OSError, EOFError, zlib.error and struct.error
        raise DataError(f"{path} could not be read ({_cause(error)}): copy or download it again") from error
    if len(data) != size:
        found = "more" if len(data) > size else str(len(data))
        raise DataError(f"{path} must hold {tuple(shape)} = {size} bytes; got {found}: copy or download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_at_most(file: IO[bytes] | gzip.GzipFile, size: int) -> bytes:
    """Read up to ``size`` bytes in pieces, so that a false size in a header costs no memory."""
    pieces = []
    while size > 0 and (piece := file.read(min(size, 1 << 24))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
