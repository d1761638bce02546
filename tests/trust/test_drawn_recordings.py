"""Whatever recorder and regularizer are given: a right result, or an error of the library that leaves ``.grad`` alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bootgrad

from .drawing import drawn

B = 4


class Scaler:
    """What is no GradScaler."""

    def get_scale(self):
        return "one"


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


LOSSES = {
    "right": lambda losses, model: losses,
    "half precision": lambda losses, model: losses.half(),
    "one sample": lambda losses, model: losses[:1],
    "reduced": lambda losses, model: losses.mean(),
    "a column": lambda losses, model: losses[:, None],
    "none": lambda losses, model: losses[:0],
    "twice": lambda losses, model: torch.cat([losses, losses]),
    "other order": lambda losses, model: losses.flip(0),
    "infinite": lambda losses, model: losses / 0,
    "not numbers": lambda losses, model: losses * torch.tensor([1, 1, torch.nan, 1]),
    "detached": lambda losses, model: losses.detach(),
    "whole numbers": lambda losses, model: losses.detach().long(),
    "complex": lambda losses, model: losses * 1j,
    "of nothing": lambda losses, model: torch.ones(B, requires_grad=True),
    "of parameters alone": lambda losses, model: model[0].weight.sum().expand(B),
    "coupled": lambda losses, model: losses - losses.mean(),
    "gradients": lambda losses, model: torch.autograd.grad(losses.sum(), model[2].bias, create_graph=True)[0].expand(
        B, 2
    )[:, 0],
    "a list": lambda losses, model: list(losses),
    "a number": lambda losses, model: 0.5,
    "a word": lambda losses, model: "losses",
    "nothing": lambda losses, model: None,
    "an array": lambda losses, model: losses.detach().numpy(),
    "a sparse tensor": lambda losses, model: losses.to_sparse(),
}
CENTERS = {
    "none": lambda model: None,
    "right": lambda model: {name: torch.ones_like(p) for name, p in model.named_parameters()},
    "flat": lambda model: torch.ones(sum(p.numel() for p in model.parameters())),
    "too short": lambda model: torch.ones(3),
    "one missing": lambda model: {"0.weight": torch.ones(5, 3)},
    "unknown name": lambda model: {"weight": torch.ones(5, 3)},
    "wrong shape": lambda model: {name: torch.ones(2, 2) for name, _ in model.named_parameters()},
    "whole numbers": lambda model: {name: torch.ones_like(p, dtype=torch.long) for name, p in model.named_parameters()},
    "not numbers": lambda model: {name: p.detach() * torch.nan for name, p in model.named_parameters()},
    "elsewhere": lambda model: {name: torch.ones_like(p, device="meta") for name, p in model.named_parameters()},
    "a word": lambda model: "ema",
    "a number": lambda model: 1.0,
    "numbers": lambda model: {name: 0.0 for name, _ in model.named_parameters()},
}
REDUCTIONS = {
    "mean": "mean",
    "sum": "sum",
    "none": "none",
    "nothing": None,
    "a number": 0.5,
    "weights": torch.tensor([0.1, 0.2, 0.3, 0.4]),
    "too many weights": torch.ones(7),
    "no numbers": torch.full((B,), torch.nan),
    "whole weights": torch.ones(B, dtype=torch.long),
    "complex weights": torch.ones(B, dtype=torch.complex64),
    "a list": [1.0] * B,
}
SCALERS = {
    "none": None,
    "right": "right",
    "a word": "cpu",
    "a number": 2.0,
    "its own kind": Scaler(),
    "a tensor": torch.ones(()),
}
some = st.sampled_from


def outcome(step):
    """Whether a step went well; ``.grad`` is untouched otherwise. Any other error than the library's passes."""
    model, x, y = model_of(), torch.randn(B, 3), torch.tensor([0, 1, 1, 0])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in model.parameters()]
    parameters = [p.detach().clone() for p in model.parameters()]
    generator = torch.get_rng_state()
    try:
        step(model, x, y)
        good = True
    except bootgrad.BootgradError as error:
        assert str(error) and "\n\n" not in str(error)
        good = False
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(
            p.grad is g and torch.equal(g, torch.ones_like(g)) for p, g in zip(model.parameters(), grads, strict=True)
        )
    assert all(map(torch.equal, model.parameters(), parameters))
    return good


@drawn(150)
@given(some(list(LOSSES)), some(list(CENTERS)), some(list(REDUCTIONS)), some(list(SCALERS)), st.booleans())
def test_statistics(losses, center, reduction, scaler, retain):
    def step(model, x, y):
        chosen = torch.amp.GradScaler("cpu", init_scale=8.0) if scaler == "right" else SCALERS[scaler]
        about = CENTERS[center](model)
        with bootgrad.record(model) as rec:
            made = LOSSES[losses](F.cross_entropy(model(x), y, reduction="none"), model)
        rec.backward(made, reduction=REDUCTIONS[reduction], center=about, scaler=chosen, retain_graph=retain)

    good = outcome(step)
    if (losses, scaler) in [("right", "none"), ("right", "right")] and center in ("none", "right", "flat"):
        assert good or reduction not in ("mean", "sum", "weights")
    if losses in ("reduced", "a column", "none", "coupled", "nothing", "a word", "a list"):
        assert not good
    if center in ("elsewhere", "one missing", "unknown name", "wrong shape") or reduction == "complex weights":
        assert not good


@drawn(100)
@given(some(list(LOSSES)), some(list(SCALERS)), some(["exact", "finite_difference", "random_signs"]), st.booleans())
def test_penalties(losses, scaler, method, accumulated):
    def step(model, x, y):
        chosen = torch.amp.GradScaler("cpu", init_scale=8.0) if scaler == "right" else SCALERS[scaler]
        generator = torch.get_rng_state()
        reg = bootgrad.GradientRegularizer(model, reg1=0.1, method=method)
        torch.set_rng_state(generator)

        def function(x, y):
            return LOSSES[losses](F.cross_entropy(model(x), y, reduction="none"), model)

        if accumulated:
            with reg.accumulate(scaler=chosen):
                reg.backward(function, x, y)
        else:
            reg.backward(function, x, y, scaler=chosen)

    good = outcome(step)
    assert good or (losses, scaler) not in [("right", "none"), ("right", "right")]
    if losses in ("reduced", "a column", "none", "nothing", "a word", "a list"):
        assert not good


VALUES = [
    None,
    -1,
    0,
    1,
    2,
    0.5,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "exact",
    "ema",
    True,
    [],
    {},
    torch.ones(()),
    10**30,
]
OPTIONS = (
    "reg1",
    "reg2",
    "center",
    "method",
    "probes",
    "derivative",
    "epsilon",
    "fraction",
    "every",
    "statistics",
    "batchnorm",
)


@drawn(200)
@given(st.dictionaries(some(OPTIONS), some(range(len(VALUES))), max_size=4))
@pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")
def test_options_of_a_regularizer(chosen):
    """They are refused when it is made, or a step of it goes well or is refused."""

    def step(model, x, y):
        generator = torch.get_rng_state()
        try:
            reg = bootgrad.GradientRegularizer(model, **{name: VALUES[k] for name, k in chosen.items()})
        finally:
            torch.set_rng_state(generator)
        reg.backward(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y)

    outcome(step)
