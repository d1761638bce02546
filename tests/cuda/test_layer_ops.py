"""The CUDA kernels of layers without a GPU: run on the CPU by emulation, and compiled by nvcc; with one: against eager."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bootgrad.ops import schema
from bootgrad.ops.backends import eager
from bootgrad.ops.library import build_info

from ..ops import cases
from ..tolerances import TOLERANCES
from .toolchain import (
    ARCHITECTURES,
    DEFINITIONS,
    HERE,
    INCLUDE,
    ROOT,
    TORCH_INCLUDE,
    build_emulated,
    compile_launcher,
    cuobjdump,
    gencode,
    needs_cxx20,
    needs_nvcc,
    resource_usage,
    run,
)

STEM = "layer_ops"
DTYPES = {"double": torch.float64, "float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
LAYERS = ("linear", "linear_short", "conv2d_groups", "conv2d_holes", "conv1d", "conv3d")  # the rest takes longer
RESULTS = 14  # of a layer in one layout


def check(output: str, layers: int | None = None) -> None:
    """Results lie within rounding of the naive loops', and other layouts of the same numbers change no bit."""
    lines = [line.split() for line in output.splitlines()]
    assert len(lines) == RESULTS * layers if layers else lines
    bits = {}
    for dtype, layer, layout, op, result, error, checksum in lines:
        row = TOLERANCES["compiled", DTYPES[dtype]]
        tolerance = row.derivatives if result in ("dx", "dgy") else row.sums
        assert float(error) <= tolerance, (dtype, layer, layout, op, result, error)
        bits.setdefault((dtype, layer, op, result), set()).add(checksum)
    assert sum(map(len, bits.values())) == len(bits)


@needs_cxx20()
def test_emulated_equals_naive_loops(tmp_path):
    program = build_emulated(STEM, "plain", tmp_path)
    output = run([program, "double", "bfloat16", *LAYERS])
    check(output, 2 * (len(LAYERS) + 2))  # linear layers have two layouts
    assert run([program, "double", *LAYERS[2:]]) in output  # twice the same bits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizer", "dtypes"), [("plain", ["double", "float", "bfloat16", "half"]), ("address", ["float", "half"])]
)
@needs_cxx20("address")
def test_emulated_equals_naive_loops_for_all_dtypes_layers_and_layouts(sanitizer, dtypes, tmp_path):
    """Inside of its buffers, too, whose ends and gaps are not to be touched, for entries of 32 and of 16 bits."""
    check(run([build_emulated(STEM, sanitizer, tmp_path), *dtypes]), len(dtypes) * 24)


@pytest.mark.slow
@needs_cxx20("thread")
def test_emulated_has_no_races(tmp_path):
    program = build_emulated(STEM, "thread", tmp_path)
    check(run([program, "double", "float", "bfloat16", "conv2d_groups", "linear_short", "pixels_apart"]), 3 * 4)


