"""The fused ops, for people who write their own backward passes: linear and convolution layers, all twice differentiable."""

from . import backends, library
from .convolution import conv_deviation_sq_norms, conv_jvp, conv_sq_norms, conv_weighted_sum
from .linear import linear_deviation_sq_norms, linear_jvp, linear_sq_norms, linear_weighted_sum

assert backends  # its import registers the eager implementations, over which the compiled ones come
library.load()

__all__ = [
    "conv_deviation_sq_norms",
    "conv_jvp",
    "conv_sq_norms",
    "conv_weighted_sum",
    "linear_deviation_sq_norms",
    "linear_jvp",
    "linear_sq_norms",
    "linear_weighted_sum",
]
