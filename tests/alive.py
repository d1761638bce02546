"""What is alive after a step: nodes, memory of tensors; and steps of all kinds to look after, of a model with most layers.

The cyclic garbage collector is off, by the fixture `no_collector`: all goes when the last name for it does.
"""

import functools
import warnings
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bootgrad
from bootgrad.graph import nodes_behind

B = 6


class Model(nn.Module):
    """Most kinds of layers: products, a norm, a lookup, a repeated token, weights made of others, and one without a rule."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.conv, self.norm, self.table = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Embedding(5, 6)
        self.linear, self.head = nn.Linear(4 * 16, 6), nn.Linear(6, 3)
        self.scale, self.token = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1, 6))
        self.mixed = nn.Parameter(torch.randn(6))
        self.checkpointed, self.calls, self.fails_in_run = checkpointed, 0, 0

    def features(self, x):
        self.calls += 1
        if self.calls == self.fails_in_run:
            raise Own
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.linear(x.flatten(1)) * self.scale + self.token.expand(len(x), -1)

    def outputs(self, x):
        x = x + self.table(x.argmax(1) % 5)
        return self.head(torch.cumsum(x.tanh() * self.mixed.softmax(0), 1))

    def forward(self, x):
        if self.checkpointed:
            return checkpoint(self.outputs, checkpoint(self.features, x, use_reentrant=False), use_reentrant=False)
        return self.outputs(self.features(x))


class Own(Exception):
    pass


class Made(TorchDispatchMode):
    """Weak references to the memory of all tensors that are made, in backward passes, too."""

    def __init__(self):
        super().__init__()
        self.storages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.storages.append((StorageWeakRef(t.untyped_storage()), f"{func} {tuple(t.shape)}"))
        return result

    def alive(self, owned):
        owned = {t.untyped_storage()._cdata for t in owned}
        return {name for reference, name in self.storages if not reference.expired() and reference.cdata not in owned}


class Nodes:
    """Weak references to what hangs at the nodes behind losses, and goes with them."""

    class _Mark:
        pass

    def __init__(self):
        self.marks = []

    def see(self, losses):
        for node in nodes_behind([losses]):
            if node.name() != "torch::autograd::AccumulateGrad":
                node.metadata["mark"] = mark = Nodes._Mark()
                self.marks.append((weakref.ref(mark), node.name()))

    def alive(self):
        return {name for mark, name in self.marks if mark() is not None}


def tensors_in(value):
    """All tensors that an object of ours holds, at any depth."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        value = list(object.__getattribute__(value, "__dict__").values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, list | tuple) else []


# Steps: functions of a model, of one that makes losses, and of a batch; what they return is kept.


def statistics(model, function, x, y):
    with bootgrad.record(model) as rec:
        losses = function(x, y)
    return rec.backward(losses)


def about_a_center(model, function, x, y):
    with bootgrad.record(model) as rec:
        losses = function(x, y)
    return rec.backward(losses, center={name: torch.ones_like(p) for name, p in model.named_parameters()})


def kept_for_a_second_pass(model, function, x, y):
    with bootgrad.record(model) as rec:
        losses = function(x, y)
    rec.backward(losses, retain_graph=True)
    return rec.backward(losses, retain_graph=True)


def no_backward_pass(model, function, x, y):
    with bootgrad.record(model):
        function(x, y)


def matrix(model, function, x, y):
    with bootgrad.record(model) as rec:
        losses = function(x, y)
    G = rec.per_sample_gradients(losses)
    return G.sq_norms(), G.gram(), G.mean()


def differentiable_matrix(model, function, x, y):
    with bootgrad.record(model) as rec:
        losses = function(x, y)
    (losses.mean() + bootgrad.reg1(rec.per_sample_gradients(losses, create_graph=True))).backward()


def micro_batches(model, function, x, y):
    with bootgrad.accumulate(model) as whole:
        for part in zip(x.split(4), y.split(4), strict=True):
            with whole.record():
                losses = function(*part)
            whole.backward(losses)
    return whole.statistics, whole


def regularizer(name, **options):
    """Steps that keep the regularizer with its centers, too."""

    def step(model, function, x, y):
        reg = bootgrad.GradientRegularizer(model, **({"reg1": 0.1, "reg2": 0.2, "center": "zero"} | options))
        return reg.backward(function, x, y), reg.centers

    step.__name__ = name
    return step


def recorded_by_the_regularizer(model, function, x, y):
    reg = bootgrad.GradientRegularizer(model, reg1=0.1)
    with reg.record():
        losses = function(x, y)
    return reg.backward(losses), reg


def accumulation(name, **options):
    def step(model, function, x, y):
        reg = bootgrad.GradientRegularizer(model, **({"reg1": 0.1, "reg2": 0.2, "center": "zero"} | options))
        with reg.accumulate() as block:
            for part in zip(x.split(4), y.split(4), strict=True):
                reg.backward(function, *part)
        return block, reg

    step.__name__ = name
    return step


FINITE_DIFFERENCES = [
    regularizer("finite_difference", method="finite_difference"),
    regularizer("finite_difference_reg2", method="finite_difference", reg1=0),
    regularizer("random_signs_finite", method="random_signs", derivative="finite_difference", probes=2),
    regularizer("fraction_finite", method="finite_difference", fraction=0.5),
]
STEPS = [
    statistics,
    about_a_center,
    kept_for_a_second_pass,
    no_backward_pass,
    matrix,
    differentiable_matrix,
    micro_batches,
    regularizer("exact"),
    regularizer("exact_batch_mean", reg2=0, center="batch_mean"),
    regularizer("exact_ema", center="ema"),
    regularizer("exact_without_statistics", statistics=False),
    regularizer("exact_fraction", fraction=0.5),
    recorded_by_the_regularizer,
    regularizer("random_signs", method="random_signs"),
    *FINITE_DIFFERENCES,
    accumulation("accumulated"),
    accumulation("accumulated_two_sweeps", center={"reg1": "batch_mean", "reg2": "zero"}),
    accumulation("accumulated_finite", method="finite_difference"),
    accumulation("accumulated_random_signs", method="random_signs"),
]


def batch():
    return torch.randn(B, 1, 8, 8), torch.randint(0, 3, (B,))


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


@functools.cache
def warm():
    """Take the first steps, by which all is imported and cached."""
    for checkpointed in (False, True):
        model = Model(checkpointed)
        with Made(), warnings.catch_warnings():
            warnings.simplefilter("ignore", bootgrad.BootgradWarning)
            for step in (statistics, STEPS[7], FINITE_DIFFERENCES[0]):
                step(model, losses_of(model), *batch())
