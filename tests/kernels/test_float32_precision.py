"""Whether float32 is multiplied in TF32: as torch was told, in whichever of its ways."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from .loading import load_kernel

configs, gram, layers = (load_kernel(stem) for stem in ("conv_configs", "gram", "layer"))


def legacy(allowed):
    torch.backends.cuda.matmul.allow_tf32 = allowed


def by_word(allowed):
    torch.set_float32_matmul_precision("high" if allowed else "highest")


def of_products(allowed):
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"


def of_everything(allowed):
    torch.backends.fp32_precision = "tf32" if allowed else "none"


@pytest.fixture
def restored():
    """The settings as they are when torch is imported, afterwards."""
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"
    assert torch.backends.cuda.matmul.allow_tf32 is False


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("say", [legacy, by_word, of_products, of_everything])
@pytest.mark.parametrize("allowed", [True, False])
def test_both_paths_do_as_torch_was_told(say, allowed):
    say(allowed)
    x, gy, layer = layers.linear_layer(torch.ones(2, 3, 4), torch.ones(2, 3, 5))
    assert gram._Call(x, gy, layer, (True, True), False).tf32 is allowed
    assert configs.direct_kind(torch.float32) == ("tf32" if allowed else "ieee")
    half = gram._Call(x.half(), gy.half(), layer, (True, True), False)
    assert (half.tf32, configs.direct_kind(torch.float16)) == (False, "half")
