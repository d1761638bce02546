"""Products with the Hessian and its eigenvalues, against the whole matrix."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bootgrad.errors import ArgumentError, ArgumentTypeError, RecordingError, UnsupportedError
from bootgrad.theory import Hessian

from .problems import CLOSE, Direct, dense_hessian, losses_at, network, rows, vector


@pytest.mark.parametrize("chunk", [None, 5, 12, 40])
def test_products_gradient_and_losses_are_those_of_the_whole_matrix(chunk):
    model, loss_fn, x, y = network()
    H, dense = Hessian(model, loss_fn, x, y, chunk=chunk), dense_hessian(model, x, y)
    v = torch.randn(H.size).double()
    assert (H.samples, H.size) == (12, 26)
    torch.testing.assert_close(H @ v, dense @ v, **CLOSE)
    parts = dict(zip(H.parameters, v.split([p.numel() for p in model.parameters()]), strict=True))
    by_name = {name: part.view_as(H.parameters[name]) for name, part in parts.items()}
    torch.testing.assert_close(H @ by_name, dense @ v, **CLOSE)
    torch.testing.assert_close(H.gradient(), rows(model, loss_fn, x, y).mean(0), **CLOSE)
    torch.testing.assert_close(H.losses(), losses_at(model, vector(model), x, y), **CLOSE)
    torch.testing.assert_close(H.losses(0.1 * v), losses_at(model, vector(model) + 0.1 * v, x, y), **CLOSE)
    torch.testing.assert_close(H @ v, dense @ v, **CLOSE)  # after parameters were moved and put back


def test_nothing_of_the_model_is_changed_and_changes_of_it_are_seen():
    model, loss_fn, x, y = network()
    model.append(nn.BatchNorm1d(2).double().eval())
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    H = Hessian(model, loss_fn, x, y)
    v = torch.randn(H.size, generator=torch.Generator().manual_seed(1)).double()
    first = H @ v
    H.losses(v)
    H.eigenpairs(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert not torch.allclose(H @ v, first)
    torch.testing.assert_close(H @ v, dense_hessian(model, x, y) @ v, **CLOSE)


class Doubling(nn.Module):
    """Twice as much in training mode, and a buffer as a factor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.ones(()).double())

    def forward(self, x):
        return x * self.factor * (2 if self.training else 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[0].weight.data.mul_(3),
        lambda model: model[-1].factor.mul_(3),
        lambda model: model.eval(),
    ],
    ids=["data", "buffer", "mode"],
)
def test_products_are_about_the_model_of_now(change):
    model, loss_fn, x, y = network()
    model.append(Doubling())
    H = Hessian(model, loss_fn, x, y)
    v = torch.randn(H.size, generator=torch.Generator().manual_seed(1)).double()
    first, values = H @ v, H.eigenpairs().values
    change(model)
    expected = dense_hessian(model, x, y)
    assert not torch.allclose(expected @ v, first, rtol=1e-3)
    torch.testing.assert_close(H @ v, expected @ v, **CLOSE)
    assert not torch.allclose(H.eigenpairs().values, values, rtol=1e-3)


def test_a_block_of_products_runs_the_model_once():
    model, loss_fn, x, y = network()
    calls = []
    H = Hessian(model, lambda x, y: calls.append(1) or loss_fn(x, y), x, y)
    v, before = torch.ones(H.size).double(), len(calls)
    with H.one_graph():
        first = H @ v
        H.eigenpairs(2)
        assert torch.equal(H @ v, first) and len(calls) == before + 1
    H @ v
    assert len(calls) == before + 2


@pytest.mark.parametrize("smallest", [False, True])
def test_eigenpairs_are_those_of_the_whole_matrix(smallest):
    model, loss_fn, x, y = network()
    H = Hessian(model, loss_fn, x, y)
    values, vectors = torch.linalg.eigh(dense_hessian(model, x, y))
    if not smallest:
        values, vectors = values.flip(0), vectors.flip(1)
    found = H.eigenpairs(4, smallest=smallest, tolerance=1e-9)
    torch.testing.assert_close(found.values, values[:4], rtol=1e-8, atol=1e-10)
    assert (found.residuals < 1e-8).all()
    torch.testing.assert_close((found.vectors * vectors[:, :4].T).sum(1).abs(), torch.ones(4).double(), **CLOSE)
    torch.testing.assert_close(found.products, found.vectors @ dense_hessian(model, x, y), **CLOSE)
    every = H.eigenpairs(H.size, smallest=smallest)
    torch.testing.assert_close(every.values, values, rtol=1e-8, atol=1e-10)


def test_residuals_bound_the_error_of_few_steps():
    spectrum = torch.cat([torch.linspace(-1, 1, 58), torch.tensor([5.0, -3.0])]).double()
    model = Direct(torch.zeros(60).double())
    H = Hessian(model, lambda: (spectrum * model.theta.square()).sum().reshape(1) / 2)
    for smallest in (False, True):
        for steps in (3, 8, 20):
            found = H.eigenpairs(2, smallest=smallest, steps=steps, tolerance=1e-12)
            nearest = (found.values[:, None] - spectrum).abs().amin(1)
            assert (nearest <= found.residuals + 1e-12).all() and found.residuals[0] > 0
    assert abs(float(H.eigenpairs(steps=20).values) - 5) < 1e-3


