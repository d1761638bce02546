"""Measured times of a plan: medians of ratios by a clock that tests set, and a model that stays as it was."""

import pytest
import torch
from torch import nn

import bootgrad
from bootgrad import costs, plan_timing
from bootgrad.errors import ArgumentError


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(plan_timing, "ROUNDS", 1)
    monkeypatch.setattr(plan_timing, "WARMUP", 0)


def test_ratios_are_medians_over_rounds_in_turns(monkeypatch):
    now, order = [0.0], []
    took = {"plain": iter([50.0, 9, 9, 2, 1, 4, 8, 2, 2, 2]), "op": iter([50.0, 9, 9, 6, 1, 4, 40, 1, 4, 20])}

    def run(name):
        def step():
            order.append(name)
            now[0] += next(took[name])

        return step

    every = iter(range(1000))

    def eighth():
        order.append("eighth")
        now[0] += 8.0 if next(every) % 8 == 7 else 0.0

    monkeypatch.setattr(plan_timing.time, "perf_counter", lambda: now[0])
    runs = {"plain": run("plain"), "op": run("op"), "eighth": eighth}
    found = plan_timing.time_ratios(runs, "plain", {"eighth": 8}, torch.device("cpu"))
    # Without the three rounds of the warm-up: op 3, 1, 1, 5, 0.5, 2, 10; one call of eighth takes 1.
    assert found == {"plain": 1.0, "op": 2.0, "eighth": 0.5}
    assert order[:10] == ["plain", "op"] + ["eighth"] * 8 and len(order) == 10 * 10


def test_measured_times_stand_beside_the_predicted_ones(quick):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval(), nn.Flatten(), nn.Linear(36, 3))
    model[0].weight.grad = kept = torch.ones_like(model[0].weight)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = bootgrad.plan(model, torch.randn(5, 2, 5, 5), measure=True)
    assert all(row.measured > 0 for row in result.layers)
    by_name = {step.name: step.measured for step in result.steps}
    assert by_name["plain"] == 1 and by_name["reg1 batch_mean"] > 0 and by_name["reg1 batch_mean, every 8"] > 0
    missing = [name for name, value in by_name.items() if value is None]
    notes = str(result).split("\n\n")[-1]
    assert all(f"not measured: {name}: " in notes for name in missing) and len(missing) <= 1
    assert "median of 1 rounds in turns, on cpu, 1 threads" in notes and "  measured" in str(result)
    assert model[0].weight.grad is kept and torch.equal(kept, torch.ones_like(kept))
    assert model[3].weight.grad is None
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_ops_are_those_of_the_layer():
    model = nn.Linear(4, 3)
    recording = bootgrad.record(model)
    with recording:
        model(torch.zeros(6, 2, 4))
    runs = plan_timing.op_runs(recording.operations[0], 6)
    total, s, *_ = runs["statistics"]()
    assert (total.shape, s.shape) == ((3, 4), (6,))
    norms, dx, dgy, none = runs["grad"]()
    torch.testing.assert_close(norms, s)
    assert (dx.shape, dgy.shape, none) == ((6, 2, 4), (6, 2, 3), None)


def test_a_model_that_cannot_be_copied(quick):
    model = nn.Sequential(nn.Linear(3, 2))
    model.handle = (i for i in range(3))
    with pytest.raises(ArgumentError, match="on a copy of the model, which cannot be made: cannot pickle"):
        bootgrad.plan(model, torch.zeros(4, 3), measure=True)


def test_every_step_has_a_run_or_a_reason():
    model, x = nn.Linear(3, 2), torch.randn(16, 3)
    runs, refused = plan_timing.step_runs(model, [x], model(x), 16)
    named = [line.removeprefix("not measured: ").split(": ")[0] for line in refused]
    assert [step.name for step in costs.STEPS if step.name in runs or step.name in named] == [
        s.name for s in costs.STEPS
    ]
