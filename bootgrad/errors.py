"""What the library raises and warns with.

Every error derives from `BootgradError` and from the built-in error that a user of PyTorch would expect in its place.
"""

import sys
import warnings


class BootgradError(Exception):
    """Base of every error that bootgrad raises."""


class ArgumentError(BootgradError, ValueError):
    """A value that the call cannot use: a wrong shape, an unknown option, a number out of range."""


class ArgumentTypeError(BootgradError, TypeError):
    """An argument of a type that the call cannot use."""


class RecordingError(BootgradError, RuntimeError):
    """A recording used at the wrong time, or one that does not hold what was asked of it."""


class UnsupportedError(RecordingError):
    """A model for which per-sample gradients do not exist or would come out wrong."""


class DistributedError(BootgradError, RuntimeError):
    """Another rank has failed, and with it the step of all."""


class DataError(BootgradError, ValueError):
    """A file that is missing, damaged, or not of the expected form."""


class BootgradWarning(UserWarning):
    """Something works, but slower or to less effect than the caller may think."""


def warn(message: str) -> None:
    """Warn at the call that led here: in the first frame that is neither bootgrad's nor torch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("bootgrad", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, BootgradWarning, level)
