import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import bootgrad
from bootgrad.errors import ArgumentError, ArgumentTypeError, RecordingError, UnsupportedError

from .plain import assert_same_parameters, batches, classifier, losses_of, trained

accelerate = pytest.importorskip("accelerate")
from bootgrad.integrations.accelerate import PerSample  # noqa: E402


@pytest.fixture
def make():
    """An Accelerator for the CPU; its settings are the process's own, and are let go afterwards."""

    def accelerator(**options):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return accelerate.Accelerator(cpu=True, **options)

    yield accelerator
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def prepared(accelerator, parts, model=None, momentum=0.0):
    model = classifier() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    return accelerator.prepare(model, optimizer, DataLoader(parts, batch_size=None))


def run(accelerator, model, optimizer, loader, ours, clip=None):
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(ours.loss(lambda x, y: losses_of(model, x, y), x, y))
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(("n", "clip"), [(1, None), (2, 0.05), (3, None)])
def test_a_loop_takes_the_steps_of_a_plain_one(make, n, clip):
    parts = batches([5, 7, 4, 6, 3])
    accelerator = make(gradient_accumulation_steps=n)
    model, optimizer, loader = prepared(accelerator, parts)
    ours = PerSample(accelerator, model, penalties={"reg1": 0.3}, statistics={"every": 1})
    run(accelerator, model, optimizer, loader, ours, clip)
    windows = [parts[k : k + n] for k in range(0, len(parts), n)]
    want, traces = trained(classifier(), windows, reg1=0.3, clip=clip)
    assert_same_parameters(accelerator.unwrap_model(model), want)
    assert ours.numbers()["bootgrad/covariance_trace"] == pytest.approx(traces[-1])
    assert ours.monitor.step == ours.regularizer.step == len(windows)
    assert ours.report.batch_size == sum(len(x) for x, _ in windows[-1])


@pytest.mark.parametrize("n", [1, 2])
def test_statistics_leave_the_training_as_it_is(make, n):
    parts = batches([5, 7, 4, 6, 3, 5])
    accelerator = make(gradient_accumulation_steps=n)
    model, optimizer, loader = prepared(accelerator, parts)
    ours = PerSample(accelerator, model, statistics={"every": 2})
    run(accelerator, model, optimizer, loader, ours)
    other = make(gradient_accumulation_steps=n)
    plain, optimizer, loader = prepared(other, parts)
    for x, y in loader:
        with other.accumulate(plain):
            other.backward(losses_of(plain, x, y).mean())
            optimizer.step()
            optimizer.zero_grad()
    assert_same_parameters(model, plain, 1e-12)
    assert ours.monitor.step == 6 // n
    assert ours.numbers()["bootgrad/covariance_trace"] > 0


def test_autocast_is_that_of_the_prepared_model(make):
    parts, seen = [(x.float(), y) for x, y in batches([16, 16])], []
    accelerator = make(mixed_precision="bf16")
    model, optimizer, loader = prepared(accelerator, parts, classifier().float())
    model[0].register_forward_hook(lambda layer, args, output: seen.append(output.dtype))
    ours = PerSample(accelerator, model, penalties={"reg1": 0.2, "center": "zero"})
    run(accelerator, model, optimizer, loader, ours)
    assert set(seen) == {torch.bfloat16}
    other = classifier().float()
    reg = bootgrad.GradientRegularizer(other, reg1=0.2, center="zero")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for x, y in parts:
        optimizer.zero_grad()

        def losses(x, y):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = other(x)
            return nn.functional.cross_entropy(outputs.float(), y, reduction="none")

        reg.backward(losses, x, y)
        optimizer.step()
    assert_same_parameters(model, other, 1e-6)


class Scaled:
    """An accelerator's scaler in half precision, which there is on GPUs alone, in front of the rest of a CPU's."""

    def __init__(self, accelerator):
        self._accelerator = accelerator
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def __getattr__(self, name):
        return getattr(self._accelerator, name)

    def backward(self, loss):
        self.scaler.scale(loss / self.gradient_accumulation_steps).backward()


@pytest.mark.parametrize(
    "options", [dict(penalties={"reg1": 0.3}), dict(statistics={"every": 1})], ids=["penalties", "statistics"]
)
def test_a_scalers_factor_arrives_and_gradients_that_are_not_finite_are_left_to_it(make, options):
    parts = batches([5, 5, 5, 5])
    accelerator = Scaled(make(gradient_accumulation_steps=2))
    model = classifier()
    ours = PerSample(accelerator, model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.clone() for p in model.parameters()]
    for k, (x, y) in enumerate([(parts[0][0] * torch.inf, parts[0][1]), *parts[1:]]):
        with accelerator.accumulate(model):
            accelerator.backward(ours.loss(lambda x, y: losses_of(model, x, y), x, y))
        if accelerator.sync_gradients:
            accelerator.scaler.step(optimizer)
            accelerator.scaler.update()
            optimizer.zero_grad()
            if k == 1:
                assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
                assert accelerator.scaler.get_scale() == 2.0**9
    want, _ = trained(classifier(), [parts[2:]], reg1=0.3 if "penalties" in options else 0.0)
    assert_same_parameters(model, want)


def test_a_saved_state_is_gone_on_from(make, tmp_path):
    parts, options = batches([5, 7, 4, 6, 3, 5]), dict(reg1=0.2, reg2=0.1, center="ema", fraction=0.5)

    def begun():
        accelerator = make()
        model, optimizer, loader = prepared(accelerator, parts, momentum=0.9)
        ours = PerSample(accelerator, model, penalties=options, statistics={"every": 2})
        return accelerator, model, optimizer, loader, ours

    whole = begun()
    run(*whole)
    whole[0].save_state(tmp_path)
    run(*whole)
    torch.manual_seed(9)
    resumed = begun()
    resumed[0].load_state(tmp_path)
    run(*resumed)
    assert_same_parameters(resumed[1], whole[1], 0)
    assert resumed[-1].regularizer.step == resumed[-1].monitor.step == 12
    assert resumed[-1].numbers() == whole[-1].numbers()


def test_what_would_be_wrong_is_refused(make):
    parts = batches([5, 7])
    accelerator = make(gradient_accumulation_steps=2)
    model, _, _ = prepared(accelerator, parts)
    with pytest.raises(ArgumentError, match="nothing was asked for"):
        PerSample(accelerator, model)
    sharded = SimpleNamespace(distributed_type=accelerate.DistributedType.FSDP)
    with pytest.raises(UnsupportedError, match="the backend FSDP does more"):
        PerSample(sharded, model, penalties={"reg1": 0.1})
    with pytest.raises(ArgumentTypeError, match="losses must be a function"):
        PerSample(accelerator, model, penalties={"reg1": 0.1}).loss(torch.ones(3))
    ours = PerSample(accelerator, model, penalties={"reg1": 0.1})

    def losses(x, y):
        return losses_of(model, x, y)

    with pytest.raises(ArgumentError, match="multiplied by 2 "):
        ours.loss(losses, *parts[0]).backward()  # not by accelerator.backward, which divides
    loss = ours.loss(losses, *parts[0])
    with pytest.raises(RecordingError, match="of the loss before was not taken"):
        ours.loss(losses, *parts[1])
    with pytest.raises(RecordingError, match="this loss was dropped"):
        accelerator.backward(loss)
    assert all(p.grad is None for p in model.parameters())
    loss = ours.loss(losses, *parts[0])
    accelerator.backward(loss, retain_graph=True)
    taken = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RecordingError, match="taken already"):
        accelerator.backward(loss)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), taken, strict=True))
