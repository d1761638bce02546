"""Embeddings' ops: both backends against the oracle, their derivatives of every order, and what they allocate."""

import dataclasses

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import bootgrad
from bootgrad import ops, reference
from bootgrad.ops import embedding, schema
from bootgrad.ops.backends import eager_embedding
from bootgrad.ops.embedding import LookUps

from ..tolerances import TOLERANCES
from .test_raw_ops import LargestResult

NAMES = ("embedding_sq_norms", *schema.EMBEDDING_SCHEMAS)
EVERY_OP = pytest.mark.parametrize("name", NAMES)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPILED = all(torch._C._dispatch_has_kernel_for_dispatch_key(f"bootgrad::{name}", "CPU") for name in NAMES)
# Look-ups of each sample, D, V
SIZES = [
    ((5, 0, 7, 1), 63, 9),
    ((127,), 1, 3),
    ((0,), 5, 2),
    ((), 4, 3),
    ((64, 63), 127, 1000),
    ((200, 300), 700, 4),
    ((3, 4), 0, 4),
    ((1, 1, 1), 1030, 1),
]


@pytest.fixture(params=["eager", "compiled"] if COMPILED else ["eager"])
def backend(request):
    """(name, namespace of its ops)."""
    return request.param, eager_embedding if request.param == "eager" else torch.ops.bootgrad


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(name, lengths, D, V, dtype, optional=True):
    """The op's arguments: tokens, of which some are none, bounds, gy, and what else it takes, if that is wanted."""
    accumulation = schema.accumulation_dtype(dtype)
    bounds, N = torch.tensor([0, *lengths]).cumsum(0), sum(lengths)
    tokens = torch.randint(-1, V, (N,), generator=torch.Generator().manual_seed(1))
    common = [tokens, bounds, random(N, D, dtype=dtype)]
    table = random(V, D, dtype=accumulation, seed=2)
    if name == "embedding_weighted_sum":
        return [*common, random(len(lengths), dtype=accumulation, seed=3) if optional else None, V]
    return [*common, table if optional or name == "embedding_jvp" else None]


def plain(name, tokens, bounds, gy, *rest):
    """What plain torch makes of it in the accumulation dtype, by the tables themselves."""
    gy = gy.to(schema.accumulation_dtype(gy.dtype))
    V = rest[1] if len(rest) > 1 else int(tokens.max()) + 1 if rest[0] is None else rest[0].size(0)
    lengths = bounds.diff()
    samples = torch.arange(len(lengths)).repeat_interleave(lengths)
    used = tokens >= 0
    tables = gy.new_zeros(len(lengths) * V, gy.size(1)).index_add(0, (samples * V + tokens)[used], gy[used])
    tables = tables.view(len(lengths), V, -1)
    if name == "embedding_weighted_sum":
        return (tables.sum(0) if rest[0] is None else torch.tensordot(rest[0], tables, 1),)
    if name == "embedding_jvp":
        return ((tables * rest[0]).flatten(1).sum(1),)
    apart = tables if rest[0] is None else tables - rest[0]
    s = apart.flatten(1).square().sum(1)
    return (s,) if name == "embedding_sq_norms" else (s, apart[samples, tokens].masked_fill(~used[:, None], 0))


def tupled(results):
    return results if isinstance(results, tuple) else (results,)


def check(backend, name, values, ours):
    """Ours ≤ factor · plain torch's error + tolerance, relative to what a result is made of."""
    dtype = values[2].dtype
    tolerance = TOLERANCES[backend, dtype]
    expected = tupled(getattr(reference, name)(*values))
    theirs = expected if dtype == torch.float64 or not values[0].numel() else plain(name, *values)
    for k, (a, b, c) in enumerate(zip(tupled(ours), expected, theirs, strict=True)):
        typed = k == 1
        assert a.dtype == (dtype if typed else schema.accumulation_dtype(dtype))
        assert a.shape == b.shape and a.is_contiguous()
        if not b.numel():
            continue
        scale = b.norm()
        if name == "embedding_jvp":
            scale = scale + values[2].double().norm() * values[3].double().norm()
        bound = (
            tolerance.factor * (c.double() - b).norm() + (tolerance.derivatives if typed else tolerance.sums) * scale
        )
        assert (a.double() - b).norm() <= bound, f"result {k} of {name}, {dtype}"


