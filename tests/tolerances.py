"""The one table of tolerances: how far from the float64 oracle a result may lie, per backend and dtype.

    error(ours) ≤ factor · error(plain torch, same inputs, accumulation dtype) + tolerance

Errors are relative: ‖ours − exact‖ / scale, where the scale is the exact result's norm, per sample where results are
per sample, or what `ops.cases` says of an op whose result may cancel.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """A row of the table.

    Attributes:
        factor: of plain torch's error; blocked sums are often better than torch's, shorter vectors' may be worse.
        sums: for results of the accumulation dtype.
        derivatives: for results of the inputs' dtype.
    """

    factor: float
    sums: float
    derivatives: float


TOLERANCES = {
    # Rounding errors of a few hundred terms, 1e-16 each, and room for another order of summation.
    ("eager", torch.float64): Tolerance(4, 1e-13, 1e-13),
    ("compiled", torch.float64): Tolerance(4, 1e-13, 1e-13),
    # The same at 6e-8 a term. The Gram path sums T² products of both signs.
    ("eager", torch.float32): Tolerance(4, 2e-6, 2e-6),
    ("compiled", torch.float32): Tolerance(4, 2e-6, 2e-6),
    # Inputs are exact in float32: sums are as float32's. Derivatives are rounded once, to 8 bits.
    ("eager", torch.bfloat16): Tolerance(4, 2e-6, 2**-8),
    ("compiled", torch.bfloat16): Tolerance(4, 2e-6, 2**-8),
    # As bfloat16, but 11 bits; entries below 6e-5 have fewer.
    ("eager", torch.float16): Tolerance(4, 2e-6, 2**-10),
    ("compiled", torch.float16): Tolerance(4, 2e-6, 2**-10),
}
