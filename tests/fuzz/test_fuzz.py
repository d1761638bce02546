"""Programs that are drawn at random, the same ones in every run, and those that once failed; ``make fuzz`` draws others."""

import pytest
from hypothesis import HealthCheck, given, settings

from bootgrad.errors import UnsupportedError

from .architectures import programs
from .comparison import compare
from .operations import OPERATIONS
from .programs import Loss, Node, Program, W
from .regressions import REGRESSIONS
from .weights import KINDS

_SLOW_TO_DRAW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
QUICK = settings(max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=_SLOW_TO_DRAW)


@pytest.mark.parametrize("name", REGRESSIONS)
def test_programs_that_failed(name):
    assert compare(REGRESSIONS[name])


@QUICK
@given(programs(most=5))
def test_small_programs(program):
    compare(program)


@pytest.mark.slow
@settings(QUICK, max_examples=600)
@given(programs())
def test_programs(program):
    compare(program)


@pytest.mark.slow
@pytest.mark.parametrize(
    "last", [*({"operation": name} for name in OPERATIONS), *({"kind": name} for name in KINDS)], ids=str
)
def test_programs_with_each(last):
    """An operation, or a kind of weight, at the end of small programs; it is done somewhere, but for what may be refused."""
    done = []

    @settings(QUICK, max_examples=12)
    @given(programs(most=2, **last))
    def run(program):
        done.append(compare(program))

    run()
    assert any(done) or (done and OPERATIONS[last["operation"]].refused)


TIED = Program(
    ((3,),),
    (Node("linear", 0, out=3, bias=True), Node("activation", 1, name="tanh"), Node("again", 2, k=1)),
    Loss("smooth", 3),
)


def test_the_comparison_sees_a_wrong_number(monkeypatch):
    assert compare(TIED)
    monkeypatch.setattr("bootgrad.recording.merged", lambda terms: terms[0])  # of the uses of a parameter, one
    with pytest.raises(AssertionError, match="sq_norms of modules_of.0.weight"):
        compare(TIED)


def test_the_comparison_sees_a_refusal(monkeypatch):
    program = Program(((3,),), (Node("elementwise", 0, name="x * w", shape="last", w=W("new")),), Loss("smooth", 1))
    assert compare(program)

    def refuse(*_):
        raise UnsupportedError("no")

    monkeypatch.setattr("bootgrad.batch_check.BatchCheck.run", refuse)
    with pytest.raises(AssertionError, match="refused: "):
        compare(program)
