"""The convolutions' Triton kernels cross-compiled: no spills, shared memory that there is, tensor cores where they matter."""

import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl

from . import conv_compiling
from .compiling import ARCHITECTURES, SHARED_LIMIT
from .loading import load_kernel

configs = load_kernel("conv_configs")

DTYPES_OF_KIND = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
PRODUCTS = {
    "rows": (conv_compiling.compile_rows, configs.DirectConfig, configs.DIRECT),
    "output": (conv_compiling.compile_output, configs.OutputConfig, configs.PRODUCTS),
    "input": (conv_compiling.compile_input, configs.InputConfig, configs.PRODUCTS),
}


def compile_and_check(product, architecture, kind, tile, layout, folder, dtype=None, **flags):
    compile_product, config, _ = PRODUCTS[product]
    dtype = dtype or DTYPES_OF_KIND[kind]
    precision = "ieee" if kind == "ieee" else "tf32"
    compiled = compile_product(config(*tile), dtype, architecture, folder, layout, precision=precision, **flags)
    assert not compiled.spills
    assert compiled.shared <= SHARED_LIMIT[architecture]
    M, _, _, num_warps, _ = tile
    if kind != "ieee":
        wide = M >= 64 and num_warps >= 4
        instruction = {80: "mma.sync", 90: "wgmma" if wide else "mma.sync", 100: "tcgen05.mma" if wide else "mma.sync"}
        assert instruction[architecture] in compiled.ptx
    return compiled


def every_tile():
    for product, architecture in itertools.product(PRODUCTS, ARCHITECTURES):
        for kind in configs.KINDS:
            for row in PRODUCTS[product][2][configs.family_name((architecture // 10, 0)), kind]:
                yield pytest.param(
                    product, architecture, kind, row[2:], id=f"{product}-sm{architecture}-{kind}-{row[2:]}"
                )


@pytest.mark.slow
@pytest.mark.every_configuration
@pytest.mark.parametrize(("product", "architecture", "kind", "tile"), list(every_tile()))
def test_every_tile_compiles_without_spills(product, architecture, kind, tile, tmp_path):
    for layout in conv_compiling.LAYOUTS if architecture == 90 else ("channels last",):
        compile_and_check(product, architecture, kind, tile, layout, tmp_path)
    if product != "rows" and kind == "tf32":
        compile_and_check(product, architecture, kind, tile, "channels last", tmp_path, torch.float16)


@pytest.mark.parametrize(
    ("product", "architecture", "tile"),
    [
        ("rows", 80, (64, 64, 32, 4, 4)),
        ("rows", 90, (128, 64, 64, 8, 3)),
        ("output", 90, (128, 128, 64, 8, 3)),
        ("input", 80, (128, 128, 32, 8, 3)),
    ],
)
def test_tiles_with_channels_last_are_loaded_16_bytes_at_a_time(product, architecture, tile, tmp_path):
    compiled = compile_and_check(product, architecture, "half", tile, "channels last", tmp_path)
    assert "cp.async.cg.shared.global" in compiled.ptx  # copies of 16 bytes, past the registers
    assert compiled.global_loads() <= {"ld.global.v4.b32"}
    assert tile in [row[2:] for row in PRODUCTS[product][2][f"sm{architecture}", "half"]]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_unusual_layers_compile(product, architecture, tmp_path):
    """Rows of several taps, three dimensions, strides, 64-bit offsets, groups, weights, additions, stored gradients."""
    family = configs.family_name((architecture // 10, 0))
    tile = PRODUCTS[product][2][family, "half"][-3][2:]
    number, last = ("i32",) * 3, "channels last"
    shape = {"S": number, "P": number, "kernel": number, "stride": number, "padding": number, "dilation": number}
    far = {f"{t}_strides": ("i64",) * 5 for t in ("x", "gy", "out")} | {"INDEX": tl.int64}
    common = shape | {"DIMS": 3, "groups": "i32"}
    if product == "rows":
        several = {"ONE_TAP": False, "PADDED": 7, "w_ptr": "*fp32", "rows_ptr": "*bf16", "segments": "i32"}
    elif product == "output":
        several = {"ONE_TAP": False, "PADDED": 7, "rows_ptr": "*fp32", "dots_ptr": "*fp32", "ADD": True}
    else:
        several = {"M": number, "phase_step": number, "rows_ptr": "*fp32", "ADD": True}
    used = PRODUCTS[product][0]
    for more in ({}, far):
        known = {n: v for n, v in (common | several | more).items() if product != "input" or n != "x_strides"}
        compiled = used(PRODUCTS[product][1](*tile), torch.bfloat16, architecture, tmp_path, last, 3, "tf32", **known)
        assert compiled.shared <= SHARED_LIMIT[architecture]


@pytest.mark.parametrize("architecture", [80])
@pytest.mark.parametrize("name", ["rows", "output", "input"])
def test_kernels_for_few_channels_compile(name, architecture, tmp_path):
    narrow(name, architecture, torch.bfloat16, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["rows", "output", "input"])
def test_kernels_for_few_channels_compile_everywhere(name, architecture, tmp_path):
    for dtype in DTYPES_OF_KIND.values():
        narrow(name, architecture, dtype, tmp_path)


def narrow(name, architecture, dtype, folder):
    for layout in conv_compiling.LAYOUTS:
        compiled = conv_compiling.compile_narrow(name, dtype, architecture, folder, layout)
        assert not compiled.spills
        assert compiled.shared <= SHARED_LIMIT[80]


@pytest.mark.parametrize("name", ["sum_rows", "conv_combine"])
def test_reductions_compile(name, tmp_path):
    for architecture in ARCHITECTURES:
        assert not conv_compiling.compile_reduce(name, architecture, tmp_path).spills


def test_a_tile_is_chosen_by_the_layer_and_not_wider_than_it():
    cpu = torch.device("cpu")
    for kind in configs.KINDS:
        small = configs.direct_config(kind, cpu, Og=8, Cg=3, taps=9, T=20)
        assert small.BLOCK_O == 16 and small.BLOCK_R >= 16 and small.BLOCK_T == (16 if kind == "ieee" else 32)
        assert configs.direct_config(kind, cpu, 256, 256, 9, 196).BLOCK_O >= 64
        assert (
            configs.output_config(kind, cpu, 64, 64, 9, 49)[:2]
            == configs.choose("products", "sm80", kind, 64, 49, 64)[:2]
        )
        assert configs.input_config(kind, cpu, 512, 20, 49).BLOCK_C == 32
    for table in (configs.DIRECT, configs.PRODUCTS):
        assert all(rows[-1][:2] == (None, None) for rows in table.values())
        families = [configs.family_name(c) for c in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))]
        assert table.keys() == set(itertools.product(families, configs.KINDS))


def test_kinds_of_products(monkeypatch):
    matmul = SimpleNamespace(fp32_precision="none")
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    kinds = {
        d: (configs.direct_kind(d), configs.product_kind(d)) for d in (torch.float32, torch.float16, torch.bfloat16)
    }
    assert kinds == {
        torch.float32: ("ieee", "ieee"),
        torch.float16: ("half", "tf32"),
        torch.bfloat16: ("half", "half"),
    }
    matmul.fp32_precision = "tf32"
    assert configs.direct_kind(torch.float32) == configs.product_kind(torch.float32) == "tf32"
