"""The loop against hand-written ones, and resumed runs against uninterrupted ones bit for bit.

Letters: g_i the gradient of sample i by plain autograd, ḡ their mean, c the center, β its decay.
"""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F

from bootgrad import BootgradError, GradientRegularizer
from bootgrad.errors import ArgumentError, DataError
from bootgrad.training import checkpoint
from bootgrad.training.data import ImageData
from bootgrad.training.loop import Trainer, TrainingError
from bootgrad.training.model import reference_cnn
from bootgrad.training.settings import Settings

SMALL = {"batch_size": 4, "epochs": 2, "threads": torch.get_num_threads()}
EXACT = {"method": "exact", "probes": 1, "derivative": "exact", "epsilon": None, "fraction": 1.0, "every": 1}
TIMES = ("seconds", "plain_seconds", "seconds_per_step", "plain_seconds_per_step")


def images(count=17, shape=(1, 8, 6), seed=0):
    """Random images in three classes, with as many to test."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, count, *shape, generator=generator)
    y = torch.randint(3, (2, count), generator=generator)
    return ImageData(x[0], y[0], x[1], y[1], classes=3, fingerprint=seed)


def run(trainer):
    while not trainer.is_finished:
        trainer.run_epoch()
    return trainer


def batches(data, settings):
    """The batches of a run, from the documented order: one permutation an epoch, whole batches only."""
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        order = torch.randperm(len(data.x_train), generator=generator)
        for k in range(len(order) // settings.batch_size):
            chosen = order[k * settings.batch_size :][: settings.batch_size]
            yield data.x_train[chosen], data.y_train[chosen]


def test_the_model_has_the_documented_layers():
    model = reference_cnn((3, 32, 32), 10)
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() > 1]
    assert shapes == [(32, 3, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (128, 64 * 8 * 8), (10, 128)]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert reference_cnn((1, 5, 11), 7)(torch.zeros(2, 1, 5, 11)).shape == (2, 7)  # sides that 4 does not divide


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_plain_run_is_plain_training(optimizer):
    data, settings = images(), Settings(**SMALL, optimizer=optimizer, lr=0.01, momentum=0.8, seed=5)
    trainer = run(Trainer(settings, data))

    torch.manual_seed(5)
    model = reference_cnn((1, 8, 6), 3)
    if optimizer == "sgd":
        steps = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.8)
    else:
        steps = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.8, 0.999))
    losses = []
    for x, y in batches(data, settings):
        steps.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert len(losses) == 8
    assert trainer.history.steps["loss"] == pytest.approx(losses, rel=1e-4)
    tolerance = 1e-4 if optimizer == "sgd" else 1e-3  # Adam divides by gradients that are nearly zero
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        outputs = model(data.x_test)
    assert trainer.history.epochs["test_loss"][-1] == pytest.approx(
        F.cross_entropy(outputs, data.y_test).item(), rel=1e-3
    )
    accuracy = (outputs.argmax(1) == data.y_test).float().mean().item()
    assert trainer.history.epochs["test_accuracy"][-1] == pytest.approx(accuracy)
    assert trainer.history.epochs["train_loss"] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4], rel=1e-4)


def test_a_regularized_run_by_hand():
    """Both penalties by double backward over each sample's gradient; Reg1 about ḡ, Reg2 about the average."""
    data = images()
    settings = Settings(**SMALL, reg1=0.02, reg2=0.03, center="batch_mean,ema", optimizer="sgd", lr=0.05, momentum=0.0)
    steps = run(Trainer(settings, data)).history.steps

    torch.manual_seed(0)
    model = reference_cnn((1, 8, 6), 3)
    parameters = list(model.parameters())
    average, weight, trace, sq_norm, beta, decay = 0.0, 0.0, 0.0, 0.0, 0.9, 0.98
    for k, (x, y) in enumerate(batches(data, settings)):
        losses = F.cross_entropy(model(x), y, reduction="none")
        g = torch.stack([flat(torch.autograd.grad(loss, parameters, create_graph=True)) for loss in losses])
        mean = g.mean(0)
        gamma = (g - mean).square().sum(1).mean()
        total = losses.mean() + 0.02 * gamma
        if k:
            reg2 = (mean - average / (1 - beta**k)).square().sum()
            total = total + 0.03 * reg2
            assert steps["reg2"][k] == pytest.approx(reg2.item(), rel=1e-3)
        else:
            assert math.isnan(steps["reg2"][0])
        assert steps["loss"][k] == pytest.approx(losses.mean().item(), rel=1e-4)
        assert steps["covariance_trace"][k] == pytest.approx(gamma.item(), rel=1e-3)
        assert steps["reg1"][k] == pytest.approx(gamma.item(), rel=1e-3)
        assert steps["sq_mean_norm"][k] == pytest.approx(mean.square().sum().item(), rel=1e-3)
        s = gamma.item() * 4 / 3
        weight = decay * weight + (1 - decay)
        trace = decay * trace + (1 - decay) * s
        sq_norm = decay * sq_norm + (1 - decay) * (mean.square().sum().item() - s / 4)
        assert steps["noise_scale"][k] == pytest.approx(trace / sq_norm if sq_norm > 0 else math.inf, rel=1e-2)
        average = beta * average + (1 - beta) * mean.detach()
        grads = torch.autograd.grad(total, parameters)
        with torch.no_grad():
            for p, grad in zip(parameters, grads, strict=True):
                p -= 0.05 * grad
    assert k == 7


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


