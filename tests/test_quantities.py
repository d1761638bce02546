"""Every quantity of the library, first and second order, on every way of using parameters, against the oracle in float64."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

import bootgrad
from bootgrad import reference
from bootgrad.errors import UnsupportedError
from bootgrad.penalties import total_sq_norm
from bootgrad.rules.stand_ins import StandIns
from bootgrad.rules.terms import DenseTerm, SqDistances, recomputed

from .models import SHAPES, Residual, Unknown, loss_of, make

pytestmark = pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning", "ignore:Using padding='same' with even")
KINDS = pytest.mark.parametrize("kind", SHAPES, ids=lambda k: k.__name__)
TOLERANCE = dict(rtol=1e-10, atol=1e-11)


def parameters_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def recorded(model, x, target, seed=7):
    torch.manual_seed(seed)
    with bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    return rec, losses


def oracle(model, x, target, seed=7, create_graph=False):
    """{name: (B, *shape)} by one backward pass per sample."""
    torch.manual_seed(seed)
    with StandIns():  # torch's own weight norm has a wrong second derivative
        losses = loss_of(model(x), target)
    return losses, reference.per_sample_gradients_of(losses, parameters_of(model), create_graph=create_graph)


def flat(rows):
    return torch.cat([g.reshape(len(g), -1) for g in rows.values()], 1)


def random_like(parameters, seed=3):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=g, dtype=p.dtype) for name, p in parameters.items()}


def check(ours, expected):
    torch.testing.assert_close(ours, expected, **TOLERANCE)


@KINDS
def test_backward_fills_grad_and_statistics(kind):
    model, x, target = make(kind)
    losses, rows = oracle(model, x, target)
    G = flat(rows)
    losses.mean().backward()
    expected = {name: p.grad for name, p in parameters_of(model).items()}
    model.zero_grad()
    center = random_like(parameters_of(model))
    c = torch.cat([t.flatten() for t in center.values()])
    for with_center in (None, center):
        model.zero_grad()
        rec, losses = recorded(model, x, target)
        stats = rec.backward(losses, center=with_center)
        for name, p in parameters_of(model).items():
            assert (p.grad is None) == (expected[name] is None), name
            if p.grad is not None:
                check(p.grad, expected[name])
            check(stats.per_parameter[name].sq_norms, rows[name].reshape(len(x), -1).square().sum(1))
            check(stats.per_parameter[name].sq_mean_norm, rows[name].mean(0).square().sum())
        check(stats.sq_norms, G.square().sum(1))
        check(stats.sq_mean_norm, G.mean(0).square().sum())
        check(stats.covariance_trace, (G - G.mean(0)).square().sum(1).mean())
        check(stats.minibatch_covariance_trace, stats.covariance_trace / len(G))
        check(stats.noise_scale, stats.covariance_trace / stats.sq_mean_norm)
        check(stats.mean_sq_norm, G.square().sum(1).mean())
    check(stats.deviation_sq_norms, (G - c).square().sum(1))
    check(stats.reg1, (G - c).square().sum(1).mean())
    check(stats.reg2, (G.mean(0) - c).square().sum())


@KINDS
@pytest.mark.parametrize("reduction", ["sum", "weights", "zeros"])
def test_reductions(kind, reduction):
    model, x, target = make(kind)
    losses, rows = oracle(model, x, target)
    weights = {"sum": torch.ones(4), "weights": torch.tensor([1.0, -2.0, 0.0, 0.5]), "zeros": torch.zeros(4)}[reduction]
    weights = weights.double()
    rec, losses = recorded(model, x, target)
    stats = rec.backward(losses, reduction="sum" if reduction == "sum" else weights)
    check(stats.sq_norms, flat(rows).square().sum(1))
    for name, p in parameters_of(model).items():
        if p.grad is not None:
            check(p.grad, torch.einsum("b,b...->...", weights, rows[name]))


@KINDS
@pytest.mark.parametrize("create_graph", [False, True])
def test_matrix(kind, create_graph):
    model, x, target = make(kind)
    _, rows = oracle(model, x, target)
    dense = flat(rows)
    rec, losses = recorded(model, x, target)
    G = rec.per_sample_gradients(losses, create_graph=create_graph)
    parameters = parameters_of(model)
    v, w = random_like(parameters), torch.randn(4, dtype=torch.float64)
    flat_v = torch.cat([t.flatten() for t in v.values()])
    if not create_graph:
        losses.mean().backward()  # G outlives the graph
    for subset, index in ((G, slice(None)), (G[1:3], slice(1, 3)), (G[[3, 0]], [3, 0]), (G[2], slice(2, 3))):
        D, u = dense[index], w[index]
        assert subset.shape == tuple(D.shape)
        check(subset.sq_norms().detach(), D.square().sum(1))
        check(subset.deviation_sq_norms().detach(), (D - D.mean(0)).square().sum(1))
        check(subset.deviation_sq_norms(center=v).detach(), (D - flat_v).square().sum(1))
        check(subset.deviation_sq_norms(flat_v).detach(), (D - flat_v).square().sum(1))
        check(subset.covariance_trace().detach(), (D - D.mean(0)).square().sum(1).mean())
        if len(D) > 1:
            check(subset.covariance_trace(unbiased=True).detach(), D.var(0).sum())
        check((subset @ v).detach(), D @ flat_v)
        check((subset @ flat_v).detach(), D @ flat_v)
        check(subset.gram().detach(), D @ D.T)
        check(torch.cat([t.flatten() for t in (subset.T @ u).values()]).detach(), u @ D)
        check(torch.cat([t.flatten() for t in subset.mean().values()]).detach(), D.mean(0))
        check(flat(subset.materialize()).detach(), D)
        assert subset.sq_norms().requires_grad == create_graph


def test_results_are_tensors_of_their_own():
    """What is done to one in place changes no other."""
    model, x, target = make(Residual)
    for create_graph in (False, True):
        rec, losses = recorded(model, x, target)
        G = rec.per_sample_gradients(losses, create_graph=create_graph)
        quantities = {
            "sq_norms": G.sq_norms,
            "sq_norms_by_parameter": G.sq_norms_by_parameter,
            "deviation_sq_norms": G.deviation_sq_norms,
            "covariance_trace": G.covariance_trace,
            "gram": G.gram,
            "mean": G.mean,
            "materialize": G.materialize,
            "G @ v": lambda G=G: G @ random_like(G.parameters),
            "G.T @ w": lambda G=G: G.T @ torch.ones(4, dtype=torch.float64),
        }
        before = {name: copy.deepcopy(detached(quantity())) for name, quantity in quantities.items()}
        for changed, quantity in quantities.items():
            for t in tensors_of(quantity()):
                t.mul_(0)
            for name, again in quantities.items():
                torch.testing.assert_close(detached(again()), before[name], msg=f"{name} after {changed} was changed")


def tensors_of(value):
    return list(value.values()) if isinstance(value, dict) else [value]


def detached(value):
    return [t.detach() for t in tensors_of(value)]


def test_the_matrix_yields_its_rows():
    model, x, target = make(Residual)
    _, rows = oracle(model, x, target)
    rec, losses = recorded(model, x, target)
    ours = list(rec.per_sample_gradients(losses))
    assert [row.shape for row in ours] == [(1, flat(rows).shape[1])] * 4
    check(torch.cat([flat(row.materialize()) for row in ours]), flat(rows))


@pytest.mark.parametrize("weight", [1e-25, 1e25, 1e-40])
def test_uniform_weights_of_any_size(weight):
    """Statistics are those of the g_i, where the square of the weight is out of float32's range."""
    model, x, target = make(Residual, torch.float32)
    rec, losses = recorded(model, x, target)
    expected = rec.backward(losses, center=random_like(parameters_of(model)))
    model.zero_grad()
    rec, losses = recorded(model, x, target)
    weights = torch.full((4,), weight)
    stats = rec.backward(losses, reduction=weights, center=random_like(parameters_of(model)))
    for name in ("sq_norms", "sq_mean_norm", "deviation_sq_norms", "reg2", "covariance_trace", "noise_scale"):
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=1e-4, atol=0)


