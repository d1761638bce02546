"""A smoke test of the installed package, run by ``make wheel`` in an empty environment, away from the sources."""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import bootgrad
from bootgrad.ops.library import build_info

assert "site-packages" in Path(bootgrad.__file__).parts, bootgrad.__file__
assert importlib.util.find_spec("kernels") is None, "the wheel exposes a top-level package `kernels`"
assert importlib.util.find_spec("bootgrad.kernels") is not None, "the wheel lacks bootgrad.kernels"
print(build_info())

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).double()
x, y = torch.randn(6, 1, 6, 6, dtype=torch.float64), torch.arange(6) % 5
parameters = list(model.parameters())


def loss(x, y):
    """One loss per sample."""
    return F.cross_entropy(model(x), y, reduction="none")


rows = [torch.cat([g.flatten() for g in torch.autograd.grad(v, parameters, create_graph=True)]) for v in loss(x, y)]
rows = torch.stack(rows)
penalty = (rows - rows.mean(0)).square().sum() / len(rows)
expected = torch.autograd.grad(loss(x, y).mean() + 0.1 * penalty, parameters)

with bootgrad.record(model) as rec:
    losses = loss(x, y)
stats = rec.backward(losses)
print(f"Γ = {stats.covariance_trace:.4f}")
torch.testing.assert_close(stats.sq_norms, rows.detach().square().sum(1), rtol=1e-10, atol=0)

model.zero_grad()
report = bootgrad.GradientRegularizer(model, reg1=0.1).backward(loss, x, y)
torch.testing.assert_close(report.reg1, penalty.detach(), rtol=1e-10, atol=0)
torch.testing.assert_close([p.grad for p in parameters], list(expected), rtol=1e-9, atol=1e-12)
print("bootgrad", bootgrad.__version__, "from", Path(bootgrad.__file__).parent, "agrees with plain autograd")
