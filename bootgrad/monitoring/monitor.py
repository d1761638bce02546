"""A monitor of a training loop: on every k-th step it records, on all others it is out of the way."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import NoiseScale, Report, Statistics
from .. import record as recording_of
from ..distributed import guarded
from ..errors import ArgumentError, ArgumentTypeError, RecordingError, warn
from ..rank_statistics import Exchange
from ..wrappers import ranks_of
from .measuring import Measured, Part, known, layer_of, listed, measure, outliers, quantiles
from .observation import LayerObservation, Observation
from .spikes import Key, Spikes
from .watched import watched
from .writers import Writer


class Monitor:
    """Watch the per-sample gradients of a model while it is trained.

        monitor = bootgrad.monitoring.Monitor(model, every=50, writers=[JSONLWriter("run/monitor.jsonl")])
        optimizer.zero_grad()
        with monitor.record():
            losses = loss_function(model(x), y)      # (B,)
        monitor.backward(losses)                     # .grad as losses.mean().backward() has it
        optimizer.step()

    Args:
        model: one module.
        every: k, of steps 0, k, 2k, … that are watched.
        layers: ``"all"``; ``"normalization"`` for the scales and shifts of normalization layers alone, whose norms cost next to
            nothing; or names of layers, of parameters, or patterns of them. What is told is then about these parameters.
        writers: where observations go, see `bootgrad.monitoring.writers`; of several ranks the first one writes.
        decay: weight of the past in the averages of noise scales, as of `bootgrad.NoiseScale`, by observations.
        outliers: how many outlying samples are told at most.
        outlier_deviations: how many robust standard deviations of log ‖g_i‖ above its median a sample is one.
        spike_deviations: how many a quantity has to be above its last values to be flagged.
        check: as of `bootgrad.record`.
        batchnorm: as of `bootgrad.record`.
        compiled: as of `bootgrad.record`.

    Attributes:
        step: number of the coming step, from 0.
        last: the last observation; None before the first, also of a run that goes on.

    Raises:
        ArgumentError, ArgumentTypeError: numbers out of range, layers that there are not, something else than writers.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 50,
        layers: str | Sequence[str] = "all",
        writers: Iterable[Writer] = (),
        *,
        decay: float = 0.95,
        outliers: int = 8,
        outlier_deviations: float = 5.0,
        spike_deviations: float = 6.0,
        check: str = "first",
        batchnorm: str = "refuse",
        compiled: bool = True,
    ):
        """Check the options; nothing is recorded yet."""
        for name, value, least in (("every", every, 1), ("outliers", outliers, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ArgumentError(f"{name} must be a whole number of at least {least}; got {value!r}")
        for name, number in (("outlier_deviations", outlier_deviations), ("spike_deviations", spike_deviations)):
            if not number > 0:
                raise ArgumentError(f"{name} must be above 0; got {number!r}")
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        watched(model, layers)
        self.model, self.every, self.layers, self.writers = model, every, layers, _tuple_of(writers)
        self.step = 0
        self.last: Observation | None = None
        self._decay, self._outliers, self._deviations = decay, outliers, outlier_deviations
        self._options: dict[str, Any] = {"check": check, "batchnorm": batchnorm, "compiled": compiled}
        self._recording: recording_of | None = None
        self._forgotten = False  # losses that were recorded
        self._noise, self._of_layers = NoiseScale(decay), dict[str, NoiseScale]()
        self._spikes = Spikes(spike_deviations)

    @property
    def due(self) -> bool:
        """Whether the coming step is watched."""
        return self.step % self.every == 0

    def record(self, samples: Tensor | None = None) -> AbstractContextManager[Any]:
        """A context for the step's forward pass: recorded if the step is watched, and else nothing at all.

        Args:
            samples: as of `bootgrad.record`.
        """
        self._warn_of_forgotten()
        self._recording = None
        if not self.due:
            return nullcontext()
        names = watched(self.model, self.layers)
        self._recording = recording_of(self.model, samples=samples, parameters=names, **self._options)
        return self._until_losses(self._recording)

    def backward(
        self,
        losses: Tensor,
        *,
        ids: Sequence[Any] | Tensor | None = None,
        scaler: Any = None,
        reduction: str | Tensor = "mean",
    ) -> Observation | None:
        """Fill ``.grad`` as ``losses.mean().backward()`` does, and end the step.

        Args:
            losses: (B,), one loss per sample.
            ids: what the samples are called, B of them, for outliers to be known again.
            scaler: a `torch.amp.GradScaler`, as of `record.backward`.
            reduction: ``"mean"``, ``"sum"``, or weights (B,).

        Returns:
            What was seen, of a step that is watched.

        Raises:
            RecordingError: a step that is watched and was not recorded.
            ArgumentError, ArgumentTypeError: ids of another kind or number, on these steps.
            Others: as `record.backward`, on these steps; ``.grad`` is as before then, and the step is still to be taken.
            Of writers: what the first one that failed has raised, after all were called; the step is done then, and `last` set.
        """
        if not self.due:
            self._plain_backward(losses, scaler, reduction)
            self.step += 1
            return None
        self._forgotten = False
        recording = self._recording
        if recording is None:
            raise RecordingError(
                f"nothing was recorded: run the forward pass inside `with monitor.record():`, for step {self.step} is watched"
            )
        names = self._names(ids, losses, recording, reduction)
        self._recording = None
        statistics = recording.backward(losses, reduction=reduction, scaler=scaler)
        return self.observe(statistics, losses=losses, ids=names)

    def observe(
        self,
        statistics_or_report: Statistics | Report,
        *,
        losses: Tensor | None = None,
        ids: Sequence[Any] | Tensor | None = None,
    ) -> Observation | None:
        """Take in what was measured of a step elsewhere, in place of `record` and `backward`, and end the step.

        Args:
            statistics_or_report: of a `bootgrad.record` or a `bootgrad.GradientRegularizer`; a report has no norms of samples
                and no layers, so that nothing is said of them.
            losses: (B,), whose mean is the loss where that is not in the report.
            ids: as of `backward`.

        Returns:
            What was seen, of a step that is watched; of the others nothing is read.

        Raises:
            ArgumentError, ArgumentTypeError: no statistics, or ids of another kind or number; the step is not counted.
            Of writers: as `backward`.
        """
        self._recording, self._forgotten = None, False
        if not self.due:
            self.step += 1
            return None
        measured = measure(statistics_or_report, losses)
        names = listed(ids, measured.norms.numel() or None)
        self.last = observation = self._observation(measured, names)
        self.step += 1
        if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
            self._call_writers(lambda writer: writer.write(observation))
        return observation

    def close(self) -> None:
        """Close all writers."""
        self._call_writers(lambda writer: writer.close())
        self._warn_of_forgotten()

    def __enter__(self) -> "Monitor":
        """The monitor, whose writers are closed at the end."""
        return self

    def __exit__(self, *exc: object) -> None:
        """As `close`."""
        if exc[0] is not None:  # which has kept losses from `backward`
            self._forgotten = False
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Step, averages and recent past, to go on from."""
        return {
            "step": self.step,
            "noise_scale": self._noise.state_dict(),
            "layers": {name: scale.state_dict() for name, scale in self._of_layers.items()},
            "past": self._spikes.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, with the decay that it was made with.

        Raises:
            ArgumentError: it is none; all is as before.
        """
        noise, layers, spikes = NoiseScale(self._decay), {}, Spikes(self._spikes.deviations)
        try:
            step = state["step"]
            if not isinstance(step, int) or step < 0:
                raise ValueError(f"step {step!r}")
            noise.load_state_dict(state["noise_scale"])
            for name, of_layer in state["layers"].items():
                layers[name] = NoiseScale()
                layers[name].load_state_dict(of_layer)
            spikes.load_state_dict(state["past"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(
                "not a state_dict of a Monitor, which has a step, averages and a past: give what state_dict() has made"
            ) from error
        self._decay = noise.decay
        self.step, self._noise, self._of_layers, self._spikes = step, noise, layers, spikes
        self._recording, self._forgotten = None, False

    @contextmanager
    def _until_losses(self, recording: recording_of) -> Iterator[recording_of]:
        """Within a forward pass; losses are forgotten that no `backward` follows, but for those that an error ended."""
        with recording:
            yield recording
        self._forgotten = self._recording is recording and torch.is_grad_enabled()

    def _warn_of_forgotten(self) -> None:
        if self._forgotten:
            self._forgotten = False
            warn(
                "the losses that were recorded before were not given to monitor.backward(losses), so that nothing was seen of "
                "them and no step was counted: where losses.mean().backward() was called, call it in its place"
            )

    def _names(self, ids: Any, losses: Tensor, recording: recording_of, reduction: str | Tensor) -> list[Any] | None:
        """What samples are called; ranks, which wait in their backward pass, are told where that is an error."""
        try:
            return listed(ids, losses.numel() if isinstance(losses, Tensor) else None)
        except Exception:
            if recording.ranks is None:
                raise
            self._recording = None
            named, sets = {**recording.parameters, **recording.unwatched}, 1 + isinstance(reduction, Tensor)
            exchange = Exchange(recording.ranks, named, False, sets, watched=len(recording.parameters))
            with guarded(exchange.rounds):
                raise

    def _call_writers(self, call: Callable[[Writer], None]) -> None:
        """Call all of them, also where one fails; then raise the first error."""
        errors = []
        for writer in self.writers:
            try:
                call(writer)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _observation(self, measured: Measured, ids: Sequence[Any] | None) -> Observation:
        """What a step has told, beside what others told before it."""
        whole, norms = measured.whole, quantiles(measured.norms)
        traces = {"covariance_trace": known(whole.covariance_trace), "sq_mean_norm": known(whole.sq_mean_norm)}
        quantities: dict[Key, float | None] = {(name, None): value for name, value in traces.items()}
        quantities |= {("loss", None): measured.totals["loss"], ("largest_norm", None): norms.get(1.0)}
        layers = {name: self._of_layer(name, part) for name, part in measured.layers.items()}
        quantities |= {("covariance_trace", name): layer.covariance_trace for name, layer in layers.items()}
        return Observation(
            self.step,
            whole.batch_size,
            noise_scale=_averaged(self._noise, whole),
            strengths=measured.strengths,
            layers=layers,
            norms=norms,
            outliers=outliers(measured.norms, ids, self._outliers, self._deviations),
            flags=self._spikes.take(quantities),
            watched=self._watched_alone(measured),
            sample_norms=tuple(measured.norms.tolist()),
            **{name: known(value) for name, value in measured.totals.items()},
            **traces,
        )

    def _watched_alone(self, measured: Measured) -> tuple[str, ...]:
        """The ``layers``, where it is of these; none where it is of all, as what was measured elsewhere may be."""
        names = watched(self.model, self.layers)
        if names is None or measured.layers.keys() != set(map(layer_of, names)):
            return ()
        return (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)

    def _of_layer(self, name: str, part: Part) -> LayerObservation:
        scale = self._of_layers.setdefault(name, NoiseScale(self._decay))
        return LayerObservation(known(part.covariance_trace), known(part.sq_mean_norm), _averaged(scale, part))

    def _plain_backward(self, losses: Tensor, scaler: Any, reduction: str | Tensor) -> None:
        if isinstance(reduction, str) and reduction not in ("mean", "sum"):
            raise ArgumentError(f'reduction must be "mean", "sum" or weights (B,); got {reduction!r}')
        if isinstance(reduction, Tensor) and (losses.dim() != 1 or reduction.shape != losses.shape):
            raise ArgumentError(
                f"weights must have shape (B,), one for each of the losses (B,); got {tuple(reduction.shape)} for losses "
                f"{tuple(losses.shape)}"
            )
        if isinstance(reduction, str) and reduction == "mean":
            total = losses.mean()
        else:
            total = losses.sum() if isinstance(reduction, str) else (losses * reduction.detach().to(losses)).sum()
            ranks = ranks_of(self.model)
            if ranks is not None:  # their wrapper makes a mean over ranks of it
                total = total * ranks.size
        (total if scaler is None else scaler.scale(total)).backward()


def _tuple_of(writers: Any) -> tuple[Writer, ...]:
    found = tuple(writers) if isinstance(writers, Iterable) else None
    if found is None or not all(_is_writer(writer) for writer in found):
        raise ArgumentTypeError(
            "writers must be a list of what has write and close, such as [bootgrad.monitoring.JSONLWriter(path)]; got "
            f"{writers!r}"
        )
    return found


def _is_writer(writer: Any) -> bool:
    return hasattr(writer, "write") and hasattr(writer, "close") and not isinstance(writer, type)


def _averaged(scale: NoiseScale, part: Part) -> float | None:
    """The noise scale with this step taken in, of which a batch of one sample says nothing."""
    return known(scale.update(part) if part.batch_size > 1 else scale.value)
