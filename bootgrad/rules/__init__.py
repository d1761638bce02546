"""One file per kind of operation; importing this package registers them all."""

from . import convolution, elementwise, fallback, linear, normalization, piecewise, recurrent, weight_norm

__all__ = ["convolution", "elementwise", "fallback", "linear", "normalization", "piecewise", "recurrent", "weight_norm"]
