"""The theory of the bootstrap perspective, in numbers of a model and its data: what it says, bounds, assumes and gives up.

docs/theory.md has the derivations. Source: "A Bootstrap Perspective on Stochastic Gradient Descent", arXiv 2512.07676.
"""

from .alignment import NoiseAlignment, noise_alignment
from .assumptions import Assumption, Assumptions, check_assumptions
from .bootstrap import BootstrapError, bootstrap_error
from .curvature import Eigenpairs, Hessian
from .gap import GapDecomposition, gap_decomposition
from .variability import VariabilityBound

__all__ = [
    "Assumption",
    "Assumptions",
    "BootstrapError",
    "Eigenpairs",
    "GapDecomposition",
    "Hessian",
    "NoiseAlignment",
    "VariabilityBound",
    "bootstrap_error",
    "check_assumptions",
    "gap_decomposition",
    "noise_alignment",
]
