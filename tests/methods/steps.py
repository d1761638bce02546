"""Steps of regularizers on a small smooth model, and their gradients from explicit rows."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import bootgrad

LAMBDA1, LAMBDA2 = 0.3, 0.7
CENTERS = {
    "batch_mean": {"reg1": "batch_mean", "reg2": "zero"},
    "zero": "zero",
    "ema": "ema",
    "window": {"reg1": "window", "reg2": "ema"},
}
SIGN_OPTIONS = {
    "exact": {"method": "random_signs"},
    "finite_difference": {"method": "random_signs", "derivative": "finite_difference", "epsilon": 1e-6},
}
TOLERANCE = {"exact": 1e-10, "finite_difference": 1e-5}  # of the differences: epsilon, and rounding over it


class Smooth(nn.Module):
    """Two layers, (B, 3) → (B, 2)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        return self.layers(x)


def data(B=4, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return Smooth().to(dtype), torch.randn(B, 3).to(dtype), torch.randint(0, 2, (B,))


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def regularizer(model, center="batch_mean", **options):
    settings = {"reg1": LAMBDA1, "reg2": LAMBDA2, "center": center} | options
    return bootgrad.GradientRegularizer(model, **settings)


def gradient_of(reg, function, *batch):
    """The gradient that one step adds, (P,), and its report; ``.grad`` is cleared before."""
    reg.model.zero_grad()
    report = reg.backward(function, *batch)
    return flat(reg.model), report


def flat(model):
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


def rewound(reg, state, function, *batch):
    """As `gradient_of`, with the regularizer's state as it was."""
    reg.load_state_dict(copy.deepcopy(state))
    return gradient_of(reg, function, *batch)


def rows_of(losses, parameters):
    """The per-sample gradients, (B, P), with their graph."""
    return torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(ell, parameters, create_graph=True)]) for ell in losses]
    )


def explicit_signs(losses, parameters, weights, c1, c2):
    """∇ of L + λ₁ mean_p (1/B) ‖Σ w_i (g_i − c₁)‖² + λ₂ ‖ḡ − c₂‖², from rows."""
    G = rows_of(losses, parameters)
    estimate = torch.stack([(w @ (G - c1)).square().sum() for w in weights]).mean() / len(losses)
    total = losses.mean() + LAMBDA1 * estimate + LAMBDA2 * (G.mean(0) - c2).square().sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)]), estimate.detach()


def relative(a, b):
    return float((a - b).norm() / b.norm())


def after_one_step(model, x, y, center, **options):
    """An exact regularizer and another, whose moving centers know the same past, and their states."""
    center = CENTERS[center]
    exact, other = regularizer(model, center), regularizer(model, center, **options)
    for reg in (exact, other):
        reg.backward(losses_of(model), x.flip(0), y)
    torch.testing.assert_close(exact.state_dict()["centers"], other.state_dict()["centers"], rtol=1e-9, atol=1e-12)
    return exact, other, (exact.state_dict(), other.state_dict())


class Once(torch.autograd.Function):
    """Marked as differentiable once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]
