"""What a second pass over a model needs so that it leaves no trace: moved parameters, random numbers, buffers.

    with displaced(parameters, direction, step):       # θ + step · d, in place; afterwards θ, bit for bit
        with replay.again() as losses:                 # with the random numbers and buffers of the first pass
            grads = torch.autograd.grad(losses.sum(), parameters)

Gradients belong inside of both: checkpointed parts of a model run once more in the backward pass.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from .errors import ArgumentError
from .graph import check_losses
from .penalties import total_sq_norm
from .rules.stand_ins import StandIns
from .scaling import Scaling


@contextmanager
def displaced(
    parameters: Mapping[str, Tensor], direction: Callable[[str], Tensor], step: float | Tensor
) -> Iterator[None]:
    """Move parameters by ``step`` times their ``direction``, in place, and put saved copies back, after an exception, too.

    What comes back is equal bit for bit, which θ + ε d − ε d would not be; version counters rise. Autocast's cached copies of
    the parameters are dropped on both ways: in a surrounding ``torch.autocast`` they would be used in place of what moved.

    Args:
        parameters: by name, each once.
        direction: makes a tensor of the parameter's shape from its name; one at a time is held.
        step: a number, or () on the parameters' device, for which nobody waits.
    """
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                p.add_((step * direction(name)).to(p))
        torch.clear_autocast_cache()
        yield
    finally:
        put_back(parameters, saved)
        torch.clear_autocast_cache()


@torch.no_grad()
def put_back(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy the saved values into the parameters, all of them: what is raised in between, as by Ctrl-C, waits for the end."""
    interruption = None
    for name, p in parameters.items():
        try:
            p.copy_(saved[name])
        except BaseException as error:
            interruption = error
            p.copy_(saved[name])
    if interruption is not None:
        raise interruption


class Snapshot:
    """The buffers of a model and the states of torch's random number generators, as they are now.

    The generators are those of the CPU and of the devices of the model's tensors; Python's, numpy's and those that a model
    makes for itself are not among them.
    """

    def __init__(self, model: nn.Module):
        """Copy them."""
        modules = list(model.modules())
        self._buffers = [
            (module._buffers, name, buffer, buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        tensors = (t for module in modules for t in (*module._parameters.values(), *module._buffers.values()))
        devices = {t.device for t in tensors if t is not None and t.device.type not in ("cpu", "meta")}
        self._cpu = torch.get_rng_state()
        self._devices = [(d, torch.get_device_module(d).get_rng_state(d)) for d in devices]

    def restore_buffers(self) -> None:
        """The same tensors as then, in the same places, with the same contents."""
        for owner, name, buffer, contents in self._buffers:
            owner[name] = buffer
            if all(
                stride or size < 2 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)
            ):  # can be written
                buffer.data.copy_(contents)  # no new version: what a graph has saved of it is there again

    def restore(self) -> None:
        """Buffers and generators."""
        self.restore_buffers()
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def traceless(model: nn.Module) -> Iterator[None]:
    """What the block does to buffers and random number generators is undone after it, and after an exception."""
    before = Snapshot(model)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def same_buffers(model: nn.Module, before: Snapshot) -> Iterator[None]:
    """Run the block with the buffers of ``before``, as other samples of the same batch; afterwards they are those of now."""
    now = Snapshot(model)
    before.restore_buffers()
    try:
        yield
    finally:
        now.restore_buffers()


class Replay:
    """A function of a model that makes losses, run several times as if once.

    Args:
        model: whose buffers are kept.
        function: makes losses (m,), without arguments.
    """

    def __init__(self, model: nn.Module, function: Callable[[], Tensor]):
        """Remember where the generators and buffers stand now, just before the first pass."""
        self.model, self.function = model, function
        self._before = Snapshot(model)

    @contextmanager
    def again(self, context: AbstractContextManager | None = None) -> Iterator[Tensor]:
        """The losses of one more pass, in a context of its own, with the random numbers and buffers of the first."""
        with traceless(self.model):
            self._before.restore()
            with context or StandIns():
                losses = self.function()
            check_losses(losses)
            yield losses


def finite_step(spread: Tensor, parameters: Sequence[Tensor], epsilon: float) -> Tensor:
    """ε, () in float64, such that ε · spread = epsilon · ‖θ‖; without any spread or parameters other than zero, epsilon.

    Args:
        spread: the length of the direction, root mean square over samples where each has its own, () in float64.
        parameters: θ.
        epsilon: the length of the step, relative to θ.
    """
    with torch.no_grad():
        size = total_sq_norm(parameters).sqrt()
        ratio = torch.where(size > 0, size, 1) / torch.where(spread > 0, spread, 1)
        return epsilon * torch.where(spread > 0, ratio, 1)


def quotient(moved: Sequence[Tensor | None], grads: Sequence[Tensor | None], step: Tensor) -> list[Tensor | None]:
    """(∇(θ + ε d) − ∇(θ)) / ε by leaf; None where neither reaches it."""
    out: list[Tensor | None] = []
    for there, here in zip(moved, grads, strict=True):
        difference = there if here is None else -here if there is None else there - here
        out.append(None if difference is None else difference / step.to(difference.dtype))  # (), as wide as a scalar's
    return out


def check_parameters(parameters: Mapping[str, Tensor], what: str = "finite differences") -> None:
    """Raise where a parameter is too coarse to be moved a little, or shares memory with another, and would be moved twice."""
    for name, p in parameters.items():
        if p.dtype not in (torch.float32, torch.float64):
            raise ArgumentError(
                f"{what} need parameters in float32 or float64; got {p.dtype} for {name}, which rounds small steps "
                "away: keep the parameters in float32 (torch.autocast for the rest), or take an exact derivative"
            )
    spans = sorted((*_span(p), name) for name, p in parameters.items() if p.numel())
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise ArgumentError(
                f"parameters {name} and {other} share memory, so that {what} would move both at once: tie them by using one "
                "parameter twice"
            )


def _span(t: Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first byte to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def check_second(losses: Tensor, batch_size: int, scaling: Scaling) -> Tensor | None:
    """As `Scaling.finite`, of a second pass; raise where it gave another number of losses."""
    if losses.numel() != batch_size:
        raise ArgumentError(
            f"the function gave {losses.numel()} losses when it was run again; expected {batch_size}, as at first: it must "
            "depend on its arguments and the model alone"
        )
    return scaling.finite(losses)
