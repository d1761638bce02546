"""The identities behind the gap's decomposition by enumeration of all data sets, and the decomposition by brute force."""

import itertools

import pytest
import torch

from bootgrad.errors import ArgumentError
from bootgrad.intervals import interval
from bootgrad.theory import GapDecomposition, gap_decomposition

from .problems import CLOSE, Direct, dense_hessian, losses_at, network, rows, vector

N, VALUES = 3, 4
X = torch.tensor([-1.0, 0.3, 0.8, 2.0], dtype=torch.float64)
Y = torch.tensor([0.7, -0.4, 0.2, 1.0], dtype=torch.float64)
CHANCES = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def losses(theta):
    """Of each value of z at θ (…, 2): (…, VALUES)."""
    return (torch.tanh(theta[..., :1] * X + theta[..., 1:]) - Y).square()


def trained(data):
    """A(S) of data sets (R, N): a few steps of SGD, one sample at a time and not in a symmetric order."""
    theta = torch.tensor([0.5, -0.2]).double().repeat(len(data), 1).requires_grad_()
    for i in (0, 1, 2, 0, 2, 1, 1):
        own = losses(theta).gather(1, data[:, i : i + 1]).sum()
        theta = (theta - 0.4 * torch.autograd.grad(own, theta)[0]).detach().requires_grad_()
    return theta.detach()


def every_data_set():
    """All S and fresh samples z' (R, N), and the chance of each pair."""
    both = torch.tensor(list(itertools.product(range(VALUES), repeat=2 * N)))
    return both[:, :N], both[:, N:], CHANCES[both].prod(1)


def replaced(S, fresh, i):
    Si = S.clone()
    Si[:, i] = fresh[:, i]
    return Si


def training_loss(theta, S):
    return losses(theta).gather(1, S).mean(1)


def expected_gap():
    S, _, chance = every_data_set()
    theta = trained(S)
    return float(chance @ (losses(theta) @ CHANCES - training_loss(theta, S)))


def test_the_gap_is_what_replacing_one_sample_does_to_its_own_loss():
    S, fresh, chance = every_data_set()
    theta, total = trained(S), 0.0
    for i in range(N):
        at = S[:, i : i + 1]
        rise = losses(trained(replaced(S, fresh, i))).gather(1, at) - losses(theta).gather(1, at)
        total += float(chance @ rise[:, 0]) / N
    assert total == pytest.approx(expected_gap(), rel=1e-12)
    assert expected_gap() > 0.05  # of losses near 0.5


def test_the_gap_is_the_sum_of_the_rises_of_the_training_loss():
    """Σ_i E [L_S(A(Sⁱ)) − L_S(A(S))], with the factor N and no approximation."""
    S, fresh, chance = every_data_set()
    total = 0.0
    for i in range(N):
        total += float(chance @ (training_loss(trained(replaced(S, fresh, i)), S) - training_loss(trained(S), S)))
    assert total == pytest.approx(expected_gap(), rel=1e-12)


def test_the_gap_is_the_rise_to_an_independent_solution():
    S, other, chance = every_data_set()
    rise = training_loss(trained(other), S) - training_loss(trained(S), S)
    assert float(chance @ rise) == pytest.approx(expected_gap(), rel=1e-12)


def variabilities():
    """V' of independent data sets, and N V of those with one sample replaced."""
    S, other, chance = every_data_set()
    move = trained(other) - trained(S)
    independent = (chance[:, None] * move).T @ move
    one = torch.zeros(2, 2).double()
    for i in range(N):
        move = trained(replaced(S, other, i)) - trained(S)
        one += (chance[:, None] * move).T @ move
    return independent, one


def test_independent_data_sets_vary_by_twice_the_covariance_and_by_n_v_at_most():
    S, _, chance = every_data_set()
    theta = trained(S)
    away = theta - chance @ theta
    covariance = (chance[:, None] * away).T @ away
    independent, one = variabilities()
    torch.testing.assert_close(independent, 2 * covariance, rtol=1e-12, atol=0)
    assert torch.linalg.eigvalsh(one - independent).min() > 0  # Efron and Stein, in every direction; here it is strict