@EVERY_OP
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_the_oracle(backend, name, sizes, dtype):
    for optional in (True, False):
        values = arguments(name, *sizes, dtype, optional)
        before = [t.clone() for t in values if isinstance(t, torch.Tensor)]
        check(backend[0], name, values, getattr(backend[1], name)(*values))
        assert all(map(torch.equal, before, [t for t in values if isinstance(t, torch.Tensor)]))


@EVERY_OP
def test_layouts(backend, name):
    values = arguments(name, (9, 0, 20), 37, 6, torch.float32)
    expected = tupled(getattr(backend[1], name)(*values))
    for change in (
        lambda t: t.repeat_interleave(2, dim=0)[::2],
        lambda t: t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t + 1], 1)[:, 0],
    ):
        spread = [change(t) if isinstance(t, torch.Tensor) else t for t in values]
        for a, b in zip(tupled(getattr(backend[1], name)(*spread)), expected, strict=True):
            torch.testing.assert_close(a, b)
            assert a.is_contiguous()
    values[2] = torch.tensor(0.7).expand(values[2].shape)
    check(backend[0], name, values, getattr(backend[1], name)(*values))


@EVERY_OP
def test_same_bits_whatever_the_threads(backend, name):
    values, threads, results = arguments(name, (300, 20, 1000, 3), 1100, 50, torch.float32), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 3):
            torch.set_num_threads(n)
            results.append(tupled(getattr(backend[1], name)(*values)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_long_sums_do_not_drift():
    """A chain of 50,000 equal terms is rounded to one side: to 4e-4."""
    if not COMPILED:
        pytest.skip("the sums are torch's own")
    for name in NAMES:
        values = arguments(name, (50_000,), 19, 2, torch.float32, False)
        values[0], values[2] = torch.zeros_like(values[0]), torch.full_like(values[2], 0.3)
        for a, b in zip(
            tupled(getattr(torch.ops.bootgrad, name)(*values)), tupled(getattr(reference, name)(*values)), strict=True
        ):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["embedding_sq_norms", "embedding_rows"])
@pytest.mark.parametrize("unused", [0, 40])
def test_deviations_of_samples_that_nearly_agree(backend, name, unused):
    """The rows that are looked up are subtracted before they are squared, and those that are not are zero, or far away."""
    tokens, bounds, gy, _ = arguments(name, (60,) * 4, 16, 5, torch.float32)
    tokens, gy = tokens[:60].repeat(4), gy[:60].repeat(4, 1) + 1e-4 * gy
    tables = reference.embedding_tables(tokens, bounds, gy, 5 + unused)
    center = tables.mean(0).float()
    values = [tokens, bounds, gy, center]
    check(backend[0], name, values, getattr(backend[1], name)(*values))
    exact = reference.embedding_sq_norms(*values)
    assert (exact < 1e-5 * center.square().sum()).all()  # ‖E_i‖² − 2⟨E_i, c⟩ + ‖c‖² has a digit or two left here
    center[5:] = 3.0
    check(backend[0], name, values, getattr(backend[1], name)(*values))


def test_deviations_are_not_negative(backend):
    tokens, bounds, gy, _ = arguments("embedding_sq_norms", (60,) * 64, 16, 5, torch.float32)
    tokens, gy = (
        tokens[:60].repeat(64),
        gy[:60].repeat(64, 1) * torch.linspace(1, 1 + 1e-5, 64).repeat_interleave(60)[:, None],
    )
    center = backend[1].embedding_weighted_sum(tokens[:60], bounds[:2], gy[:60], None, 5)
    assert (backend[1].embedding_sq_norms(tokens, bounds, gy, center) >= 0).all()


@EVERY_OP
def test_eager_chunks_add_up(monkeypatch, name):
    for budget in (1, 10_000, 2**30):
        monkeypatch.setitem(eager_embedding.CHUNK_BYTES, "cpu", budget)
        for optional in (True, False):
            values = arguments(name, (9, 0, 20), 37, 6, torch.bfloat16, optional)
            check("eager", name, values, getattr(eager_embedding, name)(*values))


@EVERY_OP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eager_holds_a_chunk_and_not_the_batch(monkeypatch, name, dtype):
    """Nor a copy of the table, where there is one, but for one that is asked for."""
    values = arguments(name, (64,) * 32, 512, 3000, dtype)
    monkeypatch.setitem(eager_embedding.CHUNK_BYTES, "cpu", budget := 2**19)
    with LargestResult() as largest:
        results = tupled(getattr(eager_embedding, name)(*values))
    results = [t.numel() * t.element_size() for t in results]
    assert largest.bytes <= max(budget, *results, values[0].numel() * 16)


def test_nothing_has_the_size_of_the_table(backend):
    """Of 200,000 rows, 20 are used."""
    tokens, bounds, gy = (
        torch.randint(0, 200_000, (20,)),
        torch.tensor([0, 12, 20]),
        random(20, 64, dtype=torch.float32),
    )
    with LargestResult() as largest:
        backend[1].embedding_sq_norms(tokens, bounds, gy, None)
        backend[1].embedding_rows(tokens, bounds, gy, None)
    assert largest.bytes == gy.numel() * 4
    look_ups = LookUps(tokens, bounds)
    gy.requires_grad_()
    with LargestResult() as largest:
        s = embedding.sq_norms(look_ups, gy)
        (g,) = torch.autograd.grad(s.sin().sum(), gy, create_graph=True)
        g.square().sum().backward()
    assert largest.bytes <= gy.numel() * 4


@EVERY_OP
def test_opcheck(name):
    for optional in (True, False):
        for change in (lambda t: t, lambda t: t.t().contiguous().t() if t.dim() == 2 else t):
            values = [
                change(v) if isinstance(v, torch.Tensor) else v
                for v in arguments(name, (9, 0, 20), 7, 6, torch.float32, optional)
            ]
            opcheck(getattr(torch.ops.bootgrad, name).default, values)


WRONG = {
    "gy": (2, lambda v: v[2][0], r"gy must be .*\(N, D\)"),
    "integers": (2, lambda v: v[2].long(), "gy must be .*float"),
    "tokens": (0, lambda v: v[0].int(), "tokens must be int64"),
    "dimensions": (0, lambda v: v[0][None], "tokens must be int64 in one dimension"),
    "bounds": (1, lambda v: v[1].float(), "bounds must be int64"),
    "no bounds": (1, lambda v: v[1][:0], "bounds must have a number more"),
    "lengths": (0, lambda v: v[0][1:], "one length; got 28 and 29"),
}


@EVERY_OP
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(backend, name, wrong):
    values = arguments(name, (9, 0, 20), 7, 6, torch.float32, False)
    position, change, message = WRONG[wrong]
    values[position] = change(values)
    with pytest.raises(RuntimeError, match=message):
        getattr(backend[1], name)(*values)
    meta = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in values]
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.bootgrad, name)(*meta)


