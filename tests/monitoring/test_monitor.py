"""A monitor sees on every k-th step what plain autograd has, and leaves all steps' gradients as they would be."""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bootgrad
from bootgrad.errors import ArgumentError, ArgumentTypeError, BootgradWarning, RecordingError
from bootgrad.monitoring import Flag, JSONLWriter, Monitor, Observation
from bootgrad.monitoring.measuring import LEAST_SPREAD, Part, quantiles
from bootgrad.monitoring.observation import QUANTILES

from .runs import BATCH, batch, losses_of, network, observation

close = torch.testing.assert_close


class Kept(list):
    """A writer that keeps what it is given."""

    closed = False

    def write(self, seen):
        self.append(seen)

    def close(self):
        self.closed = True


def rows_of(model, x, y):
    """(B, P) of each parameter, one backward pass per sample."""
    losses = losses_of(model, x, y)
    grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    return {name: torch.stack([g[k].flatten() for g in grads]) for k, (name, _) in enumerate(model.named_parameters())}


def step(monitor, seed=0, **options):
    x, y = batch(seed)
    monitor.model.zero_grad()
    with monitor.record():
        losses = losses_of(monitor.model, x, y)
    return monitor.backward(losses, **options)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "weights"])
def test_every_steps_gradient_is_the_plain_one(every, reduction):
    model, plain = network(), network()
    weights = torch.linspace(0, 1, BATCH, dtype=torch.float64)
    chosen = weights if reduction == "weights" else reduction
    with Monitor(model, every) as monitor:
        for k in range(5):
            assert monitor.step == k and monitor.due == (k % every == 0)
            seen = step(monitor, k, reduction=chosen)
            assert (seen is not None) == (k % every == 0)
            plain.zero_grad()
            losses = losses_of(plain, *batch(k))
            (losses @ weights if reduction == "weights" else getattr(losses, reduction)()).backward()
            close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("shape", [(BATCH, 1), (1,), (1, BATCH), ()])
@pytest.mark.parametrize("steps", [0, 1])
def test_weights_of_another_shape_are_refused_on_every_step(shape, steps):
    monitor = Monitor(network(), 2)
    for k in range(steps):
        step(monitor, k)
    with pytest.raises(ArgumentError, match="weights must have shape"):
        step(monitor, reduction=torch.ones(shape, dtype=torch.float64))
    assert monitor.step == steps and all(p.grad is None for p in monitor.model.parameters())


def test_an_observation_has_what_plain_autograd_has():
    model, (x, y), written = network(), batch(), Kept()
    rows = rows_of(model, x, y)
    seen = step(Monitor(model, writers=[written]))
    assert written == [seen] and seen.step == 0 and seen.batch_size == BATCH
    whole = torch.cat(list(rows.values()), 1)
    mean = whole.mean(0)
    assert seen.loss == pytest.approx(float(losses_of(model, x, y).mean().detach()))
    assert seen.covariance_trace == pytest.approx(float((whole - mean).square().sum(1).mean()))
    assert seen.sq_mean_norm == pytest.approx(float(mean.square().sum()))
    S = seen.covariance_trace * BATCH / (BATCH - 1)
    assert seen.noise_scale == pytest.approx(S / (seen.sq_mean_norm - S / BATCH))
    assert list(seen.layers) == ["(root)", "first", "norm", "last"]
    for name, layer in seen.layers.items():
        own = torch.cat([g for p, g in rows.items() if p.rpartition(".")[0] == name.replace("(root)", "")], 1)
        assert layer.covariance_trace == pytest.approx(float((own - own.mean(0)).square().sum(1).mean()))
        assert layer.sq_mean_norm == pytest.approx(float(own.mean(0).square().sum()))
    norms = sorted(whole.norm(dim=1).tolist())
    assert list(seen.norms) == list(QUANTILES)
    assert seen.norms[0.0] == pytest.approx(norms[0]) and seen.norms[1.0] == pytest.approx(norms[-1])
    assert seen.norms[0.5] == pytest.approx(statistics.median(norms))
    close(torch.tensor(seen.sample_norms, dtype=torch.float64), whole.norm(dim=1))


