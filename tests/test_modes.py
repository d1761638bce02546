"""Modes beside a compiler: graphs are captured of torch's own functions, and nothing of a mode is compiled."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from bootgrad.modes import Mode
from bootgrad.rules.process_wide import eager


class Seeing(Mode):
    """Doubles what sin makes, and remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def run(self, func, *args, **kwargs):
        self.seen.append(getattr(func, "__name__", str(func)))
        out = func(*args, **kwargs)
        return 2 * out if func is torch.sin else out


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_captured_graphs_are_of_torchs_own_functions():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(lambda x: torch.sin(x).cos(), backend=backend, fullgraph=True)
    for _ in range(2):
        with Seeing() as mode:
            compiled(torch.randn(3))
        assert "sin" in mode.seen  # in the graph that this backend runs as it is
    assert graphs == [[torch.sin]] and not counters["graph_break"]


class Loop(nn.Module):
    """A loop with a graph break, which the compiler gives up on: its calls run uncompiled, one by one."""

    def forward(self, x):
        for _ in range(3):
            try:
                x = torch.sin(x)
                torch._dynamo.graph_break()
            finally:
                x = x + 1
        return x


def test_uncompiled_code_in_compiled_functions_is_seen_and_the_mode_left_alone():
    model, x = Loop(), torch.randn(3)
    compiled = torch.compile(model, backend="eager")
    results = []
    for function in (compiled, model):
        with Seeing() as mode:
            results.append(function(x))
        assert mode.seen.count("sin") == 3
    torch.testing.assert_close(*results)
    assert "__torch_function__" not in str(counters)


def test_as_written():
    compiled = torch.compile(lambda x: x.sin(), backend="eager")
    with eager:
        compiled(torch.randn(3))
    assert not counters["stats"]