@EVERY_OP
def test_wrong_tables_and_weights_are_named(backend, name):
    values = arguments(name, (9, 0, 20), 7, 6, torch.float32)
    is_sum = name == "embedding_weighted_sum"
    wrong, message = (values[3][1:], "w must have shape") if is_sum else (values[3][:, 1:], r"must have shape \(V, 7\)")
    for last, expected in ((wrong, message), (values[3].double(), "must have dtype torch.float32")):
        with pytest.raises(RuntimeError, match=expected):
            getattr(backend[1], name)(*values[:3], last, *values[4:])


@EVERY_OP
def test_tokens_and_bounds_are_checked(name):
    """A pointer beyond a table would be a fault or nonsense."""
    if not COMPILED:
        pytest.skip("torch's own indices")
    op, values = getattr(torch.ops.bootgrad, name), arguments(name, (9, 0, 20), 7, 6, torch.float32)
    for bounds in ([0, 9, 8, 29], [0, 9, 9, 28], [1, 9, 9, 29], [0, -1, 9, 29]):
        with pytest.raises(RuntimeError, match="bounds must rise from 0 to the number of look-ups, 29"):
            op(values[0], torch.tensor(bounds), *values[2:])
    tokens = values[0].clone()
    tokens[3] = 6
    with pytest.raises(RuntimeError, match="tokens must be less than 6, the rows of the table; got 6"):
        op(tokens, *values[1:])


