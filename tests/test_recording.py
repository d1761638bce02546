"""What a recording refuses, when, and that nothing of the user's is touched when it does."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bootgrad
from bootgrad import BootgradError
from bootgrad.batch_check import BatchCheck
from bootgrad.graph import powers_of_two

from .models import Residual, Sequence, Unknown, loss_of, make


class BatchFirstForgotten(nn.Module):
    """Inputs (T, B, d) with T = B, as recurrent code has them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        return torch.tanh(self.linear(x)).mean(0)


class Coupled(nn.Module):
    """``between`` couples samples after a linear layer."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.between(self.first(x))))


def contrastive(z):
    return F.cross_entropy(z @ z.t(), torch.arange(len(z)), reduction="none")


def batch_norm(z):
    return (z - z.mean(0)) / z.std(0)


def refused(model, x, loss, message, **options):
    """The model is refused with ``message``, and no gradient is touched."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(BootgradError, match=message):
        rec = bootgrad.record(model, **options)
        with rec:
            losses = loss(model(x))
        rec.backward(losses)
    with pytest.raises(BootgradError, match=message):
        rec = bootgrad.record(model, **options)
        with rec:
            losses = loss(model(x))
        rec.per_sample_gradients(losses, create_graph=True)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def per_sample(z):
    return z.square().flatten(1).sum(1)


def test_samples_that_are_coupled_or_elsewhere_are_refused_by_operation():
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    refused(
        BatchFirstForgotten(),
        torch.randn(4, 4, 3),
        per_sample,
        r"after linear \(parameter linear.weight, linear.bias\)",
    )
    refused(Coupled(lambda z: z - z.mean(0)), x, per_sample, r"after linear \(parameter first.weight")
    refused(Coupled(batch_norm), x, per_sample, r"after linear \(parameter first.weight")
    refused(Coupled(nn.Identity()), x, contrastive, r"after linear \(parameter first.weight")
    refused(Coupled(nn.BatchNorm1d(4, affine=False)), x, per_sample, "batch_norm in training mode.*replace_batchnorm")
    refused(Coupled(nn.BatchNorm1d(4)), x, per_sample, "batch_norm in training mode.*eval()")
    refused(BatchFirstForgotten(), torch.randn(5, 4, 3), per_sample, "puts out 5 rows in dimension 0 for 4 losses")


def test_the_check_runs_on_the_first_second_fourth_step_of_each_signature(monkeypatch):
    model, x, target = make(Residual)
    calls = []
    original = BatchCheck.row_norms

    def counted(self, weights):
        calls.append(weights.numel())
        return original(self, weights)

    monkeypatch.setattr(BatchCheck, "row_norms", counted)

    def checks(n, **options):
        with bootgrad.record(model, **options) as rec:
            losses = loss_of(model(x[:n]), target[:n])
        before = len(calls)
        rec.backward(losses)
        assert set(calls[before:]) <= {n}
        return (len(calls) - before) // 2  # a plain pass and a weighted one

    assert [checks(4) for _ in range(9)] == [1, 1, 0, 1, 0, 0, 0, 1, 0]
    assert [checks(3) for _ in range(3)] == [1, 1, 0]
    assert checks(4, check="always") == 1
    assert checks(2, check="never") == 0
    with pytest.raises(BootgradError, match="check must be one of first, always, never"):
        bootgrad.record(model, check="sometimes")


