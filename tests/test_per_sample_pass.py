"""The pass at θ + f g_i per sample, on every way of using parameters, against one moved copy of the model per sample."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bootgrad
from bootgrad.errors import ArgumentError, RecordingError, UnsupportedError
from bootgrad.per_sample_pass import PerSamplePass

from .layers import Uses, parameter
from .models import SHAPES, B, Convolutions, DerivedWeights, Norms, Residual, Sequence, loss_of, make

pytestmark = pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning", "ignore:Using padding='same' with even")
KINDS = pytest.mark.parametrize("kind", SHAPES, ids=lambda k: k.__name__)
FACTOR = 0.3


def parameters_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def seeded_losses(model, x, target):
    torch.manual_seed(7)
    return loss_of(model(x), target)


def rows_of(model, x, target):
    """{name: (B, *shape)}, one backward pass per sample."""
    losses, parameters = seeded_losses(model, x, target), parameters_of(model)
    rows = [
        torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True) for loss in losses
    ]
    return {
        name: torch.stack([torch.zeros_like(p) if r[k] is None else r[k] for r in rows])
        for k, (name, p) in enumerate(parameters.items())
    }


def oracle(model, x, target, factor, shift=None):
    """Losses (B,) and {name: Σ_i ∇ℓ_i}, sample i's of a copy of the model at θ + shift + factor · g_i."""
    rows, losses, total = rows_of(model, x, target), [], {}
    for i in range(len(x)):
        moved = copy.deepcopy(model)
        parameters = parameters_of(moved)
        with torch.no_grad():
            for name, p in parameters.items():
                p += factor * rows[name][i] + (0 if shift is None else shift[name])
        loss = seeded_losses(moved, x, target)[i]
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        losses.append(loss.detach())
        for name, g in zip(parameters, grads, strict=True):
            total[name] = total.get(name, 0) + (torch.zeros_like(parameters[name]) if g is None else g)
    return torch.stack(losses), total


def first_pass(model, x, target):
    torch.manual_seed(7)
    with bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    return rec.per_sample_gradients(losses)


def second_pass(second, model, x, target):
    torch.manual_seed(7)
    with second:
        losses = loss_of(model(x), target)
    parameters = parameters_of(model)
    grads = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
    filled = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), grads, strict=True))
    return losses.detach(), dict(zip(parameters, filled, strict=True))


def check(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


@KINDS
@pytest.mark.parametrize("batch", [1, 4])
def test_gradients_are_those_of_a_moved_copy_per_sample(kind, batch):
    model, x, target = make(kind, batch=batch)
    before = copy.deepcopy(model.state_dict())
    ours = second_pass(PerSamplePass(first_pass(model, x, target), FACTOR), model, x, target)
    expected = oracle(model, x, target, FACTOR)
    check(ours[0], expected[0])
    check(ours[1], expected[1])
    plain = second_pass(torch.enable_grad(), model, x, target)
    assert (ours[0] - plain[0]).norm() > 1e-3 * plain[0].norm()  # the displacement shows
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("frozen", ["weight", "bias", None])
def test_group_norm_has_weights_of_its_own_for_each_sample(frozen):
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 4)
    nn.init.normal_(norm.weight)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    if frozen:
        getattr(norm, frozen).requires_grad_(False)
    x, target = torch.randn(5, 2, 4, 4).double(), torch.randn(5, 3).double()
    ours = second_pass(PerSamplePass(first_pass(model, x, target), FACTOR), model, x, target)
    check(ours, oracle(model, x, target, FACTOR))