ESTIMATORS = {
    "differences": {"method": "finite_difference", "epsilon": 1e-3},
    "signs": {"method": "random_signs", "probes": 2},
    "signs by differences": {"method": "random_signs", "derivative": "finite_difference"},
    "a fraction": {"fraction": 0.5},
    "every third step": {"every": 3},
    "all": {"method": "random_signs", "derivative": "finite_difference", "fraction": 0.75, "every": 3},
    "auto": {"method": "auto"},
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_run_with_an_estimator_by_hand(name):
    options = {"reg1": 0.02, "reg2": 0.03, **ESTIMATORS[name]}
    data, settings = images(), Settings(**SMALL, **options, center="ema", optimizer="sgd", lr=0.05, seed=3)
    trainer = run(Trainer(settings, data))

    torch.manual_seed(3)
    model = reference_cnn((1, 8, 6), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    reg = GradientRegularizer(model, **options, center="ema")
    exact = run(Trainer(Settings(**{**settings.as_dict(), **EXACT}), data))
    for k, (x, y) in enumerate(batches(data, settings)):
        optimizer.zero_grad()
        report = reg.backward(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y)
        optimizer.step()
        for column in ("loss", "covariance_trace", "reg1", "sq_mean_norm"):
            ours = trainer.history.steps[column][k]
            assert ours == pytest.approx(float(getattr(report, column)), rel=1e-4, nan_ok=True)
    differ = [not torch.equal(a, b) for a, b in zip(trainer.model.parameters(), exact.model.parameters(), strict=True)]
    assert any(differ) == (name != "auto")
    for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_epoch_s_trace_is_the_mean_of_those_that_are_known():
    options = {"method": "random_signs", "every": 3, "center": "ema"}
    trainer = run(Trainer(Settings(**SMALL, **options, reg1=0.05), images()))
    traces = trainer.history.steps["covariance_trace"]
    assert [k for k, trace in enumerate(traces) if not math.isnan(trace)] == [0, 3, 6]
    assert trainer.history.epochs["covariance_trace"] == [statistics.fmean([traces[0], traces[3]]), traces[6]]
    trainer = run(Trainer(Settings(**SMALL, **options, reg2=0.05), images()))
    assert all(map(math.isnan, trainer.history.epochs["covariance_trace"] + trainer.history.epochs["noise_scale"]))


def test_the_price_of_penalties_now_and_then_is_a_mean_over_steps():
    """Pairs are taken in the third of four steps, from the fourth step of a process on: its first is in none."""
    history = run(Trainer(Settings(**{**SMALL, "epochs": 3}, reg1=0.05, every=3), images())).history
    seconds = history.steps["seconds"]
    assert history.pairs["seconds"] == [statistics.fmean(seconds[4:7]), statistics.fmean(seconds[8:11])]


RUNS = {
    "plain, adam": {},
    "reg1 about the batch mean, sgd": {"reg1": 0.05, "optimizer": "sgd", "lr": 0.01},
    "both, ema, adam": {"reg1": 0.05, "reg2": 0.1, "center": "ema"},
    **{name: {"reg1": 0.05, "reg2": 0.1, "center": "ema", **options} for name, options in ESTIMATORS.items()},
    "both, window and zero, sgd": {"reg1": 0.05, "reg2": 0.1, "center": "window,zero", "optimizer": "sgd", "lr": 0.01},
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("stop_after", [1, 4, 6])  # within the first epoch, at its end, within the second
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, name, stop_after):
    data, settings = images(), Settings(**SMALL, **RUNS[name])
    whole = run(Trainer(settings, data))

    first = Trainer(settings, data)
    while len(first.history.steps) < stop_after:
        first.run_epoch(lambda: len(first.history.steps) == stop_after)
    checkpoint.save(tmp_path / "c.pt", first.state_dict())
    torch.manual_seed(99)  # whatever the process has done since
    second = Trainer(settings, data)
    second.load_state_dict(checkpoint.read(tmp_path / "c.pt"))
    assert len(second.history.steps) == stop_after
    run(second)

    assert_same_numbers(second, whole)


def assert_same_numbers(a, b):
    """Equal bits in parameters, optimizer, centers and history, times apart."""
    ours, theirs = a.state_dict(), b.state_dict()
    for state in (ours, theirs):
        for table in state["history"].values():
            for name in TIMES:
                table.pop(name, None)
    ours, theirs = (torch.utils._pytree.tree_flatten_with_path(state)[0] for state in (ours, theirs))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, x), (_, y) in zip(ours, theirs, strict=True):
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)), path
        else:
            assert x == y, path


