"""Implementations of the ops. Importing this package registers the eager ones; compiled ones register when loaded."""

from . import eager  # noqa: F401
