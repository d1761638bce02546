"""Passes of which nothing is recorded, on architectures without per-layer rules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import bootgrad

from .steps import SIGN_OPTIONS, TOLERANCE, data, explicit_signs, flat, gradient_of, losses_of, regularizer, relative


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x.view(len(x), 1, 3).expand(-1, 5, -1) * torch.arange(1, 6).view(5, 1))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 12), nn.Linear(4, 2)

    def forward(self, x):
        q, k, v = self.inner(x.unsqueeze(1) * torch.arange(1, 6).view(5, 1)).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


class Distances(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.points = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return torch.cdist(self.inner(x).unsqueeze(1), self.points.weight.expand(len(x), -1, -1)).squeeze(1)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.inner, self.reentrant = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), reentrant
        self.head = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def block(self, x):
        self.calls += 1
        return self.inner(F.dropout(x, 0.3))

    def forward(self, x):
        x = self.first(x)
        if self.reentrant == "own":  # of a library
            x = CheckpointFunction.apply(self.block, True, x)
        else:
            x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(x)


def batch_of(model, B=4):
    torch.manual_seed(0)
    return torch.randn(B, 3).double(), torch.randint(0, 2, (B,))


def test_fused_recurrent_layers(signs):
    torch.manual_seed(0)
    model = Recurrent().double()
    x, y = batch_of(model)
    v = [1, 1, -1, 1]
    P = sum(p.numel() for p in model.parameters())
    zero = torch.zeros(P)
    weights = torch.tensor([v], dtype=x.dtype)
    expected, _ = explicit_signs(losses_of(model)(x, y), list(model.parameters()), weights, zero, zero)
    with pytest.raises(bootgrad.BootgradError, match="lstm"):
        regularizer(model, "zero").backward(losses_of(model), x, y)
    for derivative, options in SIGN_OPTIONS.items():
        signs[:] = [v]
        grad, _ = gradient_of(regularizer(model, "zero", **options), losses_of(model), x, y)
        assert relative(grad, expected) < 10 * TOLERANCE[derivative]


def test_fused_attention_by_first_order_passes(signs):
    torch.manual_seed(0)
    model = Attention().double()
    x, y = batch_of(model)
    v = [1, 1, -1, 1]
    weights = torch.tensor([v], dtype=x.dtype)
    zero = torch.zeros(sum(p.numel() for p in model.parameters()))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected, _ = explicit_signs(losses_of(model)(x, y), list(model.parameters()), weights, zero, zero)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        for derivative, options in SIGN_OPTIONS.items():
            signs[:] = [v]
            grad, _ = gradient_of(regularizer(model, "zero", **options), losses_of(model), x, y)
            assert relative(grad, expected) < 10 * TOLERANCE[derivative]


def test_operations_without_a_second_derivative_by_first_order_passes(signs):
    torch.manual_seed(0)
    model = Distances().double()
    x, y = batch_of(model)
    for options in ({}, {"method": "auto"}, {"method": "random_signs"}):
        signs[:] = [[1, 1, -1, 1]]
        with pytest.raises(bootgrad.BootgradError, match='no second derivative.*derivative="finite_difference"'):
            regularizer(model, "zero", **options).backward(losses_of(model), x, y)
        assert all(p.grad is None for p in model.parameters())
    signs[:] = [[1, 1, -1, 1]]
    regularizer(model, "zero", **SIGN_OPTIONS["finite_difference"]).backward(losses_of(model), x, y)
    assert all(p.grad.norm() > 0 for name, p in model.named_parameters() if name != "points.bias")


@pytest.mark.parametrize("reentrant", [True, False, "own"])
def test_checkpointed_parts(signs, reentrant):
    torch.manual_seed(0)
    model, plain = Checkpointed(reentrant).double(), Checkpointed(None).double()
    plain.load_state_dict(model.state_dict())
    x, y = batch_of(model)
    x.requires_grad_()
    vectors = [[1, 1, -1, 1], [1, -1, -1, 1]]
    zero = torch.zeros(sum(p.numel() for p in model.parameters()))
    torch.manual_seed(1)
    weights = torch.tensor(vectors, dtype=x.dtype)
    expected, _ = explicit_signs(losses_of(plain)(x, y), list(plain.parameters()), weights, zero, zero)
    after = torch.get_rng_state()
    options = {"probes": 2} | SIGN_OPTIONS["finite_difference"]
    hooked = []
    model.head.bias.register_post_accumulate_grad_hook(lambda p: hooked.append(p.grad.clone()))
    reg = regularizer(model, "zero", **options)
    signs[:] = copy.deepcopy(vectors)
    torch.manual_seed(1)
    held = torch.ones_like(model.head.bias)
    model.head.bias.grad = held
    reg.backward(losses_of(model), x, y)
    assert torch.equal(torch.get_rng_state(), after)
    assert model.calls == 2  # the forward pass, and the backward pass's own run
    assert model.head.bias.grad is held and len(hooked) == 1 and torch.equal(hooked[0], held)
    held -= 1
    torch.testing.assert_close(flat(model), expected, rtol=1e-5, atol=1e-5)
    assert float(x.grad.norm()) > 0
    signs[:] = copy.deepcopy(vectors)
    exact = regularizer(model, "zero", method="random_signs", probes=2)
    if reentrant == "own":
        before = flat(model)
        with pytest.raises(bootgrad.BootgradError, match="reentrant checkpointing has no second derivative"):
            exact.backward(losses_of(model), x, y)
        assert torch.equal(flat(model), before) and exact.step == 0
    else:
        torch.manual_seed(1)
        grad, _ = gradient_of(exact, losses_of(model), x, y)
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)


def test_compiled_models(signs):
    model, x, y = data(B=4)
    compiled = torch.compile(model, backend="aot_eager")
    vectors = [[1, 1, -1, 1], [1, -1, -1, 1]]
    zero = torch.zeros(sum(p.numel() for p in model.parameters()))
    weights = torch.tensor(vectors, dtype=x.dtype)
    expected, _ = explicit_signs(losses_of(model)(x, y), list(model.parameters()), weights, zero, zero)
    signs[:] = copy.deepcopy(vectors)
    options = {"probes": 2} | SIGN_OPTIONS["finite_difference"]
    reg = regularizer(compiled, "zero", **options)
    grad, _ = gradient_of(reg, losses_of(compiled), x, y)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
    signs[:] = copy.deepcopy(vectors)
    model.zero_grad()
    with pytest.raises(bootgrad.BootgradError, match="a compiled model has no second derivative"):
        regularizer(compiled, "zero", method="random_signs").backward(losses_of(compiled), x, y)
    assert all(p.grad is None for p in model.parameters())


def test_gradient_hooks_and_losses_of_nothing_are_refused():
    model, x, y = data(B=4)
    reg = regularizer(model, "zero", method="random_signs")
    with pytest.raises(bootgrad.BootgradError, match="do not depend on any parameter"):
        reg.backward(lambda: torch.zeros(4, requires_grad=True) * 1)
    handle = model.layers[0].bias.register_hook(lambda g: 2 * g)
    with pytest.raises(bootgrad.BootgradError, match="layers.0.bias has a gradient hook"):
        reg.backward(losses_of(model), x, y)
    handle.remove()
    assert reg.step == 0 and all(p.grad is None for p in model.parameters())
