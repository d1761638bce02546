"""Rows that are in no order of the samples, of which gradients tell whose they are, against the oracle."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bootgrad
from bootgrad.errors import UnsupportedError
from bootgrad.graph import unlike
from bootgrad.rules.samples import Reading

from .oracle import Oracle, record
from .quantities import Case, deviation, norms, products, second_order, transposed_products
from .test_samples import Stack, by_index, smooth

B, D = 4, 6  # samples, features
SHUFFLED = torch.tensor([3, 0, 1, 2, 2, 0, 1, 3])
UNLIKE = torch.tensor([2, 0, 0, 1, 2, 3, 0, 2, 2])


class Images(nn.Module):
    """A convolution, a group norm and a head, on images of which several are one sample's."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.gelu(self.norm(self.conv(x))).mean((2, 3)))


class Words(nn.Module):
    """Embeddings of words in one row, and a scale."""

    def __init__(self):
        super().__init__()
        self.words, self.scale = nn.Embedding(7, D), nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x):
        return self.words(x).sin() * self.scale


class Experts(nn.Module):
    """A mixture of experts: each of a sample's tokens goes to those that its own features choose."""

    def __init__(self, experts=3, chosen=2):
        super().__init__()
        self.chosen = chosen
        self.router, self.inside = nn.Linear(D, experts), nn.Linear(D, D)
        self.up, self.bias = nn.Parameter(torch.randn(experts, 5, D) / 2), nn.Parameter(torch.randn(experts, 5))
        self.down = nn.ParameterList([nn.Parameter(torch.randn(D, 5) / 2) for _ in range(experts)])

    def forward(self, x):  # (B, T, D)
        tokens = self.inside(x).flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(1).topk(self.chosen)
        out = torch.zeros_like(tokens)
        for number in range(len(self.up)):  # one may have no tokens
            place, slot = torch.where(chosen == number)
            y = F.gelu(F.linear(tokens[place], self.up[number], self.bias[number])) @ self.down[number].t()
            out = out.index_add(0, place, y * weights[place, slot, None])
        return out.view(x.shape)


class SortedExperts(nn.Module):
    """A mixture of experts, each of which is handed its tokens in one piece; one has none, and the last tokens have none."""

    def __init__(self):
        super().__init__()
        self.inside, self.up = nn.Linear(D, D), nn.Parameter(torch.randn(4, D, 5) / 2)

    def forward(self, x):
        return self.run(x, F.grouped_mm)

    def plain(self, x):
        return self.run(
            x, lambda a, w, offs: torch.cat([y @ w for y, w in zip(a.tensor_split(offs.long()), w, strict=False)])
        )

    def run(self, x, multiply):
        tokens = self.inside(x).flatten(0, 1)
        order = tokens.detach()[:, 0].argsort()
        ends = torch.tensor([3, 3, 8, 10], dtype=torch.int32)
        y = multiply(tokens[order], self.up, offs=ends)[:10]
        return y.new_zeros(len(tokens), 5).index_add(0, order[:10], y.sin()).view(*x.shape[:2], 5)


CASES = {
    "shuffled": (lambda: Stack(), lambda: torch.randn(8, D), by_index(SHUFFLED)),
    "of unlike numbers": (lambda: Stack(), lambda: torch.randn(9, D), by_index(UNLIKE)),
    "images": (Images, lambda: torch.randn(9, 2, 4, 4), by_index(UNLIKE)),
    "words": (Words, lambda: torch.randint(0, 7, (9,)), by_index(UNLIKE)),
    "experts": (Experts, lambda: torch.randn(B, 3, D), lambda y: smooth(y).sum((1, 2))),
    "many experts": (lambda: Experts(9, chosen=1), lambda: torch.randn(B, 2, D), lambda y: smooth(y).sum((1, 2))),
    "sorted experts": (SortedExperts, lambda: torch.randn(B, 3, D), lambda y: smooth(y).sum((1, 2))),
    "more rows than samples": (lambda: Stack(), lambda: torch.randn(7, D), lambda y: smooth(y[:B]).sum(1)),
    "pairs": (lambda: Stack(), lambda: torch.randn(2 * B, D), lambda y: smooth(y[:B] * y[B:]).sum(1)),
}


@pytest.mark.parametrize("quantity", [norms, deviation, products, transposed_products, second_order])
@pytest.mark.parametrize("name", CASES)
def test_every_quantity(name, quantity):
    make, inputs, losses_of = CASES[name]
    torch.manual_seed(0)
    model, x = make().double(), inputs()
    x = x.double() if x.is_floating_point() else x
    quantity(Case(model, [x], plain=getattr(model, "plain", None), losses_of=losses_of))


