"""One object that trains with the penalties Reg1 and Reg2: what `GradientRegularizer` does in a step, whatever the method.

Reg1 = (1/B) Σ_i ‖g_i − c‖²        Reg2 = ‖ḡ − c‖²
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import center_pairs, waiting
from .centers import BatchMean
from .compiled import is_compiled
from .distributed import guarded
from .errors import ArgumentError, ArgumentTypeError, RecordingError, UnsupportedError, warn
from .grads import add_to_grads, call_hooks, gated
from .methods.base import Penalties
from .methods.choice import choose, is_number
from .methods.random_signs import RandomSigns
from .micro_batches import Block
from .penalties import Distances, Report, reg1, reg2, total_sq_norm
from .recording import BATCHNORM, named_parameters
from .rules.stand_ins import StandIns
from .scaling import Scaling
from .statistics import record as Record
from .steps import Step
from .strength_pairs import Strength, Strengths
from .wrappers import ranks_of, silent

__all__ = ["GradientRegularizer", "Report", "reg1", "reg2"]


class GradientRegularizer:
    """Backward passes with λ₁ Reg1 + λ₂ Reg2 added to the mean loss, for a plain training loop.

        reg = bootgrad.GradientRegularizer(model, reg1=0.1, reg2=0.2, center="ema")
        optimizer.zero_grad()
        report = reg.backward(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y)
        optimizer.step()

    The model's class, forward, hooks and ``state_dict`` stay as they are. Where a method runs the model a second time, dropout
    draws the same numbers again, and random number generators and buffers are left as one pass leaves them. (Torch's default
    generator is that of all threads, and finite differences move the parameters for the length of a pass: let no other thread
    draw from the one or read the others then.)

    ==========================  ======================================  ================================================
    method                      price, 3 being a plain step             bias and variance
    ==========================  ======================================  ================================================
    ``"exact"``                 6 to 9                                  none
    ``"finite_difference"``     6 for Reg2, 6 to 8 with Reg1            O(ε); another estimate where it is not smooth
    ``"random_signs"``          3 + 8 probes, or 3 + 5 probes by        none, or O(ε); the variance of the signs over probes
                                finite differences
    ==========================  ======================================  ================================================

    With ``fraction=m/B`` a price u becomes 3 + (m/B)(u − 3), and with ``every=k`` 3 + (u − 3)/k on average. Both are unbiased:
    the plain gradient is that of the whole batch always. A fraction has the variance (1 − m/B) S²/m in the penalties' gradient,
    S² that of the samples' own parts of it. Steps between penalties leave those of one step k times as large on every k-th.

    Where several ranks train the model, by `DistributedDataParallel` or `fully_shard`, all is about the batch that they have
    together, whatever the number of samples on each.

    Args:
        model: the module to regularize; frozen parameters are left out.
        reg1: λ₁ ≥ 0, a number or a function of the step; all steps count, with penalty or without, and it is asked at each. Or
            a rule of `bootgrad.strengths` that sets it during training; ``"auto"`` is the default one.
        reg2: λ₂ ≥ 0, likewise.
        center: ``"batch_mean"``, ``"zero"``, ``"ema"``, ``"window"``, a mapping {parameter name: tensor}, an object of
            `bootgrad.centers`, or {"reg1": …, "reg2": …}. Centers move after each successful backward. As long as a moving
            center knows nothing, on the first step, Reg1 is about the batch mean and Reg2 is left out. About the batch mean
            a batch of one sample has a Reg1 of zero, with no gradient: it takes another center.
        method: ``"exact"``; ``"finite_difference"``, from another first-order pass at displaced parameters;
            ``"random_signs"``, for any architecture, with nothing recorded and hence no check for coupled samples; ``"auto"``,
            the cheapest exact one, or for a compiled model random signs by finite differences: other methods run it as it was
            written. `Report.method` says what ran.
        fraction: m/B in (0, 1], the share of the batch that the penalty is taken on, at least one sample, chosen at random in
            each step. Every tensor in the batch with as many rows as the first is indexed in dimension 0.
        every: k, the penalty is taken on steps 0, k, 2k, …, with k times λ.
        probes: vectors of signs that ``"random_signs"`` averages over.
        derivative: of ``"random_signs"``: ``"exact"``, by double backward, or ``"finite_difference"``, by first-order passes
            alone, which run compiled models and recurrent kernels, too.
        statistics: whether reports are to tell Γ, ‖ḡ‖² and what follows from them at any price. If not, they are nan where the
            penalties do not bring them along: no norms are made on steps and samples without a penalty, and by ``"exact"``
            none for Γ, and about a constant center no ḡ, a product of each layer less. By ``"exact"`` and by finite differences
            Reg1 is then that of the samples it was taken on, and nan where Reg2 was taken, too.
        epsilon: length of a finite step relative to ‖θ‖; 0.0001. Parameters must be float32 or wider; under autocast to half
            precision, steps that are shorter than its rounding are lost in it.
        batchnorm: as of `bootgrad.record`, for batch norm in training mode: with ``"contribution"`` penalties are of the
            samples' contributions; running statistics move as in one plain pass.

    Raises:
        ArgumentError: an option out of range; Reg2 about the batch mean, which is identically zero.
        RecordingError: the model has no parameter that requires grad.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reg1: Strength = 0.0,
        reg2: Strength = 0.0,
        center: Any = "batch_mean",
        method: str = "exact",
        fraction: float = 1.0,
        every: int = 1,
        probes: int = 1,
        derivative: str = "exact",
        epsilon: float | None = None,
        statistics: bool = True,
        batchnorm: str = "refuse",
    ):
        """Check the options; nothing is computed yet."""
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if not named_parameters(model):
            raise RecordingError("the model has no parameter that requires grad: the penalties would do nothing")
        self._method = choose(method, probes, derivative, epsilon, is_compiled(model))
        if not is_number(fraction) or not 0 < fraction <= 1:
            raise ArgumentError(f"fraction must be a number in (0, 1], a share of the batch; got {fraction!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(
                f"every must be a whole number of at least 1, steps from one penalty to the next; got {every!r}"
            )
        if batchnorm not in BATCHNORM:
            raise ArgumentError(f"batchnorm must be one of {', '.join(BATCHNORM)}; got {batchnorm!r}")
        if batchnorm == "contribution" and (not self._method.records or fraction < 1):
            raise ArgumentError(
                'batchnorm="contribution" is of all samples of a batch, in a recorded pass: take method="exact" or '
                f'"finite_difference" and fraction=1; got method="{self._method.name}" and fraction={fraction}'
            )
        self.model, self.batchnorm = model, batchnorm
        self._strengths = Strengths(reg1, reg2)
        self.strengths = self._strengths.given
        self.fraction, self.every, self.statistics = fraction, every, bool(statistics)
        self.step = 0
        self.centers = center_pairs.parsed(center, named_parameters(model))
        if isinstance(self.centers["reg2"], BatchMean) and not self._strengths.is_zero("reg2"):
            raise ArgumentError(
                'reg2 about "batch_mean" is identically zero: give it a center of its own, for example '
                'center={"reg1": "batch_mean", "reg2": "ema"}'
            )
        self._strengths.claim()
        if self._strengths.is_zero("reg1") and self._strengths.is_zero("reg2"):
            warn("reg1 and reg2 are both 0: gradients will be the plain ones")
        # What is drawn in a step follows from this and the step, so that one that fails and is taken again draws the same.
        draws = isinstance(self._method, RandomSigns) or fraction < 1
        self._seed = int(torch.randint(2**62, (), device="cpu")) if draws else None
        self._recording: Record | None = None
        self._awaits_losses = self._forgotten = False
        self._block: Accumulation | None = None

    @property
    def method(self) -> str:
        """The method that runs; "auto" is the one that was chosen."""
        return self._method.name

    def record(self, samples: Tensor | None = None) -> AbstractContextManager[Any]:
        """The context for the forward pass, where `backward` is given losses; ``samples`` as for `bootgrad.record`."""
        if self._forgotten:
            self._forgotten = False
            warn(
                "the losses that were recorded before were not given to reg.backward(losses), so that no penalty was taken of "
                "them: call it in place of losses.mean().backward()"
            )
        record = partial(Record, samples=samples, batchnorm=self.batchnorm, compiled=self.step % self.every != 0)
        self._recording = record(self.model) if self._method.records else None
        self._awaits_losses = True
        return self._until_losses(self._recording or _unrecorded(self.model))

    @contextmanager
    def _until_losses(self, forward: AbstractContextManager[Any]) -> Iterator[Any]:
        """Within a forward pass; losses are forgotten that no `backward` follows, but for those that an error ended."""
        with forward as recording:
            yield recording
        self._forgotten = self._awaits_losses

    def backward(self, losses: Tensor | Callable[..., Tensor], *batch: Any, scaler: Any = None) -> Report:
        """Accumulate the gradient of ``losses.mean() + λ₁ Reg1 + λ₂ Reg2`` into ``.grad``, move the centers, and report.

        Calls add up as torch's do: after k of them ``.grad`` is the sum of k such gradients, each with its penalties, and the
        centers and the step have moved k times. Micro-batches of one batch belong in a block of `accumulate`; there the report
        has the loss alone, and all else happens at the end of the block.

        Args:
            losses: a function of ``batch`` that gives losses (B,), or the losses themselves, computed in ``with reg.record()``.
                Finite differences and fractions need the function, which they call twice or more.
            batch: what the function is called with.
            scaler: a `torch.amp.GradScaler`: ``.grad`` is scaled by its factor, for ``scaler.step(optimizer)``, and what is not
                finite is no error but left in ``.grad``, for the scaler to skip the step; the centers are then left alone.
                Penalties, centers and the report are of the unscaled gradients.

        Raises:
            BootgradError: as `record.backward`; exceptions of the user's function pass as they are. On any error ``.grad``,
                the centers and the step are as before, but for one of a hook that waits for ``.grad``, when the step is
                done. Of two centers the first has moved where the second one's own update fails.
        """
        recording, awaited = self._recording, self._awaits_losses
        self._recording, self._awaits_losses, self._forgotten = None, False, False
        block = self._block
        if block is None:
            step = self._begin(scaler)
        elif scaler is None:
            step = block._next()
        else:
            raise ArgumentError("the scaler of a whole batch is given to its block: reg.accumulate(n, scaler=scaler)")
        with guarded(step.rounds if block is None else None):  # of a block, at its end
            if callable(losses):
                step.add(losses, batch)
            elif batch:
                raise ArgumentTypeError(
                    "a batch was given along with losses: pass the function that computes the losses instead"
                )
            elif not awaited:
                raise RecordingError(
                    "nothing was recorded: compute the losses inside `with reg.record():`, or pass a function"
                )
            else:
                step.add_losses(losses, recording)
            if block is None:
                return self._end(step)
        block._after_call()
        return step.report_of_call()

    def accumulate(self, n: int | None = None, scaler: Any = None) -> "Accumulation":
        """A block whose calls of `backward` bring the micro-batches of one batch, of any sizes; one step at its end.

            with reg.accumulate() as step:
                for x, y in micro_batches:
                    reg.backward(loss_fn, x, y)
            step.report

        ``.grad``, the centers and the report are as if all samples had come in one call: mean loss and penalties are those of
        the whole batch, and λ is asked once. Until the end of the block gradients are kept apart from ``.grad``, as two tensors
        of each parameter's size, or as one where nothing but the mean loss is taken.

        Reg1 about a center of earlier steps takes one sweep, at the price of the calls themselves. **Reg1 about the batch mean
        and Reg2 take two**, for they need the mean gradient of all samples: each call takes the plain step, 3 units, and keeps
        its function and batch; at the end of the block all are run again, with the same random numbers and buffers, for the
        penalties at their price, 6 to 9. With ``center=bootgrad.centers.WindowMean(1)`` one sweep measures Reg1 from the mean
        of the batch before. (Reg2 with that in the place of ḡ would be of no use: H̄ (ḡ − c) with another batch's ḡ has the mean
        H (g − c), without the noise that Reg2 is about.)

        Random signs are drawn for each micro-batch by itself, and a fraction is taken of each.

        Args:
            n: the number of micro-batches, an error if there are fewer or more; None for as many as there are.
            scaler: as of `backward`.

        Raises:
            RecordingError: another number of micro-batches than ``n``, parameters that changed between them, a block in a
                block.
            ArgumentError: in two sweeps, a batch that was written to after its call, or a function that gives other losses
                when it is run again. On all errors in the block ``.grad``, the centers and the step are as before.
        """
        return Accumulation(self, n, scaler)

    def _begin(self, scaler: Any, alone: bool = True) -> Step:
        """The step that comes: what is taken in it, and about which centers."""
        asked = self._strengths.asked(self.step)
        ranks, generator = ranks_of(self.model), torch.Generator()
        if self._seed is not None:
            of_rank = 0 if ranks is None else 0x9E3779B9 * ranks.rank  # each draws for its own samples
            generator.manual_seed((self._seed + self.step + of_rank) % 2**63)
        parameters = named_parameters(self.model)
        if not parameters:
            raise RecordingError(
                "no parameter of the model requires grad any more: there is nothing to take gradients of"
            )
        scaling = Scaling(scaler, next(iter(parameters.values())).device)
        if ranks is not None:
            ranks.gather()
        with silent(ranks):  # passes of a center's own
            centers = center_pairs.values_of(self.centers, parameters)
        plan = self._strengths.plan(asked, self.step, self.every, centers, self.centers)
        wants_mean = self.statistics or "reg2" in plan.taken or centers["reg1"] is None or plan.needs_mean
        wants_mean = wants_mean or center_pairs.ask_for_mean(self.centers)
        others = plan.trial is None
        penalties = Penalties(plan.taken, centers, generator, self.statistics, wants_mean, others)
        method, fraction = self._method, self.fraction
        step = Step(self.model, parameters, method, fraction, penalties, scaling, plan, alone, self.batchnorm, ranks)
        runs_again = step.takes_two_sweeps or self._method.repeats
        if plan.taken and (self._seed is not None or runs_again) and waiting.is_capturing():
            raise UnsupportedError(
                "a captured graph of kernels would repeat the signs or samples of the step that it was captured from, and "
                'cannot rewind random number generators for a second pass: take method="exact" and fraction=1 there'
            )
        return step

    def _end(self, step: Step) -> Report:
        """Write ``.grad``, and move the centers and the step."""
        outcome, centers = step.finish(), step.penalties.centers
        distances = Distances(outcome.mean, centers)
        for name, strength in step.penalties.strengths.items():
            c = centers[name]
            if c is not None:
                with silent(step.ranks):
                    center_pairs.add_derivative(outcome, step.parameters, c, self.centers[name], strength)
        added = self._strengths.added(step.plan, outcome, step.parameters, distances)
        step.plan = self._strengths.settled(step.plan, added)
        grads = gated(step.scaling.scaled(outcome.grads), outcome.finite, step.scaling.skips)
        checks = [outcome.finite, torch.isfinite(distances.sq_mean) if outcome.mean else None]
        if step.scaling.skips:  # for the penalties alone, too
            seen = total_sq_norm([g for g in grads if g is not None and g.layout == torch.strided])
            checks.append(torch.isfinite(seen))
        known = [t for t in checks if t is not None]
        finite = torch.stack(known).all() if known else None
        report, leaves = step.report(outcome, distances, finite), outcome.leaves
        # Before anything is written: a rule of the user's may raise.
        self._strengths.after(self.step, step.plan, outcome, added, centers["reg1"] is not None, report, finite)
        if step.ranks is not None:
            leaves, grads = step.ranks.stored(leaves, grads)
        move = None
        if outcome.mean and finite is not None:
            move = partial(center_pairs.move, self.centers, outcome.mean, centers, finite)
        add_to_grads(leaves, grads, move)
        self._strengths.count(step.plan, finite)
        self.step += 1
        call_hooks(leaves, grads)
        return report

    def state_dict(self) -> dict[str, Any]:
        """The step, the states of centers and of rules for λ, and what random samples and signs follow from."""
        state: dict[str, Any] = {
            "step": self.step,
            "centers": {name: c.state_dict() for name, c in self.centers.items()},
        }
        if self._seed is not None:
            state["seed"] = self._seed
        strengths = self._strengths.state_dict()
        return state | {"strengths": strengths} if strengths else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of a regularizer with the same centers and options; on an error, all is as before."""
        before = {name: center.state_dict() for name, center in self.centers.items()}
        try:
            step = int(state["step"])
            seed = None if self._seed is None else int(state["seed"])
            for name, center in self.centers.items():
                center.load_state_dict(state["centers"][name])
            self._strengths.load_state_dict(state.get("strengths", {}))
        except Exception as error:
            for name, center in self.centers.items():
                center.load_state_dict(before[name])
            if not isinstance(error, KeyError | TypeError | ValueError | AttributeError | OverflowError | RuntimeError):
                raise
            what = f"it lacks {error}" if isinstance(error, KeyError) else repr(error)
            if error.args == ("seed",):
                what += ", the whole number that random samples and signs follow from: with any there, others are drawn"
            raise ArgumentError(
                f"not a state_dict of a GradientRegularizer with these centers and options: {what}"
            ) from None
        self.step, self._seed = step, seed


@contextmanager
def _unrecorded(model: nn.Module) -> Iterator[None]:
    with StandIns(), silent(ranks_of(model)):
        yield


class Accumulation(Block):
    """A block of `GradientRegularizer.accumulate`."""

    def __init__(self, regularizer: GradientRegularizer, n: int | None, scaler: Any):
        """Keep the arguments."""
        super().__init__(n, [regularizer.model])
        self._regularizer, self._scaler = regularizer, scaler
        self._step: Step | None = None
        self._report: Report | None = None

    @property
    def report(self) -> Report:
        """What the step saw of the whole batch, after the block."""
        if self._report is None:
            raise RecordingError("the report is that of all micro-batches, and there when the block has ended")
        return self._report

    def _begin(self) -> None:
        if self._regularizer._block is not None:
            raise RecordingError("a block of micro-batches is open already: end it before the next one")
        self._step = self._regularizer._begin(self._scaler, alone=self.n == 1)
        self._rounds = self._step.rounds
        self._regularizer._block = self

    def _next(self) -> Step:
        """The step, for one more micro-batch."""
        self._before_call()
        self._in_call = True
        assert self._step is not None
        return self._step

    def _finish(self) -> None:
        assert self._step is not None
        self._regularizer._block = None
        self._report = self._regularizer._end(self._step)

    def _drop(self) -> None:
        self._step = self._regularizer._block = None
        self._regularizer._recording = None
        self._regularizer._awaits_losses = self._regularizer._forgotten = False
