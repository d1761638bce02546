"""A short soak and a few kills, what they would find, and the results of the long ones that were run by hand."""

import json
import sys
from pathlib import Path

import pytest
import torch

from . import kills, soak

RESULTS = Path(__file__).parents[2] / "benchmarks/results/trust"
ignore = pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")


@pytest.mark.slow
@ignore
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_grows_in_five_hundred_steps():
    training, rows = soak.soak(500)
    assert training.steps >= 500 and len(rows) >= 12 and rows[-1]["tensors"] > 100
    grown = soak.growth(rows)
    assert {name: value for name, value in grown.items() if value > soak.BOUNDS[name]} == {}


@ignore
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_grows_is_seen(monkeypatch):
    """A list of losses, and as many bytes of C's heap as a lost string of every op would be."""
    kept = []
    losses = soak.Training.losses

    def keeping(self, x, y):
        kept.append((losses(self, x, y), torch.zeros(300)))
        return kept[-1][0]

    monkeypatch.setattr(soak.Training, "losses", keeping)
    _, rows = soak.soak(280, "small")
    grown = soak.growth(rows)
    assert all(grown[name] > soak.BOUNDS[name] for name in ("tensors", "graphs", "objects", "heap")), grown


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forkserver")
def test_killed_runs_go_on_to_the_same_numbers(tmp_path):
    killer = kills.Killer(tmp_path, seed=1)
    while killer.kills < 5:
        killer.run(5)
    assert len(killer.epochs) == 5 and killer.runs >= 1


def test_a_difference_of_one_bit_is_seen():
    state = {"a": [torch.ones(3), {"b": 1.0}]}
    other = {"a": [torch.ones(3), {"b": 1.0}]}
    assert kills.same(state, other)
    other["a"][0][1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert not kills.same(state, other) and not kills.same({"a": 1}, {"a": 2}) and not kills.same([1], [1, 2])


@pytest.mark.parametrize("path", sorted(RESULTS.glob("soak*.json")), ids=lambda path: path.stem)
def test_a_stored_soak(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["steps"] == found["measurements"][-1]["step"] and len(found["kinds"]) == 12
    assert soak.growth(found["measurements"]) == found["growth"] and found["bounds"] == soak.BOUNDS
    assert all(value <= soak.BOUNDS[name] for name, value in found["growth"].items())


@pytest.mark.parametrize("path", sorted(RESULTS.glob("kills*.json")), ids=lambda path: path.stem)
def test_stored_kills(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["kills"] == len(found["epochs_found_done"]) and found["runs_that_ended_alike"] >= 1
    assert found["command"] == " ".join(["bootgrad train", *kills.OPTIONS])
    assert len(set(found["epochs_found_done"])) > 5  # at all times of a run