@pytest.mark.parametrize("scale", [1e-10, 1e-19, 1e-22, 3e-23, 1e-23, 1e-35])
def test_gradients_that_vanish_are_not_taken_for_coupled(scale):
    """The squares of entries below 1e-19 are not in float32's range, and norms of them do not scale."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 64), nn.Linear(4, 2)
    model, x = nn.ModuleList([first, second]), torch.randn(6, 4)
    for _ in range(4):
        with bootgrad.record(model, check="always") as rec:
            losses = second(x).square().sum(1) + scale * first(x).square().sum(1)
        rec.backward(losses)


def test_samples_that_couple_later_are_found():
    model, x = nn.Linear(4, 4).double(), torch.randn(4, 4, dtype=torch.float64)

    def losses(strength):
        z = model(x)
        return z.square().sum(1) + strength * F.cross_entropy(z @ z.t(), torch.arange(4), reduction="none")

    with bootgrad.record(model) as rec:
        values = losses(0.0)  # a term that warms up
    rec.backward(values)
    for _ in range(3):  # a refusal is not a check that passed
        with bootgrad.record(model) as rec:
            values = losses(1.0)
        with pytest.raises(BootgradError, match="coupled"):
            rec.backward(values)


def test_every_pair_of_samples_gets_different_weights_in_some_check():
    weights = torch.stack([powers_of_two(8, seed) for seed in range(1, 9)])
    assert all((weights[:, i] != weights[:, j]).any() for i in range(8) for j in range(i))
    assert all(len(w.unique()) > 1 for w in weights) and powers_of_two(1, 1).numel() == 1


def test_batchnorm_is_replaced():
    model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.Sequential(nn.BatchNorm2d(48, affine=False)))
    weight = model[1].weight
    model[2].eval()
    assert bootgrad.replace_batchnorm(model) is model
    assert (model[1].num_groups, model[1].num_channels, model[1].weight is weight) == (12, 48, True)
    assert not model[2][0].affine and not model[2][0].training
    x = torch.randn(4, 3, 6, 6)
    with bootgrad.record(model) as rec:
        losses = per_sample(model(x))
    assert rec.backward(losses).sq_norms.shape == (4,)
    assert isinstance(bootgrad.replace_batchnorm(nn.BatchNorm1d(7), groups=3), nn.GroupNorm)
    with pytest.raises(BootgradError, match="groups must be"):
        bootgrad.replace_batchnorm(model, groups=0)


@pytest.mark.parametrize(
    ("kind", "channels", "groups"),
    [
        *((nn.BatchNorm1d, channels, groups) for channels, groups in ((2, 1), (12, 1), (16, 2), (64, 8), (512, 32))),
        *(
            (nn.BatchNorm2d, channels, groups)
            for channels, groups in ((2, 1), (7, 1), (16, 4), (32, 8), (64, 16), (512, 32))
        ),
        (nn.BatchNorm3d, 10, 2),
    ],
)
def test_groups_of_a_replaced_batchnorm_leave_something_of_their_channels(kind, channels, groups):
    torch.manual_seed(0)
    norm = bootgrad.replace_batchnorm(kind(channels))
    assert norm.num_groups == groups
    x = torch.randn(64, channels, *(1,) * {nn.BatchNorm1d: 0, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[kind])
    assert norm(x).var(0).min() > 0.1


def test_parameters_that_are_not_seen_are_named():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.linear(x)

    model, x = Hidden(), torch.randn(4, 3)
    with bootgrad.record(model) as rec:
        z = model(x)
    with pytest.raises(BootgradError, match="parameter gain reaches the losses through"):
        rec.backward(per_sample(z * model.gain))
    assert model.linear.weight.grad is None
    lstm = nn.LSTM(3, 3, batch_first=True)
    with pytest.raises(BootgradError, match="lstm hides how it uses weight_ih_l0"), bootgrad.record(lstm):
        lstm(x.unsqueeze(0))
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(BootgradError, match="ScriptModule"):
        bootgrad.record(scripted)


@pytest.mark.filterwarnings("ignore:prelu", "ignore:bilinear", "ignore:__truediv__", "ignore:div")
def test_operations_without_a_rule_warn_once():
    model, x, target = make(Unknown)

    def step():
        with bootgrad.record(model) as rec:
            losses = loss_of(model(x), target)
        rec.backward(losses)

    with pytest.warns(bootgrad.BootgradWarning, match="einsum on form has no rule"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()


def test_operations_that_cannot_run_per_sample_are_refused():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 3))

        def forward(self, x):
            return torch.cat([x, self.w]).cumsum(0)[:4]

    with pytest.warns(bootgrad.BootgradWarning):
        refused(Sorted(), torch.randn(4, 3, requires_grad=True), per_sample, "cat|coupled")


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda losses: losses.mean(), r'shape \(B,\).*reduction="none"'),
        (lambda losses: losses[:, None], "one loss per sample"),
        (lambda losses: losses[:0], "at least one sample"),
        (lambda losses: torch.cat([losses, losses[:1]]), "rows in dimension 0 for 5 losses"),
        (lambda losses: losses.detach(), "requires grad"),
        (lambda losses: torch.ones(4, requires_grad=True), "do not depend on any recorded parameter"),
        (lambda losses: torch.ones(4, requires_grad=True) * 2, "do not depend on any recorded parameter"),
        (lambda losses: losses / torch.tensor([1.0, 0.0, 1.0, 0.0]), "NaN or infinite at 2 of 4 samples: 1, 3"),
        (lambda losses: losses * torch.tensor([1.0, 1.0, 1.0, float("nan")]), "at 1 of 4 samples: 3"),
        (lambda losses: losses.tolist(), "must be a tensor"),
    ],
)
def test_bad_losses(losses, message):
    model, x, target = make(Residual)
    with bootgrad.record(model) as rec:
        good = loss_of(model(x), target)
    with pytest.raises(BootgradError, match=message):
        rec.backward(losses(good))
    with pytest.raises(BootgradError, match=message):
        rec.per_sample_gradients(losses(good))
    assert all(p.grad is None for p in model.parameters())


def test_use_at_the_wrong_time():
    model, x, target = make(Residual)
    rec = bootgrad.record(model)
    with pytest.raises(BootgradError, match="nothing was recorded"):
        rec.backward(loss_of(model(x), target))
    with rec:
        pass
    with pytest.raises(BootgradError, match="do not depend on any recorded parameter|outside of the recorded"):
        rec.backward(loss_of(model(x), target))
    with pytest.raises(BootgradError, match="used already"), rec:
        pass
    with bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    rec.backward(losses, retain_graph=True)
    rec.backward(losses)
    for use in (rec.backward, rec.per_sample_gradients):
        with pytest.raises(BootgradError, match="freed"):
            use(losses)
    with bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    losses.sum().backward()
    for use in (rec.backward, rec.per_sample_gradients):
        with pytest.raises(BootgradError, match="freed"):
            use(losses)
    with torch.no_grad(), bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    with pytest.raises(BootgradError, match="no_grad"):
        rec.backward(losses)
    with pytest.raises(BootgradError, match="at least one module"):
        bootgrad.record()
    with pytest.raises(BootgradError, match="Module objects"):
        bootgrad.record(model.parameters())


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda G: G.T @ torch.ones(3), r"w must have shape \(4,\)"),
        (lambda G: G.T @ [1, 2, 3, 4], "w must have shape"),
        (lambda G: G @ torch.ones(5), "must be flat"),
        (lambda G: G @ {"first.weight": torch.ones(1)}, "lacks"),
        (lambda G: G @ 3, "must be a mapping"),
        (lambda G: G[7], "indexed within 0 … 3"),
        (lambda G: G[[0, 9]], "indexed within 0 … 3"),
        (lambda G: G["x"], "indexed within"),
        (lambda G: G[2:2], "no rows"),
        (lambda G: G[1].covariance_trace(unbiased=True), "at least two"),
    ],
)
def test_bad_arguments_of_the_matrix(use, message):
    model, x, target = make(Residual)
    with bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    with pytest.raises(BootgradError, match=message):
        use(rec.per_sample_gradients(losses))


def test_bad_options_of_backward():
    model, x, target = make(Residual)
    with bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    for options, message in (
        ({"reduction": "median"}, 'must be "mean", "sum"'),
        ({"reduction": 3}, 'must be "mean", "sum"'),
        ({"reduction": torch.ones(3)}, r"weights must have shape \(4,\)"),
        ({"reduction": torch.tensor([1.0, 2.0, 3.0, float("inf")])}, "finite"),
        ({"center": {}}, "lacks"),
        ({"center": torch.zeros(2)}, "must be flat"),
    ):
        with pytest.raises(BootgradError, match=message):
            rec.backward(losses, **options)
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_of_one_is_plain_autograd():
    """No operation need be understood, and none is refused."""
    model = nn.LSTM(3, 2, batch_first=True)
    model.requires_grad_(True)
    linear, x = nn.Linear(3, 2), torch.randn(1, 3)
    with bootgrad.record(linear) as rec:
        losses = per_sample(linear(x))
    stats = rec.backward(losses)
    total = sum(float(p.grad.square().sum()) for p in linear.parameters())
    assert float(stats.sq_norms) == pytest.approx(total, rel=1e-5)
    assert float(stats.covariance_trace) == pytest.approx(0, abs=1e-4 * total)


def test_grad_memory_is_not_shared():
    """Two parameters that receive one and the same gradient tensor get memory of their own, as from torch."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x + self.a + self.b

    model = Sum()
    with bootgrad.record(model) as rec:
        losses = model(torch.randn(4, 3)).sum(1)
    rec.backward(losses)
    model.a.grad.zero_()
    torch.testing.assert_close(model.b.grad, torch.ones(3))


