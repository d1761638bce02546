"""The oracles against each other, against loops of backward passes, and against numbers made by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from bootgrad import reference

CLOSE = dict(rtol=1e-12, atol=1e-13)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_a_linear_layer_by_hand():
    x, gy = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), torch.tensor([[[1.0], [3.0]]])
    # G = 1·(1, 2) + 3·(0, 1) = (1, 5)
    assert reference.linear_rows(x, gy).tolist() == [[[1, 5]]]
    assert reference.linear_sq_norms(x, gy).tolist() == [26]
    c = torch.tensor([[1.0, 1.0]])
    assert reference.linear_deviation_sq_norms(x, gy, c).tolist() == [16]
    assert reference.linear_jvp(x, gy, c).tolist() == [6]
    assert reference.linear_weighted_sum(x, gy, torch.tensor([2.0])).tolist() == [[2, 10]]
    total, s, deviation, bias = reference.linear_statistics(x, gy, c)
    assert (total.tolist(), s.tolist(), deviation.tolist(), bias.tolist()) == ([[1, 5]], [26], [16], [[4]])
    s, dx, dgy, total = reference.linear_sq_norms_with_grad(x, gy, None)
    # ∂s/∂x_t = 2 gy_t G and ∂s/∂gy_t = 2 ⟨G, x_t⟩
    assert (s.tolist(), dx.tolist(), dgy.tolist()) == ([26], [[[2, 10], [6, 30]]], [[[22], [10]]])
    assert total.tolist() == [[1, 5]]
    assert reference.linear_rank1_sq_norms(x[:, 0], gy[:, 1]).tolist() == [45]


@pytest.mark.parametrize(
    "shape, O, kernel, geometry",
    [
        ((3, 4, 7), 6, 3, (2, 1, 2, 2)),
        ((3, 2, 5, 6), 4, (3, 2), ((1, 2), (1, 0), 1, 1)),
        ((2, 3, 4, 4), 3, 3, (1, "same", 1, 3)),
        ((2, 2, 3, 4, 3), 2, 2, ()),
    ],
    ids=["1d", "2d", "depthwise", "3d"],
)
def test_convolutions_against_backward_passes(shape, O, kernel, geometry):  # noqa: E741
    n = len(shape) - 2
    groups = geometry[3] if geometry else 1
    kernel_size = (kernel,) * n if isinstance(kernel, int) else kernel
    weight = random(O, shape[1] // groups, *kernel_size).requires_grad_()
    x = random(*shape)
    y = (F.conv1d, F.conv2d, F.conv3d)[n - 1](x, weight, None, *geometry)
    gy = random(*y.shape)
    rows = torch.stack([torch.autograd.grad((y[i] * gy[i]).sum(), weight, retain_graph=True)[0] for i in range(len(x))])
    flat, c, w = rows.flatten(1), random(*weight.shape), random(len(x))
    s, deviation = flat.square().sum(1), (flat - c.flatten()).square().sum(1)
    torch.testing.assert_close(reference.conv_rows(x, gy, kernel, *geometry), rows, **CLOSE)
    for ours, expected in (
        (reference.conv_sq_norms(x, gy, kernel, *geometry), s),
        (reference.conv_deviation_sq_norms(x, gy, c, *geometry), deviation),
        (reference.conv_jvp(x, gy, c, *geometry), flat @ c.flatten()),
        (reference.conv_weighted_sum(x, gy, w, kernel, *geometry), torch.tensordot(w, rows, 1)),
        (reference.conv_weighted_sum(x, gy, None, kernel, *geometry), rows.sum(0)),
    ):
        torch.testing.assert_close(ours, expected, **CLOSE)
    ours = reference.conv_statistics(x, gy, c, kernel, *geometry)
    for a, b in zip(ours, (rows.sum(0), s, deviation, gy.flatten(2).sum(2)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_derivatives_are_those_of_the_norms():
    x, gy, c = random(2, 2, 4, 4).requires_grad_(), random(2, 3, 2, 2).requires_grad_(), random(3, 2, 3, 3)
    s, dx, dgy, total = reference.conv_sq_norms_with_grad(x, gy, c, 3)
    torch.testing.assert_close(total, reference.conv_rows(x, gy, 3).sum(0).detach(), **CLOSE)
    norms = reference.conv_deviation_sq_norms(x, gy, c)
    torch.testing.assert_close(s, norms.detach(), **CLOSE)
    step = 1e-5
    for tensor, derivative in ((x, dx), (gy, dgy)):
        direction = random(*tensor.shape)
        ends = []
        for sign in (1, -1):
            moved = [t + sign * step * direction if t is tensor else t for t in (x, gy)]
            ends.append(reference.conv_deviation_sq_norms(*moved, c).sum().item())
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((derivative * direction).sum().item(), rel=1e-7)
    assert gradcheck(lambda x, gy: reference.conv_sq_norms(x, gy, 3, padding=1, stride=2), (x, gy[..., :2, :2]))


def test_a_mask_leaves_results_empty():
    x, gy = random(2, 3, 4), random(2, 3, 5)
    for mask in ((True, False, False), (False, True, False), (False, False, True)):
        results = reference.linear_sq_norms_with_grad(x, gy, None, mask)[1:]
        shapes = (x.shape, gy.shape, (5, 4))
        assert [t.shape for t in results] == [s if wanted else (0,) for s, wanted in zip(shapes, mask, strict=True)]


def test_layers_without_samples_or_positions():
    c = random(5, 4)
    assert reference.linear_sq_norms(random(0, 3, 4), random(0, 3, 5)).shape == (0,)
    s, dx, dgy, total = reference.linear_sq_norms_with_grad(random(2, 0, 4), random(2, 0, 5), c)
    torch.testing.assert_close(s, c.square().sum().expand(2), **CLOSE)
    assert dx.shape == (2, 0, 4) and dgy.shape == (2, 0, 5) and total.eq(0).all()
    assert reference.conv_weighted_sum(random(0, 2, 4), random(0, 3, 2), None, 3).eq(0).all()


def test_group_norm_s_backward_pass_and_its_derivatives():
    x, gy, u, weight = random(3, 4, 5).requires_grad_(), random(3, 4, 5).requires_grad_(), random(3, 4, 5), random(4)
    grouped = x.detach().view(3, 2, 10)
    mean, rstd = grouped.mean(2), (grouped.var(2, correction=0) + 1e-2).rsqrt()
    weights, biases = weight.repeat(3, 1).requires_grad_(), torch.zeros(3, 4, dtype=x.dtype, requires_grad=True)
    a, b = random(3, 4), random(3, 4)
    y = torch.cat([F.group_norm(x[i : i + 1], 2, weights[i], biases[i], 1e-2) for i in range(3)])
    grads = torch.autograd.grad(y, (x, weights, biases), gy, create_graph=True)
    for p, q in zip(reference.group_norm_backward(gy, x, weight, mean, rstd), grads, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)
    for cotangents in ((u, a, b), (u, None, None), (None, a, None), (None, None, b)):
        total = sum((g * c).sum() for g, c in zip(grads, cotangents, strict=True) if c is not None)
        expected = torch.autograd.grad(total, (gy, x, weights), retain_graph=True, materialize_grads=True)
        ours = reference.group_norm_double_backward(*cotangents, gy, x, weight, mean, rstd)
        for p, q in zip(ours, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)


class Net(nn.Module):
    """A layer used twice, a frozen one, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.shared, self.frozen, self.unused, self.head = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Linear(2, 2),
            nn.Linear(4, 3),
        )
        self.frozen.requires_grad_(False)

    def forward(self, x, scale=1.0):
        h = torch.tanh(self.shared(torch.tanh(self.frozen(self.shared(x)))))
        return self.head(h) * scale


