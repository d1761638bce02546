"""An exception at any operation of a step: it comes to the caller, all is as before, and so is what the next step makes.

But for what a step writes at its very end, in place: a center, and then ``.grad``, of all parameters at once.
"""

import itertools
import traceback

import pytest
import torch

from bootgrad.second_pass import put_back

from .injecting import STEPS, Faults, Injected, User, differences, same

pytestmark = pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")


def last_writes(options):
    """Operations at a step's end, within which it is no longer undone: .grad and the average, or the window's rows."""
    center = (options or {}).get("center")
    return 1 + {"ema": 2, "window": 8 * 10 + 1}.get(center, 0)


def is_injected(error):
    """Whether the exception has come, as it was, or as the cause of one that says which operation cannot be had."""
    return isinstance(error, Injected) or isinstance(error.__cause__, Injected)


def is_last_write(error):
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/bootgrad/" in f.filename]
    return frames[-1].name in ("add_to_grads", "update")


def inject(name, apart, first=0, steps=2):
    """Fail at every ``apart``-th operation of the step after some; the number of those that could not be undone, and of all."""
    options, step = STEPS[name]
    undisturbed, user = User(options, steps), User(options, steps)
    before = user.state()
    generator = torch.get_rng_state()
    expected = vars(step(undisturbed))
    after = undisturbed.state()
    ends = 0
    for k in itertools.count(first, apart):
        torch.set_rng_state(generator)
        before["generator"] = generator
        faults = Faults(k)
        try:
            with faults:
                step(user)
        except Exception as error:
            assert is_injected(error), (k, faults.met)
            changed = differences(before, user.state())
            if changed:
                assert is_last_write(error) and set(changed) <= {"grads", "regularizer"}, (k, faults.met, changed)
                ends += 1
                user = User(options, steps)
                before = user.state()
                continue
        else:
            assert faults.count <= k, f"{faults.met} at {k} went unnoticed"
            assert k > 150
            return ends, k
        if k % 4 and apart == 1:  # all are as before it, and so is the next step
            continue
        again = vars(step(user))
        now = user.state()
        assert all(same(again[key], expected[key]) for key in expected), (k, faults.met)
        assert all(same(a[1], b[1]) for a, b in zip(now["grads"], after["grads"], strict=True)), (k, faults.met)
        for key in ("regularizer", "generator", "training", "flags"):
            assert same(now[key], after[key]), (k, faults.met, key)
        user.restore(before)


@pytest.mark.parametrize("name", STEPS)
def test_an_exception_now_and_then(name):
    ends, _ = inject(name, 211 if "accumulated" in name else 83, first=7)
    assert ends <= last_writes(STEPS[name][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"), [*((name, 2) for name in STEPS), *((name, 0) for name in ("statistics", "exact", "accumulated"))]
)
def test_an_exception_at_every_operation(name, steps):
    """Of a step among others, and of a model's first one, with its checks, where ``.grad`` and centers are made."""
    ends, operations = inject(name, 1, steps=steps)
    assert ends <= last_writes(STEPS[name][0]), operations


class Interrupted(dict):
    """Saved values that Ctrl-C comes between, once."""

    done = False

    def __getitem__(self, name):
        if name == "b" and not self.done:
            self.done = True
            raise KeyboardInterrupt
        return super().__getitem__(name)


def test_moved_parameters_are_put_back_whatever_comes_between():
    parameters = {name: torch.ones(2) for name in "abc"}
    with pytest.raises(KeyboardInterrupt):
        put_back(parameters, Interrupted({name: torch.zeros(2) for name in "abc"}))
    assert all(torch.equal(p, torch.zeros(2)) for p in parameters.values())
