"""Watching a run: per-sample statistics of every k-th step, written where the run is looked at, with what is unusual said."""

from .monitor import Monitor
from .observation import Flag, LayerObservation, Observation, Outlier
from .trackers import MLflowWriter, TensorBoardWriter, WandbWriter
from .writers import CSVWriter, JSONLWriter, Writer

__all__ = [
    "CSVWriter",
    "Flag",
    "JSONLWriter",
    "LayerObservation",
    "MLflowWriter",
    "Monitor",
    "Observation",
    "Outlier",
    "TensorBoardWriter",
    "WandbWriter",
    "Writer",
]
