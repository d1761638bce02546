"""The public ops on tensors of any shape and layout, zero sizes among them, in every dtype: against the float64 oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bootgrad import ops, reference
from bootgrad.errors import ArgumentError
from bootgrad.ops import library

from ..ops import cases
from .drawing import drawn

BACKEND = "compiled" if library.is_loaded("_C") else "eager"
LAYOUTS = {
    "as they are": lambda t: t,
    "dimensions in another order": lambda t: (
        t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    ),
    "channels last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "every other number": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "within a larger tensor": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1 : 1 + t.size(-1)],
    "one sample for all": lambda t: t[:1].expand(t.shape),
    "one number for all positions": lambda t: t[..., :1].expand(t.shape) if t.size(-1) else t,
    "a part of its memory": lambda t: torch.cat([t, t])[len(t) :],
}
layouts = st.sampled_from(list(LAYOUTS))
sizes = st.sampled_from([0, 1, 2, 3, 5, 8, 17, 33])
dtypes = st.sampled_from(cases.DTYPES)


def laid_out(case, of_x, of_gy):
    return case.but(x=LAYOUTS[of_x](case.x), gy=LAYOUTS[of_gy](case.gy))


def check(kind, case, arguments):
    """All four public ops of a kind of layer, as `ops.cases` compares the raw ones."""
    before = [t.clone() for t in case.tensors()]
    for name, own in arguments.items():
        op = f"{kind}_{name}"
        ours = getattr(ops, op)(case.x, case.gy, *own)
        cases.check(BACKEND, op, case, ours, "gram")
    assert all(map(torch.equal, before, case.tensors()))


@drawn(60)
@given(sizes, sizes, sizes, sizes, dtypes, layouts, layouts, st.integers(0, 9))
def test_linear_layers(B, T, I, O, dtype, of_x, of_gy, seed):  # noqa: E741
    case = laid_out(cases.linear_case(B, T, I, O, dtype, seed), of_x, of_gy)
    check(
        "linear",
        case,
        {"sq_norms": (), "deviation_sq_norms": (case.center,), "jvp": (case.v,), "weighted_sum": (case.w,)},
    )


@drawn(60)
@given(cases.conv_shapes(), dtypes, layouts, layouts, st.integers(0, 9))
def test_convolutions(shapes, dtype, of_x, of_gy, seed):
    case = laid_out(cases.conv_case(*shapes, dtype, seed), of_x, of_gy)
    kernel, geometry = case.kernel_size, case.geometry
    check(
        "conv",
        case,
        {
            "sq_norms": (kernel, *geometry),
            "deviation_sq_norms": (case.center, *geometry),
            "jvp": (case.v, *geometry),
            "weighted_sum": (case.w, kernel, *geometry),
        },
    )


@drawn(60)
@given(sizes, sizes, sizes, st.sampled_from([1, 2, 7, 1000]), dtypes, layouts, st.integers(0, 9), st.booleans())
def test_embeddings(B, T, D, V, dtype, of_gy, seed, padded):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (B, T), generator=generator)
    gy = LAYOUTS[of_gy](torch.randn(B, T, D, generator=generator, dtype=torch.float64).to(dtype))
    padding = 0 if padded else None
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    center = torch.randn(V, D, generator=generator, dtype=torch.float64).to(accumulation)
    w = torch.randn(B, generator=generator, dtype=torch.float64).to(accumulation)
    tables = torch.zeros(B, V, D, dtype=torch.float64)
    for i in range(B):
        used = tokens[i] != (-1 if padding is None else padding)
        tables[i].index_add_(0, tokens[i][used], gy[i][used].double())
    flat, c = tables.flatten(1), center.double()
    exact = reference.sq_norms(flat)
    size = gy.double().flatten(1).norm(dim=1) * max(1, T) ** 0.5
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for ours, expected, scale in (
        (ops.embedding_sq_norms(tokens, gy, padding), exact, size**2),
        (
            ops.embedding_deviation_sq_norms(tokens, gy, center, padding),
            (tables - c).flatten(1).square().sum(1),
            (size + c.norm()) ** 2,
        ),
        (ops.embedding_jvp(tokens, gy, center, padding), flat @ c.flatten(), size * c.norm()),
        (
            ops.embedding_weighted_sum(tokens, gy, V, w, padding),
            torch.tensordot(w.double(), tables, 1),
            size.sum() * w.norm(),
        ),
    ):
        assert ours.dtype == accumulation and ours.shape == expected.shape
        assert ((ours.double() - expected).abs() <= tolerance * scale + 1e-30).all()


@drawn(40)
@given(
    st.sampled_from(["linear", "conv"]),
    dtypes,
    layouts,
    st.integers(0, 3),
    st.sampled_from([torch.nan, torch.inf, -torch.inf, "largest", "smallest"]),
    st.booleans(),
)
def test_gradients_of_norms_keep_what_is_no_number_in_its_row(kind, dtype, layout, sample, value, in_x):
    """The first derivatives by x and gy of the norms' sum, where one number of one sample is none, or is out of range."""
    if kind == "linear":
        case, own = cases.linear_case(4, 3, 5, 6, dtype), ()
    else:
        case = cases.conv_case(4, 4, (6, 5), 6, (3, 2), (2, 1), (1, 1), (1, 1), 2, dtype)
        own = (case.kernel_size, *case.geometry)
    results = []
    for spoiled in (False, True):
        x, gy = case.x.clone(), case.gy.clone()
        if spoiled:
            t = (x if in_x else gy)[sample].view(-1)
            t[7 % len(t)] = {"largest": torch.finfo(dtype).max, "smallest": torch.finfo(dtype).tiny}.get(value, value)
        x, gy = (LAYOUTS["as they are" if "for all" in layout else layout](t).requires_grad_() for t in (x, gy))
        s = getattr(ops, f"{kind}_sq_norms")(x, gy, *own)
        results.append([s.detach(), *torch.autograd.grad(s.sum(), (x, gy))])
    others = torch.arange(4) != sample
    for clean, ours in zip(*results, strict=True):
        assert torch.equal(clean[others], ours[others]) and ours[others].isfinite().all()
    if isinstance(value, float):
        assert not results[1][0][sample].isfinite()


WRONG = {
    "x of another batch size": lambda x, gy: (x[:1], gy),
    "gy of another dtype": lambda x, gy: (x, gy.to(torch.float16)),
    "whole numbers": lambda x, gy: (x.long(), gy.long()),
    "complex numbers": lambda x, gy: (x.to(torch.complex64), gy.to(torch.complex64)),
    "a number": lambda x, gy: (x.sum(), gy.sum()),
    "a row": lambda x, gy: (x[0, 0], gy[0, 0]),
    "positions of another number": lambda x, gy: (x[:, :2], gy),
}


@pytest.mark.parametrize(
    ("kind", "what"),
    [(k, w) for k in ("linear", "conv") for w in WRONG if (k, w) != ("conv", "positions of another number")],
)
def test_wrong_arguments_are_errors_of_the_library(kind, what):
    if kind == "linear":
        x, gy, own = torch.randn(4, 3, 5), torch.randn(4, 3, 6), ()
    else:
        x, gy, own = torch.randn(4, 3, 5, 5), torch.randn(4, 6, 3, 3), (3,)
    with pytest.raises(ArgumentError):
        getattr(ops, f"{kind}_sq_norms")(*WRONG[what](x, gy), *own)
