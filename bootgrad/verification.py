"""A check of the library against plain autograd, on a user's own model and samples."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError, RecordingError
from .graph import check_losses, refuse_losses
from .regularizers import reg1
from .rules.process_wide import eager
from .rules.stand_ins import StandIns
from .rules.terms import total
from .statistics import record


@dataclass(frozen=True)
class Row:
    """One parameter: the operations that cover it, and relative errors against plain autograd.

    Norms and mean are relative to the parameter's own, or, where that is smaller, to ε^⅓ times the largest gradient of any, ε
    of the dtype; Reg1's gradient to the largest of any.
    """

    name: str
    rule: str
    norms: float
    mean: float
    reg1: float


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`; prints as a table."""

    rows: tuple[Row, ...]
    samples: int
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether every error is within the tolerance."""
        return all(error <= self.tolerance for row in self.rows for error in (row.norms, row.mean, row.reg1))

    def __str__(self) -> str:
        """The table."""
        width = max(len("parameter"), *(len(r.name) for r in self.rows))
        rule = max(len("rule"), *(len(r.rule) for r in self.rows))
        lines = [f"{'parameter':{width}}  {'rule':{rule}}  {'norms':>8}  {'mean':>8}  {'reg1':>8}"]
        for r in self.rows:
            lines.append(f"{r.name:{width}}  {r.rule:{rule}}  {r.norms:8.1e}  {r.mean:8.1e}  {r.reg1:8.1e}")
        verdict = "agrees with" if self.ok else "DIFFERS from"
        lines.append(
            f"bootgrad {verdict} plain autograd on {self.samples} samples: relative errors, tolerance {self.tolerance:.0e}"
        )
        return "\n".join(lines)


def verify(
    model: nn.Module, loss_fn: Callable[..., Tensor], *batch: Any, samples: int = 4, tolerance: float | None = None
) -> Verification:
    """Compare norms, mean gradient and Reg1's gradient with plain autograd, one backward pass per sample.

    Args:
        model: the module; nothing about it changes, ``.grad`` included. What is compiled runs as it was written: torch has
            no second derivatives of it.
        loss_fn: ``loss_fn(*batch)`` gives losses (B,).
        batch: tensors with as many samples in dimension 0 as the first one, cut to a few; others are passed as they are.
        samples: how many samples to compare on.
        tolerance: largest relative error to accept; by default 1e-9 in float64, 1e-3 in float32, else 5e-2.

    Returns:
        A `Verification`, whose ``rows`` hold the errors and ``ok`` the verdict; it is printed, too.

    Raises:
        BootgradError: as `record.backward`.
    """
    if samples < 2:
        raise ArgumentError(f"Reg1 needs at least two samples to compare on; got {samples}")
    rec = record(model, check="always", compiled=False)
    size = next((t.size(0) for t in batch if isinstance(t, Tensor) and t.dim()), 0)  # the first tensor's samples
    cut = [t[:samples] if isinstance(t, Tensor) and t.dim() and t.size(0) == size else t for t in batch]
    if not rec.parameters:
        raise RecordingError("the model has no parameter that requires grad: nothing to compare")
    with _buffers_kept(model):
        result = _compare(rec, loss_fn, cut, tolerance)
    print(result)
    return result


def _compare(
    rec: record, loss_fn: Callable[..., Tensor], batch: Sequence[Any], tolerance: float | None
) -> Verification:
    tensors = list(rec.parameters.values())
    with torch.random.fork_rng(), StandIns(), eager:
        losses = loss_fn(*batch)
        check_losses(losses)
        refuse_losses(losses)
        rows = []
        for loss in losses:
            grads = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, tensors, strict=True)])
    stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    covariance = total((g - g.mean(0)).square().sum() for g in stacked) / len(rows)
    expected = _grads(covariance, tensors)

    with torch.random.fork_rng(), rec:
        losses = loss_fn(*batch)
    G = rec.per_sample_gradients(losses, create_graph=True)
    rules: dict[str, list[str]] = {}
    assert rec.last_reach is not None
    for operation in rec.last_reach.operations:
        for tracked in operation.tracked:
            for leaf in rec.leaves(tracked):
                rules.setdefault(rec.name_of(leaf), []).append(operation.name)
    ours = G.materialize()
    norms = {name: term_norms.detach() for name, term_norms in G.sq_norms_by_parameter().items()}
    mean = G.mean()
    penalty = _grads(reg1(G), tensors)

    scale = max(float(e.norm()) for e in expected)
    # Of a gradient that is zero but for rounding, as that of a bias before a norm, no digit is right.
    least = (
        torch.finfo(tensors[0].dtype).eps ** (1 / 3) * max(float(g.detach().norm()) for g in stacked) / len(rows) ** 0.5
    )
    out = []
    for k, name in enumerate(rec.parameters):
        own = stacked[k].detach()
        out.append(
            Row(
                name,
                " + ".join(dict.fromkeys(rules.get(name, ["unused"]))),
                _error(norms[name], own.reshape(len(own), -1).square().sum(1), least**2)
                if name in norms
                else _error(ours[name], own, least),
                _error(mean[name], own.mean(0), least),
                float((penalty[k] - expected[k]).norm()) / (scale or 1.0),
            )
        )
    if tolerance is None:
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(tensors[0].dtype, 5e-2)
    return Verification(tuple(out), len(rows), tolerance)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """A context after which the model's buffers, as running statistics, are what they were."""
    kept = [
        (module, name, buffer, buffer if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)


def _grads(value: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(t) for t in tensors]
    grads = torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True)]


def _error(ours: Tensor, expected: Tensor, least: float) -> float:
    """Error in norm, relative to what is expected or to ``least``, whichever is more; absolute where neither is."""
    scale = max(float(expected.norm()), least)
    return float((ours.detach() - expected.detach()).norm()) / (scale or 1.0)
