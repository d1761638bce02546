"""A rank that fails, and what is refused on all."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import bootgrad
import bootgrad.methods.random_signs
import bootgrad.steps

from ..methods.steps import losses_of, regularizer
from .models import BATCH_MEAN, SPLITS, batch, pair, raised, same_gradients


def failures(rank, size, wrap=DDP):
    """In every place that one rank can fail in; afterwards all go on."""
    x, y, rows = batch(size)
    own, found = rows[rank], {}
    model, wrapped = pair(wrap=wrap)
    bad = torch.tensor(torch.nan if rank == 1 else 1.0)

    def spoiled(x, y):
        return losses_of(wrapped)(x, y) * bad

    def broken(x, y):
        if rank == 1:
            raise KeyError("no such file")
        return losses_of(wrapped)(x, y)

    def statistics():
        with bootgrad.record(wrapped) as rec:
            losses = spoiled(x[own], y[own])
        rec.backward(losses)

    def block(function, penalties):
        reg = regularizer(wrapped, **({"center": BATCH_MEAN} | penalties))
        with reg.accumulate():
            reg.backward(losses_of(wrapped), x[own], y[own])
            reg.backward(function, x[own], y[own])

    def between():
        reg = regularizer(wrapped, BATCH_MEAN)
        with reg.accumulate():
            reg.backward(losses_of(wrapped), x[own], y[own])
            if rank == 1:
                raise KeyError("no such file")

    def second_sweep():
        """Ranks have met once for the mean gradient, and one fails before they meet again."""
        reg, calls = regularizer(wrapped, BATCH_MEAN), []

        def changing(x, y):
            calls.append(len(x))
            return losses_of(wrapped)(x, y) * (1.0 if rank != 1 or len(calls) < 3 else 2.0)

        with reg.accumulate():
            reg.backward(changing, x[own], y[own])
            reg.backward(changing, x[own], y[own])

    steps = {
        "statistics": statistics,
        "losses": lambda: regularizer(wrapped, BATCH_MEAN).backward(spoiled, x[own], y[own]),
        "one round": lambda: regularizer(wrapped, "zero", reg2=0.0).backward(spoiled, x[own], y[own]),
        "function": lambda: regularizer(wrapped, BATCH_MEAN).backward(broken, x[own], y[own]),
        "block": lambda: block(broken, {}),
        "block, plain": lambda: block(spoiled, {"center": "zero", "reg2": 0.0}),
        "between": between,
        "second sweep": second_sweep,
    }
    for name, step in steps.items():
        wrapped.zero_grad()
        found[name] = raised(step)
        assert all(p.grad is None for p in wrapped.parameters()), name
        reg = regularizer(wrapped, BATCH_MEAN)  # and all is in step
        model.zero_grad()
        regularizer(model, BATCH_MEAN).backward(losses_of(model), x, y)
        reg.backward(losses_of(wrapped), x[own], y[own])
        same_gradients(wrapped, model)
    return found


def refusals(rank, size):
    """What would not be the batch's."""
    x, y, rows = batch(size)
    own = rows[rank]
    _, wrapped = pair()
    found = {}

    def no_sync():
        with wrapped.no_sync():
            regularizer(wrapped, "zero").backward(losses_of(wrapped), x[own], y[own])

    def rows_with_a_graph():
        with bootgrad.record(wrapped) as rec:
            losses = losses_of(wrapped)(x[own], y[own])
        rec.per_sample_gradients(losses, create_graph=True)

    def hooked():
        _, hooked = pair()
        hooked.register_comm_hook(None, lambda state, bucket: bucket.buffer())
        bootgrad.record(hooked)

    def ignoring():
        model, _ = pair()
        DDP._set_params_and_buffers_to_ignore_for_model(model, ["layers.0.bias"])
        bootgrad.record(DDP(model))

    def sparse():
        model = DDP(nn.EmbeddingBag(5, 2, sparse=True, mode="sum").double())
        reg = regularizer(model, "zero", reg2=0.0, method="random_signs", derivative="finite_difference")
        reg.backward(lambda x: model(x).square().sum(1), torch.zeros(3, 2, dtype=torch.long))

    found["no_sync"] = raised(no_sync)
    found["graph"] = raised(rows_with_a_graph)
    found["hook"] = raised(hooked)
    found["ignored"] = raised(ignoring)
    found["sparse"] = raised(sparse)
    found["static"] = raised(lambda: bootgrad.record(pair(static_graph=True)[1]))
    found["inside"] = raised(lambda: bootgrad.record(nn.Sequential(wrapped, nn.Linear(2, 2))))
    found["beside"] = raised(lambda: bootgrad.record(wrapped, nn.Linear(2, 2)))
    found["batch norm"] = raised(lambda: bootgrad.record(nn.Sequential(nn.Linear(3, 2), nn.SyncBatchNorm(2))))
    with bootgrad.record(wrapped) as rec:  # rows of its own samples are the rank's own
        losses = losses_of(wrapped)(x[own], y[own])
    assert rec.per_sample_gradients(losses).batch_size == SPLITS[size][rank]
    return found
