"""A parameter that every sample has for itself: a scale, a position, a class token. From there on it is data."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from .base import Phase, RowsOperation, per_sample_sum
from .samples import Reading


class ExpandOperation(RowsOperation):
    """A tracked tensor that each sample has for itself, from where on it is data: g_i = gy_i."""

    def __init__(self, recorder, name: str, tracked: Tensor):
        """Describe it; ``name`` is what it is for."""
        shape, dtype = tracked.shape, tracked.dtype
        super().__init__(recorder, name, [tracked], lambda gy, B: [per_sample_sum(gy, B, shape).to(dtype)])

    def expanded(self, rows: Sequence[int], dims: int) -> Tensor:
        """The rows, (*rows, 1, …, *shape), in the memory of one."""
        (tracked,) = self.tracked
        self.row_dims, aligned = len(rows), (*[1] * (dims - tracked.dim()), *tracked.shape)
        self.of_rows, self.of_one = torch.Size(aligned[: len(rows)]), torch.Size(aligned[len(rows) :])
        probe = self.new_probe(math.prod(rows), tracked)
        return self.attach(ExpandedRow.apply(self, probe, self.recorder.alias(tracked), (*rows, *self.of_one)))

    def rows(self, gy, *saved):  # noqa: D102
        reading, (tracked,) = self.reading, self.tracked
        if reading is None:
            return super().rows(gy)
        # What the tensor has for itself in the rows' dimensions is apart for each sample, too: finer samples, Q of each.
        B, Q = reading.batch_size, self.of_rows.numel()
        if Q > 1:
            slots = torch.arange(Q, device="cpu").view(self.of_rows).expand(reading.owner.shape)
            reading = Reading(reading.owner * Q + slots, B * Q)
        rows = per_sample_sum(reading.gradients(gy), B * Q, self.of_one)
        return [rows.reshape(B, *tracked.shape).to(tracked.dtype)]


class ExpandedRow(Function):
    """One row as many, with a probe."""

    @staticmethod
    def forward(ctx, operation, probe, row, shape):
        """Repeat the row without a copy."""
        ctx.operation, ctx.row_shape = operation, row.shape
        return row.expand(shape)

    @staticmethod
    def backward(ctx, gy):
        """Add up the rows' gradients, and read the probe."""
        operation, probe = ctx.operation, None
        if operation.phase is Phase.ROW_NORMS:
            probe = operation.row_norms(gy)
        if operation.phase is Phase.STATISTICS and operation.recorder.takes_statistics(operation):
            probe = operation.read(operation.rows(gy))
        row = gy.sum_to_size(ctx.row_shape) if operation.phase in (Phase.PLAIN, Phase.STATISTICS) else None
        return None, probe, row, None
