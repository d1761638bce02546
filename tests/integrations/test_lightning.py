import csv
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import bootgrad
from bootgrad.errors import ArgumentError, ArgumentTypeError, BootgradWarning, RecordingError, UnsupportedError
from bootgrad.monitoring import JSONLWriter

from .plain import assert_same_parameters, batches, classifier, losses_of, trained

L = pytest.importorskip("lightning.pytorch")
from bootgrad.integrations.lightning import Penalties, Statistics, loss  # noqa: E402


class Network(L.LightningModule):
    def __init__(self, lr=0.1, momentum=0.0):
        super().__init__()
        self.model, self.lr, self.momentum = classifier(), lr, momentum

    def losses(self, x, y):
        return losses_of(self.model, x, y)

    def training_step(self, batch, batch_idx):
        value = loss(self, self.losses, *batch)
        self.log("train_loss", value)
        return value

    def validation_step(self, batch, batch_idx):
        self.log("validation_loss", loss(self, self.losses, *batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def fit(module, data, callbacks, validation=None, ckpt_path=None, **options):
    settings = dict(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    settings |= dict(enable_model_summary=False, accelerator="cpu", log_every_n_steps=1)
    trainer = L.Trainer(callbacks=callbacks, **(settings | options))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, data, validation, ckpt_path=ckpt_path)
    return trainer


def loader(parts):
    """Batches as they are, of whatever sizes."""
    return DataLoader(parts, batch_size=None)


def test_a_run_takes_the_steps_of_a_plain_loop_with_the_penalty():
    parts, module = batches([5, 7, 4]), Network()
    want, traces = trained(module.model, [[p] for p in parts] * 2, reg1=0.3)
    penalties = Penalties(reg1=0.3)
    trainer = fit(module, loader(parts), [penalties], max_epochs=2)
    assert_same_parameters(module.model, want)
    assert trainer.global_step == penalties.regularizer.step == 6
    assert float(penalties.report.covariance_trace) == pytest.approx(traces[-1])
    assert float(trainer.callback_metrics["bootgrad/covariance_trace"]) == pytest.approx(traces[-1], rel=1e-6)
    assert trainer.callback_metrics["bootgrad/strength/reg1"] == pytest.approx(0.3)


def test_without_a_callback_the_loss_is_the_mean():
    parts, module = batches([5, 7]), Network()
    want, _ = trained(module.model, [[p] for p in parts])
    fit(module, loader(parts), [], validation=loader(parts))
    assert_same_parameters(module.model, want)
    x, y = parts[0]
    torch.testing.assert_close(loss(Network(), Network().losses, x, y), losses_of(classifier(), x, y).mean())


@pytest.mark.parametrize("n", [2, 3])
def test_accumulated_batches_are_one_batch_and_clipping_sees_it_with_its_penalty(n):
    parts, module = batches([5, 7, 4, 6, 3, 2, 5]), Network()
    windows = [parts[k : k + n] for k in range(0, len(parts), n)]
    want, _ = trained(module.model, windows, reg1=0.4, clip=0.05)
    unclipped, _ = trained(module.model, windows, reg1=0.4)
    trainer = fit(module, loader(parts), [Penalties(reg1=0.4)], accumulate_grad_batches=n, gradient_clip_val=0.05)
    assert_same_parameters(module.model, want)
    assert trainer.global_step == len(windows)
    assert (module.model[0].weight - unclipped[0].weight).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        dict(reg1=0.2, reg2=0.3, center={"reg1": "batch_mean", "reg2": "ema"}),
        dict(reg1=0.2, center="ema", method="finite_difference"),
        dict(reg1=0.2, fraction=0.5),
        dict(reg1=0.2, method="random_signs", probes=2),
        dict(reg1="auto", every=2),
    ],
    ids=["both", "finite_difference", "fraction", "random_signs", "auto"],
)
def test_every_method_is_that_of_the_regularizer(options):
    """Against the same regularizer in a loop of one's own, with the same random numbers."""
    parts, module = batches([6, 6, 6, 6]), Network()
    model = classifier()
    reg, penalties = bootgrad.GradientRegularizer(model, **options), Penalties(**options)
    penalties.load_state_dict({"regularizer": reg.state_dict()})  # what random signs and samples follow from
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in parts:
        optimizer.zero_grad()
        reg.backward(lambda x, y: losses_of(model, x, y), *batch)
        optimizer.step()
    fit(module, loader(parts), [penalties])
    assert_same_parameters(module.model, model, 1e-7 if options.get("method") == "finite_difference" else 1e-10)


