"""The Triton kernels of the Gram path without a GPU: interpreted against float64, and cross-compiled."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl

from bootgrad import planning
from bootgrad.ops.backends import triton as backend

from ..ops.cases import check, conv_case, linear_case
from .compiling import ARCHITECTURES, SHARED_LIMIT, cross_compile
from .interpreter import run_interpreted
from .loading import load_kernel

module, kernels, layers = load_kernel("gram"), load_kernel("gram_kernels"), load_kernel("layer")

# B, C, S, O, K, stride, padding, dilation, groups
CONVS = {
    "3×3": (2, 4, (6, 7), 6, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "no padding": (2, 3, (9, 8), 2, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "groups": (1, 6, (5, 6), 4, (2, 3), (1, 1), (1, 0), (1, 1), 2),
    "depthwise": (1, 3, (5, 5), 3, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "stride and dilation": (2, 4, (9, 8), 6, (3, 2), (2, 3), (1, 1), (2, 1), 2),
    "stride alone": (2, 4, (5, 6), 2, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "unused pixels": (1, 2, (8, 9), 3, (2, 2), (3, 3), (0, 0), (1, 1), 1),
    "more padding than kernel": (1, 2, (3, 4), 3, (2, 2), (1, 1), (2, 2), (1, 1), 1),
    "one dimension": (3, 3, (11,), 5, (4,), (2,), (2,), (1,), 1),
    "three dimensions": (2, 4, (4, 5, 3), 2, (2, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1), 2),
    "one position": (3, 5, (3, 3), 4, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "more than a tile": (1, 3, (9, 10), 2, (3, 3), (1, 1), (1, 1), (1, 1), 1),
}
LINEARS = {"odd": (2, 37, 21, 33), "a tile and one": (2, 65, 5, 63), "short": (3, 1, 127, 1), "seven": (1, 7, 63, 31)}
MASKS = ((True, True), (False, False), (True, False), (False, True))


def conv(name, dtype, seed=0):
    return conv_case(*CONVS[name], dtype, seed)


def linear(name, dtype, seed=0):
    return linear_case(*LINEARS[name], dtype, seed)


def canonical(case):
    if case.kernel_size is None:
        return layers.linear_layer(case.x, case.gy)
    return layers.conv_layer(case.x, case.gy, case.kernel_size, *case.geometry)


def call(case, mask=(True, True), by_pixels=False, workspace=planning.GPU_WORKSPACE_BYTES):
    x, gy, layer = canonical(case)
    return case, mask, (x, gy, tuple(layer), mask, by_pixels, workspace)


def launch(x, gy, layer, mask, by_pixels, workspace):
    return module.gram_sq_norms(x, gy, layers.Layer(*layer), workspace, by_pixels, mask)


def interpret(calls, folder):
    torch.save([arguments for *_, arguments in calls], folder / "calls.pt")
    run_interpreted("-m", __name__, str(folder))
    return torch.load(folder / "results.pt")


def _main(folder):
    torch.use_deterministic_algorithms(True)  # with this torch.empty is filled with NaN
    assert torch.empty(1).isnan().all()
    torch.save([launch(*arguments) for arguments in torch.load(folder / "calls.pt")], folder / "results.pt")


def compare(calls, results):
    for (case, mask, (*_, layer, _, _, _)), (s, dx, dgy) in zip(calls, results, strict=True):
        assert [d is not None for d in (dx, dgy)] == list(mask)
        layer = layers.Layer(*layer)
        grads = [
            t.new_zeros(0) if d is None else layer.as_op(d, t.shape)
            for d, t in zip((dx, dgy), (case.x, case.gy), strict=True)
        ]
        name = "linear_sq_norms_with_grad" if case.kernel_size is None else "conv_sq_norms_with_grad"
        check("compiled", name, case.but(center=None, mask=(*mask, False)), (s, *grads, s.new_zeros(0)), "gram")


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_interpreted_equals_the_oracle(tmp_path):
    calls = [call(linear(name, torch.float32)) for name in LINEARS]
    calls += [call(conv(name, torch.float32), by_pixels=by) for name in CONVS for by in (True, False)]
    calls += [call(linear("odd", torch.float16))]
    calls += [call(conv("groups", torch.float16), by_pixels=by) for by in (True, False)]
    calls += [call(linear("seven", torch.float32), mask) for mask in MASKS]
    calls += [call(conv("groups", torch.float32), mask, by) for mask in MASKS for by in (True, False)]
    compare(calls, interpret(calls, tmp_path))


def test_a_launch_holds_its_programs():
    """Of 15625 tiles a side, samples are taken 17 at a time; 2³¹ pairs and more no launch takes."""

    def call_of(T):
        x = torch.ones(1).expand(32, T, 4)
        return module._Call(*layers.linear_layer(x, x), (False, False), False)

    assert call_of(10**6).pairs(10**6) == 15625 * 15626 // 2
    assert call_of(10**6).chunk(planning.GPU_WORKSPACE_BYTES) == 17
    with pytest.raises(RuntimeError, match="2147483647 pairs of tiles .* got 3051796875 for 5000000 .* path=.direct"):
        call_of(5 * 10**6).chunk(planning.GPU_WORKSPACE_BYTES)


def test_nothing_gives_zeros(tmp_path):
    sizes = [(0, 4, (5, 5), 2, (3, 3)), (2, 0, (5, 5), 2, (3, 3)), (2, 4, (5, 5), 0, (3, 3)), (2, 4, (2, 5), 3, (3, 3))]
    cases = [linear_case(*size, 3, torch.float32) for size in ((0, 5, 2), (2, 0, 2), (2, 5, 0))]
    cases += [conv_case(*size, (1, 1), (0, 0), (1, 1), 1, torch.float32) for size in sizes]
    calls = [call(case) for case in cases]
    for (case, *_), (s, dx, dgy) in zip(calls, interpret(calls, tmp_path), strict=True):
        assert s.shape == (case.x.size(0),) and dx.numel() == case.x.numel() and dgy.numel() == case.gy.numel()
        assert not any(t.count_nonzero() for t in (s, dx, dgy))


def test_strides_chunks_and_the_batch_change_no_bit(tmp_path):
    plain, shifted, strided = (
        linear("odd", torch.float32),
        conv("groups", torch.float32),
        conv("one dimension", torch.float32),
    )
    two = conv("3×3", torch.float32)

    def laid_out(case, copy):
        return case.but(x=copy(case.x), gy=copy(case.gy))

    def transposed(t):
        return torch.empty_like(t.mT, memory_format=torch.contiguous_format).mT.copy_(t)

    def spread_out(t):
        return t.new_full((*t.shape[:-1], 2 * t.size(-1)), torch.nan)[..., ::2].copy_(t)

    def channels_last(t):
        return t.movedim(1, -1).contiguous().movedim(-1, 1)

    groups = [
        [plain, plain, laid_out(plain, transposed), laid_out(plain, spread_out)],
        [two, two, laid_out(two, channels_last), laid_out(two, transposed), laid_out(two, spread_out)],
    ]
    calls = [call(case, by_pixels=by) for by in (True, False) for group in groups for case in group]
    for case, by in ((plain, False), (two, True), (two, False), (shifted, True), (strided, False)):
        one = case.but(x=case.x[-1:], gy=case.gy[-1:])
        calls += [call(case, by_pixels=by), call(case, by_pixels=by, workspace=1), call(one, by_pixels=by)]
    results = interpret(calls, tmp_path)
    compare(calls, results)
    results = iter(results)
    for _ in (True, False):
        for group in groups:
            first = next(results)
            assert all(same(next(results), first) for _ in group[1:])
    for whole, chunks, one in zip(results, results, results, strict=True):
        assert same(whole, chunks)
        assert same([t[-1:] for t in whole], one)


def test_a_sample_s_matrices_bound_the_workspace():
    case = conv("3×3", torch.bfloat16)
    x, gy, layer = canonical(case)
    # Per sample P and K in float32 and U Uᵀ in bfloat16: 42 rows of 48 columns.
    by_pixels = [module._Call(x, gy, layer, mask, True) for mask in MASKS]
    assert [c.bytes_per_sample for c in by_pixels] == [42 * 48 * n for n in (4 + 2 + 4, 4, 4 + 4, 4 + 2)]
    assert [by_pixels[0].chunk(n * by_pixels[0].bytes_per_sample - 1) for n in (1, 2, 3)] == [1, 1, 2]
    assert module._Call(x, gy, layer, (True, True), False).bytes_per_sample == 42 * 48 * (2 + 2)
    norms_alone = module._Call(*canonical(linear("odd", torch.float32)), (False, False), False)
    assert (norms_alone.bytes_per_sample, norms_alone.chunk(1)) == (0, 2)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("times", [1, 16, 64])
def test_pixels_come_first_where_the_plan_says_so(name, times):
    B, C, S, O, *geometry = CONVS[name]  # noqa: E741
    case = conv_case(B, C * times, S, O * times, *geometry, torch.float32)
    call = backend._conv(case.x, case.gy, case.kernel_size, *case.geometry)
    assert backend._by_pixels(call) == planning.ConvLayer(B, C * times, S, O * times, *geometry).pixels_first


@pytest.mark.parametrize(
    ("shape", "strides", "flat", "expected"),
    [
        ((2, 64, 1, 1, 5), (320, 1, 0, 0, 64), True, True),
        ((2, 63, 1, 1, 5), (315, 1, 0, 0, 63), True, False),
        ((2, 3, 1, 4, 8), (96, 32, 0, 8, 1), True, True),
        ((2, 3, 1, 4, 8), (96, 32, 0, 8, 1), False, False),
        ((2, 3, 1, 7, 7), (147, 49, 0, 7, 1), True, False),
        ((2, 32, 1, 7, 7), (1568, 1, 0, 224, 32), False, True),
    ],
)
def test_loads_are_of_whole_vectors_where_strides_allow(shape, strides, flat, expected):
    assert module.whole_vectors(torch.empty_strided(shape, strides), flat) == expected


POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
# What is multiplied, and whether as TF32.
KINDS = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
ONE = dict.fromkeys(("K0", "S0", "P0", "stride_0", "dilation_0"), 1)
UNIT_STRIDE = ONE | dict.fromkeys(("stride_1", "stride_2", "dilation_1", "dilation_2"), 1)
POINTWISE = UNIT_STRIDE | dict.fromkeys(("K1", "K2", "S1", "P1"), 1)


def configurations(kind, vectors):
    """(name, kernel, arguments, warps, rows of a product) of every kernel in every configuration and layout."""
    dtype, tf32 = KINDS[kind]
    stored = dtype if dtype == torch.bfloat16 else torch.float32
    x, acc, kept = POINTER[dtype], "*fp32", POINTER[stored]
    for _, tiles in module.TILES[module._kind(dtype, tf32), vectors]:
        given = dict(BLOCK_T=tiles.BLOCK_T, BLOCK_C=tiles.BLOCK_C, TF32=tf32, FLAT=True, x_ptr=x, gy_ptr=x)
        given |= dict(partials_ptr=acc, pixels_ptr=None, uu_ptr=None, k_ptr=None, PLAIN=False)
        rows = tiles.BLOCK_T
        for last in (True, False):
            unit = dict.fromkeys(("stride_xc", "stride_go") if last else ("stride_x2", "stride_g2"), 1)
            both = dict(uu_ptr=kept, k_ptr=kept)
            variants = {
                "pixels": (kernels.gram_pixels_kernel, POINTWISE | dict(out_ptr=acc)),
                "plain": (kernels.gram_norms_kernel, POINTWISE | dict(PLAIN=True)),
                "plain, stored": (kernels.gram_norms_kernel, POINTWISE | both | dict(PLAIN=True)),
                "shifted": (kernels.gram_norms_kernel, UNIT_STRIDE | both | dict(pixels_ptr=acc, k_ptr=acc)),
                "patches": (kernels.gram_norms_kernel, ONE | both),
            }
            if tiles.BLOCK_T > 64:
                del variants["shifted"]  # see MOST_GATHERED
            if vectors and not last:
                del variants["patches"]  # neighbouring positions' pixels are not neighbours in memory
            for name, (kernel, changed) in variants.items():
                yield f"{name}, {last=}", kernel, given | changed | unit, tiles.num_warps, rows
        given = UNIT_STRIDE | dict(k_ptr=acc, out_ptr=kept, BLOCK_T=tiles.BLOCK_T)
        if tiles.BLOCK_T <= 64:
            yield "spread", kernels.gram_spread_kernel, given, tiles.num_warps, 0
    for _, product in module.PRODUCTS[module._kind(stored, tf32 or dtype == torch.float16), vectors]:
        given = product._asdict() | dict(DOT=TYPE[stored], TF32=tf32 or dtype == torch.float16, FLAT=True)
        given |= dict(matrix_ptr=kept, k_ptr=kept, v_ptr=x, x_ptr=x, out_ptr=x)
        for last in (True, False):
            unit = dict.fromkeys(
                ("stride_vc", "stride_xc", "stride_oc") if last else ("stride_v2", "stride_x2", "stride_o2"), 1
            )
            yield (
                f"apply, {last=}",
                kernels.gram_apply_kernel,
                given | unit | {"S1": 1},
                product.num_warps,
                product.BLOCK_M,
            )
            if not vectors:
                kernel = kernels.gram_apply_patches_kernel
                yield f"apply patches, {last=}", kernel, given | ONE | unit, product.num_warps, product.BLOCK_M


def check_compiled(kind, vectors, name, kernel, given, warps, rows, architecture, folder):
    arguments = {p: given.get(p, "i32") for p in kernel.arg_names}
    sizes = ("C", "O", "N", "T", "M") if vectors else ()
    divisible = [
        p
        for p, value in arguments.items()
        if value is not None
        and (p.endswith("_ptr") or (value == "i32" and (p.startswith("ld") or p in sizes)))
        or (vectors and value == "i32" and p[:-1] in ("stride_x", "stride_g", "stride_v", "stride_o"))
    ]
    compiled = cross_compile(kernel, arguments, architecture, warps, folder, divisible)
    assert not compiled.spills, name
    assert compiled.shared <= SHARED_LIMIT[architecture], name
    if rows == 0 or kind == "fp32":
        return
    if architecture == 80 or rows < 64 or warps < 4:
        expected = "mma.sync"
    else:
        expected = "wgmma.mma_async" if architecture == 90 else "tcgen05.mma"
    assert expected in compiled.ptx, name


@pytest.mark.parametrize("vectors", [True, False])
def test_compiles_for_one_gpu(vectors, tmp_path):
    for configuration in configurations("bf16", vectors):
        name, *_, rows = configuration
        if rows == 64 and (not vectors or "last=True" in name):
            check_compiled("bf16", vectors, *configuration, 90, tmp_path)


@pytest.mark.slow
@pytest.mark.every_configuration
@pytest.mark.parametrize("kind", ["bf16", "fp32", "tf32"])
@pytest.mark.parametrize(("architecture", "vectors"), [*((a, True) for a in ARCHITECTURES), (80, False)])
def test_compiles_in_every_configuration(architecture, kind, vectors, tmp_path):
    """Without whole vectors, where loads are many and tiles small, for the one with the least shared memory."""
    for configuration in configurations(kind, vectors):
        check_compiled(kind, vectors, *configuration, architecture, tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", POINTER, ids=str)
def test_on_a_gpu_equals_the_oracle(dtype):
    cases = [linear_case(B, T, 256, 384, dtype) for B, T in ((3, 63), (2, 197), (1, 640))]
    cases += [conv_case(3, 64, (14, 14), 32, (3, 3), s, (1, 1), (1, 1), 1, dtype) for s in ((1, 1), (2, 2))]
    calls = []
    for case in [*cases, *(conv(name, dtype) for name in CONVS)]:
        for last in (False, True):
            moved = case
            if last and case.kernel_size is not None:
                moved = case.but(x=case.x.movedim(1, -1).contiguous().movedim(-1, 1))
            calls += [call(moved, by_pixels=by) for by in (True, False)]
    results = []
    for *_, (x, gy, *rest) in calls:
        first, second = (launch(x.cuda(), gy.cuda(), *rest) for _ in range(2))
        assert same(first, second)
        results.append([t.cpu() for t in first])
    compare(calls, results)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
