"""Small problems of the theory's tests, and the slow, obvious versions of what they are checked with."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

CLOSE = dict(rtol=1e-9, atol=1e-11)


def network(seed=0):
    """A network of 26 parameters, in float64, with its losses and twelve samples."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def loss_fn(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    return model, loss_fn, torch.randn(12, 3).double(), torch.randint(2, (12,))


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def losses_at(model, theta, x, y):
    """Losses at parameters θ (P,), as a function of them."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    parts = theta.split([shape.numel() for shape in shapes.values()])
    by_name = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    return F.cross_entropy(functional_call(model, by_name, (x,)), y, reduction="none")


def dense_hessian(model, x, y):
    """H (P, P) of the mean loss."""
    return hessian(lambda theta: losses_at(model, theta, x, y).mean(), vector(model))


def rows(model, loss_fn, *batch):
    """Per-sample gradients (N, P), by one backward pass each."""
    out = []
    for loss in loss_fn(*batch):
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        out.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(out)


class Direct(nn.Module):
    """A vector θ as a model."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta.clone())
