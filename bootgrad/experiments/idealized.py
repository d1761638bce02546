"""Section 2.4: two parameters, one basin in which the samples agree, and deeper ones in which they do not.

    ℓ(θ; z, δ) = ½ κ ‖θ‖² − A exp(−‖θ − t‖² / 2w²) − Σ_j z_j exp(−‖θ − s_j − δ_j‖² / 2v²)

All samples have the basin at t. The wells at s_j have amplitudes z_j ~ N(0, ζ²) and places δ_j ~ N(0, ρ²) of each sample's
own: over the population they vanish, over N samples they do not, and with ζ/√N > A the deepest are deeper than t's. The test
loss is the population's, in closed form.

Letters: ``S`` seeds (data sets), ``M`` starts, ``N`` samples, ``J`` wells. All seeds and starts move at once.
"""

import itertools
import math
import statistics
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from .conduct import markdown
from .evidence import Claim, difference, interval
from .search import halve, runs_of_halving
from .study import Study
from .table import Table, Value

TITLE = "SGD stays where samples agree, although other minima of the mean loss are deeper"
SECTION, IMAGES = "2.4", False
ABOUT = """
Losses of two parameters: one basin that all samples share, and six places where each sample has a well or a hill of its own.
Over the population these vanish; the mean of 16 samples has minima there, often deeper than the shared one. Gradient descent
meets SGD (batches drawn with replacement), isotropic noise of the power that SGD of batches of 4 has on its own path, Reg1 and
Reg2. The paper reports final test losses of 5.33 for SGD and 13.99 for gradient descent; its functions are not known here, so
orderings are compared. Learning rate and strength are those with the lowest loss on 1000 fresh samples, on other data sets.
"""
COLUMNS = (
    "stage", "method", "lr", "strength", "seed", "basin", "share", "noise", "depth", "test_loss", "validation_loss"
)  # fmt: skip

SAMPLES, WELLS = 16, 6
KAPPA, DEPTH, WIDTH, AMPLITUDE, WELL_WIDTH, SPREAD = 0.05, 1.0, 0.7, 9.0, 0.6, 0.4
PLACE = torch.tensor([0.0, 0.0])
RADIUS, BOX = 3.0, 4.0
BASINS = ("shared", *(f"well {j + 1}" for j in range(WELLS)), "between")
METHODS = ("gd", "sgd 1", "sgd 4", "sgd 16", "noisy gd", "gd + reg1", "gd + reg2")
LRS, STRENGTHS = (0.03, 0.1, 0.3), (0.01, 0.03, 0.1, 0.3)
_REG2_BATCH = 4