def ways(model, losses_of):
    """The three ways to gradients, each as a function."""

    def backward():
        with bootgrad.record(model) as rec:
            losses = losses_of()
        rec.backward(losses)

    def matrix():
        with bootgrad.record(model) as rec:
            losses = losses_of()
        rec.per_sample_gradients(losses)

    def regularizer():
        bootgrad.GradientRegularizer(model, reg1=0.1).backward(losses_of)

    return backward, matrix, regularizer


@pytest.mark.parametrize("batch", [1, 4])
def test_parameters_with_hooks_are_refused_on_every_way(batch):
    model, x, target = make(Residual, batch=batch)
    model.second.weight.register_hook(lambda g: 10 * g)
    for way in ways(model, lambda: loss_of(model(x), target)):
        with pytest.raises(UnsupportedError, match="second.weight has a gradient hook"):
            way()
    assert all(p.grad is None for p in model.parameters())


def test_complex_parameters_are_refused():
    model = nn.Linear(3, 2, dtype=torch.complex64)
    for way in ways(model, lambda: model(torch.randn(4, 3, dtype=torch.complex64)).abs().square().sum(1)):
        with pytest.raises(UnsupportedError, match="weight is complex"):
            way()


@pytest.mark.parametrize("batch", [1, 4])
def test_sparse_gradients_are_refused(batch):
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    tokens = torch.randint(0, 5, (batch, 4))
    for way in ways(model, lambda: model(tokens).square().sum((1, 2))):
        with pytest.raises(UnsupportedError, match="embedding would give 0.weight a sparse gradient"):
            way()
    assert all(p.grad is None for p in model.parameters())


