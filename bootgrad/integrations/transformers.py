"""Penalties and statistics in Hugging Face's `Trainer`, by a mixin of which `Trainer` here is the plain case.

    trainer = bootgrad.integrations.transformers.Trainer(model, args, train_dataset=data, penalties={"reg1": 0.01})

Models of transformers give one loss for a batch. Here it is one for each sample, from their logits and labels, whose mean over
the batch of an optimizer step is the loss that the model would have given:

    ℓ_i = (B/N) Σ_t ℓ_it        (1/B) Σ_i ℓ_i = (1/N) Σ_it ℓ_it

with t over the labels of sample i that are not −100, and N the number of all of them, as the trainer counts it. The mean is
compared with the model's own loss on the first, second, fourth, eighth … micro-batch.

Letters: ``B`` samples of an optimizer step, ``b`` of a micro-batch, ``N`` labels that count in what a loss is the mean of.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import GradientRegularizer, Report
from ..errors import ArgumentError, ArgumentTypeError, DataError, UnsupportedError, warn
from ..monitoring import Monitor
from ..monitoring.trackers import finite
from .loops import Loop, check_options, loop_of, numbers_of
from .required import missing

try:
    import transformers
    from transformers.trainer_utils import get_last_checkpoint
except ModuleNotFoundError as error:
    raise missing("transformers", error) from None

IGNORED = -100
STATE = "bootgrad.pt"  # in a checkpoint's folder

Losses = Callable[[Any, Mapping[str, Any]], Tensor]


def per_sample_losses(model: nn.Module, outputs: Any, inputs: Mapping[str, Any], labels_each: Any = None) -> Tensor:
    """The losses (b,) of the samples of which a model's own loss is the mean.

        ℓ_i = (b/N) Σ_t ℓ_it

    Args:
        model: of transformers, with adapters of PEFT or without; its kind of loss is told by its class.
        outputs: of the model, with ``logits``, or ``start_logits`` and ``end_logits``.
        inputs: what it was called with; ``labels``, or ``start_positions`` and ``end_positions``.
        labels_each: N/b where it is another one than in these inputs, the mean number of labels that a sample has.

    Raises:
        UnsupportedError: a model whose loss is of another kind than language models', classifiers' of sequences, tokens or
            images, and question answering's.
    """
    return _kind_of(model)(_inner(model).config, outputs, inputs, labels_each)


class PerSample:
    """A mixin for `transformers.Trainer` and what is derived of it: ``class Ours(PerSample, SFTTrainer): ...``.

    Micro-batches of ``gradient_accumulation_steps`` are one batch: penalties and centers are those of the whole, which clipping
    and the optimizer see. Numbers are in the logs beside the loss, and checkpoints hold what a resumed run goes on from.

    Args:
        *args: of the trainer.
        **kwargs: of the trainer.
        penalties: options of `bootgrad.GradientRegularizer`, or None.
        statistics: k, to watch every k-th optimizer step, or options of `bootgrad.monitoring.Monitor`, or None.
        losses: a function of outputs and inputs that gives one loss per sample, (b,), in the place of `per_sample_losses`.
            Penalties and loss are about their mean over all samples of a step.

    Raises:
        ArgumentError: an option that there is not.
        UnsupportedError: label smoothing without ``losses``; ``compute_loss_func``; several GPUs in one process; a backend that
            does more to a backward pass than is known here.
    """

    loss_is_scaled_for_ga: bool | None

    def __init__(
        self,
        *args: Any,
        penalties: Mapping[str, Any] | None = None,
        statistics: int | Mapping[str, Any] | None = None,
        losses: Losses | None = None,
        **kwargs: Any,
    ):
        """Make the trainer; penalties and statistics are made at the first step, of the model as it is wrapped then."""
        if losses is not None and not callable(losses):
            raise ArgumentTypeError(f"losses must be a function of outputs and inputs; got {type(losses).__name__}")
        if statistics is not None:
            statistics = {"every": statistics} if isinstance(statistics, int) else statistics
        for name, options in (("penalties", penalties), ("statistics", statistics)):
            if options is not None and not isinstance(options, Mapping):
                raise ArgumentTypeError(f"{name} must be options by name, as {name}={{...}}; got {options!r}")
        check_options(penalties, statistics)
        super().__init__(*args, **kwargs)
        self._penalties = None if penalties is None else dict(penalties)
        self._statistics, self._losses = None if statistics is None else dict(statistics), losses
        self._loop: Loop | None = None
        self._state: dict[str, Any] | None = None  # of a checkpoint, until there is a model
        self._samples = self._losses_checked = 0
        self._is_warned = False
        self._logged: Any = None
        if self._takes_part:
            self._check(self)
            if self._is_ours:
                self.loss_is_scaled_for_ga = True
            self.add_callback(_Steps(self))  # type: ignore[attr-defined]  # a method of the trainer

    @property
    def regularizer(self) -> GradientRegularizer | None:
        """What steps are taken with, from the first one on."""
        return None if self._loop is None else self._loop.regularizer

    @property
    def monitor(self) -> Monitor | None:
        """What watches, from the first step on."""
        return None if self._loop is None else self._loop.monitor

    @property
    def report(self) -> Report | None:
        """Of the last step with penalties."""
        return None if self._loop is None else self._loop.report

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As of the trainer; what penalties and statistics go on from is in the checkpoint."""
        self._loop = self._state = None
        if resume_from_checkpoint and self._takes_part:
            self._state = _state_in(resume_from_checkpoint, self.args.output_dir)  # type: ignore[attr-defined]
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        finally:
            if self._loop is not None:
                self._loop.drop()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As of the trainer, and count the samples of the step that comes."""
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        monitor = self.monitor
        if self._is_ours or (self._takes_part and (monitor is None or monitor.due)):
            count = torch.tensor(sum(_rows(batch) for batch in batches), device=self.args.device)  # type: ignore[attr-defined]
            self._samples = int(self.accelerator.gather(count).sum())  # type: ignore[attr-defined]
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a training step, whose backward pass is that of the step; in evaluation as of the trainer."""
        theirs = super().compute_loss  # type: ignore[misc]
        if not self._takes_part or return_outputs or not torch.is_grad_enabled() or not model.training:
            return theirs(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if self._loop is None:
            self._loop = loop_of(model, self._penalties, self._statistics)
            if self._state is not None:
                self._loop.load_state_dict(self._state)
                self._state = None
        accelerator = self.accelerator  # type: ignore[attr-defined]
        last, scaler = accelerator.sync_gradients, accelerator.scaler
        if not self._is_ours:
            return self._watched(theirs, model, inputs, num_items_in_batch, last, scaler)
        is_to_be_checked = self._is_to_be_checked()
        each = self._labels_each(model, inputs, num_items_in_batch)

        def losses(inputs: dict[str, Any]) -> Tensor:
            nonlocal is_to_be_checked
            if self._losses is not None:
                return _one_a_sample(self._losses(model(**inputs), inputs), inputs)
            if not is_to_be_checked:
                outputs = model(**_without_labels(model, inputs))
            else:
                outputs, is_to_be_checked = model(**inputs, **self._items_for_model(num_items_in_batch)), False
                self._compare(model, outputs, inputs, num_items_in_batch)
            return _one_a_sample(per_sample_losses(model, outputs, inputs, each), inputs)

        ranks = accelerator.num_processes  # over which the trainer averages what it logs

        def share(b: int) -> float:
            return b * float(ranks) / self._samples

        return self._loop.loss(losses, dict(inputs), last=last, scaler=scaler, share=share)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As of the trainer, with the numbers of the last step beside its loss."""
        loop = self._loop
        if loop is not None and "loss" in logs:
            logs |= self._take_seen()
            if loop.report is not None:
                logs |= {name: float(value) for name, value in numbers_of(loop.report).items()}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _take_seen(self) -> dict[str, float]:
        """The numbers of an observation that was not logged yet."""
        monitor = self.monitor
        if monitor is None or monitor.last is None or monitor.last is self._logged:
            return {}
        self._logged = monitor.last
        return finite(monitor.last)

    @property
    def _takes_part(self) -> bool:
        return self._penalties is not None or self._statistics is not None

    @property
    def _is_ours(self) -> bool:
        """Whether the loss of a step is ours; statistics alone leave it to the model."""
        return self._penalties is not None or (self._takes_part and self._losses is not None)

    def _labels_each(self, model: nn.Module, inputs: Mapping[str, Any], items: Any) -> Any:
        """N/B of the step where the trainer has counted N, or of this micro-batch."""
        if self._losses is not None:
            return None
        if items is not None:
            return torch.as_tensor(items).clamp(min=1) / self._samples
        count = _counted(model, inputs)
        return None if count is None else count.clamp(min=1) / _rows(inputs)

    def _items_for_model(self, items: Any) -> dict[str, Any]:
        """What the trainer adds to a model's inputs."""
        takes = self.model_accepts_loss_kwargs  # type: ignore[attr-defined]
        return {"num_items_in_batch": items} if takes and items is not None else {}

    def _compare(self, model: nn.Module, outputs: Any, inputs: Mapping[str, Any], items: Any) -> None:
        """Raise where a model's own loss is another one, and warn once where the trainer alone would add up means of it."""
        _check_parts(model, outputs)
        if outputs.loss is None:
            raise ArgumentError(f"the inputs hold no labels that {type(_inner(model)).__name__} makes a loss of")
        mean = per_sample_losses(model, outputs, inputs).detach().mean()
        part, _ = _ratio(model, outputs.loss.detach(), mean, inputs, items)
        is_known = mean != 0 and bool(mean.isfinite())  # of others the ratio says nothing
        n = self.current_gradient_accumulation_steps * self.accelerator.num_processes  # type: ignore[attr-defined]
        is_added_up = n > 1 and bool(self._items_for_model(items)) and is_known and part == 1
        if is_added_up and _of_step(model, inputs, items) != 1 and not self._is_warned:
            self._is_warned = True
            warn(
                f"{type(_inner(model)).__name__} takes the mean over a micro-batch, which Trainer without penalties adds up "
                f"over {n} of them undivided: with penalties each sample counts once, and the gradient is 1/{n} of that one"
            )

    def _is_to_be_checked(self) -> bool:
        self._losses_checked += 1
        return self._losses_checked & (self._losses_checked - 1) == 0

    def _watched(
        self, theirs: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], items: Any, last: bool, scaler: Any
    ) -> Any:
        """The model's own loss, and where it is watched the same with the samples' losses behind it.

        They are ℓ_i = (B/N) Σ_t ℓ_it where the model divides by the N labels that the trainer has counted in the B samples of a
        step, those that nothing is predicted for among them; and (b/n) Σ_t ℓ_it of these b samples and n labels where not.
        """
        loop = self._loop
        assert loop is not None
        if not loop.records(last):
            loop.pass_by(last)
            return theirs(model, inputs, num_items_in_batch=items)
        shares: list[float] = []
        # Where a model divides by the labels of all ranks, the trainer multiplies by their number.
        ranks = self.accelerator.num_processes if self._items_for_model(items) else 1  # type: ignore[attr-defined]

        def losses() -> Tensor:
            loss, outputs = theirs(model, inputs, return_outputs=True, num_items_in_batch=items)
            _check_parts(model, outputs)
            found = per_sample_losses(model, outputs, inputs)
            part, divides = _ratio(model, loss.detach() / ranks, found.detach().mean(), inputs, items)
            weight = part * self._samples / len(found) if divides else 1.0
            shares[:] = [part * ranks / weight]
            return found * weight

        return loop.loss(losses, last=last, scaler=scaler, share=lambda b: shares[0])

    def _check(self, trainer: Any) -> None:
        args, accelerator = trainer.args, trainer.accelerator
        ours = self._losses is not None
        many = args.world_size > 1
        for what, is_so, remedy in (
            ("label smoothing", trainer.label_smoother is not None and not ours, "give losses(outputs, inputs)"),
            ("compute_loss_func", trainer.compute_loss_func is not None, "give losses(outputs, inputs) in its place"),
            ("use_liger_kernel, which has no logits,", args.use_liger_kernel and not ours, "leave it out"),
            ("several GPUs in one process", args.n_gpu > 1, "start one process for each, by torchrun"),
            (
                f"the backend {accelerator.distributed_type.value}",
                accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"),
                "use DistributedDataParallel, by torchrun",
            ),
            (
                "a parallelism of another kind than over data",
                getattr(accelerator, "parallelism_config", None) is not None,
                "use DistributedDataParallel, by torchrun",
            ),
            (
                "average_tokens_across_devices=False",
                many and not args.average_tokens_across_devices,
                "leave it on: a sample would weigh otherwise on each rank",
            ),
        ):
            if is_so:
                raise UnsupportedError(f"{what} is not followed by penalties and statistics: {remedy}")


