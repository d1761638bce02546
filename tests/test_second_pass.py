"""What a second pass over a model leaves behind: nothing, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bootgrad
from bootgrad.scaling import Scaling
from bootgrad.second_pass import Replay, Snapshot, check_parameters, check_second, displaced, finite_step, quotient
from bootgrad.second_pass import same_buffers as with_buffers_of

from .methods.steps import small_model


class Stateful(nn.Module):
    """Dropout, frozen batch norm, and counts of calls: one in place, one by replacement, one through ``.data``."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.norm.eval().requires_grad_(False)
        self.dropout = nn.Dropout(0.5)
        for name in ("in_place", "replaced", "by_data"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.in_place += 1
        self.replaced = self.replaced + 1
        self.by_data.data.add_(1)
        return self.last(self.dropout(self.norm(self.first(x)).tanh()))

    def counts(self):
        return [int(self.in_place), int(self.replaced), int(self.by_data)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Stateful()


def directions_of(model):
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


class Own(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_come_back_bit_for_bit(model, fails):
    parameters, directions = dict(model.named_parameters()), directions_of(model)
    with torch.no_grad():
        model.first.weight[0, :3] = torch.tensor([torch.nan, -0.0, 1e-42])
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with displaced(parameters, directions.__getitem__, torch.tensor(1e-3, dtype=torch.float64)):
            for name, p in parameters.items():
                expected = before[name] + 1e-3 * directions[name]
                torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-9, equal_nan=True)
            assert not torch.equal(model.last.bias, before["last.bias"])
            if fails:
                raise Own
    except Own:
        assert fails
    for name, p in parameters.items():
        assert torch.equal(p.detach().view(torch.int32), before[name].view(torch.int32))


def test_parameters_come_back_where_one_cannot_be_moved(model):
    parameters, directions = dict(model.named_parameters()), directions_of(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    directions["last.bias"] = torch.zeros(7)
    with pytest.raises(RuntimeError, match="size"), displaced(parameters, directions.__getitem__, 1.0):
        raise AssertionError
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


def test_autocast_sees_the_parameters_where_they_are():
    model = nn.Linear(4, 2)
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with displaced(
            dict(model.named_parameters()), {"weight": torch.ones(2, 4), "bias": torch.zeros(2)}.__getitem__, 1.0
        ):
            moved = model(x)
        after = model(x)
    torch.testing.assert_close(moved - before, x.sum(1, keepdim=True).expand(3, 2).bfloat16(), rtol=5e-2, atol=5e-2)
    assert torch.equal(before, after)


def test_a_second_pass_is_the_first_again(model):
    x = torch.randn(16, 4)
    torch.manual_seed(5)
    model(x)
    one_pass = torch.get_rng_state()
    assert model.counts() == [1, 1, 1]
    torch.manual_seed(5)
    replay = Replay(model, lambda: model(x).square().sum(1))
    first = replay.function()
    held = model.replaced
    for _ in range(2):
        with replay.again() as again:
            assert torch.equal(first, again) and model.counts() == [2, 2, 2]
            torch.autograd.grad(again.sum(), model.last.weight)
        assert model.counts() == [2, 2, 2] and model.replaced is held
        assert torch.equal(torch.get_rng_state(), one_pass)
    with pytest.raises(Own), replay.again():
        raise Own
    assert model.counts() == [2, 2, 2] and torch.equal(torch.get_rng_state(), one_pass)


def test_running_statistics_are_those_of_one_pass():
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 1))
    x = torch.randn(8, 3)
    replay = Replay(model, lambda: model(x)[:, 0])
    replay.function()
    state = {name: t.clone() for name, t in model[0].state_dict().items()}
    with replay.again() as losses:
        losses.sum().backward()
    assert state["num_batches_tracked"] == 1
    assert all(torch.equal(t, state[name]) for name, t in model[0].state_dict().items())


def test_the_rest_of_a_batch_counts_with_it(model):
    before = Snapshot(model)
    model(torch.randn(4, 4))
    state = torch.get_rng_state()
    with with_buffers_of(model, before):
        assert model.counts() == [0, 0, 0]
        model(torch.randn(4, 4))
    assert model.counts() == [1, 1, 1]
    assert not torch.equal(torch.get_rng_state(), state)  # other samples take other random numbers


def test_the_step_is_relative_to_the_parameters():
    parameters = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    zero = torch.zeros((), dtype=torch.float64)
    assert float(finite_step(zero + 2, parameters, 1e-3)) == pytest.approx(1e-3 * 5 / 2)
    assert float(finite_step(zero, parameters, 1e-3)) == 1e-3
    assert float(finite_step(zero + 2, [torch.zeros(3)], 1e-3)) == pytest.approx(1e-3 / 2)


def test_quotients_where_a_pass_does_not_reach():
    one, three = torch.ones(2), torch.full((2,), 3.0)
    step = torch.tensor(0.5, dtype=torch.float64)
    out = quotient([three, three, None, None], [one, None, one, None], step)
    assert [None if t is None else t.tolist() for t in out] == [[4.0, 4.0], [6.0, 6.0], [-2.0, -2.0], None]
    assert out[0].dtype == torch.float32


def test_what_cannot_be_a_second_pass_is_refused():
    with pytest.raises(bootgrad.BootgradError, match="bfloat16 for weight"):
        check_parameters({"weight": torch.zeros(2, dtype=torch.bfloat16)})
    with pytest.raises(bootgrad.BootgradError, match="3 losses when it was run again; expected 4"):
        check_second(torch.zeros(3), 4, Scaling())
    with pytest.raises(bootgrad.BootgradError, match="NaN or infinite at 1 of 2 samples: 1"):
        check_second(torch.tensor([0.0, torch.nan]), 2, Scaling())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "random_signs"},
        {"method": "random_signs", "derivative": "finite_difference", "probes": 2},
        {"method": "finite_difference"},
        {"method": "finite_difference", "reg1": 0.0},
        {"fraction": 0.5},
        {"fraction": 0.5, "method": "random_signs", "derivative": "finite_difference"},
        {"every": 2},
    ],
)
def test_a_step_of_each_method_is_one_pass_to_the_model(model, options):
    x, y = torch.randn(6, 4), torch.randint(0, 2, (6,))
    settings = {"reg1": 0.1, "reg2": 0.2, "center": "zero"} | options
    reg = bootgrad.GradientRegularizer(model, **settings)
    for step in range(2):
        torch.manual_seed(step)
        model(x)
        expected = torch.get_rng_state()
        torch.manual_seed(step)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        reg.backward(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y)
        assert model.counts() == [2 * step + 2] * 3
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        if "fraction" not in options:  # in which the samples' numbers are drawn in another order
            assert torch.equal(torch.get_rng_state(), expected)


def test_parameters_that_share_memory_are_not_moved_twice():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double(), torch.randn(4, 3).double()
    model[2].weight = nn.Parameter(model[0].weight.data)
    reg = bootgrad.GradientRegularizer(model, reg2=0.1, center="zero", method="finite_difference")
    with pytest.raises(bootgrad.BootgradError, match="0.weight and 2.weight share memory"):
        reg.backward(lambda x: model(x).square().sum(1), x)


def test_expanded_buffers_are_left_as_they_are():
    model, x = small_model(), torch.randn(5, 3, dtype=torch.float64)
    model.register_buffer("mask", torch.ones(1, dtype=torch.float64).expand(2))
    reg = bootgrad.GradientRegularizer(model, reg2=0.1, center="zero", method="finite_difference")
    reg.backward(lambda x: (model(x) * model.mask).square().sum(1), x)
    assert model.mask.tolist() == [1, 1]
