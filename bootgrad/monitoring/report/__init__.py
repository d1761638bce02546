"""A run as one page: HTML with all that it needs inside, for a browser without a network."""

from .page import report, write_report

__all__ = ["report", "write_report"]
