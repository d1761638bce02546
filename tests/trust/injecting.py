"""An exception at the k-th operation that torch dispatches in a step, and all that must be as it was after it.

`Faults` raises where it is told to, in forward and backward passes, in Python and behind ops of C++ alike. `User.state` is what
a user has: parameters, buffers and gradients with their identities, optimizer, centers, generators, modes, hooks, flags.
"""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import bootgrad
from bootgrad.rules.checkpointed import saved_tensors_hooks

B = 5


class Injected(Exception):
    """What no code of the library raises or expects."""


class Faults(TorchDispatchMode):
    """Raises at operation ``k``, counted from 0, and counts all; never for k = None.

    Attributes:
        count: of operations so far.
        met: the name of the one that failed.
    """

    def __init__(self, k: int | None = None):
        super().__init__()
        self.k, self.count, self.met = k, 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count - 1 == self.k:
            self.met = str(func)
            raise Injected(self.met)
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """A convolution, group norm, pooling, an embedding, a linear layer, weights made of others, a buffer that is used."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Linear(8, 3)
        self.table, self.scale = nn.Embedding(3, 8), nn.Parameter(torch.randn(8))
        self.register_buffer("offset", torch.randn(8))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1)
        return self.head(x * self.scale.exp() + self.offset + self.table(x.argmax(1) % 3))


class User:
    """A model in training, with gradients that are there, an optimizer and a regularizer that have taken ``steps``."""

    def __init__(self, options: dict | None = None, steps: int = 2):
        torch.manual_seed(0)
        self.model = Net()
        self.model.norm.eval()
        self.x, self.y = torch.randn(B, 1, 6, 6), torch.randint(0, 3, (B,))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.reg = None if options is None else bootgrad.GradientRegularizer(self.model, **options)
        for _ in range(steps):  # with some, centers are there, and the batch dimension has been checked
            self.optimizer.zero_grad()
            if self.reg is None:
                with bootgrad.record(self.model) as rec:
                    losses = self.losses(self.x, self.y)
                rec.backward(losses)
            else:
                self.reg.backward(self.losses, self.x, self.y)
            self.optimizer.step()
        self.hook = self.model.head.register_forward_hook(lambda *_: None)

    def restore(self, state: dict) -> None:
        """After a step without the optimizer's, be as before it."""
        for p, kept in zip(self.model.parameters(), state["grads"], strict=True):
            p.grad = None if kept is None else kept[2].copy_(kept[1])
        if self.reg is not None:
            self.reg.load_state_dict(state["regularizer"])
        torch.set_rng_state(state["generator"])

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y, reduction="none")

    def state(self) -> dict:
        """Everything that a failed step must leave alone."""
        model = self.model
        return {
            "parameters": [(id(p), p.detach().clone(), p.requires_grad) for p in model.parameters()],
            "buffers": [(id(b), b.clone()) for b in model.buffers()],
            "grads": [None if p.grad is None else (id(p.grad), p.grad.clone(), p.grad) for p in model.parameters()],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "regularizer": None if self.reg is None else copy.deepcopy(self.reg.state_dict()),
            "generator": torch.get_rng_state(),
            "training": [m.training for m in model.modules()],
            "hooks": [
                [list(d) for name, d in vars(m).items() if "hooks" in name and isinstance(d, dict)]
                for m in model.modules()
            ],
            "modes": (_get_current_function_mode_stack(), _get_current_dispatch_mode_stack(), saved_tensors_hooks()),
            "flags": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
            "inputs": (self.x.clone(), self.y.clone()),
        }


def differences(a: dict, b: dict) -> list[str]:
    """The names of what is not the same in two states, to the bit."""
    return [name for name in a if not same(a[name], b[name])]


def same(a: object, b: object) -> bool:
    """Whether two states are, to the bit; nan is itself."""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return same(vars(a), vars(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    return bool(a == b)


def statistics(user: User):
    with bootgrad.record(user.model) as rec:
        losses = user.losses(user.x, user.y)
    return rec.backward(losses)


def about_a_center(user: User):
    center = {name: torch.ones_like(p) for name, p in user.model.named_parameters()}
    with bootgrad.record(user.model) as rec:
        losses = user.losses(user.x, user.y)
    return rec.backward(losses, center=center, reduction="sum")


def accumulated(user: User):
    with bootgrad.accumulate(user.model) as whole:
        for part in zip(user.x.split(3), user.y.split(3), strict=True):
            with whole.record():
                losses = user.losses(*part)
            whole.backward(losses)
    return whole.statistics


def penalized(user: User):
    return user.reg.backward(user.losses, user.x, user.y)


def accumulated_penalties(user: User):
    with user.reg.accumulate() as step:
        for part in zip(user.x.split(3), user.y.split(3), strict=True):
            user.reg.backward(user.losses, *part)
    return step.report


BOTH = {"reg1": 0.1, "reg2": 0.2}
STEPS = {
    "statistics": (None, statistics),
    "about a center": (None, about_a_center),
    "accumulated": (None, accumulated),
    "exact": ({**BOTH, "center": "ema"}, penalized),
    "exact, batch mean": ({"reg1": 0.1}, penalized),
    "exact, window": ({**BOTH, "center": "window"}, penalized),
    "exact, share": ({"reg1": "auto", "center": "ema"}, penalized),
    "exact, fraction": ({**BOTH, "center": "ema", "fraction": 0.5}, penalized),
    "finite differences": ({**BOTH, "center": "ema", "method": "finite_difference"}, penalized),
    "random signs": ({**BOTH, "center": "ema", "method": "random_signs"}, penalized),
    "random signs, finite differences": (
        {**BOTH, "center": "ema", "method": "random_signs", "derivative": "finite_difference"},
        penalized,
    ),
    "accumulated penalties": ({**BOTH, "center": "ema"}, accumulated_penalties),
    "accumulated finite differences": ({"reg1": 0.1, "method": "finite_difference"}, accumulated_penalties),
}