def test_far_tokens_are_told_apart(backend):
    """Hashing them, and sorting, whatever they are."""
    far = torch.tensor([2**62, 3, 2**62, 2**40 + 3, 3, 2**62 + 1, -1, -(2**62)])
    gy = random(8, 5)
    _, near = far.clamp(min=-1).unique(return_inverse=True)
    bounds = torch.tensor([0, 8])
    expected = backend[1].embedding_rows(near - 1, bounds, gy, None)
    torch.testing.assert_close(backend[1].embedding_rows(far, bounds, gy, None), expected)


# The functions around the ops.

RAGGED = LookUps(torch.tensor([1, 3, 1, -1, 1, 0, 0, 3, 2, 2]), torch.tensor([0, 5, 5, 6, 10]))
EQUAL = LookUps.of_equal(torch.tensor([1, 3, 1, -1, 1, 0, 0, 3]), 4)
LOOK_UPS = pytest.mark.parametrize("look_ups", [RAGGED, EQUAL], ids=["ragged", "equal"])


def tables(look_ups, gy, V=5):
    return reference.embedding_tables(look_ups.tokens, look_ups.bounds, gy, V)


def differentiable(*shapes):
    return [random(*shape, seed=k).requires_grad_() for k, shape in enumerate(shapes)]


@LOOK_UPS
def test_functions_to_the_second_order(look_ups):
    N = len(look_ups.tokens)
    gy, c, w, h = differentiable((N, 3), (5, 3), (4,), (N, 3))
    E = tables(look_ups, gy)
    for function, inputs, expected in (
        (lambda gy: embedding.sq_norms(look_ups, gy), (gy,), E.square().sum((1, 2))),
        (lambda gy, c: embedding.sq_norms(look_ups, gy, c), (gy, c), (E - c).square().sum((1, 2))),
        (lambda gy, c: embedding.jvp(look_ups, gy, c), (gy, c), (E * c).sum((1, 2))),
        (lambda gy, w: embedding.weighted_sum(look_ups, gy, 5, w), (gy, w), torch.tensordot(w, E, 1)),
        (lambda gy: embedding.weighted_sum(look_ups, gy, 5), (gy,), E.sum(0)),
        (
            lambda gy: embedding.rows(look_ups, gy),
            (gy,),
            E[look_ups.samples, look_ups.tokens].masked_fill(look_ups.none, 0),
        ),
        (
            lambda c: embedding.looked_up(look_ups, c, c.dtype),
            (c,),
            c[look_ups.tokens].masked_fill(look_ups.none, 0),
        ),
    ):
        torch.testing.assert_close(function(*inputs), expected, rtol=1e-12, atol=1e-12)
        assert gradcheck(function, inputs) and gradgradcheck(function, inputs)
    assert gradcheck(
        lambda gy, c: torch.autograd.grad(w.detach() @ embedding.sq_norms(look_ups, gy, c), (gy, c), create_graph=True),
        (gy, c),
    )


@LOOK_UPS
def test_covariance_is_differentiable_beyond_the_constant_mean(look_ups):
    (gy,) = differentiable((len(look_ups.tokens), 3))

    def covariance(gy):
        return embedding.covariance(look_ups, gy, tables(look_ups, gy).mean(0))

    E = tables(look_ups, gy)
    torch.testing.assert_close(covariance(gy), (E - E.mean(0)).square().sum(), rtol=1e-12, atol=1e-12)
    # Finite differences move the mean, too: its own derivative vanishes in the first order and not in the second.
    assert gradcheck(covariance, gy) and gradgradcheck(covariance, gy)


