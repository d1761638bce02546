"""Plans of models: their rows against the cost model, and whole steps against the products that are really made."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bootgrad
from bootgrad import costs, plan_timing, planning, plans
from bootgrad.batch_check import BatchCheck
from bootgrad.errors import ArgumentError, RecordingError, UnsupportedError

from . import models

B = 6


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 64, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


X = torch.zeros(B, 3, 9, 9)


def test_rows_are_those_of_the_cost_model():
    result = bootgrad.plan(cnn(), X)
    conv = planning.ConvLayer(B, 3, (9, 9), 8, (3, 3), (1, 1), (1, 1), (1, 1))
    strided = planning.ConvLayer(B, 8, (9, 9), 64, (3, 3), (2, 2), (0, 0), (1, 1))
    layers = {"0.weight": conv, "3.weight": strided, "6.weight": planning.LinearLayer(B, 1, 64, 10)}
    assert [(r.name, r.layer) for r in result.layers] == [*layers.items()] * 2
    assert [r.purpose for r in result.layers] == ["statistics"] * 3 + ["grad"] * 3
    plain = costs.step_time(costs.STEPS[0], [costs.Use(layer, layer is conv) for layer in layers.values()])
    for row in result.layers:
        own = planning.cost(row.layer, row.path, row.purpose)
        assert row.path == planning.choose_path(row.layer, row.purpose) == next(iter(row.units))
        assert set(row.units) == set(row.layer.paths)
        assert (row.operations, row.workspace) == (own.operations, own.bytes)
        time = costs.op_time(row.layer, row.path, row.purpose)
        assert row.units[row.path] == pytest.approx(time / costs.product_time(row.layer))
        assert row.share == pytest.approx(time / plain)
        assert row.backend is None and row.measured is None
    X_and_Y = B * (3 * 81 + 8 * 81)
    assert result.layers[0].bytes == 4 * (X_and_Y + 8 * 27)
    assert result.layers[3].bytes == 4 * 2 * X_and_Y
    (norm,) = result.others
    assert (norm.name, norm.parameters, norm.bytes) == ("group_norm", "1.weight, 1.bias", 4 * B * 16)
    assert (result.batch_size, result.parameters) == (B, sum(p.numel() for p in cnn().parameters()))


def test_memory_of_a_plain_step_by_hand():
    model = nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 20))
    result = bootgrad.plan(model, torch.zeros(B, 30))
    P = 30 * 50 + 50 + 50 * 20 + 20
    saved = B * 50  # tanh's output, which the second layer saves, too; the example is there before the step
    assert result.plain_bytes == 4 * (saved + P + B * (30 + 50))
    by_name = {s.name: s for s in result.steps}
    kept = B * (50 + 2 * (50 + 20))
    assert by_name["reg1 batch_mean"].memory == pytest.approx(1 + 4 * (kept + P) / result.plain_bytes)
    assert by_name["plain"].ratio == by_name["plain"].memory == 1


def addmm(self, a, b, out_shape=None, **kwargs):
    return 2 * a[0] * a[1] * b[1]


def test_steps_make_the_products_that_are_predicted_and_no_more(monkeypatch):
    monkeypatch.setattr(costs, "TENSOR_TIME", 0)
    monkeypatch.setattr(costs, "CALL_TIME", 0)
    monkeypatch.setattr(BatchCheck, "run", lambda *_: None)  # its passes come now and then
    torch.manual_seed(0)
    sizes = (400, 640), (640, 640), (640, 320)
    model = nn.Sequential(nn.Linear(*sizes[0]), nn.Tanh(), nn.Linear(*sizes[1]), nn.Tanh(), nn.Linear(*sizes[2]))
    x = torch.randn(16, 400)
    runs, _ = plan_timing.step_runs(model, [x], model(x), 16)
    forward = 16 * sum(i * o for i, o in sizes)
    compared = 0
    for step in bootgrad.plan(model, x).steps:
        if step.name in runs:
            for _ in range(3):  # checks of the batch, and a center that knows nothing
                runs[step.name]()
            counted = []
            for _ in range(costs.EXAMPLE_EVERY if "every" in step.name else 2):
                with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) as counter:
                    runs[step.name]()
                counted.append(counter.get_total_flops() / 2 / forward)
            made = sum(counted) / len(counted) if "every" in step.name else min(counted)
            assert made == pytest.approx(step.units, rel=0.01), step.name
            compared += 1
    assert compared >= 13


def counting(conv_layer):
    """Flops of the library's convolution ops: forward-sized products, and norms as the model prices their path."""

    def product(x, gy, *rest, out_shape=None, **kwargs):
        return 2 * x[0] * conv_layer(x).forward_operations

    def norms(purpose):
        def flops(x, gy, center, *rest, out_shape=None, **kwargs):
            mask = next((a for a in rest if isinstance(a, list) and len(a) == 3), None)
            path, summed = next(a for a in rest if isinstance(a, str)), purpose == "grad" and mask[2]
            layer = conv_layer(x)
            own = planning.cost(layer, path, purpose, center is not None, summed).time
            unmade = layer.forward_operations if purpose == "grad" and not mask[0] else 0  # by x, of the data
            return 2 * x[0] * (own - unmade)

        return flops

    def convolution(x, weight, bias, padding, turned, out_shape=None, **kwargs):
        return 2 * x[0] * conv_layer((0, weight[1])).forward_operations

    ops = torch.ops.bootgrad
    return {
        ops.conv3x3: convolution,
        ops.conv3x3_weighted_sum: product,
        ops.conv_weighted_sum: product,
        ops.conv_statistics: norms("statistics"),
        ops.conv_sq_norms_with_grad: norms("grad"),
        ops.conv_visit: norms("grad"),
    }