def test_a_released_recording_lets_go_of_the_graph():
    """And of activations, which operations without a rule hold."""
    model, tokens, target = make(Unknown)
    activations = []
    model.prelu.register_forward_hook(lambda module, args, output: activations.append(weakref.ref(args[0])))
    rec, losses = recorded(model, tokens, target)
    rec.per_sample_gradients(losses)
    assert activations[0]() is not None
    rec.backward(losses)
    del losses
    gc.collect()
    assert activations[0]() is None


def per_sample_softplus(z):
    return F.softplus(z).flatten(1).sum(1)


def second_order(model, x, target, penalty, recorded_penalty):
    """Gradients of mean loss + penalty, by the oracle and by the library."""
    parameters = list(parameters_of(model).values())
    losses, rows = oracle(model, x, target, create_graph=True)
    total = losses.mean() + penalty(flat(rows))
    expected = torch.autograd.grad(total, parameters, allow_unused=True)
    plain = torch.autograd.grad(oracle(model, x, target)[0].mean(), parameters, allow_unused=True)
    rec, losses = recorded(model, x, target)
    G = rec.per_sample_gradients(losses, create_graph=True)
    (losses.mean() + recorded_penalty(G)).backward()
    changed = 0.0
    for p, e, without in zip(parameters, expected, plain, strict=True):
        if e is None:
            assert p.grad is None or not p.grad.any()
        else:
            torch.testing.assert_close(p.grad, e, rtol=1e-9, atol=1e-9 * float(e.abs().max() + 1))
            changed += float((p.grad - (0 if without is None else without)).norm())
    assert changed > 1e-3  # the penalty does something


W = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
PENALTIES = {
    "reg1": (lambda D, c: (D - D.mean(0)).square().sum(1).mean(), lambda G, c: bootgrad.reg1(G)),
    "reg1 center": (lambda D, c: (D - c).square().sum(1).mean(), lambda G, c: bootgrad.reg1(G, center=c)),
    "reg2": (lambda D, c: (D.mean(0) - c).square().sum(), lambda G, c: bootgrad.reg2(G, center=c)),
    "norms": (lambda D, c: W @ D.square().sum(1), lambda G, c: W @ G.sq_norms()),
    "deviations": (lambda D, c: W @ (D - D.mean(0)).square().sum(1), lambda G, c: W @ G.deviation_sq_norms()),
    "jvp": (lambda D, c: (D @ c).sin().sum(), lambda G, c: (G @ c).sin().sum()),
    "weighted sum": (
        lambda D, c: ((W @ D) * c).sin().sum(),
        lambda G, c: (torch.cat([t.flatten() for t in (G.T @ W).values()]) * c).sin().sum(),
    ),
    "gram": (lambda D, c: (D @ D.T).cos().sum(), lambda G, c: G.gram().cos().sum()),
    "rows": (lambda D, c: (D * c).sin().sum(), lambda G, c: (flat(G.materialize()) * c).sin().sum()),
    "subset": (lambda D, c: D[1:3].var(0).sum(), lambda G, c: G[1:3].covariance_trace(unbiased=True)),
}