class Landscape:
    """The data sets of some seeds: amplitudes (S, N, J) and places (S, N, J, 2) of the wells."""

    def __init__(self, seeds, samples: int = SAMPLES):
        """Draw them."""
        drawn = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            drawn.append(
                (torch.randn(samples, WELLS, generator=generator), torch.randn(samples, WELLS, 2, generator=generator))
            )
        z, delta = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        angles = torch.arange(WELLS) * (2 * math.pi / WELLS)
        self.wells = RADIUS * torch.stack([angles.cos(), angles.sin()], 1)  # (J, 2)
        self.amplitudes, self.places = AMPLITUDE * z, self.wells + SPREAD * delta

    def gradients(self, theta: Tensor) -> Tensor:
        """Per-sample gradients (S, M, N, 2) at θ (S, M, 2)."""
        away, well = self._wells(theta)
        from_shared = theta - PLACE
        basin = DEPTH / WIDTH**2 * torch.exp(-from_shared.square().sum(-1, keepdim=True) / (2 * WIDTH**2)) * from_shared
        return (well[..., None] * away).sum(3) / WELL_WIDTH**2 + (KAPPA * theta + basin)[:, :, None]

    def losses(self, theta: Tensor) -> Tensor:
        """Per-sample losses (S, M, N) at θ (S, M, 2)."""
        return population_loss(theta)[:, :, None] - self._wells(theta)[1].sum(3)

    def _wells(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Way to each well (S, M, N, J, 2), and how deep one is in it (S, M, N, J)."""
        away = theta[:, :, None, None] - self.places[:, None]
        return away, self.amplitudes[:, None] * torch.exp(-away.square().sum(-1) / (2 * WELL_WIDTH**2))


def population_loss(theta: Tensor) -> Tensor:
    """The expected loss at θ (…, 2), for wells have the mean zero; shifted to zero at the shared basin without the bowl."""
    bowl = 0.5 * KAPPA * theta.square().sum(-1)
    return bowl + DEPTH * (1 - torch.exp(-(theta - PLACE).square().sum(-1) / (2 * WIDTH**2)))


def noise_power(g: Tensor) -> Tensor:
    """Γ = (1/N) Σ ‖g_i − ḡ‖² of per-sample gradients (S, M, N, 2)."""
    return (g - g.mean(2, keepdim=True)).square().sum(-1).mean(2)


def simulate(method: str, land: Landscape, lr: float, strength: float, steps: int, starts: int, power=0.0) -> Tensor:
    """The path (steps, S, M, 2) of a method, from starts in a square that are the same for all methods.

    ``strength`` is λ of the penalties, ``power`` E‖noise‖² of a step's gradient of noisy gradient descent.
    """
    generator = torch.Generator().manual_seed(0)
    theta = BOX * (2 * torch.rand(len(land.amplitudes), starts, 2, generator=generator) - 1)
    path = []
    for _ in range(steps):
        if method.startswith("gd +"):
            theta = theta.detach().requires_grad_()
        g = land.gradients(theta)
        mean = g.mean(2)
        if method.startswith("sgd"):
            move = _batch_mean(g, int(method.split()[1]), generator)
        elif method == "noisy gd":
            move = mean + math.sqrt(power / 2) * torch.randn(theta.shape, generator=generator)
        elif method == "gd + reg1":
            move = mean + strength * torch.autograd.grad(noise_power(g).sum(), theta)[0]
        elif method == "gd + reg2":
            penalty = (_batch_mean(g, _REG2_BATCH, generator) - mean).square().sum()
            move = mean + strength * torch.autograd.grad(penalty, theta)[0]
        else:
            move = mean
        theta = (theta - lr * move).detach()
        path.append(theta)
    return torch.stack(path)


def _batch_mean(g: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Mean over ``size`` of the N samples, drawn with replacement for each path: (S, M, 2)."""
    chosen = torch.randint(g.shape[2], (*g.shape[:2], size), generator=generator)
    return g.gather(2, chosen[..., None].expand(-1, -1, -1, 2)).mean(2)


def evaluate(method: str, seeds, setting: Mapping[str, Value], steps: int, starts: int) -> list[dict[str, Value]]:
    """A row for each seed and basin: the share of the second half's time spent there, the noise and depth there."""
    land, fresh = Landscape(seeds), Landscape([10_000 + seed for seed in seeds], 1000)
    lr, strength, power = float(setting["lr"]), float(setting["strength"]), 0.0
    if method == "noisy gd":  # of SGD with batches of 4, on its own path
        visited = simulate("sgd 4", land, lr, 0.0, steps, starts)[::10]
        power = statistics.fmean(float(noise_power(land.gradients(theta)).mean()) for theta in visited) / 4
    path = simulate(method, land, lr, strength, steps, starts, power)
    final = path[-1]
    is_finite = torch.isfinite(final).all(-1)
    test = torch.where(is_finite, population_loss(final), torch.inf).mean(1)
    validation = torch.where(is_finite, fresh.losses(final).mean(2), torch.inf).mean(1)
    centers = torch.cat([PLACE[None], land.wells])  # (1 + J, 2)
    away = (path[steps // 2 :, :, :, None] - centers).square().sum(-1)  # (T, S, M, 1 + J)
    distance, nearest = away.min(-1)
    basin = torch.where(distance <= 1.0, nearest, WELLS + 1)
    at = centers.expand(len(land.amplitudes), -1, -1)
    noise, depth = noise_power(land.gradients(at)), -land.losses(at).mean(2)
    nan = torch.full_like(noise[:, :1], torch.nan)  # there is no place between
    share = torch.stack([(basin == b).float().mean((0, 2)) for b in range(WELLS + 2)], 1)
    by_basin = {"share": share, "noise": torch.cat([noise, nan], 1), "depth": torch.cat([depth, nan], 1)}
    return [
        {"seed": seed, "basin": name, "test_loss": float(test[s]), "validation_loss": float(validation[s])}
        | {column: float(values[s, b]) for column, values in by_basin.items()}
        for s, seed in enumerate(seeds)
        for b, name in enumerate(BASINS)
    ]


def run(study: Study) -> None:
    """Search for each method's learning rate and strength, then run it on the seeds."""
    steps, starts = (3000, 100) if study.full else (900, 30)
    grids: dict[str, list[dict[str, Value]]] = {method: [] for method in METHODS}
    for method, lr, strength in itertools.product(METHODS, LRS, STRENGTHS):
        if "reg" in method or strength == STRENGTHS[0]:
            grids[method].append({"method": method, "lr": lr, "strength": strength if "reg" in method else 0.0})

    def score(setting: Mapping[str, Value], budget: float) -> Mapping[str, Value]:
        rows = evaluate(str(setting["method"]), range(1000, 1004), setting, int(steps * budget), starts)
        mean = sum(float(row["validation_loss"]) for row in rows) / len(rows)
        return {**rows[0], "seed": -1, "basin": "all", "share": 1.0, "validation_loss": mean}

    with study.progress(sum(runs_of_halving(len(grid), 2) + 1 for grid in grids.values()), "idealized"):
        for method, grid in grids.items():
            best = halve(study, grid, score, score="validation_loss", budgets=(1 / 3, 1.0))
            study.rows({**best, "stage": "final"}, partial(evaluate, method, study.seeds, best, steps, starts))


def _by_seed(table: Table, method: str, column: str = "test_loss") -> list[float]:
    return table.where(stage="final", method=method, basin="shared").column(column)


def claims(table: Table) -> list[Claim]:
    """Orderings of test losses, and where the time is spent."""
    pairs = (("sgd 4", "gd"), ("sgd 1", "gd"), ("sgd 4", "noisy gd"), ("gd + reg1", "gd"), ("gd + reg2", "gd"))
    found = [
        Claim(
            f"{better} ends at a lower test loss than {worse}",
            SECTION,
            f"test loss of {worse} less that of {better}",
            difference(_by_seed(table, worse), _by_seed(table, better)),
        )
        for better, worse in pairs
    ]
    shares = [_by_seed(table, method, "share") for method in ("sgd 4", "gd")]
    text = "SGD spends more of its time in the basin without noise than gradient descent"
    return [*found, Claim(text, SECTION, "share of sgd 4 less that of gd", difference(*shares))]


def tables(table: Table) -> str:
    """Test loss and shares of each method; noise and depth of the basins."""
    final = table.where(stage="final")
    rows = []
    for method in map(str, final.values("method")):
        mine = final.where(method=method)
        elsewhere = zip(
            mine.where(basin="shared").column("share"), mine.where(basin="between").column("share"), strict=True
        )
        in_wells = interval(max(0.0, 1 - a - b) for a, b in elsewhere)
        losses, share = (interval(_by_seed(table, method, column)) for column in ("test_loss", "share"))
        rows.append((method, mine.rows[0]["lr"], mine.rows[0]["strength"], losses, share, in_wells))
    at = final.where(method="gd")
    shared, wells = at.where(basin="shared"), [r for r in at if str(r["basin"]).startswith("well")]
    deeper = [max(float(r["depth"]) for r in wells if r["seed"] == s["seed"]) - float(s["depth"]) for s in shared]
    return "\n\n".join(
        [
            markdown(("method", "lr", "λ", "test loss", "time in the shared basin", "time in the wells"), rows),
            f"Tr Σ at the bottom of the shared basin: {interval(shared.column('noise'))}; of the wells: "
            f"{interval(float(r['noise']) for r in wells)}. The training loss's deepest well is deeper than the shared "
            f"basin by {interval(deeper)}.",
        ]
    )


def draw(table: Table):
    """Paths over the training loss of the first seed, and over the map of Tr Σ; test losses of all methods."""
    from ..training.figures import COLOURS, panels

    figure, axes = panels(1, 3, (15, 4.8), shared=False)
    land = Landscape([0])
    line = torch.linspace(-BOX, BOX, 161)
    grid = torch.cartesian_prod(line, line)[None]
    maps = (land.losses(grid).mean(2), noise_power(land.gradients(grid)))
    final = table.where(stage="final")
    for ax, values, name in zip(axes, maps, ("Mean training loss", "Tr Σ of the samples' gradients"), strict=False):
        picture = ax.contourf(line, line, values.reshape(161, 161).T, levels=24, cmap="cividis")
        figure.colorbar(picture, ax=ax)
        for method, colour in (("gd", COLOURS[1]), ("sgd 4", COLOURS[3])):
            lr = float(final.where(method=method).rows[0]["lr"])
            path = simulate(method, land, lr, 0.0, 400, 4)[:, 0]
            for k in range(path.shape[1]):
                ax.plot(path[:, k, 0], path[:, k, 1], color=colour, linewidth=0.8, label=method if k == 0 else None)
        ax.plot(*PLACE, "*", markersize=14, color="white", markeredgecolor="black", label="shared basin")
        ax.set(title=name, xlabel="θ₁", ylabel="θ₂", xlim=(-BOX, BOX), ylim=(-BOX, BOX))
    axes[0].legend(loc="lower left")
    methods = [str(m) for m in final.values("method")]
    found = [interval(_by_seed(table, m)) for m in methods]
    means, halves = [f.mean for f in found], [f.high - f.mean for f in found]
    axes[2].barh(methods, means, xerr=halves, color=COLOURS[0], capsize=3)
    axes[2].invert_yaxis()
    axes[2].set(title="Final test loss, 95 % intervals", xlabel="loss")
    return figure
