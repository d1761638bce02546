"""The bounds on the algorithmic variability Tr V beside its truth, along training: retrained with each sample replaced.

    Δ_i = A(Sⁱ) − A(S), the same initialization and batches        Tr V = (1/N) Σ_i ‖Δ_i‖²

The population is a pool of samples, and z'_i is any of them, so that the bounds' Γ_pop and D are exact. Two problems, each by
SGD with batches drawn anew in each step and with a shuffled order: regularized logistic regression, where ρ is known, and a
small network, where ρ is taken from the extreme eigenvalues of the training loss's Hessian, and beside it as 1.

    python -m benchmarks.variability [--seeds 3]
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import bootgrad
from bootgrad.theory import Hessian, VariabilityBound

from .results import FOLDER, setting, write

N, B, POOL, D, CLASSES = 64, 8, 512, 8, 3
REPLACEMENTS = 4  # z'_i for each i
RIDGE = 0.2
PROBLEMS = {"convex": 1.5, "network": 0.2}  # learning rates, that of the convex one by the largest curvature
BOUNDS = ("rho", "one", "batch")  # with ρ; with 1 in its place; and from the mini-batch's Γ alone, with 1
MEASURED = (1, 8, 16, 40, 80, 160)  # steps; 8 are an epoch


def make_model(problem: str) -> nn.Module:
    """Logistic regression, or a network with 16 hidden units."""
    layers = [nn.Linear(D, CLASSES)] if problem == "convex" else [nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, CLASSES)]
    return nn.Sequential(*layers).double()


def pool(seed: int) -> tuple[Tensor, Tensor]:
    """Samples (POOL, D) and labels, three overlapping classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (POOL,), generator=generator)
    x = torch.randn(POOL, D, generator=generator, dtype=torch.float64)
    x[torch.arange(POOL), y] += 1.5
    return x, y


def losses_of(model, x: Tensor, y: Tensor, parameters, problem: str) -> Tensor:
    """Cross entropies, in the convex problem with ½ RIDGE ‖θ‖² each."""
    losses = F.cross_entropy(model(x), y, reduction="none")
    if problem == "convex":
        losses = losses + RIDGE / 2 * sum(p.square().sum() for p in parameters)
    return losses


def batches(steps: int, order: str, generator: torch.Generator) -> Iterator[Tensor]:
    """B distinct samples a step: drawn anew each time, or in a shuffled order of all."""
    left = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if order == "fresh" or len(left) < B:
            left = torch.randperm(N, generator=generator)
        yield left[:B]
        left = left[B:]


def gradients(model: nn.Module, x: Tensor, y: Tensor, center=None):
    """Statistics of per-sample gradients, and their mean, without what the ridge adds to all of them alike."""
    with bootgrad.record(model) as rec:
        losses = F.cross_entropy(model(x), y, reduction="none")
    stats = rec.backward(losses, center=center)
    mean = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return stats, mean


def largest_curvature(x: Tensor) -> float:
    """Of the convex problem, for any samples: the Hessian of a cross entropy is at most ½ ‖(x, 1)‖²."""
    return RIDGE + 0.5 * float((x.square().sum(1) + 1).max())


def expansion(model: nn.Module, x: Tensor, y: Tensor, lr: float) -> float:
    """How much a step on the training loss expands small distances here: by the extreme eigenvalues of its Hessian."""
    H = Hessian(model, lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y)
    low, high = (float(H.eigenpairs(smallest=s, tolerance=0.01).values) for s in (True, False))
    return max(abs(1 - lr * low), abs(1 - lr * high))


def follow(problem: str, order: str, seed: int, steps: int, measured=MEASURED) -> Iterator[dict[str, float]]:
    """Yield the truth and the bounds at some steps of a run."""
    torch.manual_seed(seed)
    model, lr = make_model(problem), PROBLEMS[problem]
    x, y = pool(seed)
    generator = torch.Generator().manual_seed(seed)
    data = torch.randperm(POOL, generator=generator)[:N]
    fresh = torch.randint(POOL, (REPLACEMENTS, N), generator=generator)
    sets = data.repeat(1 + REPLACEMENTS * N, 1)  # (R, N): S, and then each Sⁱ
    rows = torch.arange(REPLACEMENTS * N)
    sets[1 + rows, rows % N] = fresh.flatten()
    if problem == "convex":
        lr /= largest_curvature(x)
    names = [name for name, _ in model.named_parameters()]
    many = {name: p.detach().expand(len(sets), *p.shape).clone() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        def call(x):
            return functional_call(model, parameters, (x,))

        return losses_of(call, x, y, parameters.values(), problem).mean()

    step_gradient: Callable = vmap(grad(loss))
    bounds = {name: VariabilityBound(N) for name in BOUNDS}
    for t, chosen in enumerate(batches(steps, order, generator), 1):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(many[name][0])
        population, center = gradients(model, x, y)
        batch, _ = gradients(model, x[data[chosen]], y[data[chosen]], center)
        exact = {"population": float(population.covariance_trace), "deviation": float(batch.reg1)}
        rho = max(abs(1 - lr * RIDGE), abs(1 - lr * largest_curvature(x)))
        if problem != "convex":
            rho = expansion(model, x[data], y[data], lr)
        bounds["rho"].update(lr, B, **exact, expansion=rho)
        bounds["one"].update(lr, B, **exact)
        bounds["batch"].update(lr, B, batch)
        picked = sets[:, chosen]
        g = step_gradient(many, x[picked], y[picked])
        many = {name: p - lr * g[name] for name, p in many.items()}
        if t in measured:
            flat = torch.cat([many[name].flatten(1) for name in names], 1)
            truth = float((flat[1:] - flat[0]).square().sum(1).mean())
            yield {"step": t, "truth": truth, "rho": rho} | {
                f"{kind}_{name}": getattr(bound, kind)
                for name, bound in bounds.items()
                for kind in ("any_order", "fresh_batches", "leading_order")
            }


def rows(seeds: int, measured=MEASURED) -> list[dict]:
    """A row of each problem, order and step: the truth, and the bounds by it, geometric means over seeds."""
    out = []
    for problem in PROBLEMS:
        for order in ("fresh", "shuffled"):
            runs = [list(follow(problem, order, seed, max(measured), measured)) for seed in range(seeds)]
            for at in zip(*runs, strict=True):
                row = setting() | {"problem": problem, "order": order, "step": at[0]["step"], "seeds": seeds}
                row |= {"truth": f"{_geometric(r['truth'] for r in at):.3g}"}
                row |= {"rho": f"{sum(r['rho'] for r in at) / seeds:.4f}"}
                for name in list(at[0])[3:]:
                    row[name] = f"{_geometric(r[name] / r['truth'] for r in at):.3g}"
                out.append(row)
                print(", ".join(f"{key} {row[key]}" for key in list(row)[6:]), flush=True)
    return out


def _geometric(values) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=FOLDER / "variability.csv")
    options = parser.parse_args()
    write(options.csv, rows(options.seeds))


if __name__ == "__main__":
    main()