def test_noise_scales_are_averaged_over_observations():
    model = network()
    monitor, of_all, of_layer = Monitor(model, 2, decay=0.5), bootgrad.NoiseScale(0.5), bootgrad.NoiseScale(0.5)
    for k in range(6):
        seen = step(monitor, k)
        if seen is not None:
            with bootgrad.record(model) as rec:
                losses = losses_of(model, *batch(k))
            stats = rec.backward(losses)
            assert seen.noise_scale == pytest.approx(of_all.update(stats))
            parts = [stats.per_parameter[f"last.{name}"] for name in ("weight", "bias")]
            trace, sq_mean = (sum(float(getattr(m, f)) for m in parts) for f in ("covariance_trace", "sq_mean_norm"))
            assert seen.layers["last"].covariance_trace == pytest.approx(trace)
            part = type("", (), {"batch_size": BATCH, "covariance_trace": trace, "sq_mean_norm": sq_mean})
            assert seen.layers["last"].noise_scale == pytest.approx(of_layer.update(part))


def test_normalization_layers_alone():
    model, plain = network(), network()
    rows = rows_of(model, *batch())
    seen = step(Monitor(model, layers="normalization"))
    own = torch.cat([rows["norm.weight"], rows["norm.bias"]], 1)
    assert list(seen.layers) == ["norm"] and seen.as_dict()["watched"] == ["normalization"]
    with bootgrad.record(model) as whole:
        losses = losses_of(model, *batch())
    assert Monitor(model, layers="normalization").observe(whole.backward(losses)).watched == ()
    model.zero_grad()
    step(Monitor(model, layers="normalization"))
    assert seen.covariance_trace == pytest.approx(float((own - own.mean(0)).square().sum(1).mean()))
    close(torch.tensor(seen.sample_norms, dtype=torch.float64), own.norm(dim=1))
    losses_of(plain, *batch()).mean().backward()
    close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_layers_by_name():
    blocks = nn.Sequential(
        nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    ).double()
    for layers, expected in (
        (["0"], ["0.0"]),
        (["*.0"], ["0.0", "1.0"]),
        (["1.0.bias"], ["1.0"]),
        (["?.0.bias", "1"], ["0.0", "1.0"]),
    ):
        assert list(step(Monitor(blocks, layers=layers)).layers) == expected
    whole = torch.compile(network(), backend="eager")
    assert list(step(Monitor(whole, layers=["norm", "(root)"], compiled=False)).layers) == ["(root)", "norm"]
    for layers, error, message in (
        ("norm", ArgumentError, "put a name into a list"),
        ([], ArgumentError, "got none"),
        (["0", "third"], ArgumentError, "'third', which no trained parameter of the model is in; there are: 0.0, 1.0"),
        (7, ArgumentTypeError, "a list of names"),
        ("normalization", ArgumentError, "the model has none"),
    ):
        with pytest.raises(error, match=message):
            Monitor(blocks, layers=layers)


