"""The GPU report's parts, each alone: what they make of a GPU is tried on stand-ins for one."""

import importlib
from pathlib import Path

import pytest
import torch

from bootgrad.planning import LinearLayer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def part(monkeypatch):
    """A module of benchmarks.gpu_report by name."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.gpu_report.{name}")


def test_weights_and_centers_are_tried_with_strides_too(part):
    """Such as are kept on the way to a device: a strided tensor of one's own is where kernels go wrong."""
    layer = LinearLayer(4, 3, 5, 6)
    assert {"apart": True} in part("correctness").variants("linear_weighted_sum", layer, True)
    examples = part("examples")
    x, gy, w = examples.moved(examples.arguments("linear_weighted_sum", layer, torch.float32, apart=True), "cpu")
    assert (x.stride(), gy.stride(), w.stride()) == ((15, 5, 1), (18, 6, 1), (2,))
    assert torch.equal(w, examples.arguments("linear_weighted_sum", layer, torch.float32)[2])