def losses_of(model, x, y, scale):
    return F.cross_entropy(model(x, scale=scale), y, reduction="none")


def test_whole_models_both_ways():
    model, x, y = Net().double(), random(5, 4), torch.tensor([0, 2, 1, 1, 0])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mapped = reference.per_sample_gradients(model, losses_of, x, y, 0.7)
    looped = reference.per_sample_gradients_of(losses_of(model, x, y, 0.7), parameters)
    assert list(mapped) == list(looped) == list(parameters)
    assert mapped["unused.weight"].eq(0).all() and looped["unused.weight"].eq(0).all()
    for name, p in parameters.items():
        assert mapped[name].shape == (5, *p.shape)
        torch.testing.assert_close(mapped[name].detach(), looped[name], **CLOSE)
    losses_of(model, x, y, 0.7).sum().backward()
    torch.testing.assert_close(looped["shared.weight"].sum(0), model.shared.weight.grad, **CLOSE)


def test_rows_of_models_are_differentiable():
    model, x, y = Net().double(), random(3, 4), torch.tensor([0, 2, 1])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mapped = reference.matrix(reference.per_sample_gradients(model, losses_of, x, y, 1.0))
    losses = losses_of(model, x, y, 1.0)
    looped = reference.matrix(reference.per_sample_gradients_of(losses, parameters, create_graph=True))
    weight = model.shared.weight
    gradients = [torch.autograd.grad(reference.covariance_trace(G), weight)[0] for G in (mapped, looped)]
    torch.testing.assert_close(*gradients, **CLOSE)

    direction, step, ends = random(4, 4), 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        G = reference.matrix(reference.per_sample_gradients(model, losses_of, x, y, 1.0))
        ends.append(reference.covariance_trace(G).item())
        with torch.no_grad():
            weight -= sign * step * direction
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((gradients[0] * direction).sum().item(), rel=1e-6)


def test_quantities_by_hand():
    G = torch.tensor([[1.0, 2.0], [3.0, -2.0], [2.0, 3.0]])  # ḡ = (2, 1)
    c = torch.tensor([1.0, 0.0])
    for ours, expected in (
        (reference.sq_norms(G), [5, 13, 13]),
        (reference.deviation_sq_norms(G), [2, 10, 4]),
        (reference.deviation_sq_norms(G, c), [4, 8, 10]),
        (reference.covariance_trace(G), 16 / 3),
        (reference.covariance_trace(G, unbiased=True), 8),
        (reference.minibatch_covariance_trace(G), 16 / 9),
        (reference.noise_scale(G), 16 / 15),
        (reference.reg1(G), 16 / 3),
        (reference.reg1(G, c), 22 / 3),
        (reference.reg2(G, c), 2),
        (reference.jvp(G, torch.tensor([2.0, 1.0])), [4, 4, 7]),
        (reference.weighted_sum(G, torch.tensor([1.0, 0.0, -1.0])), [-1, -1]),
        (reference.gram(G), [[5, -1, 8], [-1, 13, 0], [8, 0, 13]]),
    ):
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float32))


def test_the_matrix_is_row_major_and_in_order():
    rows = {"a": torch.arange(8.0).view(2, 2, 2), "b": torch.tensor([[10.0], [20.0]])}
    assert reference.matrix(rows).tolist() == [[0, 1, 2, 3, 10], [4, 5, 6, 7, 20]]


def test_the_matrix_has_a_column_for_a_number():
    rows = {"scale": torch.tensor([1.0, 2.0]), "weight": torch.tensor([[[3.0], [4.0]], [[5.0], [6.0]]])}
    assert reference.matrix(rows).tolist() == [[1, 3, 4], [2, 5, 6]]
