"""Samples in other places than dimension 0, as an index says, against the oracle."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bootgrad
from bootgrad.batch_check import BatchCheck
from bootgrad.per_sample_pass import PerSamplePass
from bootgrad.rules.base import ProductOperation
from bootgrad.rules.samples import Reading, Samples

from .oracle import Oracle, record
from .quantities import Case, deviation, norms, products, second_order, transposed_products

QUANTITIES = [norms, deviation, products, transposed_products, second_order]
B, D = 4, 6  # samples, features


def case(model, inputs, index, losses_of):
    return Case(model.double(), inputs, losses_of=losses_of, samples=index)


def smooth(y):
    return y.sin() + y.square() / 3


def by_index(index, samples=B):
    """Losses (B,): the sums over the positions of each sample."""

    def losses_of(y):
        rows = smooth(y.flatten(0, index.dim() - 1)).flatten(1).sum(1)
        return rows.new_zeros(samples).index_add(0, index.flatten(), rows)

    return losses_of


class Stack(nn.Module):
    """Layers of each kind that work on positions: products, norms, parameters that are broadcast, and one without a rule."""

    def __init__(self, *positions):
        super().__init__()
        self.first, self.second = nn.Linear(D, 5), nn.Linear(5, D)
        self.norm, self.rms = nn.LayerNorm(D), nn.RMSNorm(5)
        self.scale, self.positions = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.randn(*positions, D))

    def forward(self, x):
        x = self.rms(F.gelu(self.first(x * self.scale + self.positions)))
        return self.norm(self.second(x)) + self.second(x)


class Attention(nn.Module):
    """Self-attention that sees the same document, and a head."""

    def __init__(self, mask):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mask = mask

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.mT).masked_fill(~self.mask, float("-inf"))
        return self.out(scores.softmax(-1) @ v)


class Pooled(nn.Module):
    """(T, B, D): layers of positions, the mean over them, and a head on samples."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.head = nn.Embedding(7, D), nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.first(self.embedding(tokens))).mean(0))


class LookUps(nn.Module):
    """Look-ups in two tables, one of which is the head's weight, too."""

    def __init__(self):
        super().__init__()
        self.tokens, self.padded, self.head = nn.Embedding(7, D), nn.Embedding(7, D, padding_idx=1), nn.Linear(D, 7)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.tokens(tokens) * self.padded(tokens)))


class Bags(nn.Module):
    """Bags of which several are of a sample."""

    def __init__(self):
        super().__init__()
        self.maxima, self.head = nn.EmbeddingBag(7, D, mode="max"), nn.Linear(D, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.maxima(tokens)))


class OwnBags(nn.Module):
    """A bag of each sample's, of both other kinds."""

    def __init__(self):
        super().__init__()
        self.sums, self.means = (nn.EmbeddingBag(7, D, mode=mode, padding_idx=2) for mode in ("sum", "mean"))

    def forward(self, tokens):
        return self.sums(tokens, per_sample_weights=tokens.double() - 2) * self.means(tokens)


class Beside(nn.Module):
    """Features that all positions share, beside their own."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Parameter(torch.randn(2)), nn.Linear(D + 2, 3)

    def forward(self, x):
        return self.head(torch.cat([x, self.shared.expand(*x.shape[:-1], 2)], -1).tanh())


class Images(nn.Module):
    """Images, several of a user."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.down = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 2, 2)
        self.up, self.head, self.slope = nn.ConvTranspose2d(4, 3, 2, 2), nn.Linear(3, 3), nn.PReLU(3)
        self.fixed = nn.BatchNorm2d(4).eval()

    def forward(self, x):
        x = self.fixed(self.down(torch.relu(self.norm(self.conv(x)))))
        return self.head(self.slope(self.up(x)).mean((2, 3)))


def encoder(batch_first=False):
    layer = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, activation="gelu", batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def x(*shape):
    return torch.randn(*shape, D, dtype=torch.float64)


def over_steps(y):
    return smooth(y).sum((0, 2))


