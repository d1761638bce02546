"""Writers of observations into experiment trackers, whose packages are imported when a writer is made.

Runs and files begin with the first observation: of several processes those that write nothing have none.

Numbers that are not finite, as a noise scale whose gradient is lost in the noise, are left out: of trackers some refuse them.
"""

import math
import re
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, DataError
from .observation import PREFIX, Observation

_NAMES = {"torch.utils.tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}


class TensorBoardWriter:
    """Scalars, a histogram of the norms of the samples, and flags as text, for TensorBoard.

    Args:
        dir: folder of the event files.

    Raises:
        ArgumentError: tensorboard is not installed.
    """

    def __init__(self, dir: str | Path):
        """Nothing is written yet."""
        self._open, self._dir = _imported("torch.utils.tensorboard").SummaryWriter, str(dir)
        self._writer: Any = None

    def write(self, observation: Observation) -> None:
        """Add the events of a step."""
        if self._writer is None:
            try:
                self._writer = self._open(self._dir)
            except OSError as error:
                raise DataError(f"{self._dir} cannot be written ({error.strerror}): choose another folder") from error
        step = observation.step
        for name, value in finite(observation).items():
            self._writer.add_scalar(name, value, step)
        norms = finite_norms(observation)
        if norms:
            self._writer.add_histogram(f"{PREFIX}norms", torch.tensor(norms), step)
        if observation.flags:
            self._writer.add_text(f"{PREFIX}flags", "  \n".join(map(str, observation.flags)), step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file; what comes after begins another one."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


class WandbWriter:
    """Scalars and a histogram of the norms of the samples, for Weights & Biases, by ``bootgrad/step``.

    The run's own steps are left to others who log to it.

    Args:
        run: a run, which is left open at the end; without one, a new one of ``wandb.init(**init)`` for the first observation,
            which is finished.
        init: of the new run.

    Attributes:
        run: that; None while there is none.

    Raises:
        ArgumentError: wandb is not installed, or options of a new run beside a run.
    """

    def __init__(self, run: Any = None, **init: Any):
        """Take a run; a new one is not begun yet."""
        if run is not None and init:
            raise ArgumentError(
                f"a run that is there takes no options of a new one; got {', '.join(init)}: leave them out"
            )
        self._wandb = _imported("wandb")
        self._owns, self._init = run is None, init
        self.run = run
        self._is_defined = False

    def write(self, observation: Observation) -> None:
        """Log a step."""
        if self.run is None:
            self.run = self._wandb.init(**self._init)
        if not self._is_defined:
            self.run.define_metric(f"{PREFIX}step", hidden=True)
            self.run.define_metric(f"{PREFIX}*", step_metric=f"{PREFIX}step")
            self._is_defined = True
        row: dict[str, Any] = {f"{PREFIX}step": observation.step, **finite(observation)}
        norms = finite_norms(observation)
        if norms:
            row[f"{PREFIX}norms"] = self._wandb.Histogram(norms)
        self.run.log(row)

    def close(self) -> None:
        """Finish a run that was begun here; what comes after begins another one."""
        if self._owns and self.run is not None:
            run, self.run, self._is_defined = self.run, None, False
            run.finish()


class MLflowWriter:
    """Scalars as metrics of an MLflow run; characters that MLflow has no names of become ``_``.

    Args:
        run_id: of a run, which is left open at the end; without one, a new one for the first observation, which is ended.
        tracking_uri: where runs are kept; MLflow's own choice when None.
        experiment: name of the new run's experiment, made if need be.
        run_name: of the new run.

    Attributes:
        run_id: of the run; None while there is none.

    Raises:
        ArgumentError: mlflow is not installed, or options of a new run beside a run's id.
    """

    def __init__(
        self,
        run_id: str | None = None,
        *,
        tracking_uri: str | None = None,
        experiment: str = "Default",
        run_name: str | None = None,
    ):
        """Take a run; a new one is not begun yet."""
        if run_id is not None and (experiment != "Default" or run_name is not None):
            raise ArgumentError("a run that is there has an experiment and a name: leave experiment and run_name out")
        mlflow = _imported("mlflow")
        self._metric, self._client = mlflow.entities.Metric, mlflow.MlflowClient(tracking_uri)
        self._owns, self.run_id = run_id is None, run_id
        self._experiment, self._run_name = experiment, run_name

    def write(self, observation: Observation) -> None:
        """Log a step."""
        if self.run_id is None:
            self.run_id = self._begun()
        now, step = int(time.time() * 1000), observation.step
        values = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in finite(observation).items()}
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        for k in range(0, len(metrics), 1000):  # as many as a call takes
            self._client.log_batch(self.run_id, metrics[k : k + 1000])

    def close(self) -> None:
        """End a run that was begun here."""
        if self._owns and self.run_id is not None:
            self._client.set_terminated(self.run_id)

    def _begun(self) -> Any:
        """The id of a new run."""
        known = self._client.get_experiment_by_name(self._experiment)
        place = self._client.create_experiment(self._experiment) if known is None else known.experiment_id
        return self._client.create_run(place, run_name=self._run_name).info.run_id


def finite(observation: Observation) -> dict[str, float]:
    """The scalars that are finite."""
    return {name: value for name, value in observation.scalars().items() if math.isfinite(value)}


def finite_norms(observation: Observation) -> list[float]:
    """The norms of samples that are."""
    return [norm for norm in observation.sample_norms if math.isfinite(norm)]


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ArgumentError(f"this writer needs {_NAMES[name]} ({error}): pip install {_NAMES[name]}") from error
