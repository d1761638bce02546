"""What is raised where a framework is not installed."""

from ..errors import BootgradError


class MissingPackageError(BootgradError, ImportError):
    """A package that an integration is for is not installed."""


def missing(package: str, error: ModuleNotFoundError) -> ImportError:
    """What to raise for a failed import of ``package``: the error itself, where it lacks something but is there."""
    if error.name is None or error.name.partition(".")[0] != package:
        return error
    return MissingPackageError(
        f"bootgrad.integrations.{package} needs {package}, which is not installed: pip install {package}"
    )