class Trainer(PerSample, transformers.Trainer):
    """`transformers.Trainer` with the options of `PerSample`."""


class _Steps(transformers.TrainerCallback):
    """Logs a watched step where the trainer does not, and puts the state of penalties and statistics into checkpoints."""

    def __init__(self, trainer: PerSample):
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log what was seen, unless it will be with the loss of this step, or nothing is to be logged.

        By the trainer's own method: those of derived ones add what they have averaged since a log of the loss.
        """
        if control.should_log or args.logging_strategy == "no":
            return
        seen = self._trainer._take_seen()
        if seen:
            transformers.Trainer.log(self._trainer, seen)  # type: ignore[arg-type]  # a mixin of one

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write it, once for all ranks."""
        loop = self._trainer._loop
        if loop is not None and state.is_world_process_zero and not args.save_only_model:
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            if os.path.isdir(folder):
                torch.save(loop.state_dict(), os.path.join(folder, STATE))


def _state_in(checkpoint: str | bool, output_dir: str) -> dict[str, Any] | None:
    folder = get_last_checkpoint(output_dir) if checkpoint is True else str(checkpoint)
    path = os.path.join(folder or "", STATE)
    if folder is None or not os.path.exists(path):
        warn(f"the checkpoint {folder} has no {STATE}: penalties and statistics start anew")
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except Exception as error:
        raise DataError(
            f"{path} cannot be read ({error}): delete it for penalties and statistics to start anew"
        ) from error


