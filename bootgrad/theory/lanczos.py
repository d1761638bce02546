"""Lanczos's method for some eigenvalues of a symmetric matrix that is known by its products.

Letters: ``P`` rows and columns, ``k`` eigenvalues.
"""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def lanczos(
    product: Callable[[Tensor], Tensor],
    like: Tensor,
    k: int,
    smallest: bool,
    tolerance: float,
    steps: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Ritz values (k,) and vectors (k, P) of a symmetric product, from the wanted end on."""
    P = like.numel()
    steps = min(steps, P)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.zeros(steps, P, dtype=torch.float64, device=like.device)
    diagonal: list[float] = []
    beside: list[float] = []

    def new_direction(done: int) -> Tensor:
        return orthogonal(torch.randn(P, dtype=torch.float64, generator=generator).to(like.device), done)

    def orthogonal(w: Tensor, done: int) -> Tensor:
        for _ in range(2):  # the second time for what the first left by rounding
            w = w - basis[:done].T @ (basis[:done] @ w)
        return w

    w = new_direction(0)
    basis[0] = w / w.norm()
    while True:
        j = len(diagonal)
        w = product(basis[j])
        diagonal.append(float(basis[j] @ w))
        w = orthogonal(w, j + 1)
        beta = float(w.norm())
        if j + 1 == steps or (j + 1 >= k and j % 5 == 4):
            values, s = torch.linalg.eigh(_tridiagonal(diagonal, beside))
            wanted = torch.arange(k) if smallest else torch.arange(j, j - k, -1)
            residual = beta * float(s[-1, wanted].abs().max())
            if j + 1 == steps or residual <= tolerance * float(values.abs().max()):
                return values[wanted].to(basis), s[:, wanted].T.to(basis) @ basis[: j + 1]
        if beta <= 1e-12 * max(
            map(abs, (*diagonal, *beside))
        ):  # all that is reached from here is known: go on elsewhere
            w, beta = new_direction(j + 1), 0.0
        beside.append(beta)
        basis[j + 1] = w / w.norm()


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    off = torch.diag(torch.tensor(beside, dtype=torch.float64), 1)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + off + off.T