def same_document(index):
    return index[:, :, None] == index[:, None, :]


def sequence_first(T):
    return torch.arange(B).expand(T, B)


RAGGED = torch.tensor([[0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 3]])
SHUFFLED = torch.tensor([2, 0, 1, 1, 3, 0, 2, 1, 0, 3, 2, 3])  # three of each, and out of order
EMPTY = torch.tensor([[0, 3, 3, 1, 0]])  # sample 2 has no position
TOKENS = torch.arange(4).view(2, 2)
ROWS = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 3]])  # documents in two rows


def cases():
    yield "sequence first", lambda: case(Stack(1, 1), [x(5, B)], sequence_first(5), over_steps)
    yield "steps of its own", lambda: case(Stack(5, 1), [x(5, B)], sequence_first(5), over_steps)
    yield "beside others", lambda: case(Beside(), [x(5, B)], sequence_first(5), over_steps)
    yield "as many steps as samples", lambda: case(Stack(B, 1), [x(B, B)], sequence_first(B), over_steps)
    yield "twice as many steps", lambda: case(Stack(2 * B, 1), [x(2 * B, B)], sequence_first(2 * B), over_steps)
    yield (
        "pooled",
        lambda: case(Pooled(), [torch.randint(7, (5, B))], sequence_first(5), lambda y: smooth(y).sum(1)),
    )
    yield "look-ups of packed tokens", lambda: case(LookUps(), [torch.randint(7, (1, 11))], RAGGED, by_index(RAGGED))
    yield "look-ups by user", lambda: case(LookUps(), [torch.randint(7, (12, 3))], SHUFFLED, by_index(SHUFFLED))
    yield "bags", lambda: case(Bags(), [torch.randint(7, (11, 3))], RAGGED[0], by_index(RAGGED[0]))
    yield "a bag each", lambda: case(OwnBags(), [torch.randint(7, (B, 3))], torch.arange(B), by_index(torch.arange(B)))
    yield "encoder", lambda: case(encoder(), [x(5, B)], sequence_first(5), over_steps)
    yield "encoder, T = B", lambda: case(encoder(), [x(B, B)], sequence_first(B), over_steps)
    yield "packed", lambda: case(Attention(same_document(RAGGED)), [x(1, 11)], RAGGED, by_index(RAGGED))
    yield (
        "packed, no batch",
        lambda: case(Attention(same_document(RAGGED)[0]), [x(11)], RAGGED[0], by_index(RAGGED[0])),
    )
    yield "packed, positions", lambda: case(Stack(1), [x(1, 11)], RAGGED, by_index(RAGGED))
    yield "as many tokens as features", lambda: case(Flattened(), [x(1, D)], RAGGED[:, 2:8], by_index(RAGGED[:, 2:8]))
    yield "packed in two rows", lambda: case(Attention(same_document(ROWS)), [x(2, 5)], ROWS, by_index(ROWS))
    yield "flattened", lambda: case(Flattened(), [x(1, 11)], RAGGED, by_index(RAGGED))
    yield "a sample without positions", lambda: case(Stack(1), [x(1, 5)], EMPTY, by_index(EMPTY))
    yield (
        "more samples than positions",
        lambda: case(Stack(1), [x(1, 2)], torch.tensor([[3, 0]]), by_index(torch.tensor([[3, 0]]))),
    )
    yield "tokens", lambda: case(Stack(2), [x(2, 2)], TOKENS, by_index(TOKENS))
    yield (
        "images",
        lambda: case(Images(), [torch.randn(12, 2, 6, 6, dtype=torch.float64)], SHUFFLED, by_index(SHUFFLED)),
    )
    yield (
        "ragged images",
        lambda: case(Images(), [torch.randn(11, 2, 6, 6, dtype=torch.float64)], RAGGED[0], by_index(RAGGED[0])),
    )
    yield "transformer", lambda: case(Transformer(), [x(3, B), x(5, B)], sequence_first(5), over_steps)
    yield "module, packed", lambda: case(SeesOwn(same_document(RAGGED)[0]), [x(11)], RAGGED[0], by_index(RAGGED[0]))
    yield (
        "module, packed in two rows",
        lambda: case(SeesOwn(same_document(ROWS)), [x(5, 2)], ROWS.mT, by_index(ROWS.mT)),
    )
    yield "without a rule", lambda: case(Repeating(), [x(1, 11)], RAGGED, by_index(RAGGED))
    yield "without a rule, sequence first", lambda: case(Repeating(), [x(5, B)], sequence_first(5), over_steps)
    yield "recurrent", lambda: case(Recurrent(), [x(5, B)], sequence_first(5), over_steps)