def test_a_second_backward_pass_finds_what_the_first_one_used():
    gy, c = differentiable((10, 3), (5, 3))
    for s in (embedding.sq_norms(RAGGED, gy, c).sum(), embedding.covariance(RAGGED, gy, tables(RAGGED, gy).mean(0))):
        first, second = (torch.autograd.grad(s, gy, retain_graph=True) for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(first, torch.autograd.grad(s, gy, create_graph=True))


@pytest.mark.parametrize("pair", [(RAGGED, EQUAL), (EQUAL, RAGGED), (EQUAL, EQUAL)], ids=["ragged", "equal", "alike"])
def test_look_ups_in_rows_of_others(pair):
    a, b = pair
    (gy,) = differentiable((len(a.tokens), 3))
    E = tables(a, gy)
    ours = embedding.rows_elsewhere(a, gy, b)
    torch.testing.assert_close(ours, E[b.samples, b.tokens].masked_fill(b.none, 0), rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda gy: embedding.rows_elsewhere(a, gy, b), gy)
    both, order = a.joined(b)
    assert both.tokens.equal(torch.cat([a.tokens, b.tokens])[order])
    assert both.samples.equal(torch.cat([a.samples, b.samples])[order])
    assert (both.each is None) == (a.each is None or b.each is None)


@LOOK_UPS
def test_subsets_and_mergers_of_samples(look_ups):
    gy = random(len(look_ups.tokens), 3)
    E = tables(look_ups, gy)
    for index in ([3, 0], [1], [2, 2, 1], [0, 1, 2, 3]):
        chosen, places = look_ups.select(torch.tensor(index))
        torch.testing.assert_close(tables(chosen, gy[places]), E[index])
        assert chosen.each == look_ups.each
    merged = look_ups.merged(2)
    torch.testing.assert_close(tables(merged, gy), E.view(2, 2, 5, 3).sum(1))
    assert merged.each == (None if look_ups.each is None else 2 * look_ups.each)
    nothing = dataclasses.replace(EQUAL, tokens=EQUAL.tokens[:0], bounds=EQUAL.bounds[:1]).merged(3)
    assert nothing.batch_size == 3 and tables(nothing, gy[:0]).shape == (3, 5, 3)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 2, 3), (1, 4), (2, 0)])
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_public_ops(shape, padding_idx):
    tokens = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    gy, v, w = differentiable((*shape, 3), (6, 3), shape[:1])
    rows = []
    for own, gy_i in zip(tokens.long(), gy, strict=True):
        own = own.reshape(-1)
        used = torch.ones_like(own, dtype=torch.bool) if padding_idx is None else own != padding_idx
        rows.append(gy.new_zeros(6, 3).index_add(0, own[used], gy_i.reshape(-1, 3)[used]))
    E = torch.stack(rows)
    for ours, expected in (
        (ops.embedding_sq_norms(tokens, gy, padding_idx), E.square().sum((1, 2))),
        (ops.embedding_deviation_sq_norms(tokens, gy, v, padding_idx), (E - v).square().sum((1, 2))),
        (ops.embedding_jvp(tokens, gy, v, padding_idx), (E * v).sum((1, 2))),
        (ops.embedding_weighted_sum(tokens, gy, 6, w, padding_idx), torch.tensordot(w, E, 1)),
        (ops.embedding_weighted_sum(tokens, gy, 6, padding_idx=padding_idx), E.sum(0)),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    if gy.numel():
        assert gradgradcheck(lambda gy, v: ops.embedding_deviation_sq_norms(tokens, gy, v, padding_idx), (gy, v))


def test_public_ops_refuse_what_does_not_fit():
    tokens, gy, table = torch.ones(2, 3, dtype=torch.long), torch.randn(2, 3, 4), torch.randn(5, 4)
    for call in (
        lambda: ops.embedding_sq_norms(tokens.float(), gy),
        lambda: ops.embedding_sq_norms(tokens > 0, gy),
        lambda: ops.embedding_sq_norms(tokens, gy[:, :2]),
        lambda: ops.embedding_sq_norms(tokens[0, 0], gy[0, 0]),
        lambda: ops.embedding_deviation_sq_norms(tokens, gy, table[:, :3]),
        lambda: ops.embedding_jvp(tokens, gy, table[0]),
        lambda: ops.embedding_weighted_sum(tokens, gy, 5, torch.ones(3)),
    ):
        with pytest.raises(bootgrad.BootgradError):
            call()
