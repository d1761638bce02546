"""Centers by themselves: how a window is kept, and that no center keeps what changes in numbers of Python's."""

import copy

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
