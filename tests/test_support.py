"""The support matrix: each layer by each quantity and way of use, against the oracle. Its page is made of what passes here."""

import functools
import os
import warnings
from pathlib import Path

import pytest
import torch

import bootgrad
from bootgrad import planning
from bootgrad.compiled import CompiledOperation
from bootgrad.rules.base import ProductOperation
from bootgrad.rules.embedding import LookUpOperation
from bootgrad.rules.fallback import FallbackOperation

from .compiling import IGNORED
from .layers import LAYERS, B
from .oracle import Oracle, losses_of, parameters_of, record
from .quantities import Case, deviation, finite_differences, norms, products, second_order, transposed_products

CLOSE = dict(
    rtol=1e-9, atol=1e-10
)  # float64: sums of some hundred terms, and room for what cancels in a penalty's gradient


pytestmark = IGNORED


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


def compiled_norms(case):
    """Norms of the model compiled; a note, unless they come out of compiled functions alone."""
    torch._dynamo.reset()
    forward = torch.compile(case.model, backend="aot_eager")
    norms(case, forward)
    rec, losses = case.record(forward)
    is_compiled = all(isinstance(o, CompiledOperation) for o in rec.reach(losses).operations)
    return None if is_compiled else "as written"


COLUMNS = {
    "norms": norms,
    "compile": compiled_norms,
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


SEQUENCE = (norms, deviation, products, transposed_products, second_order)


@functools.cache
def mark(layer: str, column: str) -> str:
    """Run a cell; what it is filled with when it passes."""
    case = case_of(layer, sequence=column == "sequence")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bootgrad.BootgradWarning)
        notes = [run(case) for run in (SEQUENCE if column == "sequence" else [COLUMNS[column]])]
    return next(filter(None, notes), "✓")


def columns_of(layer: str) -> list[str]:
    return [*COLUMNS, *(["sequence"] if LAYERS[layer].sequence else [])]


@pytest.mark.parametrize(("layer", "column"), [(layer, column) for layer in LAYERS for column in columns_of(layer)])
def test_cell(layer, column):
    assert mark(layer, column)


def path_of(recording, operation) -> str:
    """How an operation's per-sample gradients are held and squared."""
    if isinstance(operation, ProductOperation):
        layer = operation.layer(B)
        how = "rows" if layer is None else PATHS[planning.choose_path(layer, "norms")]
    elif isinstance(operation, LookUpOperation):
        how = "by tokens"
    else:
        how = "`vmap`" if isinstance(operation, FallbackOperation) else "rows"
    derived = [d for t in operation.tracked if (d := recording._known[id(t)]) is not None]
    return how + (", pulled back" if not all(d.picks for d in derived) else ", in part" if derived else "")


PATHS = {"rank1": "rank one", "direct": "tiles", "gram": "Gram matrices"}


def paths_of(layer: str) -> str:
    """By which operations a layer is recorded, and how."""
    case = case_of(layer, sequence=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bootgrad.BootgradWarning)
        rec, losses = record(case.model, case.run)
        operations = rec.reach(losses).operations
    return "; ".join(sorted({f"{o.name}: {path_of(rec, o)}" for o in operations}))


def page() -> str:
    """The matrix, of cells that pass."""
    names = [*COLUMNS, "sequence"]
    lines = [
        INTRODUCTION,
        f"| layer | {' | '.join(names)} | recorded as |",
        "|---" * (len(names) + 2) + "|",
    ]
    for layer in LAYERS:
        cells = [mark(layer, name) if name in columns_of(layer) else "" for name in names]
        lines.append(f"| {layer} | {' | '.join(cells)} | {paths_of(layer)} |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Support matrix

Written by tests/test_support.py: each mark is a test that passes, of a small model around the layer and of every parameter
that it has, against one backward pass per sample in float64 (relative tolerance 1e-9).

- *norms*: `.grad`, ‖g_i‖² by parameter and Γ, as by-products of the backward pass
- *compile*: norms again of the model under `torch.compile`, out of compiled functions alone; or *as written*, right as well,
  where torch's compiler does not capture the layer, or cannot trace its norms
- *deviation*: ‖g_i − c‖² about a center and the mean; *G @ v*, *G.T @ w*: products with the implicit matrix, Gram matrix, rows
- *second order*: the gradients of Reg1 about the mean, zero and a center, and of Reg2, by the matrix and the regularizer
- *finite differences*: Reg1's gradient by `method="finite_difference"`, to 1e-4
- *autocast*: norms to 5 % and Reg1's gradient to 10 % under bfloat16 with float32 weights, as plain torch has them there
- *sequence*: norms, deviation, products and second order again with one more dimension of positions, where the layer takes such

*Recorded as* names the operations that are seen and how their per-sample gradients are held: as one product for each sample
(rank one), as tiles of them or by Gram matrices of positions, whichever the cost model finds cheaper at this size; as rows; by
tokens; of a tensor made from the parameter and pulled back to it, or in part of it; or one sample at a time by `vmap`, which is
slow.

Attention keeps torch's fused kernels, in penalties too: their second derivative is this library's, exact, some heads at a time.
"""


def test_the_page_says_what_passes():
    path = Path(__file__).parents[1] / "docs" / "support.md"
    text = page()
    if os.environ.get("BOOTGRAD_WRITE_DOCS"):
        path.write_text(text)
    assert path.read_text() == text, "docs/support.md is not what passes: run this test with BOOTGRAD_WRITE_DOCS=1"
