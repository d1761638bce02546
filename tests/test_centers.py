"""Centers by themselves: how a window is kept, and that no center keeps what changes in numbers of Python's."""

import copy
from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import bootgrad
from bootgrad import centers


@pytest.mark.parametrize(("storage", "rtol"), [("device", 1e-6), ("cpu", 1e-6), ("bf16", 2**-8)])
def test_a_window_s_mean_is_as_exact_as_its_storage(storage, rtol):
    window = centers.WindowMean(3, storage=storage)
    parameters = {"w": torch.zeros(5)}
    torch.manual_seed(0)
    past = [torch.randn(5) * 10.0 ** (k % 7) for k in range(200)]
    for k, g in enumerate(past):
        window.update({"w": g})
        held = torch.stack(past[max(0, k - 2) : k + 1]).double()
        value = window.value(parameters)["w"]
        assert value.dtype == torch.float32
        assert ((value - held.mean(0)).abs() <= rtol * held.abs().mean(0)).all()
        if k == 100:
            restored = centers.WindowMean(7, storage=storage)
            restored.load_state_dict(copy.deepcopy(window.state_dict()))
            window = restored
    rows = window.state_dict()["window"]["w"]
    assert rows.shape == (3, 5) and rows.dtype == (torch.bfloat16 if storage == "bf16" else torch.float32)


def test_a_window_s_storage_has_a_name():
    with pytest.raises(bootgrad.BootgradError, match="storage must be one of device, bf16, cpu; got 'gpu'"):
        centers.WindowMean(3, storage="gpu")


@pytest.mark.parametrize("make", [lambda: centers.EmaMean(0.5), lambda: centers.WindowMean(3)], ids=["ema", "window"])
def test_a_center_goes_on_in_a_replayed_graph(make):
    """As in a captured graph of kernels, where whatever Python did is not done again."""
    torch.manual_seed(0)
    past = torch.randn(8, 4)
    parameters = {"w": torch.zeros(4)}
    replayed, expected = make(), make()

    def step(g):
        value = replayed.value(parameters)["w"].clone()
        replayed.update({"w": g})
        return value

    for center in (replayed, expected):
        center.update({"w": past[0]})
    graph = make_fx(step)(past[1])  # which is a step, too
    expected.update({"w": past[1]})
    for g in past[2:]:
        torch.testing.assert_close(graph(g), expected.value(parameters)["w"])
        expected.update({"w": g})


MAKERS = {
    "ema": centers.EmaMean,
    **{storage: partial(centers.WindowMean, 3, storage) for storage in centers.WindowMean.STORAGES},
    "full": partial(centers.FullBatchMean, [], torch.sum, refresh_every=5),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_that_was_read_elsewhere_goes_to_the_parameters(name):
    """A checkpoint is read on the CPU; parameters on another device, here one without numbers, are gone on with."""
    center, there = MAKERS[name](), {"w": torch.zeros(4, device="meta"), "b": torch.zeros((), device="meta")}
    if name == "full":
        center.load_state_dict({"steps": 1, "value": {n: torch.ones(p.shape) for n, p in there.items()}})
    else:
        center.update({n: torch.ones(p.shape) for n, p in there.items()})
    moved = MAKERS[name]()
    moved.load_state_dict(center.state_dict())
    for _ in range(2):
        assert all(t.is_meta and t.shape == there[n].shape for n, t in moved.value(there).items())
        if name != "cpu":  # where gradients would have to come from there
            moved.update(there)
    state = moved.state_dict()
    window = state.pop("window", {"w": torch.zeros((), device="meta")})
    assert window["w"].is_meta == (name != "cpu")
    held = [part["w"] if isinstance(part, dict) else part for part in state.values()]
    assert all(t.is_meta for t in held if isinstance(t, torch.Tensor))
