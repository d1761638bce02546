"""The second derivative of fused attention, against plain torch's of the same formula."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bootgrad.ops import attention
from bootgrad.ops.attention import FusedAttention, attention_double_backward
from bootgrad.rules.stand_ins import StandIns

N, H, L, S, D = 3, 2, 5, 4, 6
nothing_counts = torch.ones(L, S, dtype=torch.bool)
nothing_counts[2] = False
CASES = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "causal": {"is_causal": True},
    "causal, square": {"is_causal": True, "keys": L},
    "padded": {"attn_mask": torch.arange(S).view(1, 1, 1, S) <= torch.arange(N).view(N, 1, 1, 1)},
    "biased": {"attn_mask": torch.randn(1, H, L, S, generator=torch.Generator().manual_seed(5), dtype=torch.float64)},
    "a query without a key": {"attn_mask": nothing_counts},
}


def inputs(keys=S, dtype=torch.float64):
    torch.manual_seed(0)
    q, k, v = torch.randn(N, H, L, D), torch.randn(N, H, keys, D), torch.randn(N, H, keys, D)
    return [t.to(dtype).requires_grad_() for t in (q, k, v)]


def derivatives(function, tensors, further=False):
    """First and second derivatives of a function of the output; and what a third is made of."""
    y = function(*tensors)
    (g,) = torch.autograd.grad((y.sin() * y).sum(), y, create_graph=True)
    first = torch.autograd.grad(y, tensors, g, create_graph=True)
    value = sum((t * t.cos()).sum() for t in first)
    second = torch.autograd.grad(value, tensors, create_graph=further)
    third = torch.autograd.grad(sum(t.square().sum() for t in second), tensors) if further else []
    return [y, *first, *second, *third]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [attention.CPU_CHUNK_BYTES, 1, 8 * 8 * L * S * H * 2])
def test_derivatives(case, chunk, monkeypatch):
    monkeypatch.setattr(attention, "CPU_CHUNK_BYTES", chunk)
    options = dict(CASES[case])
    tensors = inputs(options.pop("keys", S))
    with sdpa_kernel(SDPBackend.MATH):
        expected = derivatives(lambda *t: F.scaled_dot_product_attention(*t, **options), tensors, further=True)
    with StandIns():
        y = F.scaled_dot_product_attention(*tensors, **options)
        assert y.grad_fn.name() == "FusedAttentionBackward"
        for further in (False, True):  # the op, and what stands for it where more derivatives are to be had
            ours = derivatives(lambda *t: F.scaled_dot_product_attention(*t, **options), tensors, further)
            for a, b in zip(ours, expected, strict=False):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_groups_of_heads_share_keys():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, L, D, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    with sdpa_kernel(SDPBackend.MATH):
        expected = derivatives(lambda *t: F.scaled_dot_product_attention(*t, enable_gqa=True), (q, k, v))
    with StandIns():
        ours = derivatives(lambda *t: F.scaled_dot_product_attention(*t, enable_gqa=True), (q, k, v))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (2,)])
def test_some_inputs_alone(wanted):
    tensors = inputs()
    for k, t in enumerate(tensors):
        t.requires_grad_(k in wanted)
    some = [tensors[k] for k in wanted]

    def first_and_second():
        y = F.scaled_dot_product_attention(*tensors)
        first = torch.autograd.grad(y.square().sum(), some, create_graph=True)
        return [*first, *torch.autograd.grad(sum(t.square().sum() for t in first), some)]

    with sdpa_kernel(SDPBackend.MATH):
        expected = first_and_second()
    with StandIns():
        ours = first_and_second()
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    tensors = [t.detach().to(dtype) for t in inputs()]
    u, g = [torch.randn_like(t) for t in tensors], torch.randn_like(tensors[0])
    exact = attention_double_backward(
        [t.double() for t in u], g.double(), *(t.double() for t in tensors), None, False, None
    )
    ours = attention_double_backward(u, g, *tensors, None, False, None)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype
        assert float((a.double() - b).norm()) <= (2e-6 if dtype == torch.float32 else 2**-8) * float(b.norm())


def test_the_graph_goes_when_it_was_used():
    tensors = inputs()
    with StandIns():
        y = F.scaled_dot_product_attention(*tensors)
    assert isinstance(y.grad_fn, FusedAttention._backward_cls)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