def test_changes_in_place_after_the_call_are_noticed():
    model, x, target = make(Sequence)

    def recorded(check):
        with bootgrad.record(model, check=check) as rec:
            losses = loss_of(model(x), target)
        x.add_(1)
        return rec, losses

    torch_says = ".*modified by an inplace operation"
    rec, losses = recorded("first")
    with pytest.raises(BootgradError, match=f"an operation of the model needs .* was changed in place{torch_says}"):
        rec.backward(losses)
    rec, losses = recorded("never")  # no backward pass by the layer's inputs
    with pytest.raises(
        BootgradError, match=f"an input of linear on inner.weight and inner.bias was changed{torch_says}"
    ):
        rec.per_sample_gradients(losses)
    assert all(p.grad is None for p in model.parameters())


def test_a_matrix_notices_that_its_inputs_changed():
    model, x, target = make(Residual)
    with bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    G = rec.per_sample_gradients(losses)
    before = G.sq_norms()
    x.mul_(2)
    with pytest.raises(BootgradError, match="changed in place"):
        G.gram()
    assert torch.equal(G.sq_norms(), before)  # a value that was made already


class InPlace(nn.Module):
    """Products, sums and differences in place with a parameter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.a, self.b, self.c = (nn.Parameter(torch.randn(4)) for _ in range(3))

    def forward(self, x):
        x = self.linear(x)
        x *= self.a
        x += self.b
        x.sub_(self.c * 2)
        return torch.tanh(x)


def test_operations_in_place_with_a_parameter():
    torch.manual_seed(0)
    model = InPlace().double()
    assert bootgrad.verify(model, lambda x: per_sample(model(x)), torch.randn(4, 3, dtype=torch.float64)).ok


def test_masks_in_place_are_refused():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(()))

        def forward(self, x):
            return (x * 1.5).masked_fill_(x > 0.5, self.w)

    with pytest.raises(BootgradError, match="masked_fill_ uses w in place"), bootgrad.record(model := Masked()):
        model(torch.rand(4, 3))


def test_autocast_records_what_autocast_computes():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)), torch.randn(4, 2, 5, 5)

    def losses():
        with torch.autocast("cpu", torch.bfloat16):
            return per_sample(model(x).float())

    parameters = list(model.parameters())
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(losses()[i], parameters)]) for i in range(4)]
    expected = torch.stack(rows).double()
    with bootgrad.record(model) as rec:
        values = losses()
    stats = rec.backward(values)
    torch.testing.assert_close(stats.sq_norms.double(), expected.square().sum(1), rtol=3e-2, atol=0)
    grads = torch.cat([p.grad.flatten() for p in parameters])
    assert all(p.grad.dtype == torch.float32 for p in parameters)
    torch.testing.assert_close(grads.double(), expected.mean(0), rtol=5e-2, atol=2e-3 * float(expected.abs().max()))


class Hooked(nn.Module):
    """Its last output's gradient is changed by a hook."""

    def __init__(self, last):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3), last

    def forward(self, x):
        y = self.last(torch.tanh(self.first(x)))
        y.register_hook(lambda g: g * torch.arange(g.size(-1)))
        return y


