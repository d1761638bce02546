"""Look-ups: which calls are recorded, what is refused, what is allocated, and what becomes of low precision.

Every quantity, to the second order, on models that look things up is compared with the oracle in `tests.test_quantities`, and
passes at per-sample parameters in `tests.test_per_sample_pass`; the models are `LookUps`, `Bags` and `TiedTable`.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bootgrad
from bootgrad import BootgradError, reference
from bootgrad.per_sample_pass import PerSamplePass
from bootgrad.rules.embedding import embedding_bag
from bootgrad.rules.lookup_term import LookUpTerm
from bootgrad.rules.terms import SumTerm

from ..models import Bags, LookUps, TiedTable, loss_of, make

B, T, V, D = 4, 6, 7, 4
TOKENS = torch.tensor([[0, 2, 2, 6, 1, 0], [5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 6], [6, 0, 6, 0, 3, 3]])


class Model(nn.Module):
    """A function of a table and tokens, and a layer behind it."""

    def __init__(self, function, shape=(V, D)):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(shape))
        self.layer = nn.Linear(D, 3)
        self.function = function
        self.double()

    def forward(self, tokens):
        y = self.function(self, tokens).reshape(len(tokens), -1, D)
        return self.layer(torch.tanh(y)).sin().sum((1, 2))


def recorded(model, *args):
    with bootgrad.record(model) as rec:
        losses = model(*args)
    return rec, losses


def rows_of(model, *args):
    """(B, V, D) of the table, by plain autograd."""
    return reference.per_sample_gradients_of(model(*args), {"table": model.table})["table"]


def test_a_single_sample_s_gradient_has_all_rows_that_the_losses_reach():
    """Also those that they reach outside of the recording, as one sample's may."""
    model = Model(lambda m, x: F.embedding(x, m.table))
    rec, losses = recorded(model, TOKENS[1:2])
    stats = rec.backward(losses + model.table.square().sum())
    torch.testing.assert_close(stats.sq_mean_norm, stats.sq_norms[0])


