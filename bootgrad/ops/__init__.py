"""The fused ops, for people who write their own backward passes: linear layers, convolutions, embeddings."""

from . import fakes, library  # noqa: F401 — fakes register themselves
from .backends import eager_convolution, eager_distances, eager_pooling, gpu  # noqa: F401 — the eager ones register themselves
from .convolution import conv_deviation_sq_norms, conv_jvp, conv_sq_norms, conv_weighted_sum
from .embedding import embedding_deviation_sq_norms, embedding_jvp, embedding_sq_norms, embedding_weighted_sum
from .linear import linear_deviation_sq_norms, linear_jvp, linear_sq_norms, linear_weighted_sum

# The import of the backends registered the eager implementations; over them come the compiled ones for
# CPUs, and for GPUs whichever the machine has.
library.load()
gpu.register(library.backend())

__all__ = [
    "conv_deviation_sq_norms",
    "conv_jvp",
    "conv_sq_norms",
    "conv_weighted_sum",
    "embedding_deviation_sq_norms",
    "embedding_jvp",
    "embedding_sq_norms",
    "embedding_weighted_sum",
    "linear_deviation_sq_norms",
    "linear_jvp",
    "linear_sq_norms",
    "linear_weighted_sum",
]
