"""Unusual code: right, or refused by name; and nothing stays behind."""

import functools
import gc
import operator
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import bootgrad
from bootgrad import BootgradError, reference
from bootgrad.rules.base import RULES, Operation
from bootgrad.rules.stand_ins import StandIns

pytestmark = pytest.mark.filterwarnings("ignore::bootgrad.BootgradWarning")


class Model(nn.Module):
    """A linear layer, free parameters, and a function of them."""

    def __init__(self, forward, **shapes):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 2))
        self.function = forward
        self.register_buffer("table", torch.randn(4, 4))
        self.double()

    def forward(self, x):
        return self.function(self, x).tanh().reshape(len(x), -1).sum(1)


def data(*shape):
    return torch.randn(*(shape or (4, 4)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _halved(y):
    y[:, 1:] *= 0.5
    return y


def _real(z):
    return torch.view_as_real(z)


def token_changed(m, x):
    y = z = m.w.repeat(4, 1)
    z.mul_(m.linear(x)).add_(x)
    return m.linear(y)


def learned_queries(m, x):
    """(3, 4, 4) of the model's own, looked up among (2, 4, 4), samples second."""
    q, k = m.w.expand(3, 4, 4), torch.stack([m.linear(x), x])
    own = m.a, m.b, None, None, False, 0.0, m.c, None
    q, _ = F.multi_head_attention_forward(q, q, q, 4, 2, *own, need_weights=False)
    return F.multi_head_attention_forward(q, k, k, 4, 2, *own)[0].transpose(0, 1)


def attention_with(name):
    """Attention over three places of a sample, with ``name`` of the model's own."""

    def forward(m, x):
        of_data = m.linear(x[:, None] * torch.arange(1, 4).double()[:, None]).unflatten(-1, (2, 2)).transpose(1, 2)
        given = {"query": of_data, "key": of_data.sin(), "value": of_data.cos()} | {name: m.w.sin()}
        return F.scaled_dot_product_attention(**given)

    return forward


RIGHT = {
    "bias of one": (lambda m, x: F.linear(x, m.w, m.b), dict(w=(3, 4), b=(1,))),
    "bias of a row": (lambda m, x: F.linear(m.linear(x), m.w, m.b), dict(w=(3, 4), b=(1, 3))),
    "scalar bias": (lambda m, x: F.linear(m.linear(x), m.w, m.b), dict(w=(3, 4), b=())),
    "names": (lambda m, x: torch.add(input=torch.mul(input=m.linear(x), other=m.b), other=m.w), dict(w=(4,), b=(4,))),
    "in place, of positions": (lambda m, x: m.linear(x[:, None] * x[..., None]).mul_(m.b).tanh_(), dict(b=(4,))),
    "in place, of some positions": (lambda m, x: _halved(m.linear(x[:, None] * x[..., None])), {}),
    "a target": (lambda m, x: F.mse_loss(m.linear(x), m.w.expand(4, 4), reduction="none"), dict(w=(4,))),
    "broadcast": (lambda m, x: torch.mul(*torch.broadcast_tensors(m.linear(x)[..., None], m.w)), dict(w=(3,))),
    "made of each sample's numbers": (
        lambda m, x: F.linear(torch.stack([torch.stack([row.mean(), row.std()]) for row in x]), m.w),
        dict(w=(3, 2)),
    ),
    "in place by name": (lambda m, x: m.linear(x).mul_(other=m.b), dict(b=(4,))),
    "instance norm": (
        lambda m, x: F.instance_norm(m.linear(x).view(4, 2, 2), weight=m.w, bias=m.b).pow(3),
        dict(w=(2,), b=(2,)),
    ),
    "norm of weights": (lambda m, x: m.linear(x).sum(1) + 0.1 * m.linear.weight.square().sum(), {}),
    "unreached output": (lambda m, x: m.linear(x) + 0 * (m.linear(x) * m.w).detach(), dict(w=(4,))),
    "positions": (lambda m, x: m.linear(x)[:, :3, None] + F.embedding(torch.arange(3), m.w), dict(w=(5, 2))),
    "positions of one row": (lambda m, x: m.linear(x)[:, :3, None] + m.w[torch.arange(3)[None]], dict(w=(5, 2))),
    "class token": (lambda m, x: torch.cat([m.w.expand(4, -1), m.linear(x)], 1), dict(w=(1, 3))),
    "class token, repeated": (lambda m, x: torch.cat([m.w.repeat(4, 1), x], 1) @ m.b, dict(w=(3,), b=(7, 2))),
    "class token, repeated among features": (
        lambda m, x: m.linear(x).repeat(1, 2) + m.w.expand(4, 3).repeat(1, 2)[:, :1],
        dict(w=(1, 3)),
    ),
    "class token, repeated by both": (
        lambda m, x: torch.cat([m.w.repeat((4, 2)), x], 1) @ m.b,
        dict(w=(3,), b=(10, 2)),
    ),
    "class tokens, looked up": (
        lambda m, x: m.linear(x)[:, None] * F.embedding(torch.tensor([[0, 2, 2]]).expand(4, 3), m.w, padding_idx=2),
        dict(w=(3, 4)),
    ),
    "class token, contiguous": (
        lambda m, x: torch.cat([m.w.expand(4, -1).contiguous(), m.linear(x)], 1),
        dict(w=(1, 3)),
    ),
    "class token, a product": (
        lambda m, x: torch.cat([F.linear(m.w.expand(4, -1), m.b).tanh(), m.linear(x)], 1),
        dict(w=(1, 3), b=(5, 3)),
    ),
    "class token, added": (lambda m, x: x + m.w.sin().expand(4, -1) + m.w.expand_as(x), dict(w=(4,))),
    "class token, expanded twice": (lambda m, x: m.linear(x) + m.w.expand(4, 1).expand(4, 4), dict(w=(1, 1))),
    "class token, normalized": (
        lambda m, x: m.linear(x) + F.layer_norm(m.w.expand(4, -1), (4,), m.b),
        dict(w=(1, 4), b=(4,)),
    ),
    "token types of a buffer": (
        lambda m, x: m.linear(x)[:, :, None] + F.embedding((m.table[:1] > 0).long().expand(4, 4), m.w),
        dict(w=(2, 3)),
    ),
    "windows": (
        lambda m, x: torch.stack([m.linear(x), x], 1).flatten(0, 1) + (m.w + m.table[:2]).repeat(4, 1).sin(),
        dict(w=(1, 4)),
    ),
    "heads": (
        lambda m, x: torch.bmm(m.linear(x).view(8, 1, 2), m.w.repeat(4, 1, 1)).view(4, 2, 3),
        dict(w=(2, 2, 3)),
    ),
    "heads, expanded": (
        lambda m, x: torch.bmm(m.linear(x).view(8, 1, 2), m.w.expand(4, 2, 2, 3).reshape(8, 2, 3)).view(4, 2, 3),
        dict(w=(2, 2, 3)),
    ),
    "learned keys": (attention_with("key"), dict(w=(2, 3, 2))),
    "learned values": (attention_with("value"), dict(w=(1, 2, 3, 2))),
    "learned mask": (attention_with("attn_mask"), dict(w=(1, 2, 3, 3))),
    "learned mask of all heads": (attention_with("attn_mask"), dict(w=(3, 3))),
    "weights by heads": (
        lambda m, x: m.linear(x).view(4, 2, 1, 2) @ m.w.exp() + (m.b @ m.linear(x).view(4, 2, 2, 1)).mT,
        dict(w=(2, 2, 3), b=(1, 2, 3, 2)),
    ),
    "weights by heads, one input": (lambda m, x: m.linear(x).view(4, 1, 1, 4) @ m.w[None], dict(w=(3, 4, 2))),
    "one weight of three dimensions": (lambda m, x: m.linear(x).view(4, 2, 2) @ m.w, dict(w=(1, 2, 3))),
    "heads by einsum": (
        lambda m, x: torch.einsum("bnh,tnh->nbt", m.linear(x).view(4, 2, 2), m.w).transpose(0, 1),
        dict(w=(3, 2, 2)),
    ),
    "heads by einsum, two letters": (
        lambda m, x: torch.einsum("eif,bfpe->bepi", m.w, m.linear(x).view(4, 2, 1, 2).expand(4, 2, 3, 2)).sin(),
        dict(w=(2, 3, 2)),
    ),
    "state of zeros": (lambda m, x: m.linear(x) + torch.zeros(4, 3).double() @ m.w + m.b, dict(w=(3, 4), b=(4,))),
    "class token, changed in place": (token_changed, dict(w=(1, 4))),
    "class token, changed in place by an operator": (
        lambda m, x: m.linear(operator.iadd(m.w.repeat(4, 1), m.linear(x))),
        dict(w=(1, 4)),
    ),
    "scaled buffer": (lambda m, x: m.linear(x) + m.w * m.table[0], dict(w=())),
    "relative positions": (
        lambda m, x: m.linear(x)[:, :2, None] + m.w[(m.table > 0).long()].sum(0)[:2],
        dict(w=(2, 3)),
    ),
    "a column by a mask that repeats": (
        lambda m, x: m.linear(x) * m.w[(m.table[0, :3] == m.table[0, 0]).expand(4, 3)],
        dict(w=(4, 3)),
    ),
    "parts of columns": (lambda m, x: F.linear(x[:, :1], m.w[:, :1]) + F.linear(x[:, 1:], m.w[:, 1:]), dict(w=(3, 4))),
    "parts that overlap": (lambda m, x: F.linear(x[:, :3], m.w[:, :3]) + F.linear(x, m.w[1:3])[:, :1], dict(w=(3, 4))),
    "parts of rows that overlap": (lambda m, x: F.linear(x, m.w[:2]) + F.linear(x, m.w[1:]), dict(w=(3, 4))),
    "parts turned": (lambda m, x: F.linear(x, m.w[:2]) + x @ m.w[2:].t(), dict(w=(4, 4))),
    "frozen factor": (lambda m, x: F.linear(x, m.w @ m.table[:2] @ m.table.t()), dict(w=(3, 2))),
    "complex times real": (lambda m, x: _real(torch.fft.fft(m.linear(x)) * m.w), dict(w=(4,))),
    "complex filter": (lambda m, x: _real(torch.fft.rfft(m.linear(x)) * torch.view_as_complex(m.w)), dict(w=(3, 2))),
    "complex conjugate": (lambda m, x: _real(torch.fft.fft(x) * torch.view_as_complex(m.w).conj()), dict(w=(4, 2))),
    "complex matrix": (lambda m, x: _real(torch.fft.fft(x) @ torch.view_as_complex(m.w)), dict(w=(4, 3, 2))),
    "complex linear": (
        lambda m, x: _real(F.linear(torch.fft.fft(x), m.w.cdouble(), m.b.cdouble())),
        dict(w=(3, 4), b=(3,)),
    ),
    "complex phase": (lambda m, x: _real(torch.fft.fft(x) * torch.exp(1j * m.w)), dict(w=(4,))),
    "scale in a derivative": (
        lambda m, x: torch.autograd.grad((y := x.clone().requires_grad_()).mul(m.w).sin().sum(), y, create_graph=True)[
            0
        ],
        dict(w=(4,)),
    ),
    "a mask that looks like samples": (
        lambda m, x: torch.where(torch.ones(4, 4).tril().bool(), m.linear(x.view(4, 1, 4).expand(4, 4, 4)), m.w),
        dict(w=()),
    ),
    "embedding": (lambda m, x: F.embedding((x > 0).long(), m.w) * m.linear(x)[..., None], dict(w=(2, 3))),
    "standardized weights": (
        lambda m, x: F.linear(m.linear(x), F.batch_norm(m.w[None], None, None, training=True)[0]),
        dict(w=(3, 4)),
    ),
    "layer norm of parameters": (
        lambda m, x: m.linear(x) @ F.layer_norm(m.w, (3,), m.b, m.c),
        dict(w=(4, 3), b=(3,), c=(3,)),
    ),
    "layer norm of parameters, torch's own": (
        lambda m, x: m.linear(x) @ torch.layer_norm(m.w, (4, 3), m.b),
        dict(w=(4, 3), b=(4, 3)),
    ),
    "batch norm of parameters": (
        lambda m, x: m.linear(x) @ F.batch_norm(m.w, None, None, m.b, m.c, training=True),
        dict(w=(4, 3), b=(3,), c=(3,)),
    ),
    "batch norm of parameters, torch's own": (
        lambda m, x: (
            m.linear(x) @ torch.batch_norm(m.w[:, :, None], m.b, None, None, None, True, 0.1, 1e-5, False).flatten(1)
        ),
        dict(w=(4, 3), b=(3,)),
    ),
    "instance norm of parameters": (
        lambda m, x: m.linear(x) @ F.instance_norm(m.w[:, None], weight=m.b, bias=m.c)[:, 0],
        dict(w=(4, 3), b=(1,), c=(1,)),
    ),
    "group norm of parameters": (
        lambda m, x: m.linear(x) @ F.group_norm(m.w, 2, m.b, m.c).t(),
        dict(w=(3, 4), b=(4,), c=(4,)),
    ),
    "rms norm of parameters": (lambda m, x: m.linear(x) @ F.rms_norm(m.w, (3,), m.b), dict(w=(4, 3), b=(3,))),
    "a number beside parameters": (
        lambda m, x: x @ (m.w / torch.tensor(2.0).sqrt()).logaddexp(torch.tensor(0.5)) * x.max(),
        dict(w=(4, 3)),
    ),
    "a view, changed in place": (
        lambda m, x: torch.einsum("bnh,tnh->bnt", m.linear(x).unflatten(1, (2, 2)), m.w).mul_(2),
        dict(w=(3, 2, 2)),
    ),
    "a view, changed in place by a part": (
        lambda m, x: torch.tensordot(m.linear(x).unflatten(1, (2, 2)), m.w, ([1], [1]))[:, 1:].mul_(2),
        dict(w=(3, 2, 2)),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    function, shapes = RIGHT[name]
    model = Model(function, **shapes)
    assert bootgrad.verify(model, model, data()).ok


def attended(mask=None, **options):
    """Attention of (1, 2, 4, 3) parameters; a causal mask comes in the dtype ``mask``."""

    def forward(m, x):
        causal = None if mask is None else (torch.arange(4)[:, None] >= torch.arange(4)).to(mask)
        y = F.scaled_dot_product_attention(m.w, m.w.sin(), m.w.cos(), causal, **options)
        return m.linear(x) @ y[0].sum(0)

    return forward


OWN_ATTENTION = [
    (attended(), dict(w=(1, 2, 4, 3))),
    (attended(is_causal=True, scale=0.3), dict(w=(1, 2, 4, 3))),
    (attended(torch.bool), dict(w=(1, 2, 4, 3))),
    (attended(torch.float64), dict(w=(1, 2, 4, 3))),
    (
        lambda m, x: m.linear(x) @ F.scaled_dot_product_attention(m.w, m.b, m.b.sin(), enable_gqa=True)[0].sum(0),
        dict(w=(1, 4, 4, 3), b=(1, 2, 4, 3)),
    ),
    (learned_queries, dict(w=(3, 1, 4), a=(12, 4), b=(12,), c=(4, 4))),
]


@pytest.mark.parametrize("forward, shapes", OWN_ATTENTION)
def test_attention_of_parameters_alone(forward, shapes):
    """By torch's fused kernel, which has no second derivative: the expected one is the math kernel's. In bfloat16, too."""
    model, x = Model(forward, **shapes), data()
    parameters = dict(model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        losses = model(x)
        rows = reference.per_sample_gradients_of(losses, parameters, create_graph=True)
    penalty = sum(r.square().sum() for r in rows.values()) / len(x)
    expected = torch.autograd.grad(losses.mean() + penalty, list(parameters.values()))
    bootgrad.GradientRegularizer(model, reg1=1.0, center="zero").backward(model, x)
    for p, e in zip(parameters.values(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-9, atol=1e-10)
        p.grad = None
    if forward is OWN_ATTENTION[3][0]:  # a mask in float64
        return

    def halved(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    model.float()
    bootgrad.GradientRegularizer(model, reg1=1.0, center="zero").backward(halved, x.float())
    for p, e in zip(parameters.values(), expected, strict=True):  # of eight bits
        assert (p.grad - e).norm() < 0.1 * e.norm()


def test_one_sample_changed_in_place_by_a_parameter_of_its_shape():
    model, x = Model(lambda m, x: m.linear(x.clone().add_(m.w)), w=(1, 4)), data(1, 4)
    with bootgrad.record(model) as rec:
        losses = model(x)
    grads = torch.autograd.grad(model(x)[0], list(model.parameters()))
    torch.testing.assert_close(rec.backward(losses).sq_norms[0], sum(g.square().sum() for g in grads))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(grads))


@pytest.mark.parametrize("needs_weights", [True, False])
def test_frozen_attention(needs_weights):
    def forward(m, x):
        x = m.linear(x[:, None] * x[..., None])
        return m.attention(x, x, x, need_weights=needs_weights)[0]

    model = Model(forward)
    model.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64).requires_grad_(False)
    assert bootgrad.verify(model, model, data()).ok


@pytest.mark.parametrize(
    "parametrize",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        functools.partial(nn.utils.parametrizations.orthogonal, orthogonal_map="cayley"),
    ],
)
@pytest.mark.parametrize("size", [(4, 4), (4, 3)])
def test_parametrized_weights(parametrize, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), parametrize(nn.Linear(*size))).double().eval()
    assert bootgrad.verify(model, lambda x: model(x).tanh().sum(1), data()).ok


@pytest.mark.parametrize("method", ["exact", "random_signs"])
@pytest.mark.parametrize("normed", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_s_penalty_has_the_derivative_of_its_values(normed, method):
    """Plain autograd, with a second derivative that torch gets wrong, is no oracle here: differences of values are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), normed(nn.Linear(4, 3))).double()
    parameters, x = list(model.parameters()), data()

    def losses(x):
        return model(x).tanh().sum(1)

    def penalty():
        grads = torch.autograd.grad(losses(x).mean(), parameters)
        return float(sum(g.square().sum() for g in grads))

    reg = bootgrad.GradientRegularizer(model, reg2=1.0, center="zero", method=method)
    reg.backward(losses, x)
    plain = torch.autograd.grad(losses(x).mean(), parameters)
    for p, g in zip(parameters, plain, strict=True):
        direction, value = torch.randn_like(p), p.detach().clone()
        ends = []
        for step in (1e-5, -1e-5):
            p.data.copy_(value + step * direction)
            ends.append(penalty())
        p.data.copy_(value)
        assert float(((p.grad - g) * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-9)


def gradient_penalty(m, x):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(m.linear(x).tanh().sum(), x, create_graph=True)
    return g


def set_item(m, x):
    y = m.linear(x)
    y[:, 0] = m.w
    return y


REFUSED = {
    "buffer written in place": (lambda m, x: x @ m.table.clone().mul_(m.w), dict(w=(4, 4)), "in place"),
    "number written in place": (lambda m, x: x * torch.tensor(2.0).double().mul_(m.w), dict(w=()), "in place"),
    "losses of gradients": (gradient_penalty, {}, "derivative of a recorded operation"),
    "assignment": (set_item, dict(w=(4,)), "__setitem__ hides how it uses w"),
    "a broadcast along dimension 0 of losses of dimension 1": (
        lambda m, x: torch.lerp(x.expand(5, 4, 4), 2 * x, m.w).sum((0, 2)),
        dict(w=(4,)),
        r"lerp .* puts out 5 rows in dimension 0 for 4 losses.*record\(model, samples=index\)",
    ),
    "several outputs": (
        lambda m, x: torch.native_layer_norm(m.linear(x), (4,), m.w, None, 1e-5)[0],
        dict(w=(4,)),
        "native_layer_norm on w puts out several tensors",
    ),
    "a table that looks like samples": (
        lambda m, x: torch.einsum("bi,ij,j->bj", m.linear(x), torch.ones(4, 4).tril().double(), m.w),
        dict(w=(4,)),
        r"einsum has no rule, and run one sample at a time.*record\(model, samples=index\)",
    ),
    "rows that differ a little": (
        lambda m, x: torch.cat([m.w.expand(4, -1) + 1e-12 * m.b, m.linear(x)], 1),
        dict(w=(1, 3), b=(4, 3)),
        r"cat has no rule.*record\(model, samples=index\)",
    ),
    "rows that are alike by chance": (
        lambda m, x: torch.cat([m.w - m.w.detach(), m.linear(x)], 1),
        dict(w=(4, 3)),
        "cat has no rule",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, shapes, message = REFUSED[name]
    model = Model(function, **shapes)
    with pytest.raises(BootgradError, match=message):
        with bootgrad.record(model) as rec:
            losses = model(data())
        rec.backward(losses)
    assert all(p.grad is None for p in model.parameters())


class Swapped(Operation):
    """An operation whose output is a view: (x w)ᵀ."""

    def terms(self, gy, batch_size):
        raise AssertionError("the output is not reached")


@pytest.mark.parametrize("change", [lambda y: y.mul_(2), lambda y: y.mT.mul_(2), lambda y: y[:, 0].zero_()])
def test_a_change_that_hides_a_recorded_output_is_refused(change, monkeypatch):
    def rule(recorder, func, args, kwargs):
        x, w = args
        return Swapped(recorder, "swapped", [w]).attach((x * recorder.alias(w)).mT)

    def forward(m, x):
        y = torch.kron(m.linear(x), m.w)
        change(y)
        return y

    monkeypatch.setitem(RULES, torch.kron, rule)
    model = Model(forward, w=(4,))
    with bootgrad.record(model) as rec:
        losses = model(data())
    with pytest.raises(BootgradError, match="the output of swapped is a view .* clone it"):
        rec.backward(losses)


def test_fused_modules_are_refused():
    layer = nn.LSTM(4, 4, batch_first=True)
    with pytest.raises(BootgradError, match="hides how it uses"), bootgrad.record(layer):
        layer(torch.randn(3, 2, 4))


def test_the_check_sees_a_changed_loss_and_changed_packing():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))

    def step(loss, rows):
        x = torch.randn(rows, 5)
        with bootgrad.record(model) as rec:
            losses = loss(model(x))
        return rec.backward(losses).sq_norms, reference.per_sample_gradients_of(
            loss(model(x)), dict(model.named_parameters())
        )

    step(lambda z: z.square().sum(1), 4)
    with pytest.raises(BootgradError, match="coupled"):
        step(lambda z: F.cross_entropy(z @ z.t(), torch.arange(4), reduction="none"), 4)

    def packed(lengths):
        owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
        return lambda z: torch.zeros(4).index_add(0, owner, z.square().sum(1))

    for lengths in ([2, 2, 2, 2], [1, 3, 1, 3], [2, 2, 2, 2], [3, 1, 1, 3]):
        ours, rows = step(packed(lengths), 8)
        torch.testing.assert_close(ours, reference.sq_norms(reference.matrix(rows)))


def test_a_function_s_own_attributes_do_not_end_the_walk():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.variable = a
            return 2 * a

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    model = Model(lambda m, x: Twice.apply(m.linear(x)) * m.w, w=(4,))
    assert bootgrad.verify(model, model, data()).ok


def test_hooks():
    model = Model(lambda m, x: m.linear(x))
    seen = []
    model.linear.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    with bootgrad.record(model) as rec:
        losses = model(data())
    rec.backward(losses)
    assert torch.equal(seen[0], model.linear.bias.grad)
    model.linear.weight.register_hook(lambda g: 10 * g)
    with bootgrad.record(model) as rec:
        losses = model(data())
    with pytest.raises(BootgradError, match="linear.weight has a gradient hook"):
        rec.backward(losses)


def test_weights_and_means_are_not_the_user_s_own():
    model, offset = Model(lambda m, x: m.linear(x)), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    with bootgrad.record(model) as rec:
        losses = model(data()) + offset
    rec.backward(losses, reduction=weights, retain_graph=True)
    offset.grad.zero_()
    assert weights.tolist() == [1, 2, 3, 4]
    G = rec.per_sample_gradients(losses)
    before = G.covariance_trace()
    for t in G.mean().values():
        t.zero_()
    assert torch.equal(G.covariance_trace(), before)


def test_rows_made_from_parameters_notice_a_step():
    model = Model(lambda m, x: m.linear(x) / m.w.exp(), w=(4,))
    with bootgrad.record(model) as rec:
        losses = model(data())
    G = rec.per_sample_gradients(losses)
    G.sq_norms()
    with torch.no_grad():
        model.w.mul_(2)
    with pytest.raises(BootgradError, match="before the optimizer's step"):
        G.gram()


def test_an_expanded_grad_is_added_to():
    model = Model(lambda m, x: m.linear(x))
    model.linear.weight.grad = torch.zeros(1, dtype=torch.float64).expand(4, 4)
    with bootgrad.record(model) as rec:
        losses = model(data())
    expected = torch.autograd.grad(losses.mean(), model.linear.weight, retain_graph=True)[0]
    rec.backward(losses)
    torch.testing.assert_close(model.linear.weight.grad, expected)


def test_a_center_survives_a_gradient_that_is_not_finite():
    model = Model(lambda m, x: m.linear(x))
    reg = bootgrad.GradientRegularizer(model, reg1=0.1, center="ema")
    reg.backward(model, data())
    before = reg.centers["reg1"].value(dict(model.named_parameters()))
    report = reg.backward(lambda x: (0 * model(x)).abs().sqrt(), data())
    assert any("not finite" in note for note in report.notes)
    after = reg.centers["reg1"].value(dict(model.named_parameters()))
    assert all(torch.equal(before[n], after[n]) for n in before)
    with pytest.raises(BootgradError, match="not a state_dict"):
        reg.load_state_dict({})
    with pytest.raises(BootgradError, match="not a state_dict"):
        bootgrad.NoiseScale().load_state_dict({})


def forward_only(model, rec, losses):
    pass


def plain_backward(model, rec, losses):
    losses.mean().backward()


def penalty(model, rec, losses):
    (losses.mean() + bootgrad.reg1(rec.per_sample_gradients(losses, create_graph=True))).backward()


def failing(model, rec, losses):
    with pytest.raises(BootgradError):
        rec.backward(losses, center={})


@pytest.mark.parametrize("use", [forward_only, plain_backward, penalty, failing])
def test_nothing_stays_behind(use):
    model = Model(lambda m, x: torch.relu(F.group_norm(m.linear(x), 2, m.w)) / m.b.exp(), w=(4,), b=(4,))
    alive = []
    for _ in range(3):
        with bootgrad.record(model) as rec:
            hidden = model.linear(data())
            losses = (torch.relu(F.group_norm(hidden, 2, model.w)) / model.b.exp()).sum(1)
        alive += [weakref.ref(hidden), weakref.ref(rec)]
        use(model, rec, losses)
        del rec, losses, hidden
    gc.collect()
    assert [r() for r in alive] == [None] * 6


def test_gradients_pass_through_weights_and_biases_that_are_not_the_model_s():
    model, x = Model(lambda m, x: m.linear(x), b=(3,)), data()
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for use in (
        lambda: F.linear(x, weight, model.b),  # a leaf outside of the model
        lambda: F.linear(model.linear(x), weight.sin(), model.b),
    ):
        expected = torch.autograd.grad(use().tanh().sum(), [weight, model.b])
        weight.grad = model.b.grad = None
        with bootgrad.record(model) as rec:
            losses = use().tanh().sum(1)
        rec.backward(losses, reduction="sum")
        torch.testing.assert_close([weight.grad, model.b.grad], list(expected))


@pytest.mark.parametrize(
    "layer",
    [
        lambda m, x: F.linear(x, m.w, m.linear(x)[:, :3].mean(0)),  # a bias of the whole batch
        lambda m, x: F.linear(x, m.linear(x)[:3] * 1.0, m.b),  # weights of the batch
    ],
)
def test_a_layer_made_of_the_batch_couples_it(layer):
    model = Model(layer, w=(3, 4), b=(3,))
    with bootgrad.record(model) as rec:
        losses = model(data())
    with pytest.raises(BootgradError, match="coupled"):
        rec.backward(losses)


def test_backward_passes_inside_of_the_block():
    model, x = Model(lambda m, x: m.linear(x)), data()
    expected = torch.autograd.grad(model(x).mean(), list(model.parameters()))
    reg = bootgrad.GradientRegularizer(model, reg1=0.1)
    with reg.record():
        reg.backward(model(x))
    penalized = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with reg.record():
        losses = model(x)
    reg.backward(losses)
    torch.testing.assert_close(penalized, [p.grad for p in model.parameters()])
    model.zero_grad()
    with bootgrad.record(model) as rec:
        own = torch.autograd.grad(model(x).mean(), list(model.parameters()))
        torch.testing.assert_close(own, expected)
        rec.backward(model(x), reduction=torch.full((4,), 0.25, dtype=x.dtype))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


def test_compiled_models_are_run_as_written():
    model, x = Model(lambda m, x: m.linear(x)), data()
    compiled = torch.compile(model, backend="eager")
    with bootgrad.record(model, compiled=False) as rec:
        losses = compiled(x)
    G = rec.per_sample_gradients(losses)
    sq_norms = rec.backward(losses).sq_norms
    with bootgrad.record(model) as rec:
        losses = model(x)
    torch.testing.assert_close(sq_norms, rec.backward(losses).sq_norms)
    torch.testing.assert_close(G.sq_norms(), sq_norms)
    torch._dynamo.reset()


class PartlyCheckpointed(nn.Module):
    """What torch computes otherwise than bootgrad: weight normalization, if asked for, ReLU and max pooling."""

    def __init__(self, normed, checkpointed):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.Conv2d(2, 3, 3, padding=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            first = nn.utils.weight_norm(layer) if normed == "by hook" else layer
        first = nn.utils.parametrizations.weight_norm(layer) if normed == "parametrized" else first
        self.block = nn.Sequential(first, nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True))
        self.head, self.checkpointed = nn.Linear(8, 1), checkpointed
        self.double()

    def forward(self, x):
        if self.checkpointed:
            y = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        else:
            y = self.block(x)
        return self.head(y.flatten(1).tanh()).flatten().square()


@pytest.mark.parametrize("derivative", ["exact", "finite_difference"])
@pytest.mark.parametrize("normed", ["no", "by hook", "parametrized"])
def test_stand_ins_and_checkpointing(normed, derivative):
    """What runs again in the backward pass saves the same."""
    grads, x = [], data(4, 2, 4, 4)
    for checkpointed in (False, True):
        model = PartlyCheckpointed(normed, checkpointed)
        torch.manual_seed(3)
        reg = bootgrad.GradientRegularizer(model, reg1=0.1, method="random_signs", derivative=derivative)
        reg.backward(model, x)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("context", [bootgrad.record, lambda model: StandIns()], ids=["record", "StandIns"])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_checkpointed_parts_without_parameters(context, backward_inside):
    model, x = Model(lambda m, x: m.linear(x)), data()

    def grads(checkpointed):
        model.zero_grad()
        run = (
            functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
            if checkpointed
            else lambda f, x: f(x)
        )
        with context(model):
            y = run(lambda t: F.max_pool2d(t.view(4, 1, 2, 2).relu(), 2, 1).exp(), model.linear(x)).sum()
            if backward_inside:
                y.backward()
        if not backward_inside:
            y.backward()
        return model.linear.weight.grad

    torch.testing.assert_close(grads(True), grads(False))


def test_transforms_of_functions_are_refused():
    model = Model(lambda m, x: torch.vmap(m.linear)(x))
    with pytest.raises(BootgradError, match="transform of torch.func"), bootgrad.record(model):
        model(data())


def twice_and_a_part(w):
    w.mul_(2).sub_(0.1)
    w[0] = w.exp()[1]
    return w


def before_and_after(w):
    before = w.exp()
    w.mul_(2)
    return w * before


def a_view(w):
    rows = w.view(12)
    rows *= 0.5
    rows -= rows.sum()
    return rows.view(3, 4)


CHANGES = {
    "relu": lambda w: w.relu_(),
    "relu by option": lambda w: F.relu(w, inplace=True),
    "clamp": lambda w: w.clamp_(-0.3, 0.3),
    "mask": lambda w: w.masked_fill_(torch.arange(4) > 2, 0.0),
    "a layer's output": lambda w: F.linear(w, w).relu_() @ w,
    "twice, and a part": twice_and_a_part,
    "before and after": before_and_after,
    "a view": a_view,
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_in_place(change):
    model = Model(lambda m, x: x @ CHANGES[change](m.w.clone()).t(), w=(3, 4))
    assert bootgrad.verify(model, model, data()).ok


def a_part(v, x):
    v[0].zero_()


def unseen(v, x):
    with torch.no_grad():
        v.mul_(2)


@pytest.mark.parametrize("change", [a_part, unseen])
def test_a_derived_weight_changed_in_place_before_it_is_viewed(change):
    def forward(m, x):
        v = m.w.clone()
        change(v, x)
        return x @ v.view(3, 4).t()

    with (
        pytest.raises(BootgradError, match="changed in place"),
        bootgrad.record(model := Model(forward, w=(3, 4))) as rec,
    ):
        rec.backward(model(data()))


def test_a_derived_weight_changed_in_place_after_it_was_used():
    """What the operation used is there no more: refused where it matters."""

    def forward(m, x):
        v = m.w.sin()
        y = x + v
        return y * v.mul_(2).detach()

    with bootgrad.record(model := Model(forward, w=(4,))) as rec:
        losses = model(data())
    with pytest.raises(BootgradError, match="made of w by sin was changed in place"):
        rec.backward(losses)
    model = Model(lambda m, x: (x + (v := m.w.clone())) * v.mul_(2), w=(4,))
    with pytest.raises(BootgradError, match="changed in place"), bootgrad.record(model):
        model(data())


def test_a_derived_weight_that_draws_random_numbers():
    model = Model(lambda m, x: F.linear(x, F.dropout(m.w, 0.5)), w=(3, 4))
    with bootgrad.record(model) as rec:
        losses = model(data())
    with pytest.raises(BootgradError, match="a weight made of w by dropout comes out differently"):
        rec.backward(losses)
    assert model.w.grad is None


def test_a_mask_changed_in_place_after_the_rows_were_described():
    model, mask = Model(lambda m, x: F.linear(x, m.w * mask), w=(3, 4)), torch.ones(3, 4, dtype=torch.float64)
    with bootgrad.record(model) as rec:
        G = rec.per_sample_gradients(model(data()))
    mask.zero_()
    with pytest.raises(BootgradError, match="changed in place"):
        G.sq_norms()


def test_long_chains_of_derived_weights():
    def orthogonalized(m, x):
        w = m.w
        for _ in range(12):
            w = 1.5 * w - 0.5 * w @ w.t() @ w
        return x @ w.t()

    model = Model(orthogonalized, w=(4, 4))
    with torch.no_grad():
        model.w.mul_(0.3)
    assert bootgrad.verify(model, model, data()).ok


def test_nodes_of_another_thread_are_not_part_of_an_operation():
    model, x = Model(lambda m, x: m.linear(x)), data()
    with bootgrad.record(model) as rec:
        inputs = x.clone().requires_grad_()
        y = model.linear(inputs).tanh().sum()
    grads = []  # as on a GPU, whose backward nodes are made and numbered in a thread of their own
    thread = threading.Thread(target=lambda: grads.extend(torch.autograd.grad(y, inputs, create_graph=True)))
    thread.start()
    thread.join()
    with pytest.raises(BootgradError, match="derivative of a recorded operation"):
        rec.backward(grads[0].square().sum(1))


def test_frozen_layers_do_not_keep_their_inputs():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.shift = nn.Linear(4, 4).requires_grad_(False), nn.Parameter(torch.zeros(4))
            self.frozen.bias.requires_grad_(True)

        def forward(self, x):
            h = x * self.shift.exp()
            y = self.frozen(h)
            h += 1  # as plain torch allows
            return (y + h).square().sum(1)

    model = Frozen()
    assert bootgrad.verify(model, model, torch.randn(4, 4)).ok


def test_one_image_without_a_batch():
    model = nn.Conv1d(4, 8, 1)
    with bootgrad.record(model) as rec:
        losses = model(torch.randn(4, 5)).sum().reshape(1)
    assert rec.backward(losses).sq_norms.shape == (1,)
    with bootgrad.record(model) as rec:
        losses = model(torch.randn(4, 5)).square().sum(0)[:4]
    with pytest.raises(BootgradError, match="puts out 1 rows"):
        rec.backward(losses)


def test_calls_without_a_rule_run_once_and_let_go_of_the_graph():
    calls = []

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    class Token:
        def __call__(self, grad):
            return None

    tokens = [Token()]

    def forward(m, x):
        hidden = m.linear(x)
        hidden.register_hook(tokens[0])  # lives as long as the graph
        return torch.einsum("bi,ij,bj->b", x, m.w, hidden)

    model = Model(forward, w=(4, 4))
    with bootgrad.record(model) as rec, Counted():
        losses = model(data())
    assert calls.count(torch.einsum) == 1
    G = rec.per_sample_gradients(losses)
    graph = weakref.ref(tokens.pop())
    rec.release()
    del losses, rec
    gc.collect()
    assert graph() is None and G.sq_norms().isfinite().all()


@pytest.mark.parametrize("layer", ["low rank", "prelu"])
def test_autocast_holds_where_calls_are_run_again(layer):
    model, x = Model(lambda m, x: m.linear(x), a=(4, 2), b=(2, 4)).float(), data().float()
    model.prelu = nn.PReLU(4)

    def losses():
        with torch.autocast("cpu", torch.bfloat16):
            y = (
                F.linear(x, model.linear.weight + model.a @ model.b)
                if layer == "low rank"
                else model.prelu(model.linear(x))
            )
        return y.float().square().sum(1)

    with bootgrad.record(model) as rec:
        values = losses()
    stats = rec.backward(values, reduction="sum")
    for i in range(4):
        grads = torch.autograd.grad(losses()[i], list(model.parameters()), allow_unused=True)
        expected = sum(g.square().sum() for g in grads if g is not None)
        torch.testing.assert_close(stats.sq_norms[i], expected, rtol=3e-2, atol=0)


@pytest.fixture
def slow_answers(monkeypatch):
    """As on an accelerator, nothing is asked about values in a step."""
    monkeypatch.setattr("bootgrad.waiting.answers_at_once", lambda tensor: False)


@pytest.mark.parametrize("reduction", ["mean", "weights"])
def test_statistics_are_checked_when_they_are_read(slow_answers, reduction):
    model, x = Model(lambda m, x: m.linear(x)), data()
    weights = "mean" if reduction == "mean" else torch.arange(1.0, 5.0, dtype=x.dtype)

    def backward(x):
        with bootgrad.record(model) as rec:
            losses = model(x)
        return rec.backward(losses, reduction=weights)

    good = backward(x)
    before = [p.grad.clone() for p in model.parameters()]
    assert good.covariance_trace > 0 and good.unchecked is None
    x[2] = torch.nan
    bad = backward(x)
    torch.testing.assert_close([p.grad for p in model.parameters()], before)
    for _ in range(2):
        with pytest.raises(BootgradError, match="NaN or infinite at 1 of 4 samples: 2"):
            bad.sq_norms  # noqa: B018


def test_reports_are_checked_when_they_are_read(slow_answers):
    model, x = Model(lambda m, x: m.linear(x)), data()
    reg = bootgrad.GradientRegularizer(model, reg1=0.1, reg2=0.2, center="ema")
    reports = [reg.backward(model, x) for _ in range(2)]
    before = [p.grad.clone() for p in model.parameters()]
    center = reg.centers["reg1"].value(dict(model.named_parameters()))
    assert all(r.loss.isfinite() and r.notes == n for r, n in zip(reports, [reports[0].notes, ()], strict=True))
    bad = reg.backward(model, x.clone().fill_(torch.inf))
    torch.testing.assert_close([p.grad for p in model.parameters()], before)
    torch.testing.assert_close(reg.centers["reg1"].value(dict(model.named_parameters())), center)
    with pytest.raises(BootgradError, match="NaN or infinite at 4 of 4 samples"):
        bad.loss  # noqa: B018


def test_a_step_asks_nothing_of_the_device(slow_answers):
    """Whatever makes a number of a tensor waits for its device, and cannot be captured into a graph of kernels."""
    asked = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                asked.append(func)
            return func(*args, **(kwargs or {}))

    model, x = Model(lambda m, x: m.linear(x).relu()), data()
    regularizers = [
        bootgrad.GradientRegularizer(model, reg1=0.1, reg2=0.2, center="ema"),
        bootgrad.GradientRegularizer(model, reg1=0.1),
        bootgrad.GradientRegularizer(model, reg1=0.1, center="zero"),
    ]
    for step in range(4):  # the batch is checked on the first two and on the fourth
        for reg in regularizers:
            with Watch():
                reg.backward(model, x)
        with bootgrad.record(model, check="never") as rec:
            losses = model(x)
        with Watch():
            rec.backward(losses, center=None if step else {n: p.detach() for n, p in model.named_parameters()})
        if step == 1:
            asked.clear()
            monkey = pytest.MonkeyPatch()
            monkey.setattr("bootgrad.waiting.is_capturing", lambda: True)
    monkey.undo()
    assert not asked


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 3), (2, 0, 3)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_and_positions_that_are_none(shape):
    """An output of no features has a weight of no entries; a sequence of no positions has the gradient zero."""
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 0)]).double()
    with bootgrad.record(model) as rec:
        y = model[0](torch.randn(shape, dtype=torch.float64)).tanh()
        losses = y.flatten(1).sum(1) + model[1](y).flatten(1).sum(1)
    rows = reference.per_sample_gradients_of(losses, dict(model.named_parameters()))
    stats = rec.backward(losses)
    torch.testing.assert_close(stats.sq_norms, reference.sq_norms(reference.matrix(rows)))
    for p, of_p in zip(model.parameters(), rows.values(), strict=True):
        torch.testing.assert_close(p.grad, of_p.mean(0))


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 3)])
def test_layers_that_are_handed_nothing(shape):
    """No positions of the samples, or none of their rows, as an expert that nobody chose."""
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4), nn.LayerNorm(3), nn.RMSNorm(3), nn.PReLU()]).double()
    x, nothing = torch.randn(2, 3, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    with bootgrad.record(model) as rec:
        losses = model[0](x).tanh().sum(1)
        for layer in model[1:]:
            losses = losses + layer(nothing.requires_grad_()).sum()
    rows = reference.per_sample_gradients_of(losses, dict(model.named_parameters()))
    G = rec.per_sample_gradients(losses, create_graph=True)
    torch.testing.assert_close(G.sq_norms(), reference.sq_norms(reference.matrix(rows)))
    torch.testing.assert_close(rec.backward(losses).sq_norms, G.sq_norms())
