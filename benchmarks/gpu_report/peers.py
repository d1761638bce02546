"""Other ways to per-sample gradients: torch's own `vmap(grad)`, Opacus and BackPACK, the latter where they are installed."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ..models import Task, losses

Step = Callable[[], Any]


def steps(task: Task, model: nn.Module, x: Tensor, y: Tensor, context: Callable) -> dict[str, Step]:
    """A function for each way: norms of all samples' gradients, and the penalty Reg1 about their mean."""
    found = {
        "vmap(grad): norms": lambda: vmap_rows(model, x, y, context, False),
        "vmap(grad): reg1": lambda: vmap_rows(model, x, y, context, True),
    }
    if importlib.util.find_spec("opacus"):
        found["Opacus: norms"] = _late(lambda: _opacus(task, model, x, y, context))
    if importlib.util.find_spec("backpack"):
        found["BackPACK: norms"] = _late(lambda: _backpack(task, model, x, y, context))
    return found


def vmap_rows(model: nn.Module, x: Tensor, y: Tensor, context: Callable, penalized: bool) -> Tensor:
    """What one would write without a library: all B×P numbers at once; returns ‖g_i‖²."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x_i, y_i):
        def stand_in(x):
            return functional_call(model, parameters, (x,))

        return losses(stand_in, x_i.unsqueeze(0), y_i.unsqueeze(0)).sum()

    detached = parameters if penalized else {name: p.detach() for name, p in parameters.items()}
    with context():
        rows = vmap(grad(loss), (None, 0, 0), randomness="error")(detached, x, y)
    if penalized:
        deviations = sum((g - g.mean(0)).square().sum() for g in rows.values()) / x.size(0)
        with context():
            mean = losses(model, x, y).mean()
        (mean + 0.1 * deviations).backward()
    else:
        for name, p in parameters.items():
            p.grad = rows[name].mean(0)
    return sum(g.detach().flatten(1).square().sum(1) for g in rows.values())


def _late(make: Callable[[], Step]) -> Step:
    """A step whose model is made by the first call, so that a failure is that call's."""
    made: list[Step] = []

    def step():
        if not made:
            made.append(make())
        return made[0]()

    return step


def _opacus(task: Task, model: nn.Module, x: Tensor, y: Tensor, context: Callable) -> Step:
    from opacus import GradSampleModule

    model = GradSampleModule(_copy(task, model, x), loss_reduction="mean", strict=False)

    def step():
        model.zero_grad()
        with context():
            value = losses(model, x, y).mean()
        value.backward()
        return sum(p.grad_sample.flatten(1).square().sum(1) for p in model.parameters() if p.requires_grad)

    return step


def _backpack(task: Task, model: nn.Module, x: Tensor, y: Tensor, context: Callable) -> Step:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model, loss = extend(_copy(task, model, x), use_converter=True), extend(nn.CrossEntropyLoss())

    def step():
        model.zero_grad()
        with context():
            value = loss(model(x), y) if y.dim() == 1 else F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        with backpack(BatchL2Grad()):
            value.backward()
        # BackPACK's rows are those of the mean loss.
        return x.size(0) ** 2 * sum(p.batch_l2 for p in model.parameters() if p.requires_grad)

    return step


def _copy(task: Task, model: nn.Module, x: Tensor) -> nn.Module:
    """A model of its own with the same weights: these libraries change what they are given."""
    copy = task.build().to(x.device)
    copy.load_state_dict(model.state_dict())
    return copy
