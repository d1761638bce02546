"""Verdicts on assumptions, where they are known."""

import math

import pytest
import torch

from bootgrad.errors import ArgumentError
from bootgrad.theory import check_assumptions

from .problems import Direct, dense_hessian, network, rows, vector


def quadratic(spectrum, away=0.0):
    """Losses ½ (θ − z_i)ᵀ diag(spectrum) (θ − z_i) at θ = z̄ + away."""
    z = torch.randn(20, len(spectrum), generator=torch.Generator().manual_seed(0)).double()
    scale = torch.tensor(spectrum, dtype=torch.float64)
    model = Direct(z.mean(0) + away)
    return model, lambda z: (scale * (model.theta - z).square()).sum(1) / 2, z


def test_numbers_are_those_of_brute_force():
    model, loss_fn, x, y = network()
    found = check_assumptions(model, loss_fn, x, y, chunk=5)
    G, H = rows(model, loss_fn, x, y), dense_hessian(model, x, y)
    norm = float(G.mean(0).norm())
    assert found["stationary"].value == pytest.approx(norm)
    assert found["stationary"].relative == pytest.approx(norm / float(G.square().sum(1).mean().sqrt()))
    assert found["nondegenerate"].value == pytest.approx(float(torch.linalg.eigvalsh(H)[0]))
    assert found["nondegenerate"].verdict == found["stationary"].verdict == "does not" and not found.ok
    assert len(found.checks) == 2 and found.decomposition is None
    assert all(p.grad is None for p in model.parameters())


def test_neighbours_add_stability_and_the_remainder():
    model, loss_fn, z = quadratic([1.0, 2.0, 0.5])
    theta = vector(model)
    neighbours = {i: theta + 0.003 * (z[(i + 1) % 20] - z[i]) for i in range(20)}
    found = check_assumptions(model, loss_fn, z, neighbours=neighbours)
    assert found.ok and [c.name for c in found.checks] == ["stationary", "nondegenerate", "stable", "second order"]
    largest = max(float((p - theta).norm()) for p in neighbours.values())
    assert found["stable"].value == pytest.approx(largest)
    assert found["stable"].relative == pytest.approx(largest / float(theta.norm()))
    assert found["second order"].relative < 1e-9
    far = check_assumptions(model, loss_fn, z, neighbours={0: theta + 10.0})
    assert far["stable"].verdict == "does not" and far["second order"].verdict == "holds"
    assert "max ‖Δ_i‖" in str(far) and "does not" in str(far)


@pytest.mark.parametrize(
    ("spectrum", "verdict"),
    [
        ([1.0, 2.0, 0.01], "holds"),
        ([1.0, 2.0, 0.0], "does not"),
        ([1.0, 2.0, -0.01], "does not"),
        ([0.0, 0.0, 0.0], "does not"),
    ],
)
def test_the_smallest_eigenvalue_decides_on_degeneracy(spectrum, verdict):
    model, loss_fn, z = quadratic(spectrum)
    check = check_assumptions(model, loss_fn, z)["nondegenerate"]
    assert check.verdict == verdict and check.value == pytest.approx(min(spectrum), abs=1e-12)


def test_an_eigenvalue_within_its_residual_of_zero_is_unclear():
    spectrum = torch.linspace(1e-4, 1, 200).tolist()
    model, loss_fn, z = quadratic(spectrum)
    check = check_assumptions(model, loss_fn, z, steps=8)["nondegenerate"]
    assert check.verdict == "unclear" and check.error > abs(check.value) > 0


def test_a_small_share_of_the_largest_eigenvalue_is_resolved():
    spectrum = torch.cat([torch.tensor([3e-5]), torch.linspace(0.01, 1, 119)]).tolist()
    model, loss_fn, z = quadratic(spectrum)
    check = check_assumptions(model, loss_fn, z)["nondegenerate"]
    assert check.verdict == "holds" and check.value == pytest.approx(3e-5, rel=1e-4)


def test_a_gradient_shows():
    model, loss_fn, z = quadratic([1.0, 1.0], away=5.0)
    check = check_assumptions(model, loss_fn, z)["stationary"]
    assert check.verdict == "does not" and check.value == pytest.approx(5 * math.sqrt(2))
    assert check_assumptions(model, loss_fn, z, tolerance=1.0)["stationary"].verdict == "holds"
    with pytest.raises(ArgumentError, match="tolerance must be above 0"):
        check_assumptions(model, loss_fn, z, tolerance=-1.0)