# Header, what it says, what a careless author might say, where that shows, and how.
FAULTS = {
    "missing barrier": (
        *("tile_product.cuh", "    __syncthreads();\n  }\n}", "  }\n}"),
        *("thread", "data race"),
    ),
    "barrier in a branch's stead": (
        *("tile_product.cuh", "    store(0, buffers, buffers + Math::kBuffer);\n  }\n  __syncthreads();"),
        *("    store(0, buffers, buffers + Math::kBuffer);\n  }", "thread", "data race"),
    ),
    "space one too wide": (
        *("gather.cuh", "uint32_t(coordinate) < uint32_t(size[d])", "uint32_t(coordinate) <= uint32_t(size[d])"),
        *("address", "heap-buffer-overflow"),
    ),
    "rows one too many": (
        *("gradient_tiles.cuh", "r0 + Math::column(entry) < R", "r0 + Math::column(entry) <= R"),
        *("address", "heap-buffer-overflow"),
    ),
    "chunks off their boundaries": (
        *("layer_geometry.cuh", "reinterpret_cast<uintptr_t>(data) % 16 == 0 &&", ""),
        *("address", "misaligned address"),
    ),
    "lanes not added": ("gradient_tiles.cuh", "      value = warp_sum(value);\n", "", "plain", ""),
    "parts not added": ("gradient_tiles.cuh", "s < p.splits", "s < 1", "plain", ""),
    "chunks not added": ("layer_ops.cuh", "p.add_to_sums = p.first > 0", "p.add_to_sums = false", "plain", ""),
    "rows and depth of a fragment exchanged": (
        *("tile_product.cuh", "r / 2 * (kStep / 2), m + i * 16 + r % 2 * 8"),
        *("r % 2 * (kStep / 2), m + i * 16 + r / 2 * 8", "plain", ""),
    ),
    "tiles beside the diagonal counted once": ("gram_tiles.cuh", "i == j ? sum : 2 * sum", "sum", "plain", ""),
    "zeros of the pixels' Gram forgotten": ("gram_tiles.cuh", "gram[n * pitch + N] = 0;", "", "plain", ""),
    "a phase's first tap forgotten": ("layer_geometry.cuh", "- phase.first_tap * dilation", "", "plain", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@needs_cxx20("thread")
def test_planted_fault_is_found(fault, tmp_path):
    header, right, wrong, sanitizer, report = FAULTS[fault]
    shutil.copytree(INCLUDE, tmp_path / "include")
    path = tmp_path / "include/bootgrad" / header
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong))
    program = build_emulated(STEM, sanitizer, tmp_path, tmp_path / "include")
    command = [program, "bfloat16", "conv2d_groups", "linear", "pixels_apart", "conv1d"]
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if report:
        assert done.returncode != 0
        assert report in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        with pytest.raises(AssertionError):
            check(done.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The library's objects for all architectures, and what ptxas says of them."""
    folder = tmp_path_factory.mktemp("cuda")

    def compile_one(source: Path) -> str:
        target = folder / f"{source.name}.o"
        if source.suffix == ".cu":
            return compile_launcher(source, target, *gencode(*ARCHITECTURES))
        home = re.search(r"^#\$ TOP=(.+)$", run(["nvcc", "--dryrun", "-E", "-x", "cu", os.devnull]), re.MULTILINE)[1]
        includes = [f"-I{INCLUDE}", "-isystem", TORCH_INCLUDE, "-isystem", f"{home}/include"]
        return run(["g++", "-std=c++17", "-O2", "-fPIC", "-Wall", *DEFINITIONS, *includes, "-c", source, "-o", target])

    sources = sorted(path for path in (ROOT / "csrc/cuda").iterdir() if path.suffix in (".cu", ".cpp"))
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        reports = list(pool.map(compile_one, sources))
    return folder, "\n".join(reports)


@pytest.mark.slow
@needs_nvcc
def test_compiles_without_spills(compiled):
    usage = resource_usage(compiled[1])
    tiles = {name: u for name, u in usage.items() if "Math" in name[0]}
    # Four kernels for each of four dtypes, and the weighted sum of halves.
    assert len(tiles) == (4 * 4 + 2) * len(ARCHITECTURES)
    assert {name: u for name, u in usage.items() if u["spilled"]} == {}
    # Two blocks of 128 threads to a multiprocessor at least.
    assert max(u["registers"] for u in tiles.values()) <= 255


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is neither on the PATH nor in the package triton")
@pytest.mark.parametrize(
    ("dtype", "instruction"),
    [("bfloat16", "HMMA.16816.F32.BF16"), ("half", "HMMA.16816.F32 ")],
)
def test_uses_tensor_cores_and_16_byte_loads(dtype, instruction, compiled):
    for architecture in ARCHITECTURES:
        command = [cuobjdump(), "-sass", "-arch", f"sm_{architecture}", compiled[0] / f"layer_{dtype}.cu.o"]
        kernels = run(command).split("Function : ")[1:]
        direct = [text for text in kernels if "gradient_tiles" in text or "gram_kernel" in text]
        direct = [text for text in direct if "FmaMath" not in text.splitlines()[0]]
        adjoint = [text for text in kernels if "adjoint_tiles" in text]
        assert (len(direct), len(adjoint)) == (3, 1)
        for text in direct:
            # A stage: two steps deep, 2×4 instructions each.
            assert text.count(instruction) >= 16
            assert "LDG.E.128" in text
        assert adjoint[0].count("HMMA.1688.F32.TF32") >= 16
        assert "LDG.E.128" in adjoint[0]


@pytest.mark.slow
@needs_nvcc
def test_a_launch_of_too_many_blocks_is_refused(tmp_path):
    program, includes = tmp_path / "program", (f"-I{INCLUDE}", f"-I{ROOT / 'csrc/cuda'}")
    run(["nvcc", "-std=c++17", *gencode(80), *includes, HERE / "too_many_blocks.cu", "-o", program])
    cuda_error_invalid_configuration = 9
    assert run([program]).split("\n")[:2] == ["0 0", f"{2**31} {cuda_error_invalid_configuration}"]


@pytest.mark.slow
@needs_nvcc
def test_library_registers_its_ops_for_cuda_and_checks_their_arguments(compiled, tmp_path):
    """Linked against torch's CPU build and loaded there, with stand-ins for the symbols that only libtorch_cuda has."""
    library, stand_ins = tmp_path / "lib_cuda.so", tmp_path / "libstand_ins.so"
    torch_libraries = [f"-L{TORCH_INCLUDE.parent / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"]
    run(["nvcc", "-shared", *compiled[0].glob("*.o"), "-o", library, *torch_libraries])
    run(["g++", "-shared", "-fPIC", HERE / "stand_ins.cpp", "-o", stand_ins])
    # Of C++ it takes the standard library alone: the stable ABI is in C.
    symbols = run(["nm", "-D", "--undefined-only", library]).split()
    assert not [name for name in symbols if name.startswith("_Z") and re.search("c10|torch|2at", name)]
    environment = os.environ | {"BOOTGRAD_BACKEND": "eager", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", REGISTRATION, stand_ins, library]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after, *errors = done.stdout.splitlines()
    names = [name for name in schema.SCHEMAS if name.startswith(("linear", "conv"))]
    assert (before, after) == ("[]", str(names))
    assert [re.sub(r".*\.(?:h|cpp|cu):\d+, ", "", error) for error in errors] == [
        "x and gy must be (B, T, I) and (B, T, O); got 2 and 3 dimensions",
        "x and gy must share T; got 4 and 5",
        "path must be one of direct, gram; got 'ghost'",
        "v must have shape (5, 3); got (3, 5)",
        "v must have the accumulation dtype of x, float32",
        "x and gy must be on one device",
        "gy must have spatial size (2, 2) for this x and geometry; got (2, 3)",
        "groups must divide the channels; got 2 for 3 in and 4 out",
        "stride must have 2 numbers, one per dimension; got (1,)",
    ]


REGISTRATION = """
import ctypes, sys, torch
from bootgrad.ops import schema
def registered():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in schema.SCHEMAS if has(f"bootgrad_cuda::{name}", "CUDA")]
print(registered())
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[2])
print(registered())
ops, cuda = torch.ops.bootgrad_cuda, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
def fails(op, *arguments):
    try:
        op.default.redispatch(cuda, *arguments)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
z = torch.zeros
fails(ops.linear_sq_norms, z(2, 3), z(2, 4, 3), "direct")
fails(ops.linear_sq_norms, z(2, 4, 3), z(2, 5, 3), "direct")
fails(ops.linear_sq_norms, z(2, 4, 3), z(2, 4, 3), "ghost")
fails(ops.linear_jvp, z(2, 4, 3), z(2, 4, 5), z(3, 5))
fails(ops.linear_jvp, z(2, 4, 3), z(2, 4, 5), z(5, 3).double())
fails(ops.linear_jvp, z(2, 4, 3), z(2, 4, 5), z(5, 3))
fails(ops.conv_weighted_sum, z(2, 3, 4, 4), z(2, 4, 2, 3), None, [3, 3], [1, 1], [0, 0], [1, 1], 1)
fails(ops.conv_weighted_sum, z(2, 3, 4, 4), z(2, 4, 2, 2), None, [3, 3], [1, 1], [0, 0], [1, 1], 2)
fails(ops.conv_weighted_sum, z(2, 3, 4, 4), z(2, 4, 2, 2), None, [3, 3], [1], [0, 0], [1, 1], 1)
"""


needs_gpu = pytest.mark.skipif(
    not any(info.name == "_C_cuda" and info.loaded for info in build_info()),
    reason="the library _C_cuda is not loaded: it was not built, or there is no CUDA device",
)

# B, C, S, O, K, stride, padding, dilation, groups of convolutions; B, T, I, O of linear layers. What training meets.
CONVOLUTIONS = {
    "stem": (8, 3, (56, 56), 64, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "wide": (16, 128, (14, 14), 128, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "deep": (16, 256, (7, 7), 512, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "pointwise": (16, 64, (28, 28), 256, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "grouped": (16, 96, (15, 13), 96, (3, 5), (1, 1), (1, 2), (1, 1), 4),
    "depthwise": (8, 96, (14, 14), 96, (3, 3), (1, 1), (1, 1), (1, 1), 96),
    "dilated": (1, 63, (17, 19), 65, (3, 3), (3, 2), (2, 4), (2, 3), 1),
    "signal": (127, 12, (128,), 24, (9,), (1,), (4,), (1,), 1),
    "volume": (4, 16, (8, 9, 10), 24, (3, 3, 3), (1, 2, 1), (1, 1, 0), (1, 1, 1), 1),
    "empty": (0, 3, (8, 8), 5, (3, 3), (1, 1), (0, 0), (1, 1), 1),
}
LINEARS = {
    "tokens": (16, 128, 256, 512),
    "long": (2, 1000, 64, 48),
    "odd": (63, 7, 127, 65),
    "one": (127, 1, 64, 64),
    "none": (0, 5, 3, 4),
}
TASKS = [(name, layer) for name in cases.LINEAR_OPS for layer in LINEARS]
TASKS += [(name, layer) for name in cases.CONV_OPS for layer in CONVOLUTIONS]


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize(("name", "layer"), TASKS)
def test_on_a_gpu_equals_eager_in_float64(name, layer, dtype):
    """All variants, on both paths; channels last give the same numbers, and a second call the same bits."""
    make, shape = (cases.linear_case, LINEARS) if layer in LINEARS else (cases.conv_case, CONVOLUTIONS)
    case = on_gpu(make(*shape[layer], dtype))
    op, oracle = getattr(torch.ops.bootgrad_cuda, name), getattr(eager, name)
    paths = ("direct", "gram") if cases.takes(name, "path") else ("direct",)
    for variant in cases.variants(name, case):
        exact = tuple_of(oracle(*cases.arguments(name, as_float64(variant))))
        for path in paths:
            ours = tuple_of(op(*cases.arguments(name, variant, path)))
            for index, (a, b) in enumerate(zip(ours, exact, strict=True)):
                close(a, b, variant, name.endswith("with_grad") and index in (1, 2))
            again = tuple_of(op(*cases.arguments(name, variant, path)))
            assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        if variant.x.dim() == 4:
            last = variant.but(
                **{t: getattr(variant, t).contiguous(memory_format=torch.channels_last) for t in ("x", "gy")}
            )
            for a, b in zip(tuple_of(op(*cases.arguments(name, last))), exact, strict=True):
                close(a, b, last, a.dtype == dtype and a.shape in (last.x.shape, last.gy.shape))


def close(ours, exact, case, derivative: bool) -> None:
    """Rounding errors, relative to what a result is made of."""
    assert ours.shape == exact.shape and ours.is_contiguous()
    if not exact.numel():
        return
    tolerance = TOLERANCES["compiled", case.x.dtype]
    # Sums of up to 10⁵ terms in another order than the oracle's: 30 of the table's bounds, which are for hundreds.
    bound = 2 * tolerance.derivatives if derivative else 30 * tolerance.sums
    size = exact.norm()
    if ours.dim() == 1:
        # Inner products may cancel: their terms are as large as the norms.
        x, gy = (t.double().flatten(1).norm(dim=1) for t in (case.x, case.gy))
        size = exact.norm() + (x * gy).square().norm() + (x * gy).norm() * case.v.double().norm()
    assert (ours.double() - exact).norm() <= bound * size


def on_gpu(case):
    return case.but(
        **{
            f.name: value.cuda()
            for f in dataclasses.fields(case)
            if isinstance(value := getattr(case, f.name), torch.Tensor)
        }
    )


def as_float64(case):
    return case.but(
        **{
            f.name: value.double()
            for f in dataclasses.fields(case)
            if isinstance(value := getattr(case, f.name), torch.Tensor)
        }
    )


def tuple_of(results):
    return results if isinstance(results, tuple) else (results,)
