"""The Triton kernels of layer norm's affine rows without a GPU: interpreted against float64, and cross-compiled."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from .compiling import ARCHITECTURES, SHARED_LIMIT, cross_compile
from .interpreter import interpret
from .loading import load_kernel

STEM = "norm_rows"
module = load_kernel(STEM)

POINTER = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# Sums of T terms of both signs, relative to their norm.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}


def arguments(B, T, N, dtype, rms=False):
    g = torch.Generator().manual_seed(0)
    x, gy = (torch.randn(B, T, N, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    wide = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    mean = wide.mean(2)
    centered = wide if rms else wide - mean[..., None]
    return x, gy, None if rms else mean, (centered.square().mean(2) + 1e-3).rsqrt()


def compare(cases, results):
    for (x, gy, mean, rstd), ours in zip(cases, results, strict=True):
        normal = (x.double() - (0 if mean is None else mean.double()[..., None])) * rstd.double()[..., None]
        for a, b in zip(ours, ((gy.double() * normal).sum(1), gy.double().sum(1)), strict=True):
            assert a.dtype == rstd.dtype and a.shape == b.shape and a.is_contiguous()
            assert (a.double() - b).norm() <= TOLERANCE[x.dtype] * b.norm()


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_interpreted_equals_the_formula_and_strides_change_no_bit(tmp_path):
    sizes = ((2, 37, 70), (1, 1, 1), (3, 1, 5), (1, 127, 63), (0, 5, 3), (2, 0, 3), (2, module.RUN + 1, 33))
    cases = [
        arguments(*size, dtype, rms) for size in sizes for dtype, rms in ((torch.float32, False), (torch.float64, True))
    ]
    cases += [arguments(2, 37, 33, dtype) for dtype in (torch.float16, torch.bfloat16)]
    plain = arguments(3, 2 * module.RUN + 5, 35, torch.float32)
    spread = [torch.full((*t.shape, 2), torch.nan)[..., 0].copy_(t) for t in plain]
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in plain]
    cases += [plain, plain, tuple(spread), tuple(turned), tuple(t[2:] for t in plain)]
    results = interpret(STEM, cases, tmp_path)
    compare(cases, results)
    first, *others, alone = results[-5:]
    assert all(same(other, first) for other in others)
    assert same(alone, [t[2:] for t in first])  # a sample's result does not depend on the batch around it


def test_they_are_torch_s_gradients():
    x, gy, mean, rstd = arguments(2, 5, 7, torch.float64)
    weight, bias = torch.ones(7, dtype=x.dtype, requires_grad=True), torch.zeros(7, dtype=x.dtype, requires_grad=True)
    normal = (x - mean[..., None]) * rstd[..., None]
    for i in range(2):
        y = torch.nn.functional.layer_norm(x[i], (7,), weight, bias, 1e-3)
        grads = torch.autograd.grad(y, (weight, bias), gy[i])
        torch.testing.assert_close(grads, ((gy * normal)[i].sum(0), gy[i].sum(0)))


def check_compiled(dtype, config, rms, architecture, folder):
    wide = POINTER[torch.float64 if dtype == torch.float64 else torch.float32]
    given = dict.fromkeys(("stride_xn", "stride_gn", "stride_mt", "stride_rt"), 1) | config._asdict()
    given |= {"RUN": module.RUN, "x_ptr": POINTER[dtype], "gy_ptr": POINTER[dtype], "mean_ptr": None if rms else wide}
    given |= dict.fromkeys(("rstd_ptr", "rows_ptr", "bias_rows_ptr"), wide)
    given = {p: given.get(p, "i32") for p in module.norm_rows_kernel.arg_names}
    divisible = [p for p, v in given.items() if isinstance(v, str) and p not in ("T", "runs")]
    compiled = cross_compile(module.norm_rows_kernel, given, architecture, config.num_warps, folder, divisible)
    assert not compiled.spills and compiled.shared <= SHARED_LIMIT[architecture]
    widest = "ld.global.v2.b64" if dtype == torch.float64 else "ld.global.v4.b32"
    assert widest in compiled.global_loads()


def test_compiles_for_one_gpu(tmp_path):
    check_compiled(torch.bfloat16, module.CONFIGS[-1][1], False, 90, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills_in_every_configuration(architecture, tmp_path):
    for dtype, (_, config), rms in itertools.product(POINTER, module.CONFIGS, (False, True)):
        check_compiled(dtype, config, rms, architecture, tmp_path)
    pointers = ("partials_ptr", "bias_partials_ptr", "rows_ptr", "bias_rows_ptr")
    given = dict.fromkeys(pointers, "*fp32") | {"N": "i32", "runs": "i32", "BLOCK_N": module.TOTAL_BLOCK}
    assert not cross_compile(module.norm_rows_total_kernel, given, architecture, 4, tmp_path, pointers).spills


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", POINTER, ids=str)
def test_on_a_gpu_equals_the_formula(dtype):
    cases = [
        arguments(*size, dtype, rms) for size in ((3, 197, 768), (2, 1000, 33), (1, 1, 1)) for rms in (True, False)
    ]
    for case in cases:
        cuda = [None if t is None else t.cuda() for t in case]
        first, second = module.norm_rows(*cuda), module.norm_rows(*cuda)
        assert same(first, second)
        compare([case], [[t.cpu() for t in first]])