def test_autocast_is_that_of_the_trainer():
    parts = [(x.float(), y) for x, y in batches([16, 16])]
    module, seen = Network(), []
    module.model.float()
    module.model[0].register_forward_hook(lambda layer, args, output: seen.append(output.dtype))
    model = classifier().float()
    reg = bootgrad.GradientRegularizer(model, reg1=0.2, center="zero", method="finite_difference", epsilon=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in parts:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            reg.backward(lambda x, y: losses_of(model, x, y), x, y)
        optimizer.step()
    options = dict(reg1=0.2, center="zero", method="finite_difference", epsilon=0.1)
    fit(module, loader(parts), [Penalties(**options)], precision="bf16-mixed")
    assert set(seen) == {torch.bfloat16}
    assert len(seen) >= 4  # two passes a step
    assert_same_parameters(module.model, model, 1e-6)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, accumulated):
    parts = batches([5, 7, 4, 6, 3, 5])
    options = dict(reg1=0.2, reg2=0.1, center="ema", fraction=0.5)

    def run(epochs, ckpt_path=None):
        torch.manual_seed(3)
        module, penalties = Network(momentum=0.9), Penalties(**options)
        torch.manual_seed(3 if ckpt_path is None else 5)  # what signs and samples follow from is in the checkpoint
        settings = dict(max_epochs=epochs, enable_checkpointing=True, default_root_dir=tmp_path)
        trainer = fit(
            module, loader(parts), [penalties], ckpt_path=ckpt_path, accumulate_grad_batches=accumulated, **settings
        )
        return trainer, module, penalties

    _, whole, of_whole = run(3)
    trainer, _, _ = run(1)
    path = tmp_path / "first.ckpt"
    trainer.save_checkpoint(path)
    _, resumed, of_resumed = run(3, path)
    assert of_resumed.regularizer.step == of_whole.regularizer.step == 3 * 6 // accumulated
    assert_same_parameters(resumed.model, whole.model, 0)
    for name, c in of_whole.regularizer.state_dict()["centers"].items():
        assert str(c) == str(of_resumed.regularizer.state_dict()["centers"][name])


def test_a_module_keeps_its_hooks_and_its_state_dict():
    parts, module, calls = batches([5, 7]), Network(), []
    module.model.register_forward_hook(lambda *_: calls.append("forward"))
    module.model[2].register_full_backward_hook(lambda *_: calls.append("backward"))
    module.model[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append("gradient"))
    before = {name: (type(m), set(vars(m))) for name, m in module.model.named_modules()}
    keys = list(module.state_dict())
    fit(module, loader(parts), [Penalties(reg1=0.1)])
    assert {name: (type(m), set(vars(m))) for name, m in module.model.named_modules()} == before
    assert list(module.state_dict()) == keys
    assert calls.count("forward") == calls.count("gradient") == 2
    assert "backward" in calls