@KINDS
@pytest.mark.parametrize("penalty", PENALTIES)
def test_second_order(kind, penalty):
    model, x, target = make(kind)
    c = torch.cat([t.flatten() for t in random_like(parameters_of(model)).values()])
    theirs, ours = PENALTIES[penalty]
    second_order(model, x, target, lambda D: theirs(D, c), lambda G: ours(G, c))


@pytest.mark.parametrize("reg", ["reg1", "reg2"])
def test_losses_that_are_linear_in_every_parameter(reg):
    """Their gradients are constant, and so are the penalties."""
    model = nn.Embedding(7, 4).double()
    tokens = torch.randint(0, 7, (4, 3))
    with bootgrad.record(model) as rec:
        losses = (F.embedding(tokens, model.weight) * 2.0).sum((1, 2))
    G = rec.per_sample_gradients(losses, create_graph=True)
    penalty = bootgrad.reg1(G) if reg == "reg1" else bootgrad.reg2(G, center=torch.zeros(28, dtype=torch.float64))
    assert float(penalty.detach()) > 0
    plain = torch.autograd.grad(losses.mean(), model.weight, retain_graph=True)[0]
    (losses.mean() + penalty).backward()
    check(model.weight.grad, plain)


def test_a_recomputed_constant_has_no_gradient():
    t = torch.ones(3, requires_grad=True)
    out = recomputed(lambda t: t.detach() * 2, t)
    assert torch.autograd.grad(out.sum() + t.sum(), t)[0].tolist() == [1, 1, 1]


class Once(torch.autograd.Function):
    """x ↦ x², whose backward pass is not differentiable."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        return 2 * ctx.saved_tensors[0] * gy


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("after", [lambda z: z.flatten(1).sum(1), per_sample_softplus], ids=["linear", "smooth"])
def test_functions_that_differentiate_once_are_refused_for_penalties(batch, after):
    """The penalty's derivative would end at them, silently: between a layer and the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(batch, 3, dtype=torch.float64)

    def losses_of():
        return after(Once.apply(model(x)))

    backward, matrix, regularizer = ways(model, losses_of)
    backward()
    matrix()
    with pytest.raises(UnsupportedError, match="once_differentiable"):
        regularizer()
    with bootgrad.record(model) as rec:
        losses = losses_of()
    with pytest.raises(UnsupportedError, match="once_differentiable"):
        rec.per_sample_gradients(losses, create_graph=True)


def test_a_function_that_differentiates_once_below_every_parameter_does_no_harm():
    model = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    with bootgrad.record(model) as rec:
        losses = per_sample_softplus(model(Once.apply(x)))
    penalty = bootgrad.reg1(rec.per_sample_gradients(losses, create_graph=True))
    ours = torch.autograd.grad(penalty, x)[0]
    rows = reference.per_sample_gradients_of(
        per_sample_softplus(model(x * x)), dict(model.named_parameters()), create_graph=True
    )
    D = flat(rows)
    check(ours, torch.autograd.grad((D - D.mean(0)).square().sum(1).mean(), x)[0])


def test_long_rows_keep_their_digits():
    rows = torch.randn(2, 3_000_000)
    exact, ours = rows.double().square().sum(1), SqDistances.apply(None, rows).double()
    assert ((ours - exact).abs() <= 1e-6 * exact).all()
    assert abs(total_sq_norm(rows.unbind()) - exact.sum()) <= 1e-6 * exact.sum()


@pytest.mark.parametrize("rows", [1, 2])
def test_long_rows_do_not_depend_on_threads(rows):
    threads, values = torch.get_num_threads(), torch.randn(rows, 100_003)
    out = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out.append((SqDistances.apply(None, values), DenseTerm(values).sq_norms(), total_sq_norm([values])))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for others in out[1:] for a, b in zip(out[0], others, strict=True))


def test_distances_of_dense_rows_to_second_order():
    rows = [torch.randn(4, *s, dtype=torch.float64, requires_grad=True) for s in ((3,), (2, 2))]
    for centers in (None, [torch.randn(3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)]):
        assert torch.autograd.gradcheck(lambda *r, c=centers: SqDistances.apply(c, *r), rows)
        assert torch.autograd.gradgradcheck(lambda *r, c=centers: SqDistances.apply(c, *r), rows)