class Transformer(nn.Transformer):
    """Of sources and targets of unlike length."""

    def __init__(self):
        super().__init__(D, 2, 1, 1, 8, dropout=0.0, activation="gelu")


class SeesOwn(nn.Module):
    """Attention of a module of torch's in which documents see themselves alone."""

    def __init__(self, mask, batch_first=False, **options):
        super().__init__()
        self.attention, self.mask = nn.MultiheadAttention(D, 2, batch_first=batch_first, **options), mask

    def forward(self, x):
        mask = self.mask if self.mask.dim() == 2 else self.mask.repeat_interleave(2, 0)  # for each head
        return self.attention(x, x, x, attn_mask=~mask)[0]


class Repeating(nn.Module):
    """An operation that no rule knows, in the place of a linear layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x):
        return torch.tensordot(x, self.weight, 1)


class Flattened(Stack):
    """(1, N, D) as (N, D)."""

    def __init__(self):
        super().__init__(1)

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.lstm = nn.Linear(D, D), bootgrad.replace_rnn(nn.LSTM(D, 3))

    def forward(self, x):
        return self.lstm(self.first(x))[0]


CASES = dict(cases())


@pytest.mark.filterwarnings("ignore:.* has no rule", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CASES)
def test_quantities(name, quantity):
    torch.manual_seed(0)
    quantity(CASES[name]())


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        ([0, 1], bootgrad.errors.ArgumentTypeError, "long tensor, .*; got list"),
        (torch.zeros(5, 4), bootgrad.errors.ArgumentTypeError, "long tensor, .*; got torch.float32"),
        (torch.tensor(0), bootgrad.errors.ArgumentError, r"leading dimensions, and entries; got shape \(\)"),
        (torch.zeros(5, 0, dtype=torch.long), bootgrad.errors.ArgumentError, r"and entries; got shape \(5, 0\)"),
        (torch.tensor([0, -1]), bootgrad.errors.ArgumentError, "from 0 on; got -1"),
        (torch.arange(6).expand(5, 6), bootgrad.errors.ArgumentError, "from 0 to 3, as there are 4 losses, .*; got 5"),
        (torch.arange(3).expand(5, 3), bootgrad.errors.UnsupportedError, r"puts out \(5, 4, 6\): expected .* \(5, 3\)"),
        (torch.arange(4).expand(2, 4).mT, bootgrad.errors.UnsupportedError, "coupled after linear .*, or not where"),
    ],
)
def test_wrong_indices_are_errors(index, error, words):
    torch.manual_seed(0)
    model = nn.Linear(D, D)
    shape = (5, B) if not isinstance(index, torch.Tensor) or index.shape != (4, 2) else (4, 4)
    with pytest.raises(error, match=words):
        rec, losses = record(model, lambda: over_steps(model(x(*shape).float()).float().cumsum(1)), samples=index)
        rec.backward(losses)
    assert model.weight.grad is None


def test_losses_of_other_samples_than_the_index_has_are_errors():
    model = nn.Linear(D, D).double()
    rec, losses = record(model, lambda: smooth(model(x(5, B))).sum(2).flatten(), samples=sequence_first(5))
    with pytest.raises(bootgrad.errors.UnsupportedError, match="coupled after linear"):
        rec.backward(losses)


def test_gradients_are_those_of_the_losses_whatever_the_index_says():
    wrong = case(nn.Linear(D, D), [x(5, B)], sequence_first(5), lambda y: smooth(y).sum((1, 2)))  # a loss for each step
    norms(wrong)


@pytest.mark.parametrize("shape", [(5, B), (B, B), (2 * B, B)])
def test_batches_in_dimension_one_are_errors_that_say_what_to_pass(shape):
    model, data = Stack(1, 1).double(), x(*shape)
    rec, losses = record(model, lambda: over_steps(model(data)))
    with pytest.raises(bootgrad.errors.UnsupportedError) as caught:
        rec.backward(losses)
    remedy = str(caught.value).rpartition("record(model, samples=")[2][:-1]
    assert remedy == f"torch.arange({B}).expand({shape[0]}, {B})"
    norms(case(model, [data], eval(remedy), over_steps))  # noqa: S307 — as the error says


def test_tokens_that_see_each_other_are_errors():
    model, data = Attention(torch.ones(2, 2, dtype=torch.bool)).double(), x(2, 2)
    rec, losses = record(model, lambda: smooth(model(data)).sum(2).flatten(), samples=TOKENS)
    with pytest.raises(
        bootgrad.errors.UnsupportedError, match="coupled after linear .*qkv.*, or not where `samples` says"
    ):
        rec.backward(losses)


def test_documents_that_see_each_other_are_errors():
    model, data = Attention(torch.ones(11, 11, dtype=torch.bool)).double(), x(1, 11)
    rec, losses = record(model, lambda: by_index(RAGGED)(model(data)), samples=RAGGED)
    with pytest.raises(bootgrad.errors.UnsupportedError, match="coupled after linear"):
        rec.backward(losses)


def passes_of(monkeypatch, model, run, index, steps):
    """How often a step asks for norms of rows."""
    counts, plain = [], BatchCheck.row_norms
    for _ in range(steps):
        calls = []
        monkeypatch.setattr(BatchCheck, "row_norms", lambda *a: calls.append(a) or plain(*a))  # noqa: B023
        rec, losses = record(model, run, samples=index)
        rec.backward(losses)
        monkeypatch.undo()
        counts.append(len(calls))
    return counts


def test_where_shapes_are_ambiguous_the_reading_is_remembered_once_it_is_known(monkeypatch):
    model, data, silent = Stack(1, 1).double(), x(B, B), torch.zeros(B, dtype=torch.float64)
    loud = torch.ones(B, dtype=torch.float64)
    index, weights = sequence_first(B), silent

    def run():
        return over_steps(model(data)) * weights

    assert passes_of(monkeypatch, model, run, index, 3) == [3, 3, 3]  # zeros tell nothing
    weights = loud
    assert passes_of(monkeypatch, model, run, index, 3) == [
        2,
        0,
        0,
    ]  # of which the fourth step in all is checked anyway


def test_what_is_remembered_is_a_reading_and_not_how_many_others_were_unlike_it():
    """Of documents of one length, two readings are one."""

    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(D, D), nn.Linear(D, 3)

        def forward(self, x, index):  # two rows of each document's mean behind its tokens
            means = x.new_zeros(2, D).index_add(0, index[0], self.first(x).tanh()[0])
            return (
                smooth(self.second(means.repeat_interleave(2, 0) * x.new_tensor([1, 2, 1, 2])[:, None]))
                .view(2, -1)
                .sum(1)
            )

    torch.manual_seed(0)
    model = Queries().double()
    for lengths in ([1, 3], [2, 2], [3, 1]):
        index, data = torch.arange(2).repeat_interleave(torch.tensor(lengths))[None], x(1, 4)
        run = lambda data=data, index=index: model(data, index)  # noqa: E731
        rec, losses = record(model, run, samples=index)
        torch.testing.assert_close(rec.backward(losses).sq_norms, Oracle(model, run).matrix.square().sum(1))


@pytest.mark.parametrize("name", ["as many steps as samples", "encoder, T = B", "as many tokens as features"])
def test_readings_are_told_apart_where_the_first_weights_do_not(name, monkeypatch):
    monkeypatch.setattr("bootgrad.batch_check.powers_of_two", lambda batch_size, seed: torch.ones(batch_size))
    torch.manual_seed(0)
    norms(CASES[name]())


def test_index_of_unlike_samples_is_checked_in_every_step(monkeypatch):
    model, data = Stack(1).double(), x(1, 11)
    assert passes_of(monkeypatch, model, lambda: by_index(RAGGED)(model(data)), RAGGED, 3) == [2, 2, 2]


def test_ambiguous_shapes_wait_for_a_check_before_a_graph_of_kernels(monkeypatch):
    model, data = Stack(1, 1).double(), x(B, B)

    def step():
        rec, losses = record(model, lambda: over_steps(model(data)), samples=sequence_first(B))
        return rec.backward(losses).sq_norms

    monkeypatch.setattr("bootgrad.waiting.is_capturing", lambda: True)
    with pytest.raises(bootgrad.errors.UnsupportedError, match="take a step before"):
        step()
    monkeypatch.undo()
    expected = step()
    monkeypatch.setattr("bootgrad.waiting.is_capturing", lambda: True)
    torch.testing.assert_close(step(), expected, rtol=0, atol=0)


def test_losses_by_tokens_are_errors_with_both_remedies():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2)).double(), x(B, 3)
    run = lambda: smooth(model(data)).sum(-1)  # noqa: E731  # (B, 3)
    rec, losses = record(model, run)
    with pytest.raises(bootgrad.errors.ArgumentError, match=r"got \(4, 3\): reduce each") as raised:
        rec.backward(losses)
    said = str(raised.value)
    reduced, flat, recorded = (
        re.search(p, said)[0] for p in (r"losses\.\S*mean\(1\)", r"losses\.flatten\(\)", r"record\(.*")
    )
    for context, made in ("bootgrad.record(model)", reduced), (f"bootgrad.{recorded}", flat):
        expected = Oracle(model, lambda made=made: eval(made, {"losses": run()})).matrix.square().sum(1)
        with eval(context, {"bootgrad": bootgrad, "torch": torch, "model": model}) as rec:
            losses = run()
        torch.testing.assert_close(rec.backward(eval(made, {"losses": losses})).sq_norms, expected)


def test_an_index_is_taken_as_it_was():
    model, data, index = nn.Linear(D, D).double(), x(1, 11), RAGGED.clone()
    expected = Oracle(model, lambda: by_index(RAGGED)(model(data))).matrix.square().sum(1)
    rec, losses = record(model, lambda: by_index(RAGGED)(model(data)), samples=index, check="never")
    index.zero_()
    torch.testing.assert_close(rec.backward(losses).sq_norms, expected)


def test_without_a_check_the_index_is_believed():
    model, data = Stack(1, 1).double(), x(B, B)
    expected = Oracle(model, lambda: over_steps(model(data))).matrix.square().sum(1)
    rec, losses = record(model, lambda: over_steps(model(data)), samples=sequence_first(B), check="never")
    torch.testing.assert_close(rec.backward(losses).sq_norms, expected)


def test_sequences_are_transposed_without_a_copy():
    model, data = nn.Linear(D, D).double(), x(5, B)
    rec, losses = record(model, lambda: over_steps(model(data)), samples=sequence_first(5))
    ours, _ = rec.per_sample_gradients(losses)._terms["weight"].pair()
    assert ours.shape == (B, 5, D) and ours.data_ptr() == data.data_ptr()


def test_passes_at_samples_own_parameters_are_refused():
    model, data = nn.Linear(D, D).double(), x(5, B)
    rec, losses = record(model, lambda: over_steps(model(data)), samples=sequence_first(5))
    G = rec.per_sample_gradients(losses)
    with pytest.raises(bootgrad.errors.UnsupportedError, match="lay out the data samples first"):
        PerSamplePass(G[:2], 0.1, model)


def test_checkpointed_sequences():
    model, data = Stack(5, 1).double(), x(5, B)
    expected = Oracle(model, lambda: over_steps(model(data))).matrix.square().sum(1)
    run = lambda: over_steps(checkpoint(model, data, use_reentrant=False))  # noqa: E731
    rec, losses = record(model, run, samples=sequence_first(5))
    torch.testing.assert_close(rec.per_sample_gradients(losses).sq_norms(), expected)
    torch.testing.assert_close(rec.backward(losses).sq_norms, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_sequences_whose_recording_is_gone(reentrant):
    model, data = Stack(5, 1).double(), x(5, B).requires_grad_()
    expected = torch.autograd.grad(over_steps(model(data)).sum(), list(model.parameters()))
    rec, losses = record(
        model, lambda: over_steps(checkpoint(model, data, use_reentrant=reentrant)), samples=sequence_first(5)
    )
    del rec
    ours = torch.autograd.grad(losses.sum(), list(model.parameters()))
    torch.testing.assert_close(ours, expected)


def test_sequences_in_half_precision():
    model, data = encoder().float(), x(5, B).float()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y = model(data)
        return over_steps(y.float())

    expected = Oracle(model, run).matrix.square().sum(1)
    rec, losses = record(model, run, samples=sequence_first(5))
    apart = rec.backward(losses).sq_norms - expected.detach()
    assert float(apart.norm()) <= 0.02 * float(expected.detach().norm())


def test_operations_that_know_samples_first_alone_are_refused(monkeypatch):
    monkeypatch.setattr(ProductOperation, "reads_samples", False)
    model, data = nn.Linear(D, D).double(), x(5, B)
    rec, losses = record(model, lambda: over_steps(model(data)), samples=sequence_first(5))
    with pytest.raises(
        bootgrad.errors.UnsupportedError, match=r"linear \(parameter weight, bias\) is recorded with samples in"
    ):
        rec.backward(losses)


def test_bags_of_several_of_a_sample_are_refused():
    model, tokens = nn.EmbeddingBag(7, D, mode="sum").double(), torch.randint(7, (11, 3))
    rec, losses = record(model, lambda: by_index(RAGGED[0])(model(tokens)), samples=RAGGED[0])
    with pytest.raises(
        bootgrad.errors.UnsupportedError, match="embedding_bag .* is recorded with samples in dimension 0 alone"
    ):
        rec.backward(losses)


@pytest.mark.parametrize(
    ("owner", "samples", "dimension", "fixed"),
    [
        (torch.arange(4).expand(3, 4), 4, 1, True),
        (torch.arange(4)[:, None].expand(4, 3), 4, 0, True),
        (torch.arange(12).view(3, 4), 12, None, True),
        (torch.arange(4).repeat_interleave(3), 4, None, False),
        (SHUFFLED, 4, None, False),
        (RAGGED, 4, None, False),
        (EMPTY, 4, None, False),
        (torch.tensor([[3, 0]]), 5, None, False),
    ],
)
def test_readings_bring_each_sample_its_rows(owner, samples, dimension, fixed):
    reading, t = Reading(owner, samples), torch.randn(*owner.shape, 2)
    assert (reading.dimension, reading.is_fixed) == (dimension, fixed)
    for i, rows in enumerate(reading.gradients(t)):
        own = t[owner == i]
        assert torch.equal(rows[: len(own)], own) and not rows[len(own) :].any()
        assert torch.equal(reading.data(t)[i, : len(own)], own)
    a = torch.randn(samples)
    assert torch.equal(reading.weights(a), a[owner.flatten()])


def test_what_changes_along_a_dimension_alone_counts():
    samples = Samples(torch.arange(B).expand(5, B))
    for shape, dims in ((5, B, 3), 2), ((9, B), 2), ((B, 9), 1), ((B, B), 2), ((B,), 1), ((7, 7), 1):
        assert samples.leading(shape) == dims, shape
    assert [len(samples.readings(torch.Size(s), B)) for s in ((9, B), (B,), (B, B), (7,))] == [1, 1, 2, 0]