def test_more_epochs_go_on_from_the_end():
    data = images()
    whole = run(Trainer(Settings(**{**SMALL, "epochs": 3}), data))
    short = run(Trainer(Settings(**SMALL), data))
    longer = Trainer(Settings(**{**SMALL, "epochs": 3}), data)
    longer.load_state_dict(short.state_dict())
    assert_same_numbers(run(longer), whole)


def test_plain_steps_beside_the_run_change_nothing(monkeypatch):
    data = images()
    with_copy = run(Trainer(Settings(**SMALL), data))
    assert len(with_copy.history.pairs) == 2  # one in each epoch of four steps
    ours, plain = with_copy.cost
    assert 0 < plain and 0 < ours
    assert with_copy.history.epochs["seconds_per_step"][-1] == ours
    monkeypatch.setattr(Trainer, "_take_plain_step", lambda self, x, y: None)
    assert_same_numbers(with_copy, run(Trainer(Settings(**SMALL), data)))


def test_the_first_step_of_a_process_is_in_no_pair():
    data, settings = images(), Settings(**{**SMALL, "batch_size": 16, "epochs": 3})
    first = Trainer(settings, data)
    first.run_epoch()
    assert first.steps_per_epoch == 1 and math.isnan(first.cost[0])
    first.run_epoch()
    assert first.history.pairs["seconds"] == first.history.steps["seconds"][1:]
    second = Trainer(settings, data)
    second.load_state_dict(first.state_dict())
    assert second.cost == first.cost
    assert run(second).cost == first.cost  # its only step is a first one


def test_fewer_epochs_than_are_begun_are_refused():
    data = images()
    trainer = run(Trainer(Settings(**SMALL), data))
    with pytest.raises(ArgumentError, match="--epochs 1 is fewer than the 2 that the run has begun: give 2 or more"):
        Trainer(Settings(**{**SMALL, "epochs": 1}), data).load_state_dict(trainer.state_dict())
    trainer = Trainer(Settings(**SMALL), data)
    trainer.run_epoch()
    trainer.run_epoch(lambda: True)
    with pytest.raises(ArgumentError, match="--epochs 1 is fewer than the 2"):
        Trainer(Settings(**{**SMALL, "epochs": 1}), data).load_state_dict(trainer.state_dict())


def test_only_the_first_images_are_used_where_few_are_asked_for():
    trainer = Trainer(Settings(**SMALL, train_size=9), images())
    trainer.run_epoch()
    assert trainer.steps_per_epoch == 2 and sorted(trainer.order.tolist()) == list(range(9))
    with pytest.raises(ArgumentError, match="--batch-size 10 is larger than the training set of 9 images"):
        Trainer(Settings(batch_size=10, train_size=9), images())


def test_a_diverging_run_stops_with_the_step_and_the_remedy():
    trainer = Trainer(Settings(**SMALL, optimizer="sgd", lr=1e30), images())
    with pytest.raises(TrainingError, match=r"infinite or NaN at step [23] of epoch 1: lower --lr"):
        trainer.run_epoch()
    assert all(math.isfinite(loss) for loss in trainer.history.steps["loss"])


def test_a_checkpoint_of_another_model_or_other_data_is_refused():
    state = run(Trainer(Settings(**SMALL), images())).state_dict()
    other = Trainer(Settings(**SMALL), images(shape=(3, 12, 8)))
    with pytest.raises(DataError, match=r"of another model: 0.weight must be \(32, 3, 3, 3\) .*got \(32, 1, 3, 3\)"):
        other.load_state_dict(state)
    with pytest.raises(DataError, match="was trained on other data than --data digits holds now"):
        Trainer(Settings(**SMALL), images(seed=1)).load_state_dict(state)


@pytest.mark.parametrize("key", checkpoint.KEYS[1:])
@pytest.mark.parametrize("damage", ["missing", "none", "empty", "text"])
def test_a_checkpoint_that_is_not_whole_is_refused(key, damage):
    settings = Settings(**SMALL, reg1=0.1, center="ema")
    state = run(Trainer(settings, images())).state_dict()
    state[key] = {"none": None, "empty": {}, "text": "x", "missing": None}[damage]
    if damage == "missing":
        del state[key]
    with pytest.raises(
        BootgradError, match="the checkpoint (is not whole|is of another model|was trained on other data)"
    ):
        Trainer(settings, images()).load_state_dict(state)