def test_steps_of_convolutions_make_the_products_that_are_predicted(monkeypatch):
    monkeypatch.setattr(costs, "TENSOR_TIME", 0)
    monkeypatch.setattr(costs, "CALL_TIME", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Tanh(), nn.Conv2d(32, 16, 3), nn.Tanh(), nn.Conv2d(16, 64, 3))
    x = torch.randn(8, 3, 12, 12)
    result = bootgrad.plan(model, x)
    layers = {row.layer.C: row.layer for row in result.layers}
    assert {row.path for row in result.layers if row.purpose == "grad"} == {"direct", "gram"}
    runs, _ = plan_timing.step_runs(model, [x], model(x), 8)
    forward = sum(8 * layer.forward_operations for layer in layers.values())
    names = (
        "plain",
        "rec.backward",
        "rec.backward, center",
        "reg1 batch_mean",
        "reg1 ema",
        "reg2 ema",
        "reg1 + reg2, ema",
    )
    predicted = {step.name: step.units for step in result.steps}
    for name in names:
        for _ in range(3):
            runs[name]()
        counted = []
        for _ in range(2):
            mapping = counting(lambda shape: layers[shape[1]])
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                runs[name]()
            counted.append(counter.get_total_flops() / 2 / forward)
        assert min(counted) == pytest.approx(predicted[name], rel=0.01), name


def test_the_table_says_it_all():
    result = bootgrad.plan(cnn(), X)
    text = str(result)
    first, second, steps, remarks = text.split("\n\n")
    assert first.splitlines()[1].split() == [
        *"layer shape path units instead multiply-adds bytes workspace share".split()
    ]
    assert "measured" not in text and "backend" not in text
    row = second.splitlines()[2]
    assert row.startswith("0.weight") and "conv 3×3, 3→8, 9×9, T = 81" in row and f"{result.layers[3].path} " in row
    assert "gram" in row and f"{result.layers[3].share:.2f}" in row
    assert [line.split("  ")[0] for line in steps.splitlines()[2:]] == [step.name for step in costs.STEPS]
    assert "not predicted: group_norm, 1 times, rows of 384 B together" in remarks
    assert all(len(line) <= 120 for line in remarks.splitlines())


def test_what_a_gpu_would_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("BOOTGRAD_BACKEND", raising=False)
    result = bootgrad.plan(cnn(), X, device="cuda", precision="bfloat16")
    backends = [(r.path, r.backend) for r in result.layers]
    assert backends[2] == ("rank1", "cuda") and backends[5] == ("rank1", "eager")
    assert {backend for path, backend in backends if path != "rank1"} == {"triton"}
    for row in result.layers:
        if row.path == "direct":
            assert row.workspace == planning.gpu_workspace(row.layer, row.purpose, "bfloat16")
    assert result.layers[3].bytes == 2 * 2 * B * (3 + 8) * 81
    assert "a machine with every one of them, bfloat16: torch sees no GPU here" in str(result)
    double = bootgrad.plan(cnn(), X, device="cuda", precision="float64")
    assert {r.backend for r in double.layers if r.path != "rank1"} == {"cuda"}
    monkeypatch.setenv("BOOTGRAD_BACKEND", "eager")
    assert {r.backend for r in bootgrad.plan(cnn(), X, device="cuda").layers} == {"eager"}


