"""Settings: what is accepted, and refusals in the words of the command line."""

import pytest
import torch

from bootgrad import BootgradError
from bootgrad.cli import _OPTIONS
from bootgrad.methods.choice import EPSILON
from bootgrad.training.settings import SETTING_NAMES, Settings

NAN, INF = float("nan"), float("inf")

BAD = [
    *[
        (name, value)
        for name in ("reg1", "reg2", "lr", "momentum")
        for value in (-1e-9, NAN, INF, -INF, True, "1", None)
    ],
    *[("lr", value) for value in (0.0, 1e39, 1e38)],  # Adam's first step is of size lr / (1 − 0.9)
    ("momentum", 1.0),
    *[(name, value) for name in ("epochs", "batch_size") for value in (0, -1, 1.0, None, "1", True)],
    ("batch_size", 1),
    *[(name, value) for name in ("train_size", "threads") for value in (0, -3, 2.5, "all")],
    ("threads", 5000),
    *[("seed", value) for value in (-1, 1 << 63, 0.5, None)],
    *[("center", value) for value in ("", "mean", "ema,", "ema,ema,ema", ",", None, 3)],
    *[("optimizer", value) for value in ("", "lion", None, [])],
    *[("device", value) for value in ("", "gpu", "cuda:x", "meta", "cuda:99", None)],
    *[("method", value) for value in ("", "lion", None, [])],
    *[("derivative", value) for value in ("", "auto", None)],
    *[(name, value) for name in ("probes", "every") for value in (0, -1, 1.5, "2", None, True)],
    ("every", 10**400),
    *[("fraction", value) for value in (0.0, -0.5, 1.1, NAN, INF, "1", None, True)],
    ("data", None),
    ("data_root", 7),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_are_refused_by_option(name, value):
    with pytest.raises(BootgradError, match=f"^--{name.replace('_', '-')} ") as caught:
        Settings(**{name: value})
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_reg2_needs_a_center_other_than_the_batch_mean():
    for center in ("batch_mean", "ema,batch_mean"):
        with pytest.raises(BootgradError, match="identically zero.*--center ema"):
            Settings(reg2=0.1, center=center)
    assert Settings(reg2=0.1, center="batch_mean,ema").centers == {"reg1": "batch_mean", "reg2": "ema"}
    assert Settings(reg2=0.1, center="window").centers == {"reg1": "window", "reg2": "window"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 2}, "--probes and derivative are options of method"),
        ({"derivative": "finite_difference"}, "--probes and derivative are options of method"),
        ({"method": "finite_difference", "probes": 2}, "--probes and derivative are options of method"),
        ({"epsilon": 0.01}, "--epsilon is the step of finite differences"),
        ({"method": "random_signs", "epsilon": 0.01}, "--epsilon is the step of finite differences"),
        *[({"method": "finite_difference", "epsilon": e}, "--epsilon must be") for e in (0.0, 1.0, -0.1, NAN, "1")],
    ],
)
@pytest.mark.parametrize("penalty", [{}, {"reg1": 0.1}])
def test_estimators_are_refused_by_option_in_plain_runs_too(options, message, penalty):
    with pytest.raises(BootgradError, match=f"^{message}"):
        Settings(**options, **penalty)


def test_checking_draws_no_random_numbers():
    before = torch.get_rng_state()
    Settings(method="random_signs", fraction=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_step_of_differences_is_the_documented_one():
    (text,) = (text for option, _, _, text in _OPTIONS if option == "--epsilon")
    assert float(text.rpartition("default: ")[2]) == EPSILON


def test_plainness_and_words():
    assert Settings().is_plain and Settings().penalty == "plain"
    regularized = Settings(reg1=0.125, reg2=0.5, center="ema")
    assert not regularized.is_plain and regularized.penalty == "λ₁ = 0.125, λ₂ = 0.5, center ema"
    assert Settings(**regularized.as_dict()) == regularized
    assert Settings(method="random_signs", probes=2, every=4).penalty == "plain"
    cheap = Settings(reg1=0.5, method="finite_difference", epsilon=1e-5, fraction=0.25)
    assert (
        cheap.penalty == "λ₁ = 0.5, λ₂ = 0, center batch_mean, method finite_difference, epsilon 1e-05, fraction 0.25"
    )
    assert tuple(regularized.as_dict()) == SETTING_NAMES


def test_the_learning_rate_is_one_that_torch_can_use():
    for momentum in (0.0, 0.9):
        lr = 3e38 * (1 - momentum)
        p = torch.zeros(1, requires_grad=True)
        p.grad = torch.ones(1)
        for optimizer in (torch.optim.Adam([p], lr=lr, betas=(momentum, 0.999)), torch.optim.SGD([p], lr=lr)):
            optimizer.step()
        assert Settings(lr=lr, momentum=momentum).lr == lr
    with pytest.raises(BootgradError, match="^--lr must be"):
        Settings(lr=10**400)  # as a damaged checkpoint may hold


def test_a_cuda_device_that_is_there_is_accepted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Settings(device="cuda:1").device == "cuda:1"
    with pytest.raises(BootgradError, match="torch sees 2 CUDA devices"):
        Settings(device="cuda:2")
