"""The method that runs, by its name."""

import torch

from .steps import data, gradient_of, losses_of, regularizer


def test_auto_is_exact():
    model, x, y = data(B=6)
    reg = regularizer(model, "zero", method="auto")
    grad, report = gradient_of(reg, losses_of(model), x, y)
    expected, _ = gradient_of(regularizer(model, "zero"), losses_of(model), x, y)
    assert reg.method == report.method == "exact" and torch.equal(grad, expected)
