"""One file per kind of operation; importing this package registers them all."""

from . import (
    attention,
    bilinear,
    convolution,
    elementwise,
    embedding,
    fallback,
    linear,
    normalization,
    piecewise,
    recurrent,
    weight_norm,
)

__all__ = [
    "attention",
    "bilinear",
    "convolution",
    "elementwise",
    "embedding",
    "fallback",
    "linear",
    "normalization",
    "piecewise",
    "recurrent",
    "weight_norm",
]