def test_for_a_mean_all_constants_are_exact():
    """ℓ = ½ ‖θ − z‖², A the mean: gap Tr Σ/N, V' = N V = 2 Σ/N, and no remainder."""
    torch.manual_seed(0)
    values = torch.randn(3, 2).double()
    S = torch.tensor(list(itertools.product(range(3), repeat=2 * N)))
    S, fresh = values[S[:, :N]], values[S[:, N:]]
    mean = values.mean(0)
    sigma = (values - mean).T @ (values - mean) / 3
    theta = S.mean(1)
    test = (theta[:, None] - values).square().sum(2).mean(1) / 2
    gap = (test - (theta[:, None] - S).square().sum(2).mean(1) / 2).mean()
    one = torch.zeros(2, 2).double()
    for i in range(N):
        move = (fresh[:, i] - S[:, i]) / N
        one += move.T @ move / len(S)
    torch.testing.assert_close(gap, sigma.trace() / N, **CLOSE)
    torch.testing.assert_close(one, 2 * sigma / N, **CLOSE)
    torch.testing.assert_close(one.trace() / 2, gap, **CLOSE)  # ½ N Tr[H V], H = 1


def minima(x, y, sets):
    """Minima of ridge logistic losses on index sets (R, N), by Newton's method, (R, D)."""
    theta = torch.zeros(len(sets), x.size(1)).double()
    for _ in range(12):
        p = torch.sigmoid((x @ theta.T).T)  # (R, M)
        counts = torch.zeros(len(sets), len(x)).double().scatter_add_(1, sets, torch.ones(sets.shape).double())
        g = (counts * (p - y)) @ x / sets.size(1) + RIDGE * theta
        h = torch.einsum("rm,md,me->rde", counts * p * (1 - p), x, x) / sets.size(1) + RIDGE * torch.eye(x.size(1))
        theta = theta - torch.linalg.solve(h, g)
    return theta


RIDGE = 0.1


def logistic(n, generator):
    """A pool of 64 samples, which is the population, and a data set of n of them with all neighbours' minima."""
    pool = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=pool).double()
    y = (torch.rand(64, generator=pool) < torch.sigmoid(x[:, 0])).double()
    S, fresh = torch.randint(64, (2, n), generator=generator)
    sets = S.repeat(n + 1, 1)
    sets[torch.arange(n) + 1, torch.arange(n)] = fresh
    return x, y, S, fresh, minima(x, y, sets)


def test_at_a_minimum_moves_gap_and_curvature_term_are_those_of_the_theory():
    """Δ_i ≈ H⁻¹ (g_i − g'_i)/N, and gap ≈ Tr(H⁻¹ Σ)/N ≈ ½ N Tr[H V]."""
    n, generator = 400, torch.Generator().manual_seed(1)
    x, y, S, fresh, theta = logistic(n, generator)
    model = Direct(theta[0])

    def loss_fn(x, y):
        z = x @ model.theta
        return torch.nn.functional.softplus(z) - y * z + RIDGE / 2 * model.theta.square().sum()

    found = gap_decomposition(model, loss_fn, x[S], y[S], neighbours=enumerate(theta[1:]))
    p = torch.sigmoid(x @ theta[0])
    g = (p - y)[:, None] * x + RIDGE * theta[0]  # (64, 3)
    h = torch.einsum("m,md,me->de", (p * (1 - p))[S], x[S], x[S]) / n + RIDGE * torch.eye(3)
    moves = theta[1:] - theta[0]
    predicted = torch.linalg.solve(h, (g[S] - g[fresh]).T).T / n
    assert float((moves - predicted).norm() / moves.norm()) < 0.02
    sigma = torch.cov(g.T, correction=0)
    takeuchi = float(torch.linalg.solve(h, sigma).trace()) / n
    assert found.curvature.low < takeuchi < found.curvature.high
    assert found.curvature.mean == pytest.approx(takeuchi, rel=0.15)  # of 400 z'
    assert abs(found.gradient.mean) < 1e-9 and found.holds and found.share < 0.01
    assert found.replace_one.low < takeuchi < found.replace_one.high


