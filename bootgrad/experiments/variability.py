"""Figure 3: how far a solution moves when one sample is replaced, and how much worse it does on fresh ones, along training.

    Tr V = (1/N) Σ_i E ‖A(Sⁱ) − A(S)‖²
    gap  = E ℓ(A(S), fresh) − ℓ(A(S), S)  =  E (1/N) Σ_i [ℓ(A(Sⁱ), z_i) − ℓ(A(S), z_i)]

Sⁱ is the training set S with its sample z_i replaced by a fresh one. All copies of one draw of the noise have the same start
and the same places of batches, so that they differ by the data alone.

Letters: ``S`` seeds (data sets), ``R`` draws of the noise, ``C`` copies: 1 + the replaced samples, ``N`` samples, ``D`` inputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..errors import DataError
from ..training.data import ImageData
from .conduct import markdown
from .ensembles import TwoLayers, penalized_gradient
from .evidence import Claim, Interval, difference, interval, mean_correlation
from .search import halve, runs_of_halving
from .study import Study
from .table import Row, Table, Value

TITLE = "The generalization gap, the solution's variability under replaced samples, and the penalties"
SECTION, IMAGES = "Figure 3", True
SAMPLES, HIDDEN, BATCH, VALIDATION, DECAY = 128, 32, 16, 400, 0.9
ABOUT = f"""
A network of {HIDDEN} hidden units on {SAMPLES} images (scikit-learn's digits, or those of --data), trained again and again
with one of them replaced by another one, all at once. Gradient descent, SGD of batches of {BATCH}, and SGD with Reg1 about the
batch mean or Reg2 about a moving average of the gradients (decay {DECAY}), by exact derivatives. Learning rates are those with
the lowest loss on {VALIDATION} other images at the end, then each strength, at SGD's rate, by halving on data sets of seeds
that serve nothing else; 0.3 and 3 times the strength are run, too. The paper reports that gap and variability go together. A
tanh network with 64 images, and wrong labels, had been looked at before: the penalties were of no use there, either.
"""
COLUMNS = (
    "stage", "method", "lr", "strength", "seed", "step",
    "train_loss", "validation_loss", "test_loss", "gap", "replaced_gap", "variability",
)  # fmt: skip
LRS, SHARES, CHECKPOINTS = (0.03, 0.1, 0.3, 1.0), (1.0, 0.3, 3.0), 8
STRENGTHS = {"sgd + reg1": (0.001, 0.003, 0.01, 0.03), "sgd + reg2": (0.01, 0.03, 0.1, 0.3)}
METHODS = ("gd", "sgd", *STRENGTHS)


class Draws:
    """The data sets of some seeds, whole and with one sample replaced.

    Attributes:
        chosen: which images are the copies' training sets, (S, 1, C, N): S first, then Sⁱ for some i.
        replaced: the samples z_i of S that Sⁱ lacks, (S, 1, C − 1, 1, D), and their labels.
        validation, test: fresh samples (S, 1, 1, n, D) and (n, D), and their labels.
    """

    def __init__(self, images: ImageData, seeds: Sequence[int], replaced: int):
        """Draw them from the training images; the test images are those of all seeds.

        Raises:
            DataError: there are too few images.
        """
        self.x, self.y = images.x_train.flatten(1), images.y_train
        needed = SAMPLES + replaced + VALIDATION
        if len(self.x) < needed:
            raise DataError(f"--data must have at least {needed} training images; got {len(self.x)}: give a larger set")
        sets, gone, fresh = [], [], []
        for seed in seeds:
            order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
            mine, others, rest = order[:needed].split([SAMPLES, replaced, VALIDATION])
            copies = mine.repeat(1 + replaced, 1)  # (C, N)
            copies[range(1, 1 + replaced), range(replaced)] = others
            sets.append(copies)
            gone.append(mine[:replaced, None])
            fresh.append(rest[None])
        self.chosen = torch.stack(sets)[:, None]
        self.replaced, self.validation = (self.at(torch.stack(index)[:, None]) for index in (gone, fresh))
        self.test = (images.x_test.flatten(1), images.y_test)

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The images of an index, and their labels."""
        return self.x[index], self.y[index]

    def batch(self, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples at the same places of all copies of a seed and a draw of the noise, with replacement."""
        S, _, C, N = self.chosen.shape
        places = torch.randint(N, (S, draws, 1, BATCH), generator=generator).expand(-1, -1, C, -1)
        return self.at(self.chosen.expand(-1, draws, -1, -1).gather(3, places))


def train(
    network: TwoLayers, data: Draws, draws: int, setting: Mapping[str, Value], steps: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Each of the steps and the parameters (S, R, C, P) after it, R the draws of the noise."""
    S, _, C, _ = data.chosen.shape
    method, lr, strength = str(setting["method"]), float(setting["lr"]), float(setting["strength"])
    reg1, reg2 = (strength if name in method else 0.0 for name in ("reg1", "reg2"))
    generator = torch.Generator().manual_seed(0)
    starts = torch.stack([network.start(generator) for _ in range(S * draws)])
    theta = starts.view(S, draws, 1, -1).expand(-1, -1, C, -1)
    average, center = torch.zeros_like(theta), None
    for step in range(1, steps[-1] + 1):
        part = data.batch(draws, generator)
        if method == "gd":
            move = network(theta, *data.at(data.chosen)).gradient
        elif strength == 0:
            move = network(theta, *part).gradient
        else:
            move, mean = penalized_gradient(network, theta, part, reg1, reg2, center=center)
            average = DECAY * average + (1 - DECAY) * mean
            center = average / (1 - DECAY**step)
        theta = theta - lr * move
        if step in steps:
            yield step, theta


def measure(network: TwoLayers, data: Draws, theta: Tensor) -> dict[str, Tensor]:
    """Losses, gaps and variability (S,), means over draws of the noise and replaced samples; nan where there are none."""
    whole, moved = theta[:, :, :1], theta[:, :, 1:]
    train_loss = network(whole, *data.at(data.chosen[:, :, :1])).loss
    test_loss = network(whole, *data.test).loss
    found = {
        "train_loss": train_loss,
        "validation_loss": network(whole, *data.validation).loss,
        "test_loss": test_loss,
        "gap": test_loss - train_loss,
        "replaced_gap": network(moved, *data.replaced).loss - network(whole, *data.replaced).loss,
        "variability": (moved - whole).square().sum(-1),
    }
    return {name: value.mean((1, 2)) for name, value in found.items()}


def run(study: Study) -> None:
    """Search for each method's learning rate or strength, then train on the sets with replaced samples."""
    images = study.images()
    network = TwoLayers(images.x_train[0].numel(), HIDDEN, images.classes)
    replaced, draws, steps = (64, 2, 1200) if study.full else (12, 1, 300)
    at = [round(steps * (k / CHECKPOINTS) ** 2) for k in range(1, CHECKPOINTS + 1)]

    def score(setting: Mapping[str, Value], budget: float) -> Row:
        last = round(steps * budget)
        data = Draws(images, range(1000, 1006), 0)
        ((_, theta),) = train(network, data, 1, setting, [last])
        means = {name: float(value.mean()) for name, value in measure(network, data, theta).items()}
        return {"seed": -1, "step": last, **means}

    def final(setting: Mapping[str, Value]) -> Iterator[Row]:
        data = Draws(images, study.seeds, replaced)
        for step, theta in train(network, data, draws, setting, at):
            found = measure(network, data, theta)
            for s, seed in enumerate(study.seeds):
                yield {"seed": seed, "step": step, **{name: float(value[s]) for name, value in found.items()}}

    grids = {method: STRENGTHS.get(method, LRS) for method in METHODS}
    runs = sum(runs_of_halving(len(grid), 2) + (len(SHARES) if m in STRENGTHS else 1) for m, grid in grids.items())
    lr: Value = 0.0
    with study.progress(runs, "variability"):
        for method, grid in grids.items():
            plain = method not in STRENGTHS
            settings = [{"lr": value, "strength": 0.0} if plain else {"lr": lr, "strength": value} for value in grid]
            candidates = [{"method": method, **setting} for setting in settings]
            best = halve(study, candidates, score, score="validation_loss", budgets=(1 / 3, 1.0))
            lr = best["lr"]
            for share in SHARES[:1] if plain else SHARES:
                setting = {**best, "strength": share * float(best["strength"])}
                study.rows({**setting, "stage": f"share {share:g}"}, partial(final, setting))


def finals(table: Table, **settings: Value) -> Table:
    """The rows of the runs after the search."""
    return Table(table.columns, [row for row in table.where(**settings) if str(row["stage"]).startswith("share")])


def ends(table: Table, **settings: Value) -> Table:
    """Their rows at the end of training."""
    return finals(table, step=max(finals(table).column("step")), **settings)


def correlation_by_seed(table: Table) -> Interval:
    """Of gap and variability over the rows of each seed."""
    parts = [table.where(seed=seed) for seed in table.values("seed")]
    return mean_correlation((part.column("variability"), part.column("gap")) for part in parts)


def claims(table: Table) -> list[Claim]:
    """Correlations along training and over ways of training; reductions by the penalties at the end."""
    ways = f"correlation over {len(ends(table, seed=0))} ways of training, one of each seed"
    along, over = correlation_by_seed(finals(table, method="sgd")), correlation_by_seed(ends(table))
    checkpoints = f"correlation over {CHECKPOINTS} checkpoints, one of each seed"
    found = [
        Claim("gap and variability go together along SGD's training", SECTION, checkpoints, along),
        Claim("gap and variability go together over methods and strengths at the end", SECTION, ways, over),
    ]
    pairs = [("sgd", "gd", "variability"), ("sgd", "gd", "gap")]
    pairs += [(method, "sgd", name) for name in ("variability", "gap", "test_loss") for method in STRENGTHS]
    for better, worse, column in pairs:
        a, b = (ends(table, method=method, stage="share 1").column(column) for method in (better, worse))
        name = column.replace("_", " ")
        source = SECTION if worse == "sgd" and column != "test_loss" else "abstract"
        lower = interval([1 - p / q for p, q in zip(a, b, strict=True)])
        found.append(Claim(f"{better} ends with a lower {name} than {worse}", source, f"1 − {name} / {worse}'s", lower))
    return found


def tables(table: Table) -> str:
    """Numbers at the end of training; correlations along it; the gap measured in two ways."""
    columns = ("train_loss", "test_loss", "gap", "replaced_gap", "variability")
    end, rows, by_method = ends(table), [], []
    for method, lr, strength in dict.fromkeys((row["method"], row["lr"], row["strength"]) for row in end):
        part = end.where(method=method, strength=strength)
        rows.append((method, lr, f"{strength:.3g}", *(interval(part.column(name)) for name in columns)))
    for method in METHODS:
        last = ends(table, method=method, stage="share 1")
        bias = difference(last.column("replaced_gap"), last.column("gap"))
        by_method.append((method, correlation_by_seed(finals(table, method=method, stage="share 1")), bias))
    header = ("method", "lr", "λ", "training loss", "test loss", "gap", "gap by replacing", "Tr V")
    text = (
        "Correlation of gap and variability over checkpoints, and what the gap by replaced samples is off at the end:"
    )
    return "\n\n".join(
        [markdown(header, rows), text, markdown(("method", "correlation", "gap by replacing − gap"), by_method)]
    )


def draw(table: Table):
    """Gap and variability along training, and one over the other."""
    from ..training.figures import COLOURS, STYLES, finish, panels

    figure, axes = panels(1, 3, (16, 4.8), shared=False)
    for method, colour, style, marker in zip(METHODS, COLOURS, STYLES, "osD^", strict=True):
        part = finals(table, method=method, stage="share 1")
        steps = part.values("step")
        for ax, name in zip(axes, ("gap", "variability"), strict=False):
            means = [interval(part.where(step=step).column(name)).mean for step in steps]
            ax.plot(steps, means, color=colour, linestyle=style, marker=marker, markersize=4, label=method)
        every = finals(table, method=method)
        points = {"marker": marker, "linestyle": "", "markersize": 4, "alpha": 0.6}
        axes[2].plot(every.column("variability"), every.column("gap"), color=colour, label=method, **points)
    titles = (
        "Generalization gap",
        "Tr V, squared distance of solutions with a sample replaced",
        "All runs and checkpoints",
    )
    for ax, title, x, y in zip(
        axes, titles, ("step", "step", "Tr V"), ("nats", "parameter²", "gap, nats"), strict=True
    ):
        finish(ax, title, y)
        ax.set_xlabel(x)
        ax.legend()
    axes[2].set_xscale("log")
    return figure
