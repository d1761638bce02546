"""What an average over steps goes on from."""

import math

import pytest

from bootgrad import NoiseScale
from bootgrad.errors import ArgumentError, ArgumentTypeError

GOOD = {"decay": 0.9, "steps": 3, "parts": [0.271, 2.71, 0.542]}


def test_a_state_is_gone_on_from():
    scale = NoiseScale()
    scale.load_state_dict(GOOD)
    assert math.isclose(scale.value, 5.0) and scale.state_dict() == GOOD


@pytest.mark.parametrize(
    "wrong",
    [
        {"decay": 5},
        {"decay": math.nan},
        {"decay": "x"},
        {"steps": -3},
        {"parts": [1.0]},
        {"parts": ["a", 1.0, 1.0]},
        {"parts": [0.0, 1.0, 1.0]},
        {"parts": None},
    ],
)
def test_what_is_no_state_is_refused(wrong):
    scale = NoiseScale()
    with pytest.raises(ArgumentError, match="not a state_dict of a NoiseScale"):
        scale.load_state_dict(GOOD | wrong)
    assert scale.state_dict() == NoiseScale().state_dict()


def test_a_number_is_no_batch():
    with pytest.raises(ArgumentTypeError, match="update takes .* of a batch; got float"):
        NoiseScale().update(3.0)
