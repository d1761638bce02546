"""Batch norm in training mode, whose samples contribute to the gradient: by copies of the parameters of their own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import bootgrad
from bootgrad.errors import ArgumentError, UnsupportedError

B = 5


class Images(nn.Module):
    """Two convolutions with batch norm, one of which has no scale and shift, and one norm over features."""

    def __init__(self):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.second, self.second_norm = nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4, affine=False)
        self.third, self.third_norm = nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        x = self.first_norm(self.first(x)).tanh()
        x = self.second_norm(self.second(x)).tanh().mean((2, 3))
        return self.last(self.third_norm(self.third(x)).sigmoid())

    def of_copies(self, x, p):
        """The same with parameters (B, …), each sample's its own."""

        def conv(x, w, b=None):
            y = F.conv2d(x.flatten(0, 1)[None], w.flatten(0, 1), None if b is None else b.flatten(), groups=len(x))
            return y.unflatten(1, (len(x), -1))[0]

        def norm(x):
            dims = [d for d in range(x.dim()) if d != 1]
            return (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + 1e-5).sqrt()

        def linear(x, name):
            return torch.einsum("bi,boi->bo", x, p[f"{name}.weight"]) + p[f"{name}.bias"]

        scale, shift = (p[f"first_norm.{n}"][:, :, None, None] for n in ("weight", "bias"))
        x = (norm(conv(x, p["first.weight"])) * scale + shift).tanh()
        x = norm(conv(x, p["second.weight"], p["second.bias"])).tanh().mean((2, 3))
        x = norm(linear(x, "third")) * p["third_norm.weight"] + p["third_norm.bias"]
        return linear(x.sigmoid(), "last")


def loss(y):
    return y.square().sum(1) + y.sum(1).sin()


