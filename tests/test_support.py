"""The support matrix: each layer by each quantity and way of use, against the oracle. Its page is made of what passes here."""

import functools
import warnings

import pytest
import torch

import bootgrad

from .layers import LAYERS
from .oracle import Oracle, losses_of, parameters_of
from .quantities import Case, deviation, finite_differences, norms, products, second_order, transposed_products

CLOSE = dict(
    rtol=1e-9, atol=1e-10
)  # float64: sums of some hundred terms, and room for what cancels in a penalty's gradient


def half_precision(case):
    """Autocast: as plain torch has it, per sample, to the digits of bfloat16."""
    model = case.model.float()
    inputs = [t.float() if t.is_floating_point() else t for t in case.inputs]

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y = model(*inputs)
        return losses_of(y.float())

    oracle = Oracle(model, run)
    with bootgrad.record(model) as rec:
        losses = run()
    G = rec.per_sample_gradients(losses, create_graph=True)
    exact = oracle.matrix.square().sum(1)
    assert float((G.sq_norms() - exact).detach().norm()) <= 0.05 * float(exact.detach().norm())
    grads = torch.autograd.grad(bootgrad.reg1(G), list(parameters_of(model).values()), allow_unused=True)
    expected = oracle.gradient(oracle.reg1())
    scale = max(float(g.norm()) for g in expected.values())
    for (name, e), g in zip(expected.items(), grads, strict=True):
        assert g is None or float((g - e).norm()) <= 0.1 * scale, name


COLUMNS = {
    "norms": norms,
    "deviation": deviation,
    "G @ v": products,
    "G.T @ w": transposed_products,
    "second order": second_order,
    "finite differences": finite_differences,
    "autocast": half_precision,
}


def case_of(name: str, sequence: bool) -> Case:
    torch.manual_seed(0)
    layer = LAYERS[name]
    model = layer.make().double()
    torch.manual_seed(1)
    return Case(model, [make() for make in (layer.sequence if sequence else layer.inputs)])


@functools.cache
def passes(layer: str, column: str) -> str:
    """Run a cell; what recorded it, by name."""
    case = case_of(layer, sequence=column == "sequence")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bootgrad.BootgradWarning)
        if column == "sequence":
            for run in (norms, deviation, products, transposed_products, second_order):
                run(case)
        else:
            COLUMNS[column](case)
    return "yes"


CELLS = [(name, column) for name in LAYERS for column in COLUMNS] + [
    (name, "sequence") for name, layer in LAYERS.items() if layer.sequence
]


@pytest.mark.parametrize(("layer", "column"), CELLS)
def test_cell(layer, column):
    assert passes(layer, column)
