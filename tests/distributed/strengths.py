"""Rules for λ on ranks: they measure what one process does, and all ranks get one λ, to the last digit."""

import copy

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from bootgrad.strengths import Bound, LookAhead, Share

from ..methods.steps import CENTERS, losses_of, regularizer
from .models import batch, pair, same_gradients, sharded

RULES = {
    "share": lambda: (Share(0.3, 2), Share(0.2, 2)),
    "look ahead": lambda: (LookAhead(every=2), LookAhead(every=2)),
    "bound": lambda: (Bound(0.1, measured=True, every=2), Bound(0.1, measured=True, every=2)),
}
CASES = (
    ("share", "ema", {}),
    ("look ahead", "batch_mean", {"every": 2}),
    ("look ahead", "zero", {"statistics": False}),
    ("bound", "window", {}),
)


def rules_on_ranks(rank, size):
    """λ of every step, by case."""
    return [steps_of(rank, size, *case, DDP) for case in CASES]


def rules_on_shards(rank, size):
    return [steps_of(rank, size, *case, sharded) for case in CASES[:2]]


def steps_of(rank, size, name, center, options, wrap):
    x, y, rows = batch(size)
    model, wrapped = pair(wrap=wrap)
    whole, ours = (
        regularizer(
            m, copy.deepcopy(CENTERS[center]), **dict(zip(("reg1", "reg2"), RULES[name](), strict=True)), **options
        )
        for m in (model, wrapped)
    )
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, wrapped)]
    asked = []
    for step in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected = whole.backward(losses_of(model), x, y)
        own = x[rows[rank]], y[rows[rank]]
        if step % 2:
            with ours.accumulate() as block:
                for part in zip(*(t.split(2) for t in own), strict=True):
                    ours.backward(losses_of(wrapped), *part)
            report = block.report
        else:
            report = ours.backward(losses_of(wrapped), *own)
        same_gradients(wrapped, model)
        torch.testing.assert_close(report.strengths, expected.strengths, rtol=1e-9, atol=0)
        asked.append(tuple(report.strengths.values()))
        for optimizer in optimizers:
            optimizer.step()
    assert asked[-1] != asked[1]
    return asked
