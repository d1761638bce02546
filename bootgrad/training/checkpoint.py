"""Checkpoints of a training run: one file, replaced as a whole, read without running anything that it holds.

A checkpoint is written to a file beside it and renamed, so that an interruption at any moment leaves the old one or the
new one. Reading compares every record's checksum first, since torch does not, and unpickles tensors and plain values
only.
"""

import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError

FORMAT = "bootgrad training run"
VERSION = 1
KEYS = ("settings", "fingerprint", "model", "optimizer", "regularizer", "noise_scale", "rng", "progress", "history")


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at ``path``; ``state`` has the entries `KEYS`, of tensors and plain values.

    Raises:
        DataError: the folder cannot be written.
    """
    content = io.BytesIO()  # torch's writer turns a full disk into errors of its own
    torch.save({"format": FORMAT, "version": VERSION, **state}, content)
    with replacing(path) as file:
        file.write(content.getbuffer())


class replacing:  # noqa: N801 — used as a verb
    """A context whose binary file takes the place of ``path`` when it ends without an error, and vanishes otherwise.

    Raises:
        DataError: the file cannot be made, written or renamed.
    """

    def __init__(self, path: Path):
        """Nothing is opened yet."""
        self.path = Path(path)

    def __enter__(self):
        """Open the file beside ``path``."""
        try:
            handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        except OSError as error:
            raise DataError(f"{self.path} cannot be written ({error.strerror}): choose another folder") from error
        self._name = name
        self._file = os.fdopen(handle, "wb")
        return self._file

    def __exit__(self, kind, error, trace):
        """Rename or remove it."""
        try:
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                os.chmod(self._name, 0o666 & ~_umask())
                os.replace(self._name, self.path)
        except OSError as failure:
            error = failure
        finally:
            Path(self._name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(f"{self.path} could not be written ({error.strerror}): is the disk full?") from error


def remove_unfinished(path: Path) -> None:
    """Remove what writers of ``path`` that were killed have left beside it.

    Raises:
        DataError: it cannot be removed.
    """
    for left in path.parent.glob(f".{path.name}.????????"):  # as `tempfile` names them
        try:
            left.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(
                f"{left} cannot be removed ({error.strerror}): remove it, or choose another folder"
            ) from error


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint back, on the CPU.

    Raises:
        DataError: it is missing, damaged, or no checkpoint of this program.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise DataError(f"{path} is damaged (checksum of {damaged}): use an older copy, or start anew")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(
            f"there is no checkpoint {path}: give --resume its path, or start a run without --resume"
        ) from None
    except Exception as error:  # zipfile, torch and its unpickler raise many kinds on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} is no checkpoint that can be read ({reason}): use an older copy, or start anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DataError(f"{path} is not a checkpoint of bootgrad train: give --resume a file that it wrote")
    if state.get("version") != VERSION:
        raise DataError(f"{path} has format version {state.get('version')}; this program reads version {VERSION}")
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}: it was not written by bootgrad train")
    return state


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
