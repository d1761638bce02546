"""The same of models that fully_shard was called on."""

import copy

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import bootgrad
import bootgrad.methods.random_signs
import bootgrad.steps
from bootgrad.centers import FullBatchMean

from ..methods.steps import CENTERS, Smooth, losses_of, regularizer
from .failures import failures
from .models import SPLITS, batch, mesh_of, pair, raised, same_gradients, same_report, same_steps, sharded, whole_of
from .steps import (
    exact_penalties,
    other_penalties,
    same_statistics,
    statistics_of_a_backward_pass,
    statistics_of_micro_batches,
    statistics_of_some_parameters,
)

close = torch.testing.assert_close


def sharded_statistics(rank, size):
    statistics_of_a_backward_pass(rank, size, sharded)
    statistics_of_micro_batches(rank, size, sharded)
    statistics_of_some_parameters(rank, size, sharded)


def sharded_penalties(rank, size):
    exact_penalties(rank, size, sharded)
    other_penalties(rank, size, sharded)


def sharded_failures(rank, size):
    return failures(rank, size, sharded)


class Checkpointed(nn.Module):
    """A layer whose activations are made again in each backward pass, one that is frozen, and one used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.frozen, self.twice = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = checkpoint(lambda x: torch.tanh(self.first(x)), x, use_reentrant=False)
        return torch.tanh(self.twice(torch.tanh(self.twice(self.frozen(x)))))


def sharded_layers_of_other_kinds(rank, size):
    x, y, rows = batch(size)
    own = rows[rank]
    for wrap in (DDP, sharded):
        model, wrapped = pair(Checkpointed, wrap=wrap)
        for center in CENTERS.values():
            whole, ours = (regularizer(m, copy.deepcopy(center)) for m in (model, wrapped))
            same_steps(whole, ours, size, own, rtol=1e-8)
        with bootgrad.record(model) as rec:
            losses = losses_of(model)(x, y)
        expected = rec.backward(losses)
        with bootgrad.record(wrapped) as rec:
            losses = losses_of(wrapped)(x[own], y[own])
        same_statistics(rec.backward(losses), expected, own)
        same_gradients(wrapped, model)


def full_batch_centers(rank, size):
    """Of which every rank goes through all samples; what it makes of them is no part of the step."""
    x, y, rows = batch(size)
    own = rows[rank]
    for wrap, options in ((DDP, {}), (DDP, {"find_unused_parameters": True}), (sharded, {})):
        for differentiable in (False, True):
            model, wrapped = pair(wrap=wrap, **options)
            whole, ours = (
                regularizer(
                    m,
                    {
                        "reg1": "zero",
                        "reg2": FullBatchMean([(x.flip(0), y)], losses_of(m), differentiable=differentiable),
                    },
                )
                for m in (model, wrapped)
            )
            for _ in range(2):
                model.zero_grad()
                wrapped.zero_grad()
                expected = whole.backward(losses_of(model), x, y)
                same_report(ours.backward(losses_of(wrapped), x[own], y[own]), expected)
                same_gradients(wrapped, model)


def sharded_training(rank, size):
    """Steps of fully_shard itself, of an optimizer, and forward passes between a recorded one and its backward pass."""
    x, y, rows = batch(size)
    n = min(SPLITS[size])
    parts = torch.cat([x[row][:n] for row in rows]), torch.cat([y[row][:n] for row in rows])
    own = slice(n * rank, n * rank + n)
    model, wrapped = pair(wrap=sharded)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, wrapped)]
    whole, ours = regularizer(model, "ema"), regularizer(wrapped, "ema")
    for kind in ("plain", "recorded", "penalized", "dropped", "plain", "dropped", "penalized", "evaluated", "recorded"):
        for optimizer in optimizers:
            optimizer.zero_grad()
        if kind == "penalized":
            whole.backward(losses_of(model), *parts)
            ours.backward(losses_of(wrapped), parts[0][own], parts[1][own])
        else:
            losses_of(model)(*parts).mean().backward()
        if kind == "plain":
            losses_of(wrapped)(parts[0][own], parts[1][own]).mean().backward()
        if kind in ("recorded", "evaluated", "dropped"):
            with bootgrad.record(wrapped) as rec:
                losses = losses_of(wrapped)(parts[0][own], parts[1][own])
            if kind == "evaluated":
                with torch.no_grad():
                    close(wrapped(x), model(x))
            if kind == "dropped":  # and taken by torch's own
                losses_of(wrapped)(parts[0][own], parts[1][own]).mean().backward()
            else:
                rec.backward(losses)
        same_gradients(wrapped, model)
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(wrapped.parameters(), model.parameters(), strict=True):
            close(whole_of(p), q)


def refusals_of_sharding(rank, size):
    found = {}
    offload = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    half = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    found["half"] = raised(lambda: bootgrad.record(pair(wrap=lambda m: sharded(m, **half))[1]))
    found["offload"] = raised(lambda: bootgrad.record(pair(wrap=lambda m: sharded(m, **offload))[1]))
    found["around"] = raised(lambda: bootgrad.record(nn.Sequential(pair(wrap=sharded)[1], nn.Linear(2, 2))))
    model = Smooth()
    found["ignored"] = raised(
        lambda: bootgrad.record(fully_shard(model, mesh=mesh_of(size), ignored_params={model.layers[0].bias}))
    )
    found["mesh"] = raised(
        lambda: bootgrad.record(fully_shard(Smooth(), mesh=mesh_of(1, size, names=("replicate", "shard"))))
    )
    replicated = Smooth()
    for module in replicated.layers[::2]:
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh_of(size), [Replicate()]))
    found["tensor parallel"] = raised(lambda: bootgrad.record(replicated))
    found["tensor parallel, signs"] = raised(
        lambda: regularizer(replicated, "zero", method="random_signs").backward(losses_of(replicated), *batch(size)[:2])
    )
    return found