def _inner(model: Any) -> Any:
    """The model of transformers within wrappers and adapters."""
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _rows(inputs: Any) -> int:
    """b: by the labels, for other tensors may be of no sample; where there are none, by the first tensor."""
    known = [inputs[name] for name in ("labels", "start_positions") if name in inputs] or list(inputs.values())
    return next((len(value) for value in known if isinstance(value, Tensor) and value.dim()), 0)


def _without_labels(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without what is for the model's own loss alone; of it decoders of two-part models make their inputs."""
    if getattr(_inner(model).config, "is_encoder_decoder", False):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name not in _LABELS}


def _one_a_sample(losses: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    rows = _rows(inputs)
    if losses.dim() == 1 and len(losses) != rows:
        raise ArgumentError(
            f"losses must be one for each sample, {rows} by the inputs; got {len(losses)}: put labels, by sample, under "
            '"labels" or "start_positions"'
        )
    return losses


def _check_parts(model: nn.Module, outputs: Any) -> None:
    """Raise where outputs have the loss of a router, be it as small as it may."""
    parts = [name for name in outputs if name.endswith(("aux_loss", "z_loss"))] if isinstance(outputs, Mapping) else []
    if parts:
        raise UnsupportedError(
            f"{type(_inner(model)).__name__} adds its {' and '.join(parts)} to the loss, which no sample has a part of: leave "
            "out output_router_logits, or give Trainer a function losses(outputs, inputs)"
        )


def _unlike(model: nn.Module, own: Tensor, mean: Tensor) -> UnsupportedError:
    return UnsupportedError(
        f"{type(_inner(model)).__name__} gives a loss of {float(own):.6g}, and its samples' losses have the mean "
        f"{float(mean):.6g}: there is more in it than is known here; give Trainer a function losses(outputs, inputs)"
    )


def _ratio(model: nn.Module, own: Tensor, mean: Tensor, inputs: Mapping[str, Any], items: Any) -> tuple[float, bool]:
    """What a model's loss is of the mean of the samples' losses, and whether it is divided by the labels of a whole step.

    Of no labels it is 0 or nan, and any multiple of the samples' losses, which are 0.
    """
    if (mean == 0 and not own > 0) or not (own.isfinite() or mean.isfinite()):
        return 1.0, False
    of_step = _of_step(model, inputs, items)
    known = [1.0] if of_step is None else [of_step, 1.0]
    ratio, tolerance = float(own / mean), 2e-2 if own.dtype in (torch.float16, torch.bfloat16) else 1e-5
    part = min(known, key=lambda one: abs(ratio - one))
    if not abs(float(own) - part * float(mean)) <= tolerance * part * abs(float(mean)) + 1e-6:
        raise _unlike(model, own, mean)
    return part, part == of_step


def _of_step(model: nn.Module, inputs: Mapping[str, Any], items: Any) -> float | None:
    """What part of the labels of a step these inputs have."""
    count = None if items is None else _counted(model, inputs)
    return None if count is None else float(count / items)


def _as_wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _of_labels(logits: Tensor, labels: Tensor, each: Any) -> Tensor:
    """(b/N) Σ_t ℓ_it of logits (b, T, C) or (b, C)."""
    labels = labels.to(logits.device)
    flat = F.cross_entropy(_as_wide(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    per_sample: Tensor = flat.view(len(labels), -1).sum(1)
    return per_sample / ((labels != IGNORED).sum().clamp(min=1) / len(labels) if each is None else each)


def _counted(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """N of these inputs, where there are labels that losses are added up over."""
    kind, config = _kind_of(model), _inner(model).config
    if kind is _spans or (kind is _sequences and _problem(config, inputs["labels"]) != "single_label_classification"):
        return None
    labels = _next_labels(config, inputs) if kind in (_next_tokens, _unnamed) else inputs["labels"]
    return (labels != IGNORED).sum()


def _next_labels(config: Any, inputs: Mapping[str, Any]) -> Tensor:
    labels: Tensor = inputs["labels"]
    if getattr(config, "is_encoder_decoder", False):
        return labels
    shifted: Tensor | None = inputs.get("shift_labels")
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if shifted is None else shifted


def _problem(config: Any, labels: Tensor) -> str:
    if config.problem_type is not None:
        return str(config.problem_type)
    if config.num_labels == 1:
        return "regression"
    return f"{'single' if labels.dtype in (torch.long, torch.int) else 'multi'}_label_classification"


def _next_tokens(config: Any, outputs: Any, inputs: Mapping[str, Any], each: Any) -> Tensor:
    return _of_labels(outputs.logits, _next_labels(config, inputs), each)


def _unnamed(config: Any, outputs: Any, inputs: Mapping[str, Any], each: Any) -> Tensor:
    """What transformers takes where a class's name tells nothing, and many such classes have no part of."""
    shape, of_labels = tuple(outputs.logits.shape), tuple(inputs["labels"].shape)
    if len(shape) != 3 or shape[:2] != of_labels:
        raise UnsupportedError(
            f"a loss of no known kind is a causal language model's where logits are (b, T, C) and labels (b, T); got {shape} "
            f"and {of_labels}: give Trainer a function losses(outputs, inputs) that has one for each sample, (b,)"
        )
    return _next_tokens(config, outputs, inputs, each)


def _tokens(config: Any, outputs: Any, inputs: Mapping[str, Any], each: Any) -> Tensor:
    return _of_labels(outputs.logits, inputs["labels"], each)


def _sequences(config: Any, outputs: Any, inputs: Mapping[str, Any], each: Any) -> Tensor:
    logits, labels = _as_wide(outputs.logits), inputs["labels"].to(outputs.logits.device)
    problem = _problem(config, labels)
    if problem == "single_label_classification":
        return _of_labels(logits.view(-1, config.num_labels), labels.view(-1), each)
    if problem == "regression":
        b = len(labels)
        return F.mse_loss(logits.view(b, -1), labels.view(b, -1).to(logits), reduction="none").mean(1)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(1)


def _spans(config: Any, outputs: Any, inputs: Mapping[str, Any], each: Any) -> Tensor:
    parts: list[Tensor] = []
    for name in ("start", "end"):
        logits, positions = outputs[f"{name}_logits"], inputs[f"{name}_positions"]
        positions = positions.view(-1).clamp(min=0).to(logits.device)
        inside = positions < logits.size(1)  # others are not learned from
        parts.append(_of_labels(logits, positions.masked_fill(~inside, IGNORED), None))
    return torch.stack(parts).mean(0)


def _kind_of(model: nn.Module) -> Callable[[Any, Any, Mapping[str, Any], Any], Tensor]:
    inner = _inner(model)
    kind = getattr(inner, "loss_type", None)
    if kind not in _KINDS:
        raise UnsupportedError(
            f"{type(inner).__name__} has a loss of kind {kind!r}, which is not known here by sample; known are "
            f"{', '.join(filter(None, _KINDS))}: give Trainer a function losses(outputs, inputs) that has one for each, (b,)"
        )
    return _KINDS[kind]


_KINDS = {
    None: _unnamed,
    "ForCausalLM": _next_tokens,
    "ForConditionalGeneration": _next_tokens,
    "ForMaskedLM": _tokens,
    "ForTokenClassification": _tokens,
    "ForSequenceClassification": _sequences,
    "ForImageClassification": _sequences,
    "ForVideoClassification": _sequences,
    "ForAudioClassification": _sequences,
    "ForQuestionAnswering": _spans,
}
_LABELS = ("labels", "shift_labels", "start_positions", "end_positions")