def test_a_layer_whose_parameters_are_tied_is_known_by_their_name():
    model = nn.ModuleDict({"words": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["words"].weight
    for tied in (model, torch.compile(model, backend="eager")):
        with pytest.raises(ArgumentError, match="'head', whose parameters are tied to others .*: take words.weight$"):
            Monitor(tied, layers=["head"])
        Monitor(tied, layers=["words.weight"])


class RMSNorm(nn.Module):
    """One of somebody's own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).rsqrt() * self.weight


def test_normalization_layers_of_somebodys_own():
    model = nn.Sequential(nn.Linear(5, 4), RMSNorm(), nn.Linear(4, 3)).double()
    assert list(step(Monitor(model, layers="normalization")).layers) == ["1"]


def test_outliers_are_told_by_their_ids():
    model, (x, y) = network(), batch()
    weights = torch.ones(BATCH, dtype=torch.float64)
    weights[[3, 11]] = torch.tensor([1e4, 1e3], dtype=torch.float64)
    names = [f"image {k}" for k in range(BATCH)]
    numbers = 100 + torch.arange(BATCH)
    for ids, expected in (
        (None, [None, None]),
        (names, ["image 3", "image 11"]),
        (numbers, [103, 111]),
        (numbers.numpy(), [103, 111]),
        (list(numbers), [103, 111]),
        (list(numbers.numpy()), [103, 111]),
    ):
        for most in (8, 1):
            monitor = Monitor(model, outliers=most)
            with monitor.record():
                losses = losses_of(model, x, y) * weights
            seen = monitor.backward(losses, ids=ids)
            assert [o.id for o in seen.outliers] == expected[:most]
            assert [o["id"] for o in seen.as_dict()["outliers"]] == expected[:most]
            assert [o.index for o in seen.outliers] == [3, 11][:most]
            assert seen.outliers[0].norm == pytest.approx(seen.norms[1.0])


def test_samples_that_are_alike_are_no_outliers():
    model = nn.Linear(1, 1, bias=False).double()
    for last, found in ((math.exp(0.9 * 5 * LEAST_SPREAD), []), (math.exp(1.1 * 5 * LEAST_SPREAD), [8])):
        x = torch.ones(9, 1, dtype=torch.float64)
        x[8], x[0] = last, 0  # and a sample without a gradient is none
        monitor = Monitor(model)
        with monitor.record():
            losses = model(x).squeeze(1)
        assert [o.index for o in monitor.backward(losses).outliers] == found


def test_wrong_ids_touch_no_gradient():
    model, (x, y) = network(), batch()
    monitor = Monitor(model)
    with monitor.record():
        losses = losses_of(model, x, y)
    for ids, error, message in (
        ([1, 2, 3], ArgumentError, "ids must be 16, one for each loss; got 3"),
        (torch.zeros(BATCH, 2), ArgumentError, r"ids must have one dimension, \(B,\); got \(16, 2\)"),
        (np.zeros(()), ArgumentError, r"ids must have one dimension, \(B,\); got \(\)"),
        (set(range(BATCH)), ArgumentTypeError, "ids must be a sequence, an array or a tensor.*; got set"),
        (dict.fromkeys(range(BATCH)), ArgumentTypeError, "got dict"),
        ("a" * BATCH, ArgumentTypeError, "got str"),
    ):
        with pytest.raises(error, match=message):
            monitor.backward(losses, ids=ids)
        assert monitor.step == 0 and all(p.grad is None for p in model.parameters())
    assert monitor.backward(losses, ids=range(BATCH)) is not None  # the recording is still there


def test_losses_that_are_not_given_back_are_warned_of():
    model, (x, y) = network(), batch()
    monitor = Monitor(model, 1)

    def recorded():
        with monitor.record():
            return F.cross_entropy(model(x), y, reduction="none")

    with pytest.raises(ZeroDivisionError), monitor.record():
        1 / 0  # noqa: B018 — of an error it is no wonder
    recorded().mean().backward()
    with pytest.warns(BootgradWarning, match=r"were not given to monitor.backward\(losses\)"):
        losses = recorded()
    monitor.backward(losses)
    with monitor.record() as recording:
        losses = F.cross_entropy(model(x), y, reduction="none")
    monitor.observe(recording.backward(losses))  # another way to the same
    with torch.no_grad():
        recorded()
    recorded()
    with pytest.warns(BootgradWarning, match="were not given"):
        monitor.close()
    with pytest.raises(ZeroDivisionError), monitor:
        recorded().mean() / (1 // 0)
    with monitor.record():
        monitor.backward(F.cross_entropy(model(x), y, reduction="none"))
    monitor.backward(recorded())
    assert monitor.step == 4


def test_a_spike_is_flagged_with_its_layer():
    model = network()
    monitor = Monitor(model, 1)
    for k in range(30):
        seen = step(monitor, k)
        assert seen.flags == ()
    with torch.no_grad():
        model.last.weight.mul_(1e-3)  # then the layers before it have short gradients, and this one is as it was
        model.last.bias.copy_(torch.tensor([60.0, 0.0, -60.0]))
    flagged = {(flag.quantity, flag.layer): flag for flag in step(monitor, 30).flags}
    assert ("loss", None) in flagged and ("covariance_trace", "first") not in flagged
    of_root = flagged["covariance_trace", "(root)"]
    assert of_root.value > 6 * of_root.usual
    assert str(of_root).startswith("covariance_trace of layer (root) is ")


def test_what_falls_or_wanders_is_no_spike():
    monitor, told = Monitor(network(), 1, spike_deviations=6.0), []
    generator = torch.Generator().manual_seed(0)
    for k in range(200):
        trace = 100 * math.exp(-k / 40 + 0.3 * float(torch.randn((), generator=generator)))
        told += monitor.observe(report(trace)).flags
    assert told == []
    (flag,) = monitor.observe(report(100.0)).flags
    assert flag == Flag("covariance_trace", 100.0, flag.usual) and flag.usual < 2
    assert monitor.observe(report(math.inf)).flags[0].value == math.inf


def test_a_jump_out_of_a_steep_fall_is_a_spike_though_it_ends_below_where_the_fall_began():
    monitor = Monitor(network(), 1)
    for k in range(15):
        assert monitor.observe(report(100 * 0.6**k)).flags == ()
    (flag,) = monitor.observe(report(20.0)).flags
    assert flag.value == 20.0 and flag.usual == pytest.approx(100 * 0.6**12)  # the median of the last five


def report(trace, loss=1.0, **changes):
    numbers = {"loss": loss, "reg1": trace, "covariance_trace": trace, "mean_sq_norm": trace + 1, "sq_mean_norm": 1.0}
    fields = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    return bootgrad.Report(**(fields | {"reg2": None, "batch_size": 8, "method": "exact"} | changes))


def test_a_report_is_observed_for_what_it_has():
    model, (x, y) = network(), batch()
    reg = bootgrad.GradientRegularizer(model, reg1=0.1)
    monitor = Monitor(model, 2)
    told = reg.backward(lambda x, y: losses_of(model, x, y), x, y)
    seen = monitor.observe(told)
    assert seen.covariance_trace == float(told.covariance_trace) and seen.loss == float(told.loss)
    assert seen.reg1 == float(told.reg1) and seen.reg2 is None and seen.strengths == {"reg1": 0.1, "reg2": 0.0}
    assert not seen.layers and not seen.norms and not seen.outliers and not seen.sample_norms
    assert "bootgrad/outliers" not in seen.scalars() and seen.scalars()["bootgrad/strength/reg1"] == 0.1
    assert monitor.observe(told) is None and monitor.step == 2 and monitor.last is seen
    unknown = monitor.observe(report(math.nan))
    assert unknown.covariance_trace is None and "bootgrad/covariance_trace" not in unknown.scalars()
    assert unknown.noise_scale == pytest.approx(seen.noise_scale)  # of the steps that told


def test_statistics_made_elsewhere_are_those_of_backward():
    model, (x, y) = network(), batch()
    expected = step(Monitor(model))
    for center in (None, {name: torch.full_like(p, 0.01) for name, p in model.named_parameters()}):
        with bootgrad.record(model) as rec:
            losses = losses_of(model, x, y)
        seen = Monitor(model).observe(rec.backward(losses, center=center), losses=losses)
        for name, value in expected.scalars().items():
            assert seen.scalars()[name] == pytest.approx(value), name
        assert (seen.reg1 is None) == (center is None)
    with pytest.raises(ArgumentTypeError, match="Statistics or bootgrad.Report of a step; got float"):
        Monitor(model).observe(1.0)


def test_a_watched_step_that_was_not_recorded_is_an_error():
    model, (x, y) = network(), batch()
    monitor = Monitor(model, 2)
    with pytest.raises(
        RecordingError, match="nothing was recorded: run the forward pass inside .*, for step 0 is watched"
    ):
        monitor.backward(losses_of(model, x, y))
    step(monitor)
    with pytest.raises(ArgumentError, match="reduction must be"):
        monitor.backward(losses_of(model, x, y), reduction="average")
    assert monitor.step == 1
    step(monitor)
    with pytest.raises(ArgumentError, match="losses are NaN or infinite"):
        with monitor.record():
            losses = losses_of(model, x * math.inf, y)
        monitor.backward(losses)
    assert monitor.step == 2 and step(monitor).step == 2


def test_a_batch_of_one_has_no_noise_scale():
    model, (x, y) = network(), batch()
    monitor = Monitor(model)
    with monitor.record():
        losses = losses_of(model, x[:1], y[:1])
    seen = monitor.backward(losses)
    assert seen.noise_scale is None and seen.covariance_trace == pytest.approx(0, abs=1e-12)
    assert seen.norms[0.0] == seen.norms[1.0] == pytest.approx(math.sqrt(seen.sq_mean_norm))


def test_samples_elsewhere_than_in_dimension_0():
    model, (x, y) = nn.Linear(5, 3).double(), batch()
    expected = step(Monitor(model))
    monitor = Monitor(model)
    with monitor.record(samples=torch.arange(BATCH).view(1, BATCH)):
        losses = _over_time(model, x, y)
    seen = monitor.backward(losses)
    assert seen.scalars() == pytest.approx(expected.scalars())


def _over_time(model, x, y):
    outputs = model(x.unsqueeze(0))  # (1, B, …)
    return torch.nn.functional.cross_entropy(outputs.squeeze(0), y, reduction="none")


def test_with_a_scaler_gradients_are_scaled_and_statistics_are_not():
    expected = step(Monitor(network()))
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=256.0)
    monitor, plain = Monitor(model, 2), network()
    for k in range(2):
        seen = step(monitor, k, scaler=scaler)
        plain.zero_grad()
        losses_of(plain, *batch(k)).mean().backward()
        close([p.grad for p in model.parameters()], [256 * p.grad for p in plain.parameters()])
        if k == 0:
            assert seen.covariance_trace == pytest.approx(expected.covariance_trace)
    bad = torch.full((BATCH, 5), math.inf, dtype=torch.float64)
    with monitor.record():
        losses = losses_of(model, bad, batch()[1])
    seen = monitor.backward(losses, scaler=scaler)  # a step that the scaler will skip
    assert seen.covariance_trace is None and seen.norms == {} and seen.noise_scale is not None
    assert seen.loss is None and [flag.quantity for flag in seen.flags] == ["loss"]
    assert all(part.covariance_trace is part.sq_mean_norm is None for part in seen.layers.values())
    assert "nan" not in json.dumps({**seen.as_dict(), "flags": []})


def test_norms_of_which_some_are_infinite_have_quantiles():
    norms = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, math.inf, math.inf, math.inf], dtype=torch.float64)
    assert list(quantiles(norms).values()) == [1.0, 3.0, 5.0, math.inf, math.inf, math.inf]


def test_a_loss_that_is_not_finite_is_flagged():
    monitor = Monitor(network(), 1)
    (first,) = monitor.observe(report(1.0, loss=math.inf)).flags
    assert first == Flag("loss", math.inf, None) and str(first) == "loss is inf"
    for _ in range(3):
        assert monitor.observe(report(math.nan, loss=2.0)).flags == ()  # Γ that is not known
    assert monitor.observe(report(1.0, loss=-3.0)).flags == ()
    for loss in (math.nan, -math.inf, math.inf):
        (flag,) = monitor.observe(report(1.0, loss=loss)).flags
        assert flag.quantity == "loss" and flag.usual == pytest.approx(2) and str(flag.value) == str(loss)
    assert monitor.observe(report(1.0, loss=2.0)).flags == ()


def test_a_state_goes_on():
    whole, parts = Monitor(network(), 2), Monitor(network(), 2)
    for k in range(25):
        step(whole, k)
        if k == 12:
            state = parts.state_dict()
            parts = Monitor(network(), 2)
            parts.load_state_dict(state)
        step(parts, k)
    assert parts.last == whole.last and parts.state_dict() == whole.state_dict()
    other = Monitor(network(), 2, decay=0.5)
    other.load_state_dict(state)
    other._of_layer("new", Part(4, 1.0, 1.0))
    assert {scale["decay"] for scale in other.state_dict()["layers"].values()} == {0.95}
    before = parts.state_dict()
    for broken in ({}, {**before, "step": "x"}, {**before, "past": 3}, {**before, "layers": {"first": {}}}, None):
        with pytest.raises(
            ArgumentError, match=r"^not a state_dict of a Monitor, .*: give what state_dict\(\) has made$"
        ):
            parts.load_state_dict(broken)
        assert parts.state_dict() == before


def test_all_writers_are_closed_also_where_one_fails():
    class Failing(Kept):
        def close(self):
            raise OSError("gone")

    kept = Kept()
    with pytest.raises(OSError, match="gone"), Monitor(network(), writers=(Failing(), kept)):
        pass
    assert kept.closed


def test_a_writer_that_fails_leaves_the_others_their_step():
    class Full(Kept):
        def write(self, seen):
            super().write(seen)
            raise OSError(f"full {len(self)}")

    first, second, kept = Full(), Full(), Kept()
    monitor = Monitor(network(), 1, writers=(first, second, kept))
    for k in range(2):
        with pytest.raises(OSError, match=f"full {k + 1}"):
            step(monitor, k)
        assert monitor.step == k + 1 and [seen.step for seen in kept] == list(range(k + 1)) and kept[-1] is monitor.last
        assert len(second) == k + 1 and all(p.grad is not None for p in monitor.model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a whole number of at least 1; got 0"),
        ({"every": 2.0}, "every must be a whole number"),
        ({"outliers": -1}, "outliers must be a whole number of at least 0"),
        ({"spike_deviations": 0}, "spike_deviations must be above 0"),
        ({"outlier_deviations": math.nan}, "outlier_deviations must be above 0"),
        ({"decay": 2}, "decay must be in"),
        ({"writers": "run.jsonl"}, "writers must be a list of .*; got 'run.jsonl'"),
        ({"writers": [JSONLWriter]}, "writers must be a list of .*; got .<class"),
        ({"writers": JSONLWriter("run.jsonl")}, "writers must be a list of .*; got <.*JSONLWriter"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        Monitor(network(), **options)


def test_parameters_are_no_model():
    with pytest.raises(ArgumentTypeError, match="model must be a torch.nn.Module; got generator"):
        Monitor(network().parameters())


def test_scalars_are_flat():
    assert observation(3).scalars() == {
        "bootgrad/loss": 1.25,
        "bootgrad/covariance_trace": 2.5,
        "bootgrad/sq_mean_norm": 0.5,
        "bootgrad/noise_scale": 4.0,
        "bootgrad/reg1": 2.0,
        "bootgrad/norm/0": 0.5,
        "bootgrad/norm/0.5": 1.0,
        "bootgrad/norm/1": 9.0,
        "bootgrad/strength/reg1": 0.1,
        "bootgrad/layer/conv/covariance_trace": 1.5,
        "bootgrad/layer/conv/sq_mean_norm": 0.25,
        "bootgrad/layer/conv/noise_scale": 6.0,
        "bootgrad/layer/head.out/covariance_trace": 1.0,
        "bootgrad/layer/head.out/sq_mean_norm": 0.25,
        "bootgrad/layer/head.out/noise_scale": math.inf,
        "bootgrad/outliers": 1.0,
        "bootgrad/flags": 1.0,
    }
    assert Observation(0, 4).scalars() == {"bootgrad/flags": 0.0}


RANKS = """
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from tests.monitoring.runs import batch, losses_of, network
from tests.monitoring.test_monitor import Kept
from bootgrad.errors import ArgumentError, DistributedError
from bootgrad.monitoring import Monitor

def rank(r, meeting):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=r, world_size=2)
    for layers in ("all", "normalization"):
        for reduction in ("mean", "sum", torch.linspace(0, 1, 16, dtype=torch.float64)):
            whole, model, written = network(), DistributedDataParallel(network()), Kept()
            alone, monitor = Monitor(whole, 2, layers), Monitor(model, 2, layers, [written])
            own = slice(8 * r, 8 * r + 8)
            for k in range(3):
                x, y = batch(k)
                whole.zero_grad(), model.zero_grad()
                with alone.record():
                    losses = losses_of(whole, x, y)
                part = reduction if isinstance(reduction, str) else reduction[own]
                expected = alone.backward(losses, reduction=reduction)
                with monitor.record():
                    losses = losses_of(model, x[own], y[own])
                seen = monitor.backward(losses, reduction=part)
                for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                    torch.testing.assert_close(p.grad, q.grad)
                if seen is not None:
                    assert abs(seen.covariance_trace / expected.covariance_trace - 1) < 1e-9
                    assert abs(seen.noise_scale / expected.noise_scale - 1) < 1e-9
                    assert list(seen.layers) == list(expected.layers) and seen.batch_size == 16
                    for name, layer in seen.layers.items():
                        assert abs(layer.covariance_trace / expected.layers[name].covariance_trace - 1) < 1e-9
                    pairs = zip(seen.sample_norms, expected.sample_norms[own], strict=True)
                    assert all(abs(ours / theirs - 1) < 1e-9 for ours, theirs in pairs)
            assert len(written) == (2 if r == 0 else 0)
            model.zero_grad(), monitor.load_state_dict({**monitor.state_dict(), "step": 0})
            for ids in ([1], range(8)):  # which rank 0 alone has wrong, and then has right
                with monitor.record():
                    losses = losses_of(model, x[own], y[own])
                try:
                    monitor.backward(losses, reduction=part, ids=ids if r == 0 else range(8))
                except (ArgumentError if r == 0 else DistributedError) as error:
                    assert "ids must be 8, one for each loss; got 1" in str(error) and ids == [1]
                    assert monitor.step == 0 and all(p.grad is None for p in model.parameters())
            assert monitor.step == 1
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(rank, (sys.argv[1],), nprocs=2)
"""


@pytest.mark.slow
def test_of_several_ranks_the_first_one_writes_what_all_have(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(tmp_path / "meeting")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