class Setting:
    """A model, a batch, and contributions (B, P) that can be differentiated by the parameters."""

    def __init__(self):
        torch.manual_seed(0)
        self.model, self.x = Images().double(), torch.randn(B, 2, 6, 6, dtype=torch.float64)
        for norm in (self.model.first_norm, self.model.third_norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
        self.parameters = dict(self.model.named_parameters())
        copies = {name: p.expand(B, *p.shape) for name, p in self.parameters.items()}
        losses = loss(self.model.of_copies(self.x, copies))
        torch.testing.assert_close(losses, loss(copy.deepcopy(self.model)(self.x)))
        grads = torch.autograd.grad(losses.sum(), list(copies.values()), create_graph=True)
        self.rows = dict(zip(copies, grads, strict=True))
        self.matrix = torch.cat([g.flatten(1) for g in grads], 1)
        self.center = {name: torch.randn_like(p) for name, p in self.parameters.items()}
        self.c = torch.cat([c.flatten() for c in self.center.values()])

    def step(self, penalty):
        """The gradient of the mean loss and a penalty."""
        return torch.autograd.grad(self.mean_loss() + penalty, list(self.parameters.values()))

    def mean_loss(self):
        """By the model, whose running statistics stay."""
        return loss(functional_call(copy.deepcopy(self.model), self.parameters, self.x)).mean()


def test_statistics_are_of_contributions():
    setting = Setting()
    D, running = setting.matrix.detach(), copy.deepcopy(setting.model)
    running(setting.x)
    with bootgrad.record(setting.model, batchnorm="contribution") as rec:
        losses = loss(setting.model(setting.x))
    stats = rec.backward(losses, center=setting.center)
    torch.testing.assert_close(stats.sq_norms, D.square().sum(1))
    torch.testing.assert_close(stats.covariance_trace, (D - D.mean(0)).square().sum(1).mean())
    torch.testing.assert_close(stats.deviation_sq_norms, (D - setting.c).square().sum(1))
    for name, rows in setting.rows.items():
        torch.testing.assert_close(stats.per_parameter[name].sq_norms, rows.detach().flatten(1).square().sum(1))
    plain = torch.autograd.grad(setting.mean_loss(), list(setting.parameters.values()))
    for p, g in zip(setting.parameters.values(), plain, strict=True):
        torch.testing.assert_close(p.grad, g)
    for ours, theirs in zip(setting.model.buffers(), running.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)  # moved once


def test_the_matrix_is_of_contributions():
    setting = Setting()
    with bootgrad.record(setting.model, batchnorm="contribution") as rec:
        losses = loss(setting.model(setting.x))
    G = rec.per_sample_gradients(losses)
    D, w = setting.matrix.detach(), torch.randn(B, dtype=torch.float64)
    torch.testing.assert_close(G @ setting.center, D @ setting.c)
    torch.testing.assert_close(torch.cat([t.flatten() for t in (G.T @ w).values()]), w @ D)
    torch.testing.assert_close(G.gram(), D @ D.T)


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("center", ["batch_mean", "zero", "given"])
@pytest.mark.parametrize("reg2", [0.0, 0.3])
def test_steps_with_penalties(method, center, reg2):
    if center == "batch_mean" and reg2:
        center = {"reg1": "batch_mean", "reg2": "zero"}
    setting = Setting()
    D, about = setting.matrix, setting.c if center == "given" else 0.0
    c1 = D.mean(0).detach() if center == "batch_mean" or isinstance(center, dict) else about
    penalty = 0.5 * (D - c1).square().sum(1).mean() + reg2 * (D.mean(0) - about).square().sum()
    expected = setting.step(penalty)
    options = dict(center=setting.center if center == "given" else center, reg1=0.5, reg2=reg2, method=method)
    options |= dict(epsilon=1e-6) if method == "finite_difference" else {}
    reg = bootgrad.GradientRegularizer(setting.model, batchnorm="contribution", **options)
    running = copy.deepcopy(setting.model)
    running(setting.x)
    report = reg.backward(lambda: loss(setting.model(setting.x)))
    torch.testing.assert_close(float(report.reg1), float((D - c1).detach().square().sum(1).mean()))
    largest = max(float(g.abs().max()) for g in expected)
    for p, g in zip(setting.parameters.values(), expected, strict=True):
        tolerance = 1e-9 if method == "exact" else 2e-3
        assert float((p.grad - g).abs().max()) < tolerance * largest
    for ours, theirs in zip(setting.model.buffers(), running.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_micro_batches_have_statistics_of_their_own():
    setting = Setting()
    other = Setting().x.flip(0) + 1
    expected = []
    for x in (setting.x, other):
        copies = {
            name: p.detach().expand(B, *p.shape).clone().requires_grad_() for name, p in setting.parameters.items()
        }
        grads = torch.autograd.grad(loss(setting.model.of_copies(x, copies)).sum(), list(copies.values()))
        expected.append(torch.cat([g.flatten(1) for g in grads], 1))
    with bootgrad.accumulate(setting.model, batchnorm="contribution") as batch:
        for x in (setting.x, other):
            with batch.record():
                losses = loss(setting.model(x))
            batch.backward(losses)
    torch.testing.assert_close(batch.statistics.sq_norms, torch.cat(expected).square().sum(1))


def test_without_statistics_of_the_batch_contributions_are_gradients_and_checked():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval(), torch.randn(B, 3)
    norms = []
    for batchnorm in ("refuse", "contribution"):
        with bootgrad.record(model, batchnorm=batchnorm) as rec:
            losses = loss(model(x))
        norms.append(rec.backward(losses).sq_norms)
    torch.testing.assert_close(*norms)
    with bootgrad.record(model, batchnorm="contribution") as rec:
        losses = loss(model(x) - model(x).mean(0))
    with pytest.raises(UnsupportedError, match="coupled"):
        rec.backward(losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batchnorm="ghost"), "batchnorm must be one of refuse, contribution"),
        (dict(batchnorm="contribution", fraction=0.5), "fraction=1; got"),
        (dict(batchnorm="contribution", method="random_signs"), 'got method="random_signs"'),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ArgumentError, match=message):
        bootgrad.GradientRegularizer(nn.Linear(2, 2), reg1=0.1, **options)


def test_what_is_refused_says_what_else_there_is():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(UnsupportedError, match='batchnorm="contribution"'), bootgrad.record(model):
        model(torch.randn(B, 3))
    with pytest.raises(ArgumentError, match="batchnorm must be one of"):
        bootgrad.record(model, batchnorm="ghost")
