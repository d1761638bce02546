"""Small images with classes that can be learnt, and oracles of what is computed from them."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from bootgrad.training.data import ImageData


def blobs(train=160, test=60, classes=4, shape=(1, 8, 8)):
    """Noisy images of one pattern for each class."""
    generator = torch.Generator().manual_seed(5)
    patterns = torch.randn(classes, *shape, generator=generator)

    def some(count):
        y = torch.arange(count) % classes
        return patterns[y] + 0.5 * torch.randn(count, *shape, generator=generator), y

    return ImageData(*some(train), *some(test), classes=classes, fingerprint=0)


def network(dtype=torch.float32):
    """A smooth network of few parameters, for images of 8×8 and 4 classes; the same one each time."""
    torch.manual_seed(1)
    parts = nn.Conv2d(1, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)
    return nn.Sequential(*parts).to(dtype)


def per_sample(model, parameters, x, y):
    """The gradients of the losses, (B, P), differentiable with respect to ``parameters``."""

    def loss(p, x, y):
        return F.cross_entropy(functional_call(model, p, (x[None],)), y[None])

    rows = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    return torch.cat([rows[name].flatten(1) for name in parameters], 1)


def same(first, second):
    """Whether two pairs of tensors are equal."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def rows_of(first, second):
    """How many images of the first are among those of the second."""
    known = {x.numpy().tobytes() for x in second[0]}
    return sum(x.numpy().tobytes() in known for x in first[0])
