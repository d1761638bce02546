"""What runs in place of torch's convolution where nothing is recorded: values, derivatives, and what is left to torch."""

import pytest
import torch
import torch.nn.functional as F

from bootgrad.rules.stand_ins import StandIns

compiled = torch._C._dispatch_has_kernel_for_dispatch_key("bootgrad::conv_weighted_sum", "CPU")


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


OURS = {
    "1d": (F.conv1d, (2, 3, 7), (4, 3, 3), dict(stride=2, padding=1)),
    "2d": (F.conv2d, (2, 3, 6, 5), (4, 3, 3, 2), dict(padding=(1, 0), dilation=(2, 1))),
    "3d": (F.conv3d, (2, 2, 4, 3, 3), (3, 2, 2, 1, 3), dict(padding=1)),
}
TORCHS = {
    "groups": (F.conv2d, (2, 4, 5, 5), (6, 2, 3, 3), dict(groups=2)),
    "padding by name": (F.conv2d, (2, 3, 5, 5), (4, 3, 3, 3), dict(padding="same")),
    "one image": (F.conv2d, (3, 5, 5), (4, 3, 3, 3), dict(padding=1)),
}


@pytest.mark.parametrize("case", [*OURS, *TORCHS])
@pytest.mark.parametrize("biased", [False, True])
def test_convolutions(case, biased):
    torch.manual_seed(0)
    convolve, shape, weight_shape, geometry = (OURS | TORCHS)[case]
    x, weight = random(*shape), random(*weight_shape)
    inputs = (x, weight, random(weight_shape[0])) if biased else (x, weight)
    results = []
    for context in (StandIns(), torch.enable_grad()):
        with context:
            y = convolve(*inputs, **geometry)
        first = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append((y, *first, *second))
        if len(results) == 1:
            assert (y.grad_fn.name() == "OutputBackward") == (compiled and case in OURS)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_left_to_torch():
    x, weight = (torch.randn(s, requires_grad=True) for s in ((2, 3, 5, 5), (4, 3, 3, 3)))
    with StandIns():
        with torch.autocast("cpu", torch.bfloat16):
            assert F.conv2d(x, weight).dtype == torch.bfloat16
        names = [
            F.conv2d(x.bfloat16(), weight.bfloat16()).grad_fn.name(),
            F.conv2d(x, weight.detach()).grad_fn.name(),
        ]
    assert names == ["ConvolutionBackward0"] * 2
