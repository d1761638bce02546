"""Bilinear layers, y_o = x₁ᵀ W_o x₂ + b_o: linear layers of the products of their inputs' entries."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Recorder, rule


@rule(torch.bilinear)
def _bilinear(recorder: Recorder, func, args, kwargs):
    return _apply(recorder, *args, **kwargs)


def _apply(recorder: Recorder, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None):
    if recorder.is_tracked(input1) or recorder.is_tracked(input2) or input1.dim() < 2:
        return NotImplemented
    products = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)  # (B, …, I·J)
    return recorder.run(F.linear, products, recorder.run(Tensor.reshape, weight, (weight.size(0), -1)), bias)