def test_another_order_in_every_step():
    """Also where an order came before that is the samples' own."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    for _ in range(7):
        x, order = torch.randn(B, 3).double(), torch.randperm(B)
        with bootgrad.record(model) as rec:
            losses = smooth(model(x))[order].sum(1)
        stats = rec.backward(losses)
        oracle = Oracle(model, lambda x=x, order=order: smooth(model(x))[order].sum(1))
        torch.testing.assert_close(stats.sq_norms, oracle.matrix.square().sum(1))


@pytest.mark.parametrize("pair", list(itertools.combinations(range(5), 2)))
def test_two_samples_in_exchange(pair):
    """From the first step on, of few samples, by weights of which no two are alike."""
    model, x, order = nn.Linear(3, 2).double(), torch.randn(5, 3).double(), list(range(5))
    order[pair[0]], order[pair[1]] = pair[::-1]
    rec, losses = record(model, lambda: smooth(model(x))[order].sum(1))
    oracle = Oracle(model, lambda: smooth(model(x))[order].sum(1))
    torch.testing.assert_close(rec.backward(losses).sq_norms, oracle.matrix.square().sum(1))


@pytest.mark.parametrize("seed", range(8))
def test_experts_of_few_samples_in_many_steps(seed):
    """Where an expert's tokens are as many as the samples, and look like theirs under weights of which some are alike."""
    torch.manual_seed(seed)
    model = Experts(3, chosen=1).double()
    for _ in range(12):
        x = 2 * torch.randn(B, 3, D).double()
        rec, losses = record(model, lambda x=x: smooth(model(x)).sum((1, 2)))
        oracle = Oracle(model, lambda x=x: smooth(model(x)).sum((1, 2)))
        torch.testing.assert_close(rec.backward(losses).sq_norms, oracle.matrix.square().sum(1))


def shared(y):
    """Each loss of two rows, and each row in two losses."""
    return smooth(y).sum(1) + smooth(y.roll(1, 0)).sum(1)


@pytest.mark.parametrize(
    ("rows", "losses_of", "message"),
    [
        (B, shared, "samples are coupled after linear"),
        (B + 1, lambda y: shared(y)[:B], "puts out 5 rows in dimension 0 for 4 losses"),
        (2, lambda y: torch.cat([smooth(y).sum(1), y.sum(1).cos()]), "puts out 2 rows in dimension 0 for 4 losses"),
    ],
)
def test_rows_of_several_samples_are_refused(rows, losses_of, message):
    model = nn.Linear(3, 2).double()
    rec, losses = record(model, lambda: losses_of(model(torch.randn(rows, 3).double())))
    with pytest.raises(UnsupportedError, match=message):
        rec.backward(losses)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("pair", list(itertools.combinations(range(8), 2)))
def test_one_row_of_two_samples_is_refused(pair):
    """Also where its gradient scales as if it were a third sample's."""
    model, x = nn.Linear(3, 2).double(), torch.randn(9, 3).double()
    both = torch.zeros(8).double().index_fill(0, torch.tensor(pair), 1)
    rec, losses = record(model, lambda: smooth(model(x)[:8]).sum(1) + both * smooth(model(x)[8]).sum())
    with pytest.raises(UnsupportedError, match="samples are coupled|puts out 9 rows"):
        rec.backward(losses)


def test_rows_without_a_gradient_take_no_room():
    """As dropped tokens: no sample has them all."""
    a = unlike(4, 1)
    owners = torch.tensor([1, 0, 3, 2])
    norms = torch.tensor([0.0, 0, 2, 0, 1, 3, 0, 0, 0, 0, 0, 4])
    weights = torch.zeros(12).index_copy(0, norms.nonzero().squeeze(1), a[owners])
    reading = Reading.told(norms, norms * weights, a)
    assert reading.owner[norms > 0].tolist() == owners.tolist()
    assert reading.data(norms).shape == (4, 3)


def test_rows_whose_gradient_is_zero_here_alone_have_no_penalties():
    """Norms have no part of them, but the norms' derivative has one, and it would be of any sample."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double(), torch.randn(9, 3).double()
    targets = model(x).detach() + torch.tensor([1.0, 1, 1, 0, 1, 1, 0, 1, 1])[:, None]

    def run():
        return torch.zeros(B).double().index_add(0, UNLIKE, (model(x) - targets).square().sum(1))

    oracle = Oracle(model, run)
    rec, losses = record(model, run)
    torch.testing.assert_close(rec.backward(losses).sq_norms, oracle.matrix.square().sum(1))
    reg = bootgrad.GradientRegularizer(model, reg1=0.1)
    model.zero_grad()
    with pytest.raises(UnsupportedError, match="have no gradient here, .*by record"):
        reg.backward(run)
    assert all(p.grad is None for p in model.parameters())
    with reg.record(samples=UNLIKE):
        losses = run()
    reg.backward(losses)
    expected = oracle.gradient(oracle.losses.mean() + 0.1 * oracle.reg1())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_what_cannot_be_told_is_refused():
    """Without a check, and where more samples are to be told apart than half precision can."""
    model, x = nn.Linear(3, 2), torch.randn(41, 3)
    with bootgrad.record(model, check="never") as rec:
        losses = smooth(model(x)).sum(1)[:40]
    with pytest.raises(UnsupportedError, match="puts out 41 rows"):
        rec.backward(losses)
    model.bfloat16()
    with bootgrad.record(model) as rec:
        losses = smooth(model(x.bfloat16())).float().sum(1)[:40]
    with pytest.raises(UnsupportedError, match="puts out 41 rows"):
        rec.backward(losses)


def test_a_pass_at_parameters_of_each_sample_is_refused():
    """For there rows have to be in the order of the samples."""
    model, x = Stack().double(), torch.randn(8, D).double()
    reg = bootgrad.GradientRegularizer(model, reg1=0.1, method="finite_difference")
    with pytest.raises(UnsupportedError, match="or of rows in another order"):
        reg.backward(lambda: CASES["shuffled"][2](model(x)))
    assert all(p.grad is None for p in model.parameters())
