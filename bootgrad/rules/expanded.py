"""A parameter that every sample has for itself: a scale, a position, a class token. From there on it is data."""

from torch import Tensor
from torch.autograd import Function

from .base import Phase, RowsOperation, per_sample_sum


class ExpandOperation(RowsOperation):
    """A tracked tensor that each sample has for itself, from where on it is data: g_i = gy_i."""

    def __init__(self, recorder, tracked: Tensor):
        """Describe it."""
        shape, dtype = tracked.shape, tracked.dtype
        super().__init__(recorder, "expand", [tracked], lambda gy, B: [per_sample_sum(gy, B, shape).to(dtype)])

    def expanded(self, rows: int, dims: int) -> Tensor:
        """The rows, (N, 1, …, *shape), in the memory of one."""
        (tracked,) = self.tracked
        shape = (rows, *[1] * (dims - 1 - tracked.dim()), *tracked.shape[tracked.dim() == dims :])
        return self.attach(ExpandedRow.apply(self, self.new_probe(rows, tracked), self.recorder.alias(tracked), shape))


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
            probe = operation.read(operation.rows_of(gy, operation.recorder.batch_size))
        row = gy.sum_to_size(ctx.row_shape) if operation.phase in (Phase.PLAIN, Phase.STATISTICS) else None
        return None, probe, row, None
