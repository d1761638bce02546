"""The second-order expansion of the generalization gap where the solution degenerates: a diagonal linear network.

    w = u⊙u − v⊙v        ℓ = ½ (⟨x, w⟩ − y)²        y = ⟨x, w*⟩ + noise, w* sparse        u = v = α at first

The smaller α, the nearer to zero are the coordinates that training leaves alone, and with them the Hessian's eigenvalues. A
model that is pruned after training, coordinates of |w_j| < τ to exact zeros, is the limit. Gradient descent on N samples, and
on each of the N data sets with one of them replaced, with more samples than coordinates and with fewer.

    python -m benchmarks.degenerate [--seeds 12]
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import bootgrad
from bootgrad.intervals import Interval, interval

from .results import FOLDER, setting, write

D, SPARSITY, NOISE = 16, 3, 0.5
SAMPLES = {"more samples than coordinates": 32, "fewer": 12}
ALPHAS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)
THRESHOLD = 0.05  # τ
LR, STEPS = 0.03, 20_000


class Diagonal(nn.Module):
    """The network, with parameters as given."""

    def __init__(self, theta: Tensor):
        """θ (2D,): u, and then v."""
        super().__init__()
        self.u, self.v = (nn.Parameter(part.clone()) for part in theta.split(D))

    def forward(self, x):
        """(N, D) to (N,)."""
        return x @ (self.u.square() - self.v.square())


def weights(theta: Tensor) -> Tensor:
    """W of θ (…, 2D)."""
    u, v = theta.split(D, -1)
    return u.square() - v.square()


def draw(seed: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A data set (N, D), (N,), as many fresh samples, and w*."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.zeros(D, dtype=torch.float64)
    truth[:SPARSITY] = torch.tensor([1.5, -1.0, 0.7], dtype=torch.float64)
    x = torch.randn(2 * n, D, generator=generator, dtype=torch.float64)
    y = x @ truth + NOISE * torch.randn(2 * n, generator=generator, dtype=torch.float64)
    return x[:n], y[:n], x[n:], y[n:], truth


def solutions(sets: list[tuple[Tensor, ...]], alpha: float, steps: int = STEPS) -> Tensor:
    """A(S) and then A(S¹) … A(Sᴺ) of some data sets: (len(sets), N + 1, 2D), all trained at once."""
    grams, moments = [], []
    for x, y, fresh_x, fresh_y, _ in sets:
        n = len(x)
        at = torch.arange(n)
        xs, ys = x.repeat(n + 1, 1, 1), y.repeat(n + 1, 1)
        xs[at + 1, at], ys[at + 1, at] = fresh_x, fresh_y
        grams.append(xs.mT @ xs / n)
        moments.append((xs.mT @ ys[..., None])[..., 0] / n)
    gram, moment = torch.stack(grams), torch.stack(moments)  # of the loss as a function of w
    theta = torch.full((*moment.shape[:2], 2 * D), alpha, dtype=torch.float64)
    for _ in range(steps):
        g = (gram * weights(theta)[..., None, :]).sum(-1) - moment
        theta = theta - 2 * LR * torch.cat([g, -g], -1) * theta
    return theta


def pruned(theta: Tensor) -> Tensor:
    """θ with exact zeros where |w_j| < τ."""
    kept = (weights(theta).abs() >= THRESHOLD).repeat(1, 2)
    return theta * kept


def decompose(theta: Tensor, x: Tensor, y: Tensor, truth: Tensor):
    """The decomposition at A(S), the population's gap, and λ_min."""
    model = Diagonal(theta[0])

    def loss_fn(x, y):
        return (model(x) - y).square() / 2

    found = bootgrad.theory.gap_decomposition(model, loss_fn, x, y, neighbours=enumerate(theta[1:]))
    population = float((weights(theta[0]) - truth).square().sum() + NOISE**2) / 2
    H = bootgrad.theory.Hessian(model, loss_fn, x, y)
    return found, population - float(H.losses().mean()), float(H.eigenpairs(smallest=True).values)


def less_gap(parts, gaps, term: str) -> Interval:
    """A term less the population's gap, data set by data set: both vary with the data set, and largely together."""
    return interval(getattr(part, term).mean - gap for part, gap in zip(parts, gaps, strict=True))


def rows(seeds: int, steps: int = STEPS) -> list[dict]:
    """A row of each α and number of samples, as trained and pruned."""
    out = []
    for name, n in SAMPLES.items():
        for alpha in ALPHAS:
            cases: dict[str, list] = {"trained": [], "pruned": []}
            sets = [draw(seed, n) for seed in range(seeds)]
            for (x, y, _, _, truth), theta in zip(sets, solutions(sets, alpha, steps), strict=True):
                cases["trained"].append(decompose(theta, x, y, truth))
                cases["pruned"].append(decompose(pruned(theta), x, y, truth))
            for case, found in cases.items():
                parts, gaps, smallest = zip(*found, strict=True)
                whole = bootgrad.theory.GapDecomposition.over_seeds(parts)
                terms = ("gradient", "curvature", "remainder", "loss_rise", "replace_one")
                row = setting() | {"data": name, "samples": n, "case": case, "alpha": alpha, "seeds": seeds}
                row |= {term: str(getattr(whole, term)) for term in terms} | {"gap": str(interval(gaps))}
                row |= {f"{term}_less_gap": str(less_gap(parts, gaps, term)) for term in terms[-2:]}
                row |= {
                    "share": f"{whole.share:.3g}",
                    "holds": f"{sum(p.holds for p in parts)} of {seeds}",
                    "largest_move": f"{whole.largest_move:.3g}",
                    "smallest_eigenvalue": f"{sum(smallest) / seeds:.2g}",
                }
                out.append(row)
                print(", ".join(f"{key} {row[key]}" for key in list(row)[6:]), flush=True)
    return out


def main() -> None:
    """Train, decompose, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--csv", type=Path, default=FOLDER / "degenerate.csv")
    options = parser.parse_args()
    write(options.csv, rows(options.seeds))


if __name__ == "__main__":
    main()
