"""What ranks train: a model, the same one wrapped, and a batch of which each rank has a part; how steps are compared."""

import copy
import itertools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from ..methods.steps import CENTERS, Smooth, losses_of

close = torch.testing.assert_close

FIELDS = ("loss", "reg1", "reg2", "covariance_trace", "mean_sq_norm", "sq_mean_norm", "batch_size", "noise_scale")
BATCH_MEAN = CENTERS["batch_mean"]
PENALTIES = {"both": {}, "reg1": {"reg2": 0.0}, "reg2": {"reg1": 0.0}}
SPLITS = {2: [5, 3], 4: [3, 1, 5, 2]}


class Branches(nn.Module):
    """Two layers of which a rank goes through one, and one that none goes through."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 2) for _ in range(3))

    def forward(self, x):
        return torch.tanh((self.a if x[0, 0] > 0 else self.b)(x))


def batch(size, dtype=torch.float64):
    """A batch, (B, 3) and (B,), and which rows of it each rank has."""
    split = SPLITS[size]
    x = torch.randn(sum(split), 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    ends = list(itertools.accumulate(split, initial=0))
    return x, torch.arange(sum(split)) % 2, [slice(a, b) for a, b in itertools.pairwise(ends)]


def pair(kind=Smooth, dtype=torch.float64, wrap=DDP, **options):
    """A model, and the same one wrapped."""
    torch.manual_seed(0)
    model = kind().to(dtype)
    return model, wrap(copy.deepcopy(model), **options)


def sharded(model, **options):
    """Every layer by itself, and what is left."""
    mesh = mesh_of(dist.get_world_size())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def mesh_of(*shape, names=None):
    """A mesh of the ranks."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def whole_of(t):
    """A tensor, or all of one of which each rank has a part."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def same_report(ours, expected, rtol=1e-9):
    for name in FIELDS:
        close(getattr(ours, name), getattr(expected, name), rtol=rtol, atol=1e-12, equal_nan=True)
    assert ours.method == expected.method and ours.notes == expected.notes


def same_gradients(wrapped, model, rtol=1e-9, atol=1e-12):
    for p, q in zip(wrapped.parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            close(whole_of(p.grad), q.grad, rtol=rtol, atol=atol)


def same_steps(whole, ours, size, own, parts=None, rtol=1e-9, atol=1e-12, options=()):
    """Three steps of a regularizer on one process, and of one on ranks, by micro-batches of sizes that each rank has."""
    x, y, _ = batch(size)
    for step in range(3):
        x = x.roll(1, 0) * (1 + step / 4)
        whole.model.zero_grad()
        ours.model.zero_grad()
        expected = whole.backward(losses_of(whole.model), x, y)
        if parts is None:
            report = ours.backward(losses_of(ours.model), x[own], y[own])
        else:
            with ours.accumulate() as block:
                for micro in zip(x[own].split(parts), y[own].split(parts), strict=True):
                    ours.backward(losses_of(ours.model), *micro)
            report = block.report
        same_gradients(ours.model, whole.model, rtol, atol)
        same_report(report, expected, rtol)
    close(ours.state_dict(), whole.state_dict(), rtol=rtol, atol=1e-12)


def raised(function, *args):
    """The kind and the text of an error, or None."""
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return None
