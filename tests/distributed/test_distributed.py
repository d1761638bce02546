"""Ranks that train a model together: gradients, statistics and reports are those of one process on the batch of all."""

import pytest
import torch

from .failures import failures, refusals
from .processes import together
from .sharding import (
    full_batch_centers,
    refusals_of_sharding,
    sharded_failures,
    sharded_layers_of_other_kinds,
    sharded_penalties,
    sharded_statistics,
    sharded_training,
)
from .steps import (
    buffers_come_from_rank_0,
    collectives_of_a_step,
    each_rank_draws_its_own_signs,
    exact_penalties,
    fractions_averaged_over_all_subsets,
    half_precision_and_a_scaler,
    losses_in_place_of_a_function,
    numbers_keep_their_digits,
    other_penalties,
    pieces_go_out_on_the_way,
    plain_steps_between,
    random_signs_averaged_over_all_signs,
    statistics_of_a_backward_pass,
    statistics_of_micro_batches,
    statistics_of_some_parameters,
    what_some_ranks_do_not_reach,
    without_statistics,
)
from .strengths import rules_on_ranks, rules_on_shards

ANY_NUMBER = (
    statistics_of_a_backward_pass,
    pieces_go_out_on_the_way,
    statistics_of_micro_batches,
    statistics_of_some_parameters,
    exact_penalties,
    other_penalties,
    without_statistics,
    losses_in_place_of_a_function,
    what_some_ranks_do_not_reach,
    half_precision_and_a_scaler,
    each_rank_draws_its_own_signs,
    numbers_keep_their_digits,
    plain_steps_between,
    buffers_come_from_rank_0,
    failures,
    sharded_statistics,
    sharded_penalties,
    sharded_layers_of_other_kinds,
    full_batch_centers,
    sharded_training,
    sharded_failures,
    rules_on_ranks,
    rules_on_shards,
)
TWO = (
    *ANY_NUMBER,
    fractions_averaged_over_all_subsets,
    random_signs_averaged_over_all_signs,
    collectives_of_a_step,
    refusals,
    refusals_of_sharding,
)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each of two ranks found, by case."""
    return together(2, tmp_path_factory.mktemp("ranks") / "meeting", *TWO)


def values_of(found, case):
    """What each rank found, none of which is an error."""
    errors = [value for value in found[case.__name__] if isinstance(value, str)]
    assert not errors, errors[0]
    return list(found[case.__name__])


@pytest.mark.parametrize("case", TWO, ids=lambda case: case.__name__)
def test_two_ranks_are_one_process(of_two, case):
    values_of(of_two, case)


@pytest.mark.slow
def test_four_ranks_are_one_process(tmp_path):
    found = together(4, tmp_path / "meeting", *ANY_NUMBER)
    for case in ANY_NUMBER:
        values_of(found, case)
    check_what_was_told(found)


def test_what_ranks_find_of_each_other(of_two):
    check_what_was_told(of_two)


def check_what_was_told(found):
    """Parameters and λ are the same on all, signs are not, and each knows who failed."""
    first, *others = values_of(found, half_precision_and_a_scaler)
    assert all(torch.equal(first, other) for other in others)
    for case in (rules_on_ranks, rules_on_shards):
        first, *others = values_of(found, case)
        assert first and all(first == other for other in others)
    signs = values_of(found, each_rank_draws_its_own_signs)
    assert len(set(map(tuple, signs))) == len(signs)
    for case in (failures, sharded_failures):
        of_ranks = values_of(found, case)
        failed = of_ranks.pop(1)
        assert {kind for kind, _ in failed.values()} == {"ArgumentError", "KeyError"}
        told = {place: f"rank 1 failed, and with it this step on all: {': '.join(e)}" for place, e in failed.items()}
        for of_rank in of_ranks:
            assert of_rank == {place: ("DistributedError", text) for place, text in told.items()}


def test_rounds_of_a_step(of_two):
    """One, and one more where a penalty needs the mean gradient of all; of Reg1 alone two, the first without center."""
    for counts in values_of(of_two, collectives_of_a_step):
        assert counts == {
            "statistics": 1,
            "batch_mean": 2,
            ("batch_mean", "reg1"): 4,
            "zero": 2,
            ("zero", "reg1"): 2,
            "ema": 2,
            ("ema", "reg1"): 3,
            "window": 2,
            ("window", "reg1"): 3,
        }


def test_what_is_refused(of_two):
    for found in values_of(of_two, refusals):
        assert {kind for kind, _ in found.values()} == {"UnsupportedError"}
        for place, words in {
            "no_sync": "a block of accumulate",
            "graph": "GradientRegularizer",
            "hook": "communication hook",
            "ignored": "ignores, layers.0.bias",
            "sparse": "parameter weight has a sparse gradient",
            "static": "static_graph",
            "inside": "wrap the whole",
            "beside": "wrap all alike",
            "batch norm": "SyncBatchNorm",
        }.items():
            assert words in found[place][1]
    for found in values_of(of_two, refusals_of_sharding):
        assert {kind for kind, _ in found.values()} == {"UnsupportedError"}
        for place, words in {
            "half": "torch.autocast",
            "offload": "offload_policy",
            "around": "call fully_shard on the whole",
            "ignored": "parameter layers.0.bias is not sharded",
            "mesh": "a mesh of several dimensions",
            "tensor parallel": "parameter layers.0.weight is a DTensor",
            "tensor parallel, signs": "parameter layers.0.weight is a DTensor",
        }.items():
            assert words in found[place][1]
