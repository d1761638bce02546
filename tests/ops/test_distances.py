"""Squared distances of lists of tensors: both implementations, all dtypes, and what goes together."""

import pytest
import torch
from torch.library import opcheck

from bootgrad.errors import ArgumentError
from bootgrad.ops.backends import eager_distances
from bootgrad.ops.distances import sq_distances

OP = torch.ops.bootgrad.sq_distances
SHAPES = [(), (3, 5), (0, 4), (70_001,), (2, 3, 3, 3)]


def pair(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [OP, eager_distances.sq_distances], ids=["compiled", "eager"])
def test_against_float64(backend, dtype):
    a, b = pair(dtype)
    for scale in (1.0, -0.25):
        for others in ([], b):
            zeros = others or [torch.zeros_like(t) for t in a]
            exact = torch.stack(
                [(scale * s.double() - t.double()).square().sum() for s, t in zip(a, zeros, strict=True)]
            )
            found = backend(a, others, scale)
            assert found.dtype == torch.float64 and found.shape == exact.shape
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", [OP, eager_distances.sq_distances], ids=["compiled", "eager"])
def test_what_nearly_cancels_in_half_precision(backend):
    a = (64 * torch.randn(1000, generator=torch.Generator().manual_seed(0))).half()
    b = (a.float() / 48).half()
    exact = (a.double() / 48 - b.double()).square().sum()
    torch.testing.assert_close(backend([a], [b], 1 / 48)[0], exact, rtol=1e-3, atol=0)


def test_no_digits_are_lost_over_long_tensors():
    ones = torch.full((2**22 + 3,), 0.1)
    assert OP([ones], [], 1.0) == pytest.approx(float(ones[0]) ** 2 * ones.numel(), rel=1e-7)


def test_layouts_kinds_and_graphs():
    a, b = pair()
    exact = OP(a, b, 1.0)
    spread = [torch.stack((t, 2 * t), -1)[..., 0] for t in a]
    assert not spread[1].is_contiguous()
    torch.testing.assert_close(sq_distances(spread, b), exact)
    mixed = [t.double() if k % 2 else t for k, t in enumerate(a)]
    torch.testing.assert_close(sq_distances(mixed, b), exact)
    torch.testing.assert_close(sq_distances([t.double() if k % 2 else t for k, t in enumerate(b)]), OP(b, [], 1.0))
    assert not sq_distances([t.requires_grad_() for t in a]).requires_grad


def test_schema_and_errors():
    a, b = pair()
    opcheck(OP.default, (a, b, 0.5))
    opcheck(OP.default, (a, [], 1.0))
    for backend in (OP, eager_distances.sq_distances):
        for wrong in ([], b[:2], b[::-1], [t.double() for t in b]):
            with pytest.raises(RuntimeError, match="at least one|as many tensors|one dtype"):
                backend(wrong and a, wrong, 1.0)
    with pytest.raises(ArgumentError, match="at least one"):
        sq_distances([])
