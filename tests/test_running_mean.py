"""Means over parts of a batch, in low precision."""

import pytest
import torch

from bootgrad.running_mean import RunningMean


@pytest.mark.parametrize("absent", [[], [0], [0, 1], [5]])
def test_a_tensor_that_some_parts_lack_keeps_its_bits(absent):
    values = [1 + k / 128 for k in range(8)]
    mean = RunningMean()
    for k, value in enumerate(values):
        mean.add({} if k in absent else {"p": torch.tensor([value], dtype=torch.bfloat16)}, 1)
    expected = sum(v for k, v in enumerate(values) if k not in absent) / 8
    torch.testing.assert_close(mean.values["p"], torch.tensor([expected]))
