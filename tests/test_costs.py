"""Times and memory of ops and steps against counts made by hand."""

import math

import pytest

from bootgrad import costs
from bootgrad.costs import STEPS, Use, extra_bytes, moved_entries, op_time, product_time, sizes, step_time
from bootgrad.planning import ConvLayer, LinearLayer, cost

CONV = ConvLayer(4, 3, (8, 6), 10, (3, 3), (1, 1), (1, 1), (1, 1))
LINEAR = LinearLayer(4, 1, 5, 7)
NAMED = {step.name: step for step in STEPS}


def test_sizes():
    assert sizes(CONV) == (4 * 3 * 48, 4 * 10 * 48)
    assert sizes(LinearLayer(2, 5, 3, 4)) == (2 * 5 * 3, 2 * 5 * 4)
    assert (moved_entries(LINEAR), moved_entries(LINEAR, "statistics"), moved_entries(LINEAR, "grad")) == (48, 48, 96)


def test_times_are_products_passes_and_calls():
    assert product_time(LINEAR) == 4 * 35 + 48 * costs.TENSOR_TIME + costs.CALL_TIME
    own = 4 * cost(LINEAR, "rank1", "grad").time
    assert op_time(LINEAR, "rank1", "grad") == own + 96 * costs.TENSOR_TIME + costs.CALL_TIME
    direct = 4 * cost(CONV, "direct", "statistics").time
    assert op_time(CONV, "direct", "statistics") == direct + 4 * 13 * 48 * costs.TENSOR_TIME + costs.CALL_TIME


def test_groups_slow_products_down_by_their_rows():
    def slower(groups):
        layer = ConvLayer(4, 16, (8, 8), 16, (3, 3), (1, 1), (1, 1), (1, 1), groups)
        rest = moved_entries(layer) * costs.TENSOR_TIME + costs.CALL_TIME
        return (product_time(layer) - rest) / (4 * layer.forward_operations)

    assert slower(1) == 1
    assert slower(4) == pytest.approx(1 + costs.GROUP_TIME / 2)
    assert slower(16) == pytest.approx(1 + costs.GROUP_TIME)


# Forward-sized products of a layer whose norms are next to nothing, as a linear one with one position, and of the first.
UNITS = {
    "plain": (3, 2),
    "rec.backward": (3, 2),
    "rec.backward, center": (4, 3),
    "reg1 batch_mean": (9, 4),
    "reg1 ema": (9, 4),
    "reg1 zero": (7, 3),
    "reg2 ema": (9, 4),
    "reg1 + reg2, ema": (9, 4),
    "random signs": (11, 5),
    "random signs, finite difference": (8, 5),
    "reg1 finite difference": (6, 4),
    "reg2 finite difference": (6, 4),
    "reg1 batch_mean, fraction 1/8": (3.75, 2.25),
    "reg1 batch_mean, every 8": (3.75, 2.25),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("first", [False, True])
def test_units_of_steps(name, first, monkeypatch):
    monkeypatch.setattr(costs, "TENSOR_TIME", 0)
    monkeypatch.setattr(costs, "CALL_TIME", 0)
    layer = LinearLayer(1, 1, 10**5, 10**5)
    units = step_time(NAMED[name], [Use(layer, first)]) / layer.forward_operations
    assert units == pytest.approx(UNITS[name][first], rel=1e-3)
    assert set(UNITS) == set(NAMED)


def test_the_direct_path_makes_its_derivatives_with_two_products_more(monkeypatch):
    monkeypatch.setattr(costs, "TENSOR_TIME", 0)
    monkeypatch.setattr(costs, "CALL_TIME", 0)
    layer = LinearLayer(1, 10**5, 1000, 1000)

    def units(name):
        return step_time(NAMED[name], [Use(layer)]) / layer.forward_operations

    assert units("rec.backward, center") == pytest.approx(3, rel=1e-3)
    assert units("reg1 ema") == pytest.approx(6 + 3, rel=1e-3)
    assert units("reg1 batch_mean") == pytest.approx(6 + 1 + 3, rel=1e-3)
    assert units("reg1 finite difference") == pytest.approx(6 + 2 * 2, rel=1e-3)
    first = step_time(NAMED["reg1 ema"], [Use(layer, True)]) / layer.forward_operations
    assert first == pytest.approx(2 + 2, rel=1e-3)


def test_memory_is_what_is_kept_and_copies():
    P = CONV.weight_entries + LINEAR.weight_entries
    uses = [Use(CONV, first=True), Use(LINEAR)]
    X, Y = 4 * 5, 4 * 10 * 48 + 4 * 7  # the first layer's input has no gradient
    assert extra_bytes(NAMED["plain"], uses, P) == extra_bytes(NAMED["rec.backward"], uses, P) == 0
    assert extra_bytes(NAMED["reg1 batch_mean"], uses, P) == 4 * (X + 2 * Y + P)
    assert extra_bytes(NAMED["reg1 + reg2, ema"], uses, P, 8) == 8 * (X + 2 * Y + 3 * P)
    assert extra_bytes(NAMED["reg1 batch_mean, fraction 1/8"], uses, P) == 4 * ((X + 2 * Y) / 8 + P)
    assert extra_bytes(NAMED["reg2 finite difference"], uses, P) == 4 * 3 * P


def test_steps_add_up_over_layers():
    for step in STEPS:
        parts = [step_time(step, [use]) for use in (Use(CONV, True), Use(LINEAR))]
        assert step_time(step, [Use(CONV, True), Use(LINEAR)]) == pytest.approx(sum(parts))
        assert math.isfinite(sum(parts)) and sum(parts) > 0