class Unruly(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        return torch.lerp(x, torch.zeros_like(x[:1]), self.scale)


class Twice(nn.Conv2d):
    def forward(self, x):
        return super().forward(torch.tanh(super().forward(x)))


@pytest.mark.filterwarnings("ignore:.*has no rule")
@pytest.mark.parametrize(
    "last", [nn.Conv2d(4, 3, 3), nn.GroupNorm(2, 4), Unruly(), Twice(4, 4, 2), nn.PReLU(4)], ids=repr
)
def test_what_a_hook_puts_in_the_place_of_a_gradient_counts(last):
    torch.manual_seed(0)
    model, x = Hooked(last).double(), torch.randn(3, 2, 7, 7, dtype=torch.float64)

    def losses(x):
        return model(x).square().flatten(1).sum(1)

    parameters = list(model.parameters())
    rows = [torch.autograd.grad(losses(x[i : i + 1]).sum(), parameters, create_graph=True) for i in range(len(x))]
    exact = torch.stack([sum(g.square().sum() for g in row) for row in rows])
    gradient = torch.autograd.grad(exact.mean() + losses(x).mean(), parameters)
    with bootgrad.record(model) as rec:
        values = losses(x)
    torch.testing.assert_close(rec.per_sample_gradients(values).sq_norms(), exact)
    torch.testing.assert_close(rec.backward(values).sq_norms, exact)
    model.zero_grad()
    report = bootgrad.GradientRegularizer(model, reg1=1.0, center="zero").backward(losses, x)
    torch.testing.assert_close(report.reg1, exact.mean())
    for p, g in zip(parameters, gradient, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_the_graph_goes_with_the_recording():
    model, x, target = make(Residual)
    rec = bootgrad.record(model)
    with rec:
        hidden = torch.relu(model.first(x))
        alive = weakref.ref(hidden)
        losses = hidden.square().flatten(1).sum(1)
        del hidden
    rec.backward(losses)
    del losses
    gc.collect()
    assert alive() is None


def test_statistics_are_printed_in_a_line():
    model, x = nn.Linear(3, 4), torch.randn(64, 3)
    with bootgrad.record(model) as rec:
        losses = model(x).square().sum(1)
    stats = rec.backward(losses)
    whole, of_weight = repr(stats), repr(stats.per_parameter["weight"])
    assert whole == (
        f"Statistics(batch_size=64, covariance_trace={stats.covariance_trace!r}, sq_mean_norm={stats.sq_mean_norm!r}, "
        "per_parameter=<2 names>)"
    )
    assert of_weight.startswith("Moments(batch_size=64, covariance_trace=tensor(") and len(of_weight) < 100


def test_several_modules_and_leaves_outside():
    torch.manual_seed(0)
    a, b = nn.Linear(3, 4), nn.Linear(4, 2)
    x = torch.randn(4, 3, requires_grad=True)
    outside = torch.randn(2, requires_grad=True)
    twin = copy.deepcopy((a, b))
    with bootgrad.record(a, b) as rec:
        losses = (b(torch.tanh(a(x))) * outside).square().sum(1)
    stats = rec.backward(losses)
    assert list(stats.per_parameter) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    expected = torch.autograd.grad(
        (twin[1](torch.tanh(twin[0](x))) * outside).square().sum(1).mean(), [*twin[0].parameters(), x, outside]
    )
    for ours, theirs in zip([*a.parameters(), x, outside], expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs)