CALLS = {
    "embedding": (lambda m, x: F.embedding(x, m.table), "embedding"),
    "its padding": (lambda m, x: F.embedding(x, m.table, padding_idx=2), "embedding"),
    "padding from the end": (lambda m, x: F.embedding(x, m.table, padding_idx=-1), "embedding"),
    "by names": (lambda m, x: F.embedding(input=x, weight=m.table, padding_idx=5), "embedding"),
    "torch's": (lambda m, x: torch.embedding(m.table, x, 5), "embedding"),
    "torch's, none": (lambda m, x: torch.embedding(m.table, x, -1), "embedding"),
    "int32": (lambda m, x: F.embedding(x.int(), m.table), "embedding"),
    "index": (lambda m, x: m.table[x], "indexing"),
    "index from the end": (lambda m, x: m.table[x - V], "indexing"),
    "index, with a slice": (lambda m, x: m.table[x, :], "indexing"),
    "index, with dots": (lambda m, x: m.table[x, ...], "indexing"),
    "a row each": (lambda m, x: m.table[x[:, 0]], "indexing"),
    "index_select": (lambda m, x: m.table.index_select(0, x.flatten()), "index_select"),
    "torch's index_select": (lambda m, x: torch.index_select(m.table, dim=-2, index=x.flatten()), "index_select"),
    "merged": (lambda m, x: F.embedding(x.view(-1, 3), m.table), "embedding"),
    "a derived table": (lambda m, x: F.embedding(x, m.table.exp()), "embedding"),
    "a turned table": (lambda m, x: F.embedding(x % D, m.table.T)[..., :D], "embedding"),
    "bag": (lambda m, x: F.embedding_bag(x, m.table), "embedding_bag"),
    "bag's sum": (lambda m, x: F.embedding_bag(x, m.table, mode="sum", padding_idx=5), "embedding_bag"),
    "bag's maximum": (lambda m, x: F.embedding_bag(x, m.table, mode="max", padding_idx=-2), "embedding_bag"),
    "weighted bag": (
        lambda m, x: F.embedding_bag(x, m.table, mode="sum", per_sample_weights=x.double() - 2),
        "embedding_bag",
    ),
    "module": (
        lambda m, x: nn.EmbeddingBag.from_pretrained(m.table, freeze=False)(x) * 0 + m.table[x].sum(1),
        "indexing",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_recorded(name):
    function, expected = CALLS[name]
    model = Model(function)
    rec, losses = recorded(model, TOKENS)
    assert {o.name for o in rec.operations} == {expected, "linear"}
    stats = rec.backward(losses, retain_graph=True)
    exact = rows_of(model, TOKENS)
    torch.testing.assert_close(
        stats.per_parameter["table"].sq_norms, exact.square().sum((1, 2)), rtol=1e-12, atol=1e-13
    )
    torch.testing.assert_close(model.table.grad, exact.mean(0), rtol=1e-12, atol=1e-13)
    assert bootgrad.verify(model, model, TOKENS).ok


SHAPES = {"numbers": (V,), "matrices": (V, 2, 2)}


@pytest.mark.parametrize("shape", SHAPES)
def test_tables_of_any_dimension(shape):
    model = Model(lambda m, x: m.table[x].reshape(B, T, -1) * torch.ones(D).double(), SHAPES[shape])
    assert bootgrad.verify(model, model, TOKENS).ok


# Lengths of each sample's bags, two a sample.
LENGTHS = [0, 3, 2, 2, 5, 0, 0, 0]


@pytest.mark.parametrize(
    ("mode", "last", "padding_idx"), list(itertools.product(("sum", "mean", "max"), (False, True), (None, 5, -5)))
)
def test_ragged_bags(mode, last, padding_idx):
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    offsets, tokens = ends if last else ends[:-1], TOKENS.flatten()[: int(ends[-1])]

    def bags(m, x):
        bags = F.embedding_bag(tokens, m.table, offsets, mode=mode, include_last_offset=last, padding_idx=padding_idx)
        return bags * x[:, :2].flatten()[:, None]

    model = Model(bags)
    rec, losses = recorded(model, TOKENS)
    stats = rec.backward(losses, retain_graph=True)
    exact = rows_of(model, TOKENS)  # by torch's own kernels
    torch.testing.assert_close(
        stats.per_parameter["table"].sq_norms, exact.square().sum((1, 2)), rtol=1e-12, atol=1e-13
    )
    G = rec.per_sample_gradients(losses)
    torch.testing.assert_close(G.materialize()["table"], exact, rtol=1e-12, atol=1e-13)
    assert not exact[3].any()  # a sample of empty bags
    assert bootgrad.verify(model, model, TOKENS).ok


@pytest.mark.parametrize(("mode", "padding_idx"), list(itertools.product(("sum", "mean", "max"), (None, 5, -5))))
def test_bags_written_out_are_torch_s(mode, padding_idx):
    table = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    for args in ((TOKENS, table), (TOKENS.flatten(), table, torch.tensor([0, 3, 3, 20, 24]))):
        options = dict(mode=mode, padding_idx=padding_idx)
        if mode == "sum":
            options["per_sample_weights"] = torch.randn(args[0].shape, dtype=torch.float64, requires_grad=True)
        ours, expected = embedding_bag(*args, **options), F.embedding_bag(*args, **options)
        torch.testing.assert_close(ours, expected)
        inputs = [table, *(t for t in options.values() if isinstance(t, torch.Tensor))]
        gy = torch.randn_like(ours)
        torch.testing.assert_close(torch.autograd.grad(ours, inputs, gy), torch.autograd.grad(expected, inputs, gy))


NO_LOOK_UPS = {
    "positions": lambda m, x: F.embedding(torch.arange(T), m.table) * x[..., None],
    "indexed positions": lambda m, x: m.table[torch.arange(T)] * x[..., None],
    "one row": lambda m, x: m.table[3] * x[..., None],
    "a bag of positions": lambda m, x: F.embedding_bag(torch.arange(T)[None], m.table) * x[..., None],
}


@pytest.mark.parametrize("name", NO_LOOK_UPS)
def test_constant_indices_are_functions_of_parameters(name):
    model = Model(NO_LOOK_UPS[name])
    rec, _ = recorded(model, TOKENS)
    assert not {o.name for o in rec.operations} & {"embedding", "indexing", "embedding_bag"}
    assert bootgrad.verify(model, model, TOKENS).ok


@pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")
def test_other_indices_are_right_without_the_rule():
    for function in (
        lambda m, x: torch.take(m.table, x)[..., None].expand(B, T, D),
        lambda m, x: m.table[x, 2][..., None].expand(B, T, D),
        lambda m, x: m.table[x, x % D][..., None].expand(B, T, D),
    ):
        model = Model(function)
        rec, _ = recorded(model, TOKENS)
        assert not {o.name for o in rec.operations} & {"indexing", "index_select"}
        assert bootgrad.verify(model, model, TOKENS).ok


def weights_of_a_batch(m, x):
    return F.embedding_bag(x, m.table.detach(), mode="sum", per_sample_weights=m.table[:B].repeat(1, 2)[:, :T])


REFUSED = {
    "max_norm": (
        lambda m, x: F.embedding(x, m.table, max_norm=0.5),
        "max_norm changes rows of table in place .* renorm",
    ),
    "max_norm of bags": (
        lambda m, x: F.embedding_bag(x, m.table, max_norm=0.5),
        "embedding_bag with max_norm changes rows",
    ),
    "frequencies": (lambda m, x: F.embedding(x, m.table, scale_grad_by_freq=True), "depend on other samples .* leave"),
    "frequencies, torch's": (lambda m, x: torch.embedding(m.table, x, -1, True), "embedding with scale_grad_by_freq"),
    "frequencies in bags": (
        lambda m, x: F.embedding_bag(x, m.table, scale_grad_by_freq=True),
        "embedding_bag with scale_grad_by_freq divides the gradient of table",
    ),
    "sparse": (lambda m, x: F.embedding(x, m.table, sparse=True), "embedding would give table a sparse gradient"),
    "sparse bags": (
        lambda m, x: F.embedding_bag(x, m.table, mode="sum", sparse=True),
        "embedding_bag would give table a sp",
    ),
    "weights of a batch": (
        weights_of_a_batch,
        r"embedding_bag takes table as per_sample_weights, .* weights\[tokens\]",
    ),
    "batch behind": (
        lambda m, x: F.embedding(x.T, m.table).movedim(1, 0),
        "puts out 6 rows in dimension 0 for 4 losses",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, message = REFUSED[name]
    model = Model(function)
    before = model.table.detach().clone()
    with pytest.raises(BootgradError, match=message):
        rec, losses = recorded(model, TOKENS)
        rec.backward(losses)
    assert model.table.grad is None and torch.equal(model.table, before)


def test_what_torch_refuses_is_refused():
    for function, error in (
        (lambda m, x: F.embedding(x + 5, m.table), IndexError),
        (lambda m, x: m.table[x - 8], IndexError),
        (lambda m, x: F.embedding(x, m.table, padding_idx=V), AssertionError),
        (lambda m, x: F.embedding_bag(x, m.table, torch.tensor([0, 2])), ValueError),
        (lambda m, x: F.embedding_bag(x.flatten(), m.table), ValueError),
        (lambda m, x: F.embedding_bag(x, m.table, mode="median"), ValueError),
        (lambda m, x: F.embedding_bag(x, m.table, mode="mean", per_sample_weights=x.double()), NotImplementedError),
    ):
        with pytest.raises(error):
            recorded(Model(function), TOKENS)


def test_samples_that_share_their_tokens_are_coupled():
    model = Model(lambda m, x: F.embedding(x, m.table) + F.embedding(x.flip(0), m.table))
    assert bootgrad.verify(model, model, TOKENS).ok
    mixed = Model(lambda m, x: (y := F.embedding(x, m.table)) + y.flip(0))
    rec, losses = recorded(mixed, TOKENS)
    with pytest.raises(BootgradError, match="samples are coupled after embedding"):
        rec.backward(losses)


def test_outputs_and_tokens_may_be_changed_in_place():
    def function(m, x):
        tokens = x.clone()
        y = F.embedding(tokens, m.table)
        tokens.zero_()
        y *= 2
        y += 1
        return y.view(B, -1).mul_(3)

    model = Model(function)
    rec, losses = recorded(model, TOKENS)
    stats = rec.backward(losses)
    exact = rows_of(Model(lambda m, x: (F.embedding(x, m.table) * 2 + 1) * 3), TOKENS)
    torch.testing.assert_close(stats.per_parameter["table"].sq_norms, exact.square().sum((1, 2)))


@pytest.mark.parametrize("kind", [LookUps, Bags, TiedTable], ids=lambda k: k.__name__)
def test_one_sample(kind):
    """As plain autograd, and twice, where torch itself cannot."""
    model, x, target = make(kind, batch=1)
    parameters = dict(model.named_parameters())
    with bootgrad.rules.stand_ins.StandIns():
        losses = loss_of(model(x), target)
    rows = reference.per_sample_gradients_of(losses, parameters, create_graph=True)
    s = torch.stack([g.square().sum() for g in rows.values()]).sum()
    expected = torch.autograd.grad(s, list(parameters.values()))
    with bootgrad.record(model) as rec:
        losses = loss_of(model(x), target)
    G = rec.per_sample_gradients(losses, create_graph=True)
    torch.testing.assert_close(G.sq_norms().sum(), s)
    torch.testing.assert_close(torch.autograd.grad(G.sq_norms().sum(), list(parameters.values())), expected)


@pytest.mark.parametrize("chunk", [1, 400, 2**26])
def test_gram_and_inner_products_in_chunks(monkeypatch, chunk):
    monkeypatch.setattr("bootgrad.rules.lookup_term.CHUNK_BYTES", chunk)
    for kind in (LookUps, TiedTable, Bags):
        model, x, target = make(kind)
        rows = reference.per_sample_gradients_of(loss_of(model(x), target), dict(model.named_parameters()))
        dense = torch.cat([g.flatten(1) for g in rows.values()], 1)
        with bootgrad.record(model) as rec:
            losses = loss_of(model(x), target)
        G = rec.per_sample_gradients(losses, create_graph=True)
        torch.testing.assert_close(G.gram().detach(), dense @ dense.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(G.sq_norms().detach(), dense.square().sum(1), rtol=1e-10, atol=1e-12)
        kept = torch.autograd.grad(G.sq_norms().sum(), model.head.weight, retain_graph=True)
        monkeypatch.setattr("bootgrad.rules.lookup_term.CHUNK_BYTES", 2**26)
        torch.testing.assert_close(torch.autograd.grad(G.sq_norms().sum(), model.head.weight), kept)
        monkeypatch.setattr("bootgrad.rules.lookup_term.CHUNK_BYTES", chunk)


TIED = {
    "output layer": (lambda m, x: F.linear(F.embedding(x, m.table).tanh(), m.table).sin()[..., :D], True),
    "transpose": (lambda m, x: (F.embedding(x, m.table, 2).tanh() @ m.table.T).sin()[..., :D], True),
    "from the left": (lambda m, x: (m.table @ F.embedding(x, m.table).tanh().mT).mT.sin()[..., :D], True),
    "soft look-up": (lambda m, x: F.one_hot(x, V).double().cumsum(1) @ m.table + m.table[x - V], True),
    "two look-ups": (lambda m, x: F.embedding(x, m.table, 3) * F.embedding(x.flip(1), m.table, 2), True),
    "ragged and equal": (
        lambda m, x: F.embedding_bag(x.flatten(), m.table, torch.arange(B) * T).sin() + m.table[x[:, 0]],
        True,
    ),
    "bag and output layer": (lambda m, x: F.linear(F.embedding_bag(x, m.table), m.table).sin()[..., :D], True),
    "ragged and output layer": (
        lambda m, x: F.linear(F.embedding_bag(x.flatten(), m.table, torch.arange(B) * T), m.table).sin()[..., :D],
        False,
    ),
    "maximum and look-up": (lambda m, x: F.embedding_bag(x, m.table, mode="max") + m.table[x[:, 0]], False),
    "penalty": (lambda m, x: m.table[x] * (1 + m.table.square().sum()), False),
}


@pytest.mark.parametrize("name", TIED)
def test_tied_tables(name, monkeypatch):
    """By inner products where every pair of uses has one, by rows elsewhere; about a center, too."""
    function, by_products = TIED[name]
    model = Model(function)
    assert bootgrad.verify(model, model, TOKENS).ok
    made = []
    monkeypatch.setattr(SumTerm, "rows", lambda self, *a, rows=SumTerm.rows: made.append(a) or rows(self, *a))
    rec, losses = recorded(model, TOKENS)
    center = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    stats = rec.backward(losses, center=center, retain_graph=True)
    exact = rows_of(model, TOKENS)
    own = stats.per_parameter["table"]
    torch.testing.assert_close(own.sq_norms, exact.square().sum((1, 2)), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        own.deviation_sq_norms, (exact - center["table"]).square().sum((1, 2)), rtol=1e-11, atol=1e-12
    )
    assert bool(made) != by_products


def test_distances_of_tied_tables_are_not_negative_and_keep_their_derivative():
    model = Model(TIED["output layer"][0]).float()
    tokens = TOKENS[:1].repeat(64, 1)
    rec, losses = recorded(model, tokens)
    G = rec.per_sample_gradients(losses, create_graph=True)
    distances = G.deviation_sq_norms(center={n: g.detach() for n, g in G.mean().items()})
    assert (distances >= 0).all() and (distances.detach() < 1e-5 * G.sq_norms().detach()).all()
    (gradient,) = torch.autograd.grad(distances[0], model.table, retain_graph=True)
    (scale,) = torch.autograd.grad(G.sq_norms()[0], model.table)
    assert gradient.norm() < 1e-4 * scale.norm()


# Memory.


class Sizes(TorchDispatchMode):
    """The number of entries of whatever operations return anew."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for t in results if isinstance(results, tuple | list) else (results,):
            if isinstance(t, torch.Tensor) and not func.is_view and not func._schema.is_mutable and t.numel():
                if t.untyped_storage().nbytes() >= t.numel() * t.element_size():
                    self.found.append((t.numel(), str(func)))
        return results

    def at_least(self, entries):
        return [found for found in self.found if found[0] >= entries]


LARGE = 200_000


@pytest.mark.parametrize(
    "look_up",
    [
        lambda m, x: F.embedding(x, m.table),
        lambda m, x: m.table[x],
        lambda m, x: F.embedding_bag(x, m.table),
        lambda m, x: F.embedding_bag(x, m.table, mode="max"),
    ],
    ids=["embedding", "indexing", "bag", "maximum"],
)
def test_statistics_make_nothing_of_the_table_s_size_but_its_gradient(look_up):
    model = Model(look_up, (LARGE, D)).float()
    tokens = torch.randint(0, LARGE, (B, T))
    for reduction in ("mean", "sum"):
        rec, losses = recorded(model, tokens)
        with Sizes() as sizes:
            stats = rec.backward(losses, reduction=reduction)
        assert [name for _, name in sizes.at_least(LARGE)] == ["bootgrad.embedding_weighted_sum.default"]
        model.zero_grad()
    rec, losses = recorded(model, tokens)
    with Sizes() as sizes:
        norms = rec.per_sample_gradients(losses).sq_norms()
        rec.per_sample_gradients(losses).gram()
    assert not sizes.at_least(LARGE)
    torch.testing.assert_close(norms, stats.sq_norms)


@pytest.mark.parametrize("look_up", ["output layer", "transpose", "two look-ups"])
def test_penalties_hold_no_table_for_each_sample(look_up):
    model = Model(TIED[look_up][0], (2000, D)).float()
    tokens = torch.randint(0, 2000, (B, T))
    for method in ("exact", "finite_difference"):
        if method == "finite_difference":
            model.function = lambda m, x: F.embedding(x, m.table)
        reg = bootgrad.GradientRegularizer(
            model, method=method, reg1=0.1, center="zero" if method == "exact" else "batch_mean"
        )
        with Sizes() as sizes:
            reg.backward(model, tokens)
        # Activations of the output layer are B·T·V, and a table is V·D.
        assert not [found for found in sizes.at_least(B * 2000 * D) if found[0] not in (B * T * 2000,)]


# Passes at per-sample parameters.


def test_a_moved_pass_may_look_up_other_tokens():
    """The rows of a sample's gradient are those of the first pass' tokens."""
    others = TOKENS.flip(1).roll(1, 0)
    of_calls = ("its padding", "bag", "bag's sum", "bag's maximum", "weighted bag")
    of_tied = ("output layer", "two look-ups", "bag and output layer", "maximum and look-up")
    for look_up in (*(CALLS[name][0] for name in of_calls), *(TIED[name][0] for name in of_tied)):
        model = Model(look_up)
        rows = reference.per_sample_gradients_of(model(TOKENS), dict(model.named_parameters()))
        rec, losses = recorded(model, TOKENS)
        with PerSamplePass(rec.per_sample_gradients(losses), 0.3):
            moved = model(others)
        grads = torch.autograd.grad(moved.sum(), list(model.parameters()))
        expected, sums = [], [torch.zeros_like(p) for p in model.parameters()]
        for i in range(B):
            own = copy.deepcopy(model)
            with torch.no_grad():
                for name, p in own.named_parameters():
                    p += 0.3 * rows[name][i]
            loss = own(others[i : i + 1]).sum()
            expected.append(loss.detach())
            for total, g in zip(sums, torch.autograd.grad(loss, list(own.parameters())), strict=True):
                total += g
        torch.testing.assert_close(moved.detach(), torch.stack(expected), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(list(grads), sums, rtol=1e-10, atol=1e-12)


def test_a_moved_table_is_not_held_for_each_sample():
    model = Model(CALLS["embedding"][0], (LARGE, D))
    tokens = torch.randint(0, LARGE, (B, T))
    rec, losses = recorded(model, tokens)
    G = rec.per_sample_gradients(losses)
    with Sizes() as sizes:
        with PerSamplePass(G, 0.3):
            moved = model(tokens)
        moved.sum().backward()
    assert len(sizes.at_least(LARGE)) <= 1  # the gradient


@pytest.mark.parametrize("kind", [LookUps, Bags, "output layer", "ragged and equal"], ids=str)
def test_methods_agree(kind):
    if isinstance(kind, str):  # without padding, whose value is detached: finite differences move it in a tied table
        model, x = Model(TIED[kind][0]), TOKENS
        losses = model
    else:
        model, x, target = make(kind)
        losses = lambda x: loss_of(model(x), target)  # noqa: E731
    grads = {}
    for method in ("exact", "finite_difference"):
        model.zero_grad()
        report = bootgrad.GradientRegularizer(model, method=method, reg1=0.1).backward(losses, x)
        grads[method] = torch.cat([p.grad.flatten() for p in model.parameters()]), report.reg1
    exact, finite = grads.values()
    assert (exact[0] - finite[0]).norm() < 1e-3 * exact[0].norm()
    torch.testing.assert_close(exact[1], finite[1], check_dtype=False)


@pytest.mark.parametrize("derivative", ["exact", "finite_difference"])
def test_random_signs_need_the_second_derivative_of_bags(derivative):
    model, x, target = make(Bags)
    reg = bootgrad.GradientRegularizer(model, method="random_signs", derivative=derivative, reg1=0.1)
    reg.backward(lambda x, target: loss_of(model(x), target), x, target)
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("look_up", ["embedding", "bag", "bag's maximum", "index"])
def test_half_precision(dtype, look_up):
    model = Model(CALLS[look_up][0])
    half = copy.deepcopy(model).to(dtype)
    double = copy.deepcopy(half).double()
    rec, losses = recorded(half, TOKENS)
    stats = rec.backward(losses)
    exact = rows_of(double, TOKENS)
    own = stats.per_parameter["table"]
    assert own.sq_norms.dtype == torch.float32 and half.table.grad.dtype == dtype
    torch.testing.assert_close(own.sq_norms.double(), exact.square().sum((1, 2)), rtol=5e-2, atol=1e-3)
    assert (half.table.grad.double() - exact.mean(0)).norm() < 2e-2 * exact.mean(0).norm()
    rec, losses = recorded(half, TOKENS)
    bootgrad.reg1(rec.per_sample_gradients(losses, create_graph=True)).backward()
    assert half.table.grad.isfinite().all()


def test_a_frequent_token_s_gradient_does_not_stagnate():
    """4000 times one is 4000: added up in bfloat16, it comes to rest at 256."""
    table = nn.Embedding(3, 2).bfloat16()
    tokens = torch.zeros(4, 1000, dtype=torch.long)
    with bootgrad.record(table) as rec:
        losses = table(tokens).float().sum((1, 2))
    stats = rec.backward(losses, reduction="sum")
    assert table.weight.grad[0].tolist() == [4000, 4000]
    torch.testing.assert_close(stats.sq_norms, torch.full((4,), 2e6))
    torch.testing.assert_close(stats.covariance_trace, torch.zeros(()), rtol=0, atol=1.0)


def test_float32_of_many_look_ups():
    """Norms to 1e-6 of float64's, given the same gy, where a token is met thousands of times."""
    torch.manual_seed(0)
    tokens, gy = torch.randint(0, 5, (2, 20_000)), torch.rand(2, 20_000, 3)
    table = nn.Embedding(5, 3)
    with bootgrad.record(table) as rec:
        losses = (table(tokens) * gy).sum((1, 2))
    stats = rec.backward(losses)
    exact = torch.stack(
        [torch.zeros(5, 3).double().index_add(0, t, g.double()) for t, g in zip(tokens, gy, strict=True)]
    )
    torch.testing.assert_close(stats.sq_norms.double(), exact.square().sum((1, 2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("look_up", [CALLS["embedding"][0], TIED["output layer"][0]], ids=["embedding", "tied"])
def test_autocast(look_up):
    model = Model(look_up).float()
    with torch.autocast("cpu", torch.bfloat16), bootgrad.record(model) as rec:
        losses = model(TOKENS)
    stats = rec.backward(losses.float(), reduction="sum")
    exact = rows_of(copy.deepcopy(model).double(), TOKENS)
    assert model.table.grad.dtype == torch.float32
    torch.testing.assert_close(
        stats.per_parameter["table"].sq_norms.double(), exact.square().sum((1, 2)), rtol=5e-2, atol=0
    )


def test_the_plan_knows_what_look_ups_hold():
    model = Model(CALLS["embedding"][0], (LARGE, D)).float()
    plan = bootgrad.plan(model, TOKENS)
    assert {other.name: other.bytes for other in plan.others}["embedding"] == B * T * (D * 4 + 8)


def test_terms_are_look_ups():
    """No table for a sample is behind the right numbers above."""
    for kind, names in (
        (LookUps, ("padded.weight", "merged.weight", "indexed", "selected")),
        (Bags, ("sums", "means", "maxima")),
    ):
        model, x, target = make(kind)
        with bootgrad.record(model) as rec:
            losses = loss_of(model(x), target)
        terms = rec.per_sample_gradients(losses)._terms
        assert all(isinstance(terms[name], LookUpTerm) for name in names)
