"""Exceptions leave all as it was: parameters, gradients, modes; and once they are let go, nothing that they saw is alive."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import _get_current_function_mode_stack

import bootgrad
from bootgrad.rules.checkpointed import saved_tensors_hooks

from .alive import FINITE_DIFFERENCES, STEPS, Made, Model, Nodes, Own, batch, losses_of, no_backward_pass

pytestmark = pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")

# Where they come from, by name; which of them a step meets depends on what it runs.
ALWAYS = ["forward", "losses", "hook", "shape", "infinite"]
FAILURES = [
    *((step, failure, False) for step in STEPS for failure in ALWAYS),
    *((step, "coupled", False) for step in STEPS if "random_signs" not in step.__name__),
    *((s, f, False) for s in FINITE_DIFFERENCES for f in ("second forward", "second hook", "second shape")),
    *((s, "second hook", True) for s in FINITE_DIFFERENCES),
    *((s, "second run", True) for s in STEPS if s is not no_backward_pass),
]
NOT_MET = {no_backward_pass: {"hook", "shape", "infinite", "coupled"}}


def fail_hook(_):
    raise Own


def failing(model, failure, nodes):
    """A function that makes losses and fails in its own way, in the first call or in the one that repeats it."""
    calls = []

    def function(x, y):
        calls.append(len(x))
        repeats = len(calls) > 1 and calls[-1] == calls[-2]
        now = failure.removeprefix("second ") if failure.startswith("second") == repeats else None
        model.calls, model.fails_in_run = 0, {"forward": 1, "run": 2}.get(now, 2 if failure == "second run" else 0)
        out = model(x)
        if now == "hook":
            out.register_hook(fail_hook)
        if now == "coupled":
            out = out - out.mean(0)
        losses = F.cross_entropy(out, y, reduction="none")
        nodes.see(losses)
        if now == "losses":
            raise Own
        return {"shape": losses[:-1] if repeats else losses.mean(), "infinite": losses / 0}.get(now, losses)

    return function


@pytest.mark.parametrize(
    ("step", "failure", "checkpointed"),
    [f for f in FAILURES if f[1] not in NOT_MET.get(f[0], ())],
    ids=lambda v: getattr(v, "__name__", str(v)).replace(" ", "_"),
)
def test_an_exception_leaves_all_as_it_was(no_collector, step, failure, checkpointed):
    torch.manual_seed(0)
    model, (x, y), nodes = Model(checkpointed), batch(), Nodes()
    untouched = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in model.parameters()]
    raised = False
    with Made() as made:
        try:
            step(model, failing(model, failure, nodes), x, y)
        except (Own, bootgrad.BootgradError):
            raised = True
    assert raised
    assert nodes.alive() == set()
    assert made.alive([x, y, *model.parameters(), *grads]) == set()
    for p, q, grad in zip(model.parameters(), untouched.parameters(), grads, strict=True):
        assert torch.equal(p, q) and p.grad is grad and torch.equal(grad, torch.ones_like(grad))
    assert _get_current_function_mode_stack() == [] and saved_tensors_hooks() is None
    assert torch.is_grad_enabled()
    model.calls = model.fails_in_run = 0
    for m in (model, untouched):
        m.zero_grad()
        torch.manual_seed(1)
        step(m, losses_of(m), x, y)
    for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