def test_a_gpu_that_is_there_is_asked(monkeypatch):
    monkeypatch.delenv("BOOTGRAD_BACKEND", raising=False)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    monkeypatch.setattr("bootgrad.ops.backends.gpu.choose", lambda *call: asked.append(call) or "triton")
    result = bootgrad.plan(cnn(), X, device="cuda")
    assert result.notes[0].startswith("backends of A card, float32")
    assert asked[0] == ("conv_statistics", torch.float32, result.layers[0].path, "auto", torch.device("cuda", 0))


def test_gram_matrices_on_a_gpu_fit_the_workspace(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = nn.Sequential(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, padding=1))
    result = bootgrad.plan(model, torch.zeros(64, 64, 4, 4), device="cuda")
    row = next(r for r in result.layers if r.path == "gram" and r.purpose == "grad")
    one = planning.cost(row.layer, "gram", "grad").bytes
    assert row.workspace == min(64, planning.GPU_WORKSPACE_BYTES // one) * one


def test_the_model_is_left_as_it_was():
    model = cnn()
    before = {name: p.clone() for name, p in model.named_parameters()}
    bootgrad.plan(model, X)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", [kind for kind in models.SHAPES if kind is not models.Unknown])
@pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_shapes_alone_give_the_plan_of_a_forward_pass(kind, monkeypatch):
    model, x, _ = models.make(kind)
    from_shapes = bootgrad.plan(model, x)
    recorded, runs = plans._recorded, []
    monkeypatch.setattr(
        plans, "_recorded", lambda model, example, really: runs.append(1) or recorded(model, example, True)
    )
    assert bootgrad.plan(model, x) == from_shapes and runs == [1]


def test_nothing_is_computed_and_a_model_that_asks_for_values_is_run():
    huge = bootgrad.plan(cnn(), torch.zeros(1, 3, 200, 200).expand(1 << 20, 3, 200, 200))
    assert huge.batch_size == 1 << 20 and huge.layers[0].bytes > 10**12

    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.seen = nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 4)]), []

        def forward(self, x):
            self.seen.append(float(x.sum()))
            return self.layers[x[0, 0].item() > 0](x)

    model = Asking()
    result = bootgrad.plan(model, torch.ones(6, 9))
    assert [row.name for row in result.layers] == ["layers.1.weight"] * 2 and model.seen[-1] == 54


def test_positions_merged_into_the_batch_and_reused_layers():
    layer = nn.Linear(5, 5)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(self.layer(x.flatten(0, 1))).reshape(x.shape)

    rows = bootgrad.plan(Twice(), torch.zeros(4, 3, 5)).layers
    assert [(r.name, str(r.layer)) for r in rows] == [("layer.weight", "linear 5→5, T = 3")] * 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bootgrad.plan(cnn()), ArgumentError, "one sample or more in dimension 0; got nothing: pass one"),
        (lambda: bootgrad.plan(cnn(), X[:0]), ArgumentError, r"got shape \(0, 3, 9, 9\): pass one"),
        (lambda: bootgrad.plan(cnn(), 3), ArgumentError, "got int: pass one"),
        (lambda: bootgrad.plan(cnn(), X, device="tpu"), ArgumentError, "device must be one of cpu, cuda; got 'tpu'"),
        (lambda: bootgrad.plan(cnn(), X, precision="int8"), ArgumentError, "precision must be one of float32"),
        (lambda: bootgrad.plan(nn.GroupNorm(1, 3), X), RecordingError, "no linear or convolution layer"),
        (lambda: bootgrad.plan(nn.Linear(9, 2).requires_grad_(False), X), RecordingError, "nothing to plan"),
        (lambda: bootgrad.plan(First(), X), UnsupportedError, "puts out 1 rows in dimension 0 for 6 samples"),
        (lambda: bootgrad.plan(cnn(), X, device="cuda", measure=True), ArgumentError, "must be cuda: move model and"),
        (lambda: bootgrad.plan(Pair(), X, measure=True), ArgumentError, "puts out a tensor of numbers, 6 samples"),
    ],
)
def test_what_cannot_be_planned_is_an_error_in_words(call, error, message):
    with pytest.raises(error, match=message):
        call()


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(9, 2)

    def forward(self, x):
        return self.layer(x[:1])


class Pair(First):
    def forward(self, x):
        return self.layer(x), x


def test_a_plan_is_data():
    result = bootgrad.plan(cnn(), X)
    assert dataclasses.asdict(result)["steps"][0]["name"] == "plain"
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.batch_size = 3
