"""The second derivative of fused attention, against plain torch's of the same formula."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from bootgrad.ops import attention
from bootgrad.ops.attention import FusedAttention
from bootgrad.ops.backends import eager_attention
from bootgrad.rules.stand_ins import StandIns

OP = torch.ops.bootgrad.attention_double_backward

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
def test_derivatives(case):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32, "same"])
def test_third_derivatives_in_half_precision(dtype, mask):
    tensors, mask = inputs(dtype=dtype), dtype if mask == "same" else mask
    kept = torch.arange(S).view(1, 1, 1, S) <= torch.arange(N).view(N, 1, 1, 1)
    if mask is not None:
        mask = kept if mask == torch.bool else kept.to(mask)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    with sdpa_kernel(SDPBackend.MATH):
        expected = derivatives(lambda *t: F.scaled_dot_product_attention(*t, exact_mask), doubles, further=True)
    with StandIns():
        ours = derivatives(lambda *t: F.scaled_dot_product_attention(*t, mask), tensors, further=True)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == dtype
        error = (a.detach().double() - b.detach()).norm()
        assert error <= (0.1 if dtype == torch.bfloat16 else 0.02) * b.detach().norm()


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64])
def test_a_mask_that_is_repeated_is_held_once(dtype):
    mask = torch.randn(3, 1, 1, 7).to(dtype).expand(3, 2, 5, 7)
    added = attention.as_added(mask, torch.zeros(3, 2, 5, 4, dtype=torch.bfloat16))
    assert added.shape == mask.shape and added.dtype == torch.float32
    assert added.untyped_storage().nbytes() <= 4 * 3 * 7
    expected = torch.where(mask, 0, -torch.inf) if dtype == torch.bool else mask.float()
    torch.testing.assert_close(added, expected, rtol=0, atol=0)


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


def raw(L, S, D, values, dtype=torch.float64, masked=False):
    """Inputs of the op for three samples of two heads: some laid out as a projection of heads puts them out."""
    generator = torch.Generator().manual_seed(L)
    heads = (N, H)
    q, uq, g = (torch.randn(N, L, H, n, generator=generator).transpose(1, 2) for n in (D, D, values))
    k, uk, v, uv = (torch.randn(*heads, S, n, generator=generator) for n in (D, D, values, values))
    v = torch.cat([v, v], -1)[..., ::2] if values > 1 else v  # with gaps
    mask = None
    if masked:
        mask = torch.randn(1, H, L, S, generator=generator)
        mask[torch.rand(1, H, L, S, generator=generator) < 0.3] = -torch.inf
        mask[:, :, L // 2 : L // 2 + 1] = -torch.inf
        mask = mask.to(torch.promote_types(dtype, torch.float32)).expand(*heads, L, S)
    return [*(t.to(dtype) for t in (uq, uk, uv, g, q, k, v)), mask]


SIZES = [(5, 4, 6, 6), (1, 1, 1, 3), (130, 33, 17, 5), (3, 700, 8, 16), (2, 0, 3, 3), (0, 2, 3, 3)]


@pytest.mark.parametrize("kind", ["plain", "causal", "masked", "some"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_implementations_agree(size, kind, monkeypatch):
    tensors, causal = raw(*size, masked=kind == "masked"), kind == "causal"
    if kind == "some":
        tensors[0] = tensors[2] = None
    compiled = OP(*tensors, causal, 0.7)
    for chunk in (eager_attention.CHUNK_BYTES["cpu"], 1, 8 * 8 * size[0] * size[1] * H * 2):
        monkeypatch.setitem(eager_attention.CHUNK_BYTES, "cpu", chunk)
        eager = eager_attention.attention_double_backward(*tensors, causal, 0.7)
        for a, b in zip(compiled, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [OP, eager_attention.attention_double_backward], ids=["compiled", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.2, 30.0])
def test_precision(backend, dtype, scale):
    tensors = raw(70, 45, 24, 24, dtype, masked=True)
    exact = backend(*(t.double() for t in tensors), False, scale)
    for a, b in zip(backend(*tensors, False, scale), exact, strict=True):
        assert a.dtype == dtype
        # A score of some hundreds has an error of 2⁻²⁴ of that, and its weight the same one relatively.
        tolerance = {torch.float32: 4e-6 * max(1, scale), torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        assert float((a.double() - b).norm()) <= tolerance * float(b.norm())


def test_what_is_no_number_comes_out_as_none():
    for place in range(8):
        tensors = raw(5, 4, 6, 6, masked=True)
        tensors[place] = tensors[place].clone()
        tensors[place][1, 1, 2, 3] = torch.nan
        compiled, eager = OP(*tensors, False, 0.5), eager_attention.attention_double_backward(*tensors, False, 0.5)
        assert any(torch.isnan(t[1, :, 1]).any() for t in compiled)
        for a, b in zip(compiled, eager, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_schema_and_errors():
    opcheck(OP.default, (*raw(5, 4, 6, 3, masked=True), False, 0.5))
    opcheck(OP.default, (None, *raw(3, 4, 2, 2)[1:], True, 0.5))
    for place, wrong in ((0, (3, 2, 5, 7)), (3, (3, 2, 5, 6, 1)), (5, (3, 2, 3, 6)), (7, (3, 1, 5, 4)), (4, (6, 5))):
        tensors = raw(5, 4, 6, 6, masked=True)
        tensors[place] = torch.zeros(wrong, dtype=torch.float64)
        for backend in (OP, eager_attention.attention_double_backward):
            with pytest.raises(RuntimeError, match="must have|must be|four dimensions"):
                backend(*tensors, False, 0.5)
    tensors = raw(5, 4, 6, 6)
    for backend in (OP, eager_attention.attention_double_backward):
        with pytest.raises(RuntimeError, match="dtype"):
            backend(*tensors[:5], tensors[5].float(), *tensors[6:], False, 0.5)


def test_the_graph_goes_when_it_was_used():
    tensors = inputs()
    with StandIns():
        y = F.scaled_dot_product_attention(*tensors)
    assert isinstance(y.grad_fn, FusedAttention._backward_cls)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
