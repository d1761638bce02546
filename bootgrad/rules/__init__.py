"""One file per kind of operation; importing this package registers them all."""

from . import convolution, elementwise, embedding, fallback, linear, normalization, piecewise, weight_norm

__all__ = ["convolution", "elementwise", "embedding", "fallback", "linear", "normalization", "piecewise", "weight_norm"]