def test_over_seeds_all_three_ways_agree_with_the_population_s_gap():
    generator = torch.Generator().manual_seed(2)
    parts, gaps = [], []
    for _ in range(40):
        x, y, S, _, theta = logistic(24, generator)
        model = Direct(theta[0])

        def loss_fn(x, y, model=model):
            z = x @ model.theta
            return torch.nn.functional.softplus(z) - y * z + RIDGE / 2 * model.theta.square().sum()

        parts.append(gap_decomposition(model, loss_fn, x[S], y[S], neighbours=enumerate(theta[1:]), test=(x, y)))
        gaps.append(float((loss_fn(x, y).mean() - loss_fn(x[S], y[S]).mean()).detach()))
        assert parts[-1].test_gap.mean == pytest.approx(gaps[-1], rel=1e-9)
    whole = GapDecomposition.over_seeds(parts)
    assert whole.over == "seeds" and whole.curvature.n == 40
    for name in ("loss_rise", "replace_one"):
        away = interval(getattr(part, name).mean - gap for part, gap in zip(parts, gaps, strict=True))
        assert away.low < 0 < away.high
    assert whole.test_gap.low < whole.loss_rise.mean < whole.test_gap.high
    narrow = (whole.loss_rise.high - whole.loss_rise.low) / (whole.test_gap.high - whole.test_gap.low)
    assert narrow < 0.5 and whole.loss_rise.low > 0.05
    assert "over 40 seeds" in str(whole)


def test_terms_are_those_of_the_dense_hessian():
    model, loss_fn, x, y = network()
    generator = torch.Generator().manual_seed(3)
    theta, H = vector(model), dense_hessian(model, x, y)
    moves = 0.1 * torch.randn(20, len(theta), generator=generator).double()
    indices = [k % 12 for k in range(20)]
    names = {name: p.shape for name, p in model.named_parameters()}
    pairs = []
    for k, (i, move) in enumerate(zip(indices, moves, strict=True)):
        parts = (theta + move).split([shape.numel() for shape in names.values()])
        by_name = {name: part.view(names[name]) for name, part in zip(names, parts, strict=True)}
        pairs.append((i, theta + move if k % 2 else by_name))
    found = gap_decomposition(model, loss_fn, x, y, neighbours=iter(pairs), tolerance=0.3, chunk=5)
    base, mean = losses_at(model, theta, x, y), rows(model, loss_fn, x, y).mean(0)
    first, second = 12 * moves @ mean, 6 * ((moves @ H) * moves).sum(1)
    there = torch.stack([losses_at(model, theta + move, x, y) for move in moves])
    rise = 12 * (there.mean(1) - base.mean())
    own = torch.stack([there[k, i] - base[i] for k, i in enumerate(indices)])
    for term, expected in (
        (found.gradient, first),
        (found.curvature, second),
        (found.remainder, rise - first - second),
        (found.loss_rise, rise),
        (found.replace_one, own),
        (found.variability, moves.square().sum(1)),
    ):
        half = 2.093024 * float(expected.std()) / 20**0.5
        assert term.mean == pytest.approx(float(expected.mean()), rel=1e-8, abs=1e-12)
        assert term.high - term.mean == pytest.approx(half, rel=1e-5)
    expected = float((rise - first - second).abs().mean() / second.abs().mean())
    assert found.share == pytest.approx(expected, rel=1e-8)
    assert found.largest_move == pytest.approx(float(moves.norm(dim=1).max()))
    assert found.holds == (expected <= 0.3)
    assert torch.equal(vector(model), theta)


def test_large_moves_are_seen_to_be_beyond_the_expansion():
    model, loss_fn, x, y = network()
    theta = vector(model)
    for size, holds in ((0.01, True), (3.0, False)):
        moves = size * torch.randn(6, len(theta), generator=torch.Generator().manual_seed(4)).double()
        found = gap_decomposition(model, loss_fn, x, y, neighbours=enumerate(theta + moves))
        assert found.holds == holds and ("holds" in str(found)) == holds and ("FAILS" in str(found)) != holds
    still = gap_decomposition(model, loss_fn, x, y, neighbours={0: theta, 5: theta})
    assert still.curvature.mean == 0 and not still.holds


