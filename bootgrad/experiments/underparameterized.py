"""Networks that cannot fit all training images, or that are not to: a narrow CNN, and labels that are wrong."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..intervals import interval
from ..training.data import ImageData
from ..training.model import reference_cnn
from .evidence import Claim
from .image_comparison import COLUMNS as OF_RUNS
from .image_comparison import FULL_GRID, QUICK_GRID, Problem, compare_all, final
from .image_draws import Draw, is_small, shrunk
from .image_draws import draw as draw_images
from .image_reports import against_sgd, draw_problems, measured
from .image_runs import BOTH, REG1, REG2, SGD
from .study import Study
from .table import Table

TITLE = "Penalties on gradient noise where the training error does not vanish, or ought not to"
SECTION, IMAGES = "ours", True
ABOUT = """
Where a network interpolates, per-sample gradients vanish together with the loss. Three problems in which they do not, or ought
not to: a CNN of convolutions of 2 and 4 channels and a linear layer, whose training error stays above zero (the training
accuracy in the table says whether it did); and the reference CNN with 20 % and with 40 % of the training labels replaced by
another class each, at random. The labels of validation images are wrong as often, and those of test images right. SGD, Reg1
about the batch mean, Reg2 and both about a moving average; λ₁ = s, λ₂ = B·s; in the full form also SGD with as many more
epochs as fit into the time of each.
"""
COLUMNS = ("problem", *OF_RUNS)

BATCH = 16
NARROW, WIDTHS = "narrow CNN", (2, 4)
FLIPPED = {"20 % wrong labels": 0.2, "40 % wrong labels": 0.4}
WAYS = (SGD, REG1, REG2, BOTH)


def narrow_cnn(image_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """Two 3×3 convolutions of 2 and 4 channels, each pooled, then ``classes`` units: 266 parameters for digits."""
    c, h, w = image_shape
    first, second = WIDTHS
    return nn.Sequential(
        nn.Conv2d(c, first, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * (h // 4) * (w // 4), classes),
    )


def flipped(y: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Labels of which a share, at random, is replaced by another class, all of these alike."""
    chosen = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    moved = y.clone()
    moved[chosen] = (y[chosen] + torch.randint(1, classes, (len(chosen),), generator=generator)) % classes
    return moved


def mislabelled(data: ImageData, size: int, share: float, seed: int) -> Draw:
    """Images at random, with a share of the labels to train and to validate on wrong."""
    images, generator = draw_images(data, size, seed), torch.Generator().manual_seed(seed)
    train, validation = ((x, flipped(y, share, data.classes, generator)) for x, y in (images.train, images.validation))
    return replace(images, train=train, validation=validation)


def problems(data: ImageData, full: bool) -> list[Problem]:
    """All three; the quick form leaves out the few wrong labels."""
    size, steps = (400, 800 if is_small(data) else 400) if full else (240, 32)
    epochs = steps / (size // BATCH)
    grid = FULL_GRID if full else QUICK_GRID
    narrow = Problem({"problem": NARROW}, partial(draw_images, data, size), BATCH, epochs, grid, network=narrow_cnn)
    others = [
        replace(narrow, settings={"problem": name}, draw=partial(mislabelled, data, size, share), network=reference_cnn)
        for name, share in FLIPPED.items()
        if full or share == max(FLIPPED.values())
    ]
    return [narrow, *others]


def run(study: Study) -> None:
    """All ways on all problems."""
    compare_all(study, problems(shrunk(study.images()), study.full), WAYS, WAYS[1:] if study.full else ())


def claims(table: Table) -> list[Claim]:
    """Whether the narrow CNN is too narrow; each way against SGD, at the end and stopped early."""
    errors = interval(1 - a for a in final(table, problem=NARROW, way=SGD.name).column("train_accuracy"))
    text = "the narrow CNN's training error stays above zero"
    found = [Claim(text, SECTION, "training error of sgd", errors)]
    for problem in final(table).values("problem"):
        found += against_sgd(table, WAYS[1:], SECTION, {"problem": problem}, f"{problem}: ")
    return found


def tables(table: Table) -> str:
    """All ways on all problems."""
    return measured(table, ("problem",))


draw = draw_problems