def test_group_norm_of_one_value_a_group():
    """As in place of a batch norm behind a mean over all positions: what torch takes from a batch, it may not from an image."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.Unflatten(1, (4, 1, 1)), nn.GroupNorm(4, 4), nn.Flatten(), nn.Tanh(), nn.Linear(4, 2)
    model, x, target = nn.Sequential(*layers).double(), torch.randn(5, 3).double(), torch.randn(5, 2).double()
    ours = second_pass(PerSamplePass(first_pass(model, x, target), FACTOR), model, x, target)
    check(ours, oracle(model, x, target, FACTOR))


@KINDS
def test_factor_zero_is_the_plain_pass(kind):
    model, x, target = make(kind)
    ours = second_pass(PerSamplePass(first_pass(model, x, target), 0.0), model, x, target)
    plain = second_pass(torch.enable_grad(), model, x, target)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@KINDS
def test_in_chunks_that_are_made_again(kind, monkeypatch):
    """One sample a chunk, as where a parameter is large."""
    monkeypatch.setattr("bootgrad.per_sample_pass.CHUNK_BYTES", 1)
    model, x, target = make(kind)
    ours = second_pass(PerSamplePass(first_pass(model, x, target), FACTOR), model, x, target)
    check(ours, oracle(model, x, target, FACTOR))


@KINDS
def test_parameters_may_be_moved_in_place_after_it_is_made(kind):
    """θ + s + f g_i, where every parameter was moved by s: about a center c, s = −f c."""
    model, x, target = make(kind)
    g = torch.Generator().manual_seed(3)
    shift = {n: 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in parameters_of(model).items()}
    expected = oracle(model, x, target, FACTOR, shift)
    second = PerSamplePass(first_pass(model, x, target), FACTOR, model)
    with torch.no_grad():
        for name, p in parameters_of(model).items():
            p += shift[name]
    check(second_pass(second, model, x, target), expected)


@pytest.mark.parametrize("kind", [Residual, Norms, Sequence, DerivedWeights], ids=lambda k: k.__name__)
def test_on_a_subset_of_the_samples(kind):
    model, x, target = make(kind)
    index = torch.tensor([3, 1])
    G = first_pass(model, x, target)[index]
    check(
        second_pass(PerSamplePass(G, FACTOR), model, x[index], target[index]),
        oracle(model, x[index], target[index], FACTOR),
    )


def test_finite_differences_of_gamma():
    """(2/B) Σ [∇ℓ_i(θ + ε(g_i − ḡ)) − ∇ℓ_i(θ)] / ε is ∇Γ on a smooth network, with an error that falls with ε."""
    model, x, target = make(Convolutions)
    parameters = list(parameters_of(model).values())
    torch.manual_seed(7)
    with bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    G = rec.per_sample_gradients(losses, create_graph=True)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(G.covariance_trace(), parameters)])
    plain = torch.cat([g.flatten() for g in second_pass(torch.enable_grad(), model, x, target)[1].values()])
    saved, mean, errors = [p.detach().clone() for p in parameters], G.mean(), []
    for epsilon in (1e-3, 1e-4):
        second = PerSamplePass(G, epsilon)
        with torch.no_grad():
            for p, c in zip(parameters, mean.values(), strict=True):
                p -= epsilon * c.detach()
        moved = torch.cat([g.flatten() for g in second_pass(second, model, x, target)[1].values()])
        with torch.no_grad():
            for p, before in zip(parameters, saved, strict=True):
                p.copy_(before)
        errors.append((((2 / len(x)) * (moved - plain) / epsilon - exact).norm() / exact.norm()).item())
    assert errors[0] < 1e-2 and errors[1] == pytest.approx(errors[0] / 10, rel=0.1)


class Buffered(nn.Module):
    """Buffers with as many rows as there are samples: positions to look up, and statistics of channels."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(B, 3)
        self.norm = nn.BatchNorm1d(B).eval()
        self.scale = nn.Parameter(torch.randn(3))
        self.register_buffer("numbers", torch.arange(B))
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):  # (B, B, 3)
        return self.norm(x + self.positions(self.numbers)) * self.scale


def test_buffers_with_a_row_for_each_sample_are_not_cut():
    torch.manual_seed(0)
    model, x = Buffered().double(), torch.randn(B, B, 3, dtype=torch.float64)
    target = torch.randn(B, B, 3, dtype=torch.float64)
    for modules in ((), (model,)):
        ours = second_pass(PerSamplePass(first_pass(model, x, target), FACTOR, *modules), model, x, target)
        check(ours, oracle(model, x, target, FACTOR))


