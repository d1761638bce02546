"""What a step draws at random, given by a test in its place."""

import pytest
import torch


@pytest.fixture
def subsets(monkeypatch):
    """The samples that the next step is to take."""
    chosen = []

    def draw(batch, fraction, generator):
        B = len(batch[0])
        return torch.tensor(chosen), torch.tensor([i for i in range(B) if i not in chosen])

    monkeypatch.setattr("bootgrad.steps.draw", draw)
    return chosen


@pytest.fixture
def signs(monkeypatch):
    """The signs that the next probes are to take, in turn."""
    given = []
    monkeypatch.setattr("bootgrad.methods.random_signs.draw_signs", lambda m, generator: torch.tensor(given.pop(0)))
    return given