def test_numbers_reach_the_logger(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    parts, module = batches([5, 7, 4, 6]), Network()
    _, traces = trained(module.model, [parts[:2], parts[2:]], reg1=0.3)
    fit(module, loader(parts), [Penalties(reg1=0.3)], logger=CSVLogger(tmp_path), accumulate_grad_batches=2)
    text = Path(tmp_path, "lightning_logs/version_0/metrics.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    seen = [float(row["bootgrad/covariance_trace"]) for row in rows if row.get("bootgrad/covariance_trace")]
    assert seen == pytest.approx(traces, rel=1e-5)


def test_the_module_comes_first():
    with pytest.raises(ArgumentTypeError, match=r"as in loss\(self, losses, \*batch\); got function"):
        loss(lambda x: x, torch.zeros(3))


def test_what_was_seen_is_logged_at_its_own_step_whatever_the_loggers_interval(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    module, statistics, seen = Network(), Statistics(every=3, writers=[Kept()]), []
    statistics._options["writers"][0].seen = seen
    logger = CSVLogger(tmp_path)
    trainer = fit(module, loader(batches([4] * 8)), [statistics], logger=logger, log_every_n_steps=5)
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    traces = {
        int(row["step"]): float(row["bootgrad/covariance_trace"]) for row in rows if row["bootgrad/covariance_trace"]
    }
    assert traces == pytest.approx({o.step: o.covariance_trace for o in seen}) and list(traces) == [0, 3, 6]
    assert float(trainer.callback_metrics["bootgrad/covariance_trace"]) == pytest.approx(seen[-1].covariance_trace)


def test_what_changes_to_zero_or_infinity_does_not_stay_what_it_was(tmp_path, monkeypatch):
    from lightning.pytorch.loggers import CSVLogger

    scales = iter([8.0, math.inf, math.inf, math.inf])
    monkeypatch.setattr("bootgrad.monitoring.monitor._averaged", lambda scale, part: next(scales))
    callbacks, logger = (
        [Penalties(reg1=lambda step: 0.1 if step < 2 else 0.0), Statistics(every=1)],
        CSVLogger(tmp_path),
    )
    trainer = fit(Network(), loader(batches([4] * 4)), callbacks, logger=logger)
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    names = ("bootgrad/strength/reg1", "bootgrad/noise_scale")
    strengths, noise = ([float(row[name]) for row in rows if row[name]] for name in names)
    assert strengths == pytest.approx([0.1, 0.1, 0.0, 0.0]) and noise == [8.0]
    metrics = trainer.callback_metrics
    assert metrics["bootgrad/strength/reg1"] == 0 and metrics["bootgrad/noise_scale"] == math.inf


def test_beside_penalties_a_watched_step_is_logged_whole_and_once(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    callbacks, logger = [Penalties(reg1=0.1), Statistics(every=2)], CSVLogger(tmp_path)
    fit(Network(), loader(batches([4] * 8)), callbacks, logger=logger, log_every_n_steps=5)
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    steps = {
        name: [int(row["step"]) for row in rows if row[f"bootgrad/{name}"]] for name in ("covariance_trace", "flags")
    }
    assert steps == {"covariance_trace": [0, 2, 4, 6], "flags": [0, 2, 4, 6]}  # 4 is Lightning's own, too


@pytest.mark.parametrize("n", [1, 2])
def test_statistics_leave_the_training_as_it_is(n):
    parts, module, plain = batches([5, 7, 4, 6, 3, 5]), Network(momentum=0.9), Network(momentum=0.9)
    fit(plain, loader(parts), [], accumulate_grad_batches=n, gradient_clip_val=0.5)
    statistics, seen = Statistics(every=2, writers=[Kept()]), []
    statistics._options["writers"][0].seen = seen
    trainer = fit(module, loader(parts), [statistics], accumulate_grad_batches=n, gradient_clip_val=0.5)
    assert_same_parameters(module.model, plain.model, 1e-12)
    assert statistics.monitor.step == 6 // n
    assert [o.step for o in seen] == list(range(0, 6 // n, 2))
    _, traces = trained(classifier(), [[parts[n - 1]]])  # of the first step its last batch is watched
    assert seen[0].covariance_trace == pytest.approx(traces[0])
    assert seen[0].batch_size == len(parts[n - 1][0])
    assert float(trainer.callback_metrics["bootgrad/noise_scale"]) == pytest.approx(statistics.last.noise_scale)
    assert seen[0].layers.keys() == {"model.0", "model.2"}


def test_statistics_beside_penalties_are_of_whole_batches():
    parts, module = batches([5, 7, 4, 6]), Network()
    _, traces = trained(module.model, [parts[:2], parts[2:]], reg1=0.3)
    penalties, statistics, seen = Penalties(reg1=0.3), Statistics(every=1, writers=[Kept()]), []
    statistics._options["writers"][0].seen = seen
    trainer = fit(module, loader(parts), [statistics, penalties], accumulate_grad_batches=2)
    assert [o.covariance_trace for o in seen] == pytest.approx(traces)
    assert [o.batch_size for o in seen] == [12, 10]
    assert seen[0].reg1 == pytest.approx(traces[0])
    assert trainer.callback_metrics.keys() >= {"bootgrad/noise_scale", "bootgrad/reg1", "bootgrad/strength/reg1"}


def test_statistics_go_on_from_a_checkpoint(tmp_path):
    parts = batches([5, 7, 4, 6, 3])

    def run(epochs, ckpt_path=None):
        module, statistics = Network(), Statistics(every=3)
        trainer = fit(module, loader(parts), [statistics], ckpt_path=ckpt_path, max_epochs=epochs)
        return trainer, statistics

    _, whole = run(2)
    trainer, _ = run(1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    _, resumed = run(2, tmp_path / "first.ckpt")
    assert resumed.monitor.step == whole.monitor.step == 10
    assert resumed.last.noise_scale == pytest.approx(whole.last.noise_scale, rel=1e-9)
    assert resumed.last.step == whole.last.step == 9


class Kept:
    seen: list

    def write(self, observation):
        self.seen.append(observation)

    def close(self):
        self.seen = None


class Foreign(Network):
    def training_step(self, batch, batch_idx):
        return self.losses(*batch).mean()


class Detached(Network):
    def training_step(self, batch, batch_idx):
        return loss(self, self.losses, *batch).detach() + 0 * self.model[0].weight.sum()


class Weighted(Network):
    def training_step(self, batch, batch_idx):
        return 2 * loss(self, self.losses, *batch)


class ByHand(Network):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (Foreign, RecordingError, "no part in"),
        (Detached, RecordingError, "does not lead back"),
        (Weighted, ArgumentError, "multiplied by 2"),
        (ByHand, UnsupportedError, "optimizes by hand"),
    ],
)
def test_what_would_be_wrong_is_refused_and_nothing_is_left_open(network, error, message):
    parts, penalties, module = batches([5, 7]), Penalties(reg1=0.1), network()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(error, match=message):
        fit(module, loader(parts), [penalties])
    for p, q in zip(module.parameters(), before, strict=True):
        assert torch.equal(p, q)
    good = Network()
    fit(good, loader(parts), [penalties])
    assert_same_parameters(good.model, trained(classifier(), [[p] for p in parts], reg1=0.1)[0])


def test_an_error_within_a_batch_of_parts_leaves_nothing_open():
    parts, penalties = batches([5, 7, 4, 6]), Penalties(reg1=0.1)
    bad = [*parts[:1], (parts[1][0] * torch.nan, parts[1][1]), *parts[2:]]
    module = Network()
    with pytest.raises(ArgumentError, match="NaN"):
        fit(module, loader(bad), [penalties], accumulate_grad_batches=2)
    fit(module, loader(parts), [penalties], accumulate_grad_batches=2)
    assert_same_parameters(module.model, trained(classifier(), [parts[:2], parts[2:]], reg1=0.1)[0])


def test_statistics_of_a_foreign_loss_are_refused():
    with pytest.raises(RecordingError, match="the Statistics callback has no part in"):
        fit(Foreign(), loader(batches([5])), [Statistics()])


@pytest.mark.parametrize(
    "callback", [lambda: Penalties(reg1=0.3), lambda: Statistics(every=2)], ids=["penalties", "statistics"]
)
def test_a_compiled_network_inside_of_the_module(callback):
    parts, module, ours = batches([6, 6, 6]), Network(), callback()
    want, traces = trained(module.model, [[p] for p in parts], reg1=0.3 if isinstance(ours, Penalties) else 0.0)
    module.model = torch.compile(module.model, backend="aot_eager")
    fit(module, loader(parts), [ours])
    assert_same_parameters(module.model, want, 1e-8)
    seen = ours.report if isinstance(ours, Penalties) else ours.last
    assert float(seen.covariance_trace) == pytest.approx(traces[-1])


def test_unknown_strategies_and_compiled_modules_are_refused():
    with pytest.raises(ArgumentError, match="one Penalties"):
        fit(Network(), loader(batches([5])), [Penalties(reg1=0.1), Named(reg1=0.1)])
    compiled = torch.compile(Network(), backend="eager")
    with pytest.raises(UnsupportedError, match="compiled as a whole"):
        fit(compiled, loader(batches([5])), [Penalties(reg1=0.1)])

    class Other(L.strategies.SingleDeviceStrategy):
        pass

    with pytest.raises(UnsupportedError, match="the strategy Other does more"):
        fit(Network(), loader(batches([5])), [Penalties(reg1=0.1)], strategy=Other("cpu"))


class Named(Penalties):
    pass


class Skipping(Network):
    def __init__(self, skipped):
        super().__init__()
        self.skipped = skipped

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


def test_a_batch_whose_last_part_has_no_loss_is_refused_and_leaves_nothing_open():
    parts, penalties = batches([5, 7, 4, 6]), Penalties(reg1=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*returned `?None", category=UserWarning)
        with pytest.raises(RecordingError, match="training_step returned None for the micro-batch"):
            fit(Skipping({1}), loader(parts), [penalties], accumulate_grad_batches=2)
        assert not penalties._loop.is_open
        module = Skipping({0})
        fit(module, loader(parts), [penalties], accumulate_grad_batches=2)
    assert_same_parameters(module.model, trained(classifier(), [parts[1:2], parts[2:]], reg1=0.1)[0])


class Twice(Network):
    def training_step(self, batch, batch_idx):
        return loss(self, self.losses, *batch) + loss(self, self.losses, *batch)


class Halting(Network):
    """Makes the losses of some batches, and lets them go."""

    def training_step(self, batch, batch_idx):
        value = loss(self, self.losses, *batch)
        return None if batch_idx == 0 else value


@pytest.mark.parametrize("callback", [lambda: Penalties(reg1=0.1), lambda: Statistics(every=2)], ids=["p", "s"])
def test_a_second_loss_in_a_step_is_refused(callback):
    with pytest.raises(RecordingError, match="the backward pass of the loss before was not taken"):
        fit(Twice(), loader(batches([5, 7])), [callback()])


def test_a_loss_that_was_let_go_is_no_matter_to_statistics():
    parts, plain, watched, statistics = batches([5, 7, 4]), Halting(), Halting(), Statistics(every=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*returned `?None", category=UserWarning)
        fit(plain, loader(parts), [])
        fit(watched, loader(parts), [statistics])
    assert_same_parameters(watched.model, plain.model, 1e-12)
    assert statistics.last.step == 1


def test_a_second_fit_writes_on(tmp_path):
    path = tmp_path / "seen.jsonl"
    statistics, module = Statistics(every=1, writers=[JSONLWriter(path)]), Network()
    for _ in range(2):
        fit(module, loader(batches([5, 7])), [statistics])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_options_that_do_nothing_are_said():
    with pytest.raises(ArgumentError, match="GradientRegularizer has no option regl: take of reg1, "):
        Penalties(regl=0.1)
    with pytest.raises(ArgumentError, match="Monitor has no option layer: "):
        Statistics(layer="all")
    callbacks = [Penalties(reg1=0.1), Statistics(every=1, layers="all", outliers=3)]
    trainer = L.Trainer(max_epochs=1, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.warns(BootgradWarning, match="no norms of samples: layers, outliers will do nothing"):
        trainer.fit(Network(), loader(batches([5])))
