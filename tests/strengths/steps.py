"""What the tests of rules for λ share: steps and their gradients by plain autograd."""

import torch

from ..methods.steps import gradient_of, losses_of, rows_of

START = 1e-3
EVERY_STEP = {"every": 1, "decay": 0.0}


def plain_gradient(losses, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), list(model.parameters()))])


def penalty_gradients(model, x, y, c1=None, c2=0.0):
    """ḡ, ∇Reg1 and ∇Reg2, (P,) each, from rows."""
    parameters = list(model.parameters())
    G = rows_of(losses_of(model)(x, y), parameters)
    mean = G.mean(0)
    terms = (G - (mean if c1 is None else c1)).square().sum(1).mean(), (mean - c2).square().sum()
    grads = (torch.autograd.grad(term, parameters, retain_graph=True) for term in terms)
    return mean.detach(), *(torch.cat([g.flatten() for g in gs]) for gs in grads)


def run(reg, batches, model, optimizer=None):
    """The λ of every step, and gradients."""
    asked, grads = [], []
    for batch in batches:
        grad, report = gradient_of(reg, losses_of(model), *batch)
        asked.append(dict(report.strengths))
        grads.append(grad)
        if optimizer is not None:
            optimizer.step()
    return asked, grads


def batches_of(count, B=6):
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(B, 3, generator=generator, dtype=torch.float64),
            torch.randint(0, 2, (B,), generator=generator),
        )
        for _ in range(count)
    ]