class Gated(nn.Module):
    """A token of the model's own in front of every sample's, a class token; and a parameter used in place."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.layer = nn.Linear(4, 4)
        self.gate = nn.Parameter(torch.randn(4))

    def forward(self, x):  # (B, T, 4)
        x = torch.tanh(self.layer(torch.cat([self.token.expand(len(x), -1, -1), x], 1)))
        y = x * 2
        y *= self.gate
        y -= self.gate
        return torch.lerp(y, x.sin(), self.gate)


def test_weights_of_as_many_rows_as_samples_that_are_alike():
    """All samples share them, as the rules have it, although a class token that is repeated for the samples looks so, too."""
    torch.manual_seed(0)

    def forward(m, x):
        x = F.layer_norm(F.linear(x, m.w.expand(B, -1)) * x.sin(), (B,), m.scale.expand(B))
        return x.tanh() @ m.v.expand(B, -1)

    model = Uses(forward, w=parameter(1, B), scale=parameter(1), v=parameter(1, 2)).double()
    x, target = torch.randn(B, B, dtype=torch.float64), torch.randn(B, 2, dtype=torch.float64)
    ours = second_pass(PerSamplePass(first_pass(model, x, target), FACTOR), model, x, target)
    check(ours, oracle(model, x, target, FACTOR))


def test_tokens_and_changes_in_place():
    torch.manual_seed(0)
    model, x = Gated().double(), torch.randn(B, 3, 4, dtype=torch.float64)
    target = torch.randn(B, 4, 4, dtype=torch.float64)
    check(
        second_pass(PerSamplePass(first_pass(model, x, target), FACTOR), model, x, target),
        oracle(model, x, target, FACTOR),
    )


def test_autocast():
    """In bfloat16 the products are those of the casts; the rest agrees to its 8 bits."""
    model, x, target = make(Residual, torch.float32)
    expected = oracle(model, x, target, FACTOR)
    with torch.autocast("cpu", torch.bfloat16):
        ours = second_pass(PerSamplePass(first_pass(model, x, target), FACTOR), model, x, target)
    for name, g in ours[1].items():
        assert g.dtype == torch.float32 and (g - expected[1][name]).norm() < 0.1 * expected[1][name].norm()


def test_second_derivatives_are_refused():
    model, x, target = make(Residual)
    with PerSamplePass(first_pass(model, x, target), FACTOR):
        losses = loss_of(model(x), target)
    with pytest.raises(UnsupportedError, match="first derivatives only; got create_graph=True"):
        torch.autograd.grad(losses.sum(), list(model.parameters()), create_graph=True)


def test_what_cannot_be_done_is_refused_by_name():
    model, x, target = make(Residual)
    G = first_pass(model, x, target)
    with pytest.raises(ArgumentError, match="must have every parameter of G; .* first.weight"):
        PerSamplePass(G, FACTOR, nn.Linear(2, 2))
    with (
        pytest.raises(UnsupportedError, match="conv2d on first.weight.* puts out 3 rows .* for 4 samples"),
        PerSamplePass(G, FACTOR),
    ):
        model(x[:3])
    second = PerSamplePass(G, FACTOR)
    with second:
        model(x)
    with pytest.raises(RecordingError, match="used already"), second:
        pass


def test_a_table_with_a_row_for_each_sample_is_refused():
    """A bias that is neither parameter nor buffer, as long as the batch: to cut it like samples would be wrong."""

    class Tabled(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.w = nn.Parameter(torch.randn(outputs, 3, dtype=torch.float64))
            self.bias = [torch.randn(outputs, dtype=torch.float64)]

        def forward(self, x):
            return F.linear(x, self.w.tanh(), self.bias[0])

    x = torch.randn(B, 3, dtype=torch.float64)
    model, target = Tabled(B + 1), torch.randn(B, B + 1, dtype=torch.float64)
    second = PerSamplePass(first_pass(model, x, target), FACTOR)
    check(second_pass(second, model, x, target), oracle(model, x, target, FACTOR))
    model, target = Tabled(B), torch.randn(B, B, dtype=torch.float64)
    second = PerSamplePass(first_pass(model, x, target), FACTOR)
    with pytest.raises(UnsupportedError, match="linear on w does something else on one sample at a time"), second:
        model(x)


LOOK_UPS = {
    "module": nn.Embedding.forward,
    "negative": lambda m, x: F.embedding(x, m.weight, padding_idx=m.padding_idx - 7),
    "torch's": lambda m, x: torch.embedding(m.weight, x, m.padding_idx),
    "torch's, none": lambda m, x: torch.embedding(m.weight, x, -1),
}


class Words(nn.Module):
    def __init__(self, look_up, padding):
        super().__init__()
        self.table, self.look_up = nn.Embedding(7, 4, padding_idx=padding), look_up
        self.head = nn.Linear(4, 3)

    def forward(self, words):
        return self.head(torch.tanh(self.look_up(self.table, words)).mean(1))


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", LOOK_UPS)
def test_padding_of_an_embedding_has_no_gradient(name, padding, chunk, monkeypatch):
    """torch's rule for look-ups in one table per sample masks the padding of sample 0 alone."""
    if chunk:
        monkeypatch.setattr("bootgrad.per_sample_pass.CHUNK_BYTES", chunk)
    torch.manual_seed(0)
    model = Words(LOOK_UPS[name], padding).double()
    x, target = torch.randint(0, 7, (5, 6)), torch.randn(5, 3, dtype=torch.float64)
    x[:, 2] = padding
    ours = second_pass(PerSamplePass(first_pass(model, x, target), FACTOR), model, x, target)
    check(ours, oracle(model, x, target, FACTOR))
    grads = {}
    for method in ("exact", "finite_difference"):
        model.zero_grad()
        reg = bootgrad.GradientRegularizer(model, method=method, reg1=0.1)
        reg.backward(lambda x, target: loss_of(model(x), target), x, target)
        grads[method] = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert name == "torch's, none" or not model.table.weight.grad[padding].any()
    assert (grads["exact"] - grads["finite_difference"]).norm() < 1e-3 * grads["exact"].norm()
