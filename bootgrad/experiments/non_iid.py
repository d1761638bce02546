"""Training images that are not of the distribution that is tested on: one class in excess, or the other half of the image."""

from dataclasses import replace
from functools import partial

import torch

from ..errors import DataError
from ..training.data import ImageData
from .evidence import Claim
from .image_comparison import COLUMNS as OF_RUNS
from .image_comparison import FULL_GRID, QUICK_GRID, SEARCH_SEED, Problem, compare_all
from .image_draws import Draw, Pair, is_small, shrunk
from .image_draws import draw as draw_images
from .image_reports import against_sgd, draw_problems, lower, measured
from .image_runs import BOTH, REG1, REG2, SGD
from .study import Study
from .table import Table

TITLE = "Penalties on gradient noise where training and test images are of unlike distributions"
SECTION, IMAGES = "ours", True
ABOUT = """
A bootstrap knows what it draws from: it cannot tell how much a solution would move under a distribution that it has not seen.
In the first problem nine tenths of the training images are of one class, another one for each seed, and the test images of all
classes alike; in the second a CNN is trained on the upper halves of images and tested on the lower ones. SGD, Reg1 about the
batch mean, Reg2 and both about a moving average; λ₁ = s, λ₂ = B·s; in the full form also SGD with as many more epochs as fit
into the time of each. Validation images are of the training distribution, for
another is not known when one trains. In the first problem, whose images are few, a setting's validation loss is the mean over
three searches, each with another class in excess, in the full form: not those in excess in the first five seeds.
"""
COLUMNS = ("problem", *OF_RUNS)

BATCH, SHARE = 16, 0.9
SKEWED_SEARCH = SEARCH_SEED + 5  # of ten classes, others are in excess than for the seeds 0 to 4
SKEWED, HALVES = "one class in excess", "upper halves"
WAYS = (SGD, REG1, REG2, BOTH)


def skewed(data: ImageData, size: int, seed: int, share: float = SHARE) -> Draw:
    """Images of which ``share`` are of the class ``seed`` modulo their number, the others at random; balanced test images.

    A quarter of them is to validate on. There are as many for every class in excess.

    Args:
        data: the images.
        size: to train and validate on, at most; fewer where the rarest class has not as many.
        seed: of the draw.
        share: of the class.

    Raises:
        DataError: a class has too few images.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.y_train), generator=generator)
    is_major = data.y_train[order] == seed % data.classes
    counts = torch.bincount(data.y_train, minlength=data.classes)
    rarest = int(counts.argmin())
    count = min(round(share * size), int(counts[rarest]))
    others = round(count * (1 - share) / share)
    if count < 8 or others < 1:
        raise DataError(
            f"non-iid needs at least 8 training images of every class; got {count} of class {rarest}: give it more by --data"
        )
    chosen = torch.cat([order[is_major][:count], order[~is_major][:others]])
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    held = len(chosen) // 4
    validation, train = ((data.x_train[index], data.y_train[index]) for index in (chosen[:held], chosen[held:]))
    return Draw(train, validation, balanced((data.x_test, data.y_test), data.classes), data.classes)


def balanced(images: Pair, classes: int) -> Pair:
    """The first images of each class, as many as the rarest class has."""
    places = [(images[1] == c).nonzero().flatten() for c in range(classes)]
    count = min(map(len, places))
    if count == 0:
        raise DataError("non-iid needs test images of every class: give it others by --data")
    index = torch.cat([p[:count] for p in places])
    return images[0][index], images[1][index]


def halves(data: ImageData, size: int, seed: int) -> Draw:
    """Upper halves of images to train and validate on, lower halves to test on.

    Raises:
        DataError: halves are of fewer than 4 rows, which the CNN needs.
    """
    half = data.image_shape[1] // 2
    if half < 4:
        raise DataError(f"non-iid needs images of at least 8 rows; got {data.image_shape[1]}: give it others by --data")
    whole = draw_images(data, size, seed)
    train, validation = ((x[:, :, :half], y) for x, y in (whole.train, whole.validation))
    return replace(whole, train=train, validation=validation, test=(whole.test[0][:, :, -half:], whole.test[1]))


def problems(data: ImageData, full: bool) -> list[Problem]:
    """Both of them."""
    size, steps = (1000, 600 if is_small(data) else 400) if full else (240, 32)
    grid = FULL_GRID if full else QUICK_GRID
    found = []
    for name, draw, seeds in (
        (SKEWED, skewed, range(SKEWED_SEARCH, SKEWED_SEARCH + (3 if full else 1))),
        (HALVES, halves, (SEARCH_SEED,)),
    ):
        count = len(draw(data, size, 0).train[1])
        epochs = steps / max(1, count // BATCH)
        found.append(Problem({"problem": name}, partial(draw, data, size), BATCH, epochs, grid, search_seeds=seeds))
    return found


def run(study: Study) -> None:
    """All ways on both problems; in the full form SGD of their times, too."""
    compare_all(study, problems(shrunk(study.images()), study.full), WAYS, WAYS[1:] if study.full else ())


def claims(table: Table) -> list[Claim]:
    """Each way against SGD, and its Γ."""
    found = []
    for problem in (SKEWED, HALVES):
        found += against_sgd(table, WAYS[1:], SECTION, {"problem": problem}, f"{problem}: ")
        mine, theirs = ({"problem": problem, "way": way.name} for way in (REG1, SGD))
        text = f"{problem}: Reg1 lowers Γ of the training images at the end"
        found.append(lower(table, mine, theirs, text=text, source=SECTION, column="gamma"))
    return found


def tables(table: Table) -> str:
    """All ways on both problems."""
    return measured(table, ("problem",))


draw = draw_problems
