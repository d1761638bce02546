"""Recordings of recurrent layers written out, and of cells; the oracle runs torch's own fused ones."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import bootgrad
from bootgrad import reference
from bootgrad.per_sample_pass import PerSamplePass

from .recurrent_layers import (
    CELLS,
    EACH_KIND,
    EXACT,
    IN,
    KINDS,
    LENGTHS,
    B,
    H,
    T,
    data,
    layer_of,
    losses_of,
    pack,
    replaced,
    tensors_in,
)

pytestmark = pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")


class Tagger(nn.Module):
    """A recurrent layer and a linear one on its outputs and last states."""

    def __init__(self, kind, packed=False, twice=False, **options):
        super().__init__()
        self.rnn, self.packed, self.twice = layer_of(kind, **options), packed, twice
        directions = 1 + self.rnn.bidirectional
        self.head = nn.Linear(directions * (self.rnn.proj_size or H), IN, dtype=torch.float64)

    def forward(self, x):  # (B, T, IN)
        y = self.layer(x)
        return self.head(self.layer(self.head(y).tanh()) if self.twice else y)

    def layer(self, x):
        if self.packed:
            y, last = self.rnn(pack(x))
            y = pad_packed_sequence(y, batch_first=True)[0]
        elif self.rnn.batch_first:
            y, last = self.rnn(x)
        else:
            y, last = self.rnn(x.transpose(0, 1))
            y = y.transpose(0, 1)
        return y + sum(t.sum((0, 2))[:, None, None] for t in tensors_in(last))


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def parameters_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_against_torch(fused, ours, x, losses_of=losses_of):
    """Statistics, the matrix, and the gradients of Reg1 and Reg2 of ``ours``, recorded, against the oracle on ``fused``."""
    parameters = parameters_of(fused)
    torch.manual_seed(7)
    losses = losses_of(fused, x)
    rows = reference.per_sample_gradients_of(losses, parameters, create_graph=True)
    G = reference.matrix(rows)
    center = {name: data(*p.shape) for name, p in parameters.items()}
    c = flat(center.values())

    def recorded():
        torch.manual_seed(7)
        with bootgrad.record(ours) as rec:
            losses = losses_of(ours, x)
        return rec, losses

    rec, our_losses = recorded()
    statistics = rec.backward(our_losses, center=center)
    torch.testing.assert_close(our_losses, losses, **EXACT)
    for name, p in parameters_of(ours).items():
        torch.testing.assert_close(p.grad, rows[name].mean(0), **EXACT)
        of_parameter = rows[name].flatten(1).square().sum(1)
        torch.testing.assert_close(statistics.per_parameter[name].sq_norms, of_parameter, **EXACT)
    torch.testing.assert_close(statistics.covariance_trace, reference.covariance_trace(G), **EXACT)
    torch.testing.assert_close(statistics.reg1, reference.reg1(G, c), **EXACT)
    ours.zero_grad()
    rec, our_losses = recorded()
    matrix = rec.per_sample_gradients(our_losses, create_graph=True)
    torch.testing.assert_close(flat(matrix.mean().values()), G.mean(0), **EXACT)
    torch.testing.assert_close(matrix @ center, G @ c, **EXACT)
    for penalty, expected in (
        (bootgrad.reg1(matrix), reference.reg1(G)),
        (bootgrad.reg1(matrix, center) + bootgrad.reg2(matrix, center), reference.reg1(G, c) + reference.reg2(G, c)),
    ):
        torch.testing.assert_close(penalty, expected, **EXACT)
        grads = torch.autograd.grad(penalty, list(parameters_of(ours).values()), retain_graph=True)
        of_oracle = torch.autograd.grad(expected, list(parameters.values()), retain_graph=True)
        torch.testing.assert_close(grads, of_oracle, **EXACT)


@EACH_KIND
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {},
        {"packed": True},
        {"packed": True, "num_layers": 2, "bidirectional": True, "dropout": 0.4},
        {"num_layers": 2, "dropout": 0.4, "bias": False, "batch_first": True},
        {"twice": True},
    ],
    ids=lambda options: " ".join(options) or "time first",
)
def test_recorded(kind, options):
    model = Tagger(kind, **options)
    check_against_torch(model, replaced(model), data(B, T, IN))


@EACH_KIND
@pytest.mark.parametrize("frozen", [r"weight_hh", r"weight_ih", r"bias_hh|head", r"_l0$"])
def test_recorded_with_frozen_parts(kind, frozen):
    model = Tagger(kind, num_layers=2)
    for name, p in model.named_parameters():
        p.requires_grad_(
            not any(part in name if "$" not in part else name.endswith(part[:-1]) for part in frozen.split("|"))
        )
    check_against_torch(model, replaced(model), data(B, T, IN))


class LearnedStates(nn.Module):
    """First states that are learned, or buffers, the same for every sample."""

    def __init__(self, kind, repeat, learned):
        super().__init__()
        self.rnn, self.repeat = layer_of(kind, num_layers=2, batch_first=True), repeat
        self.h = nn.Parameter(data(2, 1, self.rnn.proj_size or H), requires_grad=learned)
        if isinstance(self.rnn, nn.LSTM):
            self.register_buffer("c", data(2, 1, H))

    def forward(self, x):
        states = [self.repeat(t, len(x)) for t in (self.h, *self.buffers())]
        return self.rnn(x, states[0] if len(states) == 1 else tuple(states))[0]


REPEATS = {
    "expanded": lambda t, n: t.expand(-1, n, -1),
    "contiguous": lambda t, n: t.expand(-1, n, -1).contiguous(),
    "repeated": lambda t, n: t.repeat(1, n, 1),
    "of a function": lambda t, n: t.tanh().repeat_interleave(n, 1) * 2,
}


@EACH_KIND
@pytest.mark.parametrize("repeat", REPEATS)
@pytest.mark.parametrize("learned", [True, False])
def test_first_states_of_the_model(kind, repeat, learned):
    model = LearnedStates(kind, REPEATS[repeat], learned)
    check_against_torch(model, replaced(model), data(B, T, IN))


class Steps(nn.Module):
    """A cell in a loop, whose first input and state are learned, constants of the model, or those of the samples."""

    def __init__(self, kind, first, bias=True):
        super().__init__()
        torch.manual_seed(0)
        options = {"nonlinearity": kind} if kind in ("tanh", "relu") else {}
        self.cell, self.first = CELLS[kind](IN, H, bias=bias, **options).double(), first
        self.start = nn.Parameter(data(1, IN), requires_grad=first == "learned")
        self.h = nn.Parameter(data(1, H, seed=2), requires_grad=first == "learned")

    def forward(self, x):  # (B, T, IN)
        state, ys = None, []
        if self.first != "none":
            h = self.h.expand(len(x), -1)
            state = self.cell(self.start.repeat(len(x), 1), (h, h) if isinstance(self.cell, nn.LSTMCell) else h)
        for x_t in x.unbind(1):
            state = self.cell(x_t, state)
            ys.append(torch.cat(tensors_in(state), 1))
        return torch.stack(ys, 1)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("first", ["learned", "constant", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_are_recorded_as_they_are(kind, first, bias):
    model = Steps(kind, first, bias)
    check_against_torch(model, copy.deepcopy(model), data(B, T, IN))
    model.cell.weight_hh.requires_grad_(False)
    check_against_torch(model, copy.deepcopy(model), data(B, T, IN))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("make", [lambda kind: replaced(Tagger(kind)), lambda kind: Steps(kind, "none")])
def test_a_pass_at_the_samples_own_parameters(make, kind):
    model, x, factor = make(kind), data(B, T, IN), 0.01
    with bootgrad.record(model) as rec:
        losses = losses_of(model, x)
    G = rec.per_sample_gradients(losses)
    rows = G.materialize()
    with PerSamplePass(G, factor):
        losses = losses_of(model, x)
    parameters = parameters_of(model)
    grads = torch.autograd.grad(losses.sum(), list(parameters.values()))
    expected = []
    for i in range(B):
        displaced = {name: (p.detach() + factor * rows[name][i]).requires_grad_() for name, p in parameters.items()}
        loss = losses_of(lambda x, at=displaced: torch.func.functional_call(model, at, (x,)), x[i : i + 1])
        torch.testing.assert_close(losses[i : i + 1], loss, **EXACT)
        expected.append(torch.autograd.grad(loss.sum(), list(displaced.values())))
    torch.testing.assert_close(grads, tuple(map(sum, zip(*expected, strict=True))), **EXACT)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        *(lambda kind=kind: replaced(Tagger(kind, num_layers=2, packed=True)) for kind in KINDS),
        *(lambda kind=kind: Steps(kind, "learned") for kind in CELLS),
    ],
    ids=[*KINDS, *(f"{kind} cell" for kind in CELLS)],
)
def test_bfloat16(make, autocast):
    """Norms of a bfloat16 model, or of one under autocast, against its own in float64: 8 bits, over the steps."""
    model = make()
    exact, x = copy.deepcopy(model), data(B, T, IN)
    model = model.float() if autocast else model.bfloat16()
    with bootgrad.record(exact) as rec:
        expected = rec.backward(losses_of(exact, x)).sq_norms
    x = x.to(next(model.parameters()).dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), bootgrad.record(model) as rec:
        losses = losses_of(model, x).float()
    statistics = rec.backward(losses, retain_graph=True)
    torch.testing.assert_close(statistics.sq_norms.double(), expected, rtol=0.1, atol=0)
    plain = torch.autograd.grad(losses.mean(), list(model.parameters()))
    for p, g in zip(model.parameters(), plain, strict=True):
        assert p.grad.dtype == p.dtype and (p.grad - g).norm() <= 0.02 * g.norm()


def test_training_with_padding_is_that_of_the_oracle():
    """A tagger on sequences of several lengths: SGD with both penalties, and the same from explicit rows on torch's LSTM."""

    def losses_of(model, tokens, tags):
        logits = pad_packed_sequence(model(tokens), batch_first=True)[0]
        return F.cross_entropy(logits.transpose(1, 2), tags, reduction="none", ignore_index=-1).sum(1) / LENGTHS

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(9, IN, padding_idx=0)
            self.rnn = nn.LSTM(IN, H, num_layers=2, bidirectional=True)
            self.head = nn.Linear(2 * H, 3)
            self.double()

        def forward(self, tokens):
            packed = pack_padded_sequence(self.embed(tokens), LENGTHS, batch_first=True, enforce_sorted=False)
            y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
            return pack_padded_sequence(self.head(y), LENGTHS, batch_first=True, enforce_sorted=False)

    generator = torch.Generator().manual_seed(5)
    behind = torch.arange(T) >= LENGTHS[:, None]
    fused = Words()
    ours = replaced(fused)
    reg = bootgrad.GradientRegularizer(ours, reg1=0.1, reg2=0.2, center={"reg1": "batch_mean", "reg2": "zero"})
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (fused, ours)]
    for _ in range(4):
        tokens = torch.randint(1, 9, (B, T), generator=generator).masked_fill(behind, 0)
        tags = (tokens % 3).masked_fill(behind, -1)
        optimizers[1].zero_grad()
        report = reg.backward(lambda *batch: losses_of(ours, *batch), tokens, tags)
        losses = losses_of(fused, tokens, tags)
        G = reference.matrix(reference.per_sample_gradients_of(losses, parameters_of(fused), create_graph=True))
        total = losses.mean() + 0.1 * reference.reg1(G) + 0.2 * reference.reg2(G, torch.zeros(G.size(1)))
        for p, g in zip(fused.parameters(), torch.autograd.grad(total, list(fused.parameters())), strict=True):
            p.grad = g
        torch.testing.assert_close(report.covariance_trace, reference.covariance_trace(G), **EXACT)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(dict(ours.named_parameters()), dict(fused.named_parameters()), **EXACT)


@pytest.mark.parametrize("penalty", [False, True])
def test_nothing_outlives_a_step(penalty):
    model = replaced(Tagger("lstm", packed=True))
    gc.collect()
    gc.disable()
    try:
        with bootgrad.record(model) as rec:
            output = model(data(B, T, IN))
            losses = output.sin().square().sum((1, 2))
        output = weakref.ref(output)
        if penalty:
            bootgrad.reg1(rec.per_sample_gradients(losses, create_graph=True)).backward()
        else:
            rec.backward(losses)
        del losses, rec
        assert output() is None
    finally:
        gc.enable()
