"""What may be asked of a device: a question about values waits for all kernels before it, and stops a graph's capture."""

import torch
from torch import Tensor


def answers_at_once(tensor: Tensor) -> bool:
    """Whether a question about values does not have to wait for a device."""
    return tensor.device.type == "cpu"


def is_capturing() -> bool:
    """Whether kernels are captured into a CUDA graph now, so that nothing may be asked of the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