def test_multiple_and_zero_eigenvalues_are_met():
    model = Direct(torch.zeros(6).double())
    spectrum = torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0, -1.0]).double()
    H = Hessian(model, lambda: (spectrum * model.theta.square()).sum().reshape(1) / 2)
    torch.testing.assert_close(H.eigenpairs(6).values, spectrum, **CLOSE)
    flat = Hessian(model, lambda: model.theta.sum().reshape(1))
    torch.testing.assert_close(flat.eigenpairs(3).values, torch.zeros(3).double())
    torch.testing.assert_close(flat @ torch.ones(6).double(), torch.zeros(6).double())


def test_float32_is_right_to_its_digits():
    model, loss_fn, x, y = network()
    expected = torch.linalg.eigvalsh(dense_hessian(model, x, y))
    H = Hessian(model.float(), loss_fn, x.float(), y)
    torch.testing.assert_close(H.eigenpairs().values, expected[-1:], rtol=1e-5, atol=0)
    torch.testing.assert_close(H.eigenpairs(smallest=True).values, expected[:1], rtol=1e-4, atol=0)


def test_what_cannot_be_right_is_refused():
    model, loss_fn, x, y = network()
    with pytest.raises(ArgumentError, match=r'one loss per sample; got \(\): pass reduction="none"'):
        Hessian(model, lambda x, y: loss_fn(x, y).mean(), x, y)
    dropping = nn.Sequential(model, nn.Dropout(0.5))
    with pytest.raises(ArgumentError, match=r"other losses when it was called again.*put dropout into eval\(\)"):
        Hessian(dropping, lambda x, y: F.cross_entropy(dropping(x), y, reduction="none"), x, y)
    dropping.eval()
    assert Hessian(dropping, lambda x, y: F.cross_entropy(dropping(x), y, reduction="none"), x, y).samples == 12
    with pytest.raises(ArgumentTypeError, match=r"model must be a torch.nn.Module; got function"):
        Hessian(loss_fn, loss_fn, x, y)
    with pytest.raises(ArgumentTypeError, match="loss_fn must be a function of the batch"):
        Hessian(model, x, y)
    with pytest.raises(ArgumentError, match="chunk must be a whole number of at least 1"):
        Hessian(model, loss_fn, x, y, chunk=0)
    H = Hessian(model, loss_fn, x, y)
    with pytest.raises(ArgumentError, match=r"v as one tensor must be flat, shape \(26,\)"):
        H @ torch.ones(3)
    for wrong in (0, 27, True):
        with pytest.raises(ArgumentError, match="k must be a whole number in 1 … P = 26"):
            H.eigenpairs(wrong)
    with pytest.raises(ArgumentError, match="steps must be a whole number of at least k = 3"):
        H.eigenpairs(3, steps=2)
    with pytest.raises(ArgumentError, match="need parameters in float32 or float64; got torch.bfloat16"):
        Hessian(model.bfloat16(), loss_fn, x.bfloat16(), y)
    with pytest.raises(RecordingError, match="no parameter that requires grad"):
        Hessian(model.requires_grad_(False), loss_fn, x, y)


def test_a_function_without_a_second_derivative_is_refused():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    model = Direct(torch.ones(3).double())
    H = Hessian(model, lambda: Once.apply(model.theta))
    with pytest.raises(RecordingError, match="once_differentiable"):
        H @ torch.ones(3).double()


@pytest.mark.parametrize("loss", [lambda t: t.square().sum().sqrt().reshape(1), lambda t: t.norm().reshape(1)])
def test_a_loss_without_a_second_derivative_here_is_refused(loss):
    model = Direct(torch.zeros(3).double())
    with pytest.raises(ArgumentError, match="no second derivative here, as a norm or a square root at zero"):
        Hessian(model, lambda: loss(model.theta)).eigenpairs()


@pytest.mark.parametrize("tracking", [True, False])
@pytest.mark.parametrize("chunk", [None, 4])
def test_batch_norm_over_the_batch_is_refused_by_name(chunk, tracking):
    model, loss_fn, x, y = network()
    model.append(nn.BatchNorm1d(2, track_running_stats=tracking).double())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedError, match=r"batch norm in training mode \(3\).*eval\(\).*replace_batchnorm"):
        Hessian(model, loss_fn, x, y, chunk=chunk)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    if tracking:
        model.eval()
        assert Hessian(model, loss_fn, x, y, chunk=chunk).samples == 12
    with pytest.raises(UnsupportedError, match=r"batch norm in training mode \(a function\)"):
        plain = network()[0]
        Hessian(plain, lambda x, y: F.batch_norm(plain(x), None, None, training=True).square().sum(1), x, y)