def test_rounding_of_float32_is_told():
    model, loss_fn, x, y = network()
    model, x = model.float(), x.float()
    theta = vector(model)
    moves = 1e-5 * torch.randn(6, len(theta), generator=torch.Generator().manual_seed(5))
    assert "take the model in float64" in str(
        gap_decomposition(model, loss_fn, x, y, neighbours=enumerate(theta + moves))
    )
    text = str(gap_decomposition(model, loss_fn, x, y, neighbours=enumerate(theta + 1e4 * moves)))
    assert "take the model in float64" not in text


def test_rounding_of_small_losses_is_not_small():
    """The error of cross entropy is about eps however small the loss, for logits are rounded that are not."""
    model = Direct(torch.tensor([12.0, 0.0]))
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(50, 2)

    def loss_fn(x):
        return torch.nn.functional.cross_entropy(x + model.theta, torch.zeros(50, dtype=torch.long), reduction="none")

    moves = 0.01 * torch.randn(50, 2, generator=generator)
    found = gap_decomposition(model, loss_fn, x, neighbours=enumerate(model.theta.detach() + moves))
    model = model.double()
    exact = gap_decomposition(model, loss_fn, x.double(), neighbours=enumerate(model.theta.detach() + moves.double()))
    assert exact.holds and "float64" not in str(exact)
    assert abs(found.remainder.mean - exact.remainder.mean) > 0.1 * exact.sizes[1]  # noise of the size of the term
    assert found.rounding >= 50 * 2**-23 and "take the model in float64" in str(found)


def test_one_move_of_nan_is_told_wherever_it_stands():
    model, loss_fn, x, y = network()
    theta = vector(model)
    for order in ((0, 1), (1, 0)):
        moved = [theta + 0.01, theta * float("nan")]
        found = gap_decomposition(model, loss_fn, x, y, neighbours=[(k, moved[k]) for k in order])
        assert found.largest_move != found.largest_move and not found.holds and found.curvature.diverged == 1
        whole = GapDecomposition.over_seeds(
            [found, gap_decomposition(model, loss_fn, x, y, neighbours={0: theta + 0.01})]
        )
        assert whole.largest_move != whole.largest_move


def test_the_test_gap_is_said_to_be_over_test_samples():
    model, loss_fn, x, y = network()
    found = gap_decomposition(model, loss_fn, x, y, neighbours={0: vector(model) + 0.01}, test=(x[:7], y[:7]))
    line = next(line for line in str(found).splitlines() if line.startswith("test"))
    assert line.endswith("over 7 test samples") and "test samples" not in str(GapDecomposition.over_seeds([found] * 2))


def test_frozen_parameters_may_be_among_the_neighbours():
    model, loss_fn, x, y = network()
    model[0].bias.requires_grad_(False)
    moved = {name: p.detach() + 0.01 for name, p in model.named_parameters()}
    found = gap_decomposition(model, loss_fn, x, y, neighbours={0: moved})
    moved.pop("0.bias")
    assert str(gap_decomposition(model, loss_fn, x, y, neighbours={0: moved})) == str(found)
    with pytest.raises(ArgumentError, match="neighbour 0 has unknown other"):
        gap_decomposition(model, loss_fn, x, y, neighbours={0: {**moved, "other": moved["0.weight"]}})


def test_mistakes_are_errors():
    model, loss_fn, x, y = network()
    theta = vector(model)
    with pytest.raises(ArgumentError, match="neighbours are empty: train at least one"):
        gap_decomposition(model, loss_fn, x, y, neighbours={})
    for wrong in (12, -1, True, "a"):
        with pytest.raises(ArgumentError, match=r"numbered by the sample that was replaced, 0 … 11; got"):
            gap_decomposition(model, loss_fn, x, y, neighbours=[(wrong, theta)])
    with pytest.raises(ArgumentError, match="neighbour 3 lacks 0.bias"):
        by_name = {name: p for name, p in model.named_parameters() if name != "0.bias"}
        gap_decomposition(model, loss_fn, x, y, neighbours={3: by_name})
    with pytest.raises(ArgumentError, match="tolerance must be above 0; got 0"):
        gap_decomposition(model, loss_fn, x, y, neighbours={0: theta}, tolerance=0)
    with pytest.raises(ArgumentError, match="over_seeds needs one decomposition or more.*got N of none"):
        GapDecomposition.over_seeds([])
