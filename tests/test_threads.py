"""Recordings in several threads do not see each other: their numbers are those that one thread makes, one after the other."""

import copy
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bootgrad
from bootgrad import compiled, grads
from bootgrad.rules.process_wide import Shared, eager

STEPS = 12


def model_of(seed):
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 3),
    ]
    return nn.Sequential(*layers), torch.randn(STEPS, 6, 1, 8, 8), torch.randint(0, 3, (STEPS, 6))


def in_threads(*functions):
    """Run functions at once, with threads that take turns as often as Python can, and return what they made."""
    results, errors = {}, []
    together = threading.Barrier(len(functions))

    def run(k, function):
        try:
            torch.set_num_threads(1)
            together.wait()
            results[k] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(functions)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]
    return [results[k] for k in range(len(functions))]


OPTIONS = [
    {"center": "ema"},
    {"method": "finite_difference", "center": "ema"},
    {"method": "random_signs", "center": "zero"},
    {"fraction": 0.5, "center": "zero"},
]


def trained(model, x, y, options):
    """The parameters and reports of a few steps."""
    torch_seed = int(x.abs().sum() * 1000)  # signs and fractions follow from the regularizer's own seed
    reg = bootgrad.GradientRegularizer(model, reg1=0.1, reg2=0.1, **options)
    if reg._seed is not None:
        reg._seed = torch_seed
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    told = []
    for batch in zip(x, y, strict=True):
        optimizer.zero_grad()
        report = reg.backward(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), *batch)
        optimizer.step()
        told += [report.loss, report.covariance_trace]
    return [*(p.detach() for p in model.parameters()), torch.stack(told)]


@pytest.mark.parametrize("other", OPTIONS, ids=lambda o: o.get("method", "exact") + str(o.get("fraction", "")))
def test_two_models_are_trained_as_if_one_after_the_other(other):
    settings = [(*model_of(0), OPTIONS[0]), (*model_of(1), other)]
    expected = [trained(copy.deepcopy(model), *rest) for model, *rest in settings]
    ours = in_threads(*(lambda s=s: trained(*s) for s in settings))
    for run, one in zip(ours, expected, strict=True):
        for t, e in zip(run, one, strict=True):
            assert torch.equal(t, e)


def test_one_model_in_two_threads():
    """Statistics are those of each thread's own batches, and .grad is the sum of all."""
    model, x, y = model_of(0)
    model, x = model.double(), x.double()

    def told(steps):
        out = []
        for k in steps:
            with bootgrad.record(model) as rec:
                losses = F.cross_entropy(model(x[k]), y[k], reduction="none")
            out.append(rec.backward(losses).sq_norms)
        return torch.stack(out)

    halves = range(0, STEPS, 2), range(1, STEPS, 2)
    expected = [told(half) for half in halves]
    sums = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ours = in_threads(*(lambda half=half: told(half) for half in halves))
    assert all(torch.equal(t, e) for t, e in zip(ours, expected, strict=True))
    torch.testing.assert_close([p.grad for p in model.parameters()], sums)


def test_no_sum_of_gradients_is_lost():
    leaf, n = torch.zeros(2**19, requires_grad=True), 60

    def add():
        for _ in range(n):
            grads.add_to_grads([leaf], [torch.ones(2**19)])

    in_threads(add, add)
    assert torch.equal(leaf.grad, torch.full((2**19,), 2.0 * n))


def test_others_record_while_one_is_in_the_forward_pass():
    """Two forward passes overlap, and end in the order in which they began: what is compiled later is compiled as ever."""
    compiled_calls = []

    def backend(graph, _):
        compiled_calls.append(1)
        return graph.forward

    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    one, two = torch.compile(first, backend=backend), torch.compile(second, backend=backend)
    x = torch.randn(4, 3)
    begun, ended = threading.Barrier(2, timeout=60), threading.Event()

    def earlier():
        with bootgrad.record(first) as rec:
            begun.wait()
            losses = one(x).sum(1)
        ended.set()
        return rec.backward(losses).sq_norms

    def later():
        with bootgrad.record(second) as rec:
            begun.wait()
            assert ended.wait(60)
            losses = two(x).square().sum(1)
        return rec.backward(losses).sq_norms

    ours = in_threads(earlier, later)
    for norms, model, losses_of in zip(ours, (first, second), (lambda y: y, torch.square), strict=True):
        with bootgrad.record(model) as rec:
            losses = losses_of(model(x)).sum(1)
        torch.testing.assert_close(norms, rec.backward(losses).sq_norms)
    compiled_calls.clear()
    one(x)
    assert compiled_calls == [1]
    torch._dynamo.reset()


def test_what_is_shared_is_set_once_and_put_back_by_the_last():
    told = []

    class Context:
        def __enter__(self):
            told.append("set")

        def __exit__(self, *_):
            told.append("back")

    shared = Shared(Context)
    with shared:
        with shared, shared:
            assert told == ["set"]
        assert told == ["set"]
    assert told == ["set", "back"]
    with shared:
        assert told == ["set", "back", "set"]
    assert told == ["set", "back"] * 2


def told():
    """The stance that torch has now."""
    now = torch._dynamo.eval_frame._stance
    return now.stance if now.backend is None else "recorded"


def test_a_stance_that_cannot_be_put_back_is_by_the_next(monkeypatch):
    """As at the end of a recording inside of a compiled function, where torch lets nobody change it."""
    assert told() == "default"
    eager.__enter__()
    with monkeypatch.context() as inside:
        inside.setattr("torch._C._dynamo.eval_frame.get_eval_frame_callback", lambda: told)
        with pytest.raises(RuntimeError, match="set_stance in a torch.compile region"):
            eager.__exit__()
    for stance, expected in ((eager, "force_eager"), (compiled._stance, "recorded")):
        with stance:
            assert told() == expected
        assert told() == "default"


def test_stances_of_several_threads_leave_torch_s_own_behind():
    """Whichever ends first; code as written goes before code that is compiled for a recording."""
    recorded = compiled._stance
    for stances, expected in (
        ((eager, recorded), ["force_eager", "force_eager", "recorded", "default"]),
        ((recorded, eager), ["recorded", "force_eager", "force_eager", "default"]),
    ):
        seen = []
        for stance in stances:
            stance.__enter__()
            seen.append(told())
        for stance in stances:
            stance.__exit__()
            seen.append(told())
        assert seen == expected
