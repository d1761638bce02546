"""Arguments with which the kernels of convolutions are compiled for GPUs that are not there: as launchers would pass them."""

from pathlib import Path

import torch
import triton.language as tl

from .compiling import Compiled, cross_compile
from .loading import load_kernel

POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
LAYOUTS = ("channels first", "channels last")
SPACE = (1, "i32", "i32")
DIVISIBLE_POINTERS = ("x_ptr", "gy_ptr", "center_ptr", "rows_ptr", "out_ptr", "total_ptr", "norms_ptr", "deviation_ptr")


def layer(layout: str, dims: int = 2, names: tuple[str, ...] = ("x_strides", "gy_strides", "out_strides")) -> dict:
    """A 3×3 convolution with padding and stride 1, or with ``dims`` 1 a linear layer; and what divides by 16."""
    last = layout == "channels last"
    if dims == 1:
        strides = ("i32", 1, 0, 0, "i32") if last else ("i32", "i32", 0, 0, 1)
        space, kernel, padding, size = (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, "i32")
    else:
        strides = ("i32", 1, 0, "i32", "i32") if last else ("i32", "i32", 0, "i32", 1)
        space, kernel, padding, size = (1, 1, 1), (1, "i32", "i32"), (0, 1, 1), (1, "i32", "i32")
    geometry = {"S": size, "P": size, "kernel": kernel, "stride": space, "padding": padding, "dilation": space}
    return geometry | {name: strides for name in names}


def compile_rows(config, dtype, architecture: int, folder: Path, layout: str, dims=2, precision="ieee", **flags):
    """`conv_rows_kernel` with everything that a first-order visit asks for."""
    kernel = load_kernel("conv_direct").conv_rows_kernel
    given = layer(layout, dims) | {
        "x_ptr": POINTER[dtype],
        "gy_ptr": POINTER[dtype],
        "center_ptr": "*fp32",
        "w_ptr": None,
        "norms_ptr": "*fp32",
        "deviation_ptr": "*fp32",
        "rows_ptr": None,
        "total_ptr": "*fp32",
        **{name: "i32" for name in ("Cg", "Og", "T", "units", "per_run", "segment")},
        "groups": 1,
        "segments": 1,
        "DIMS": dims,
        "PADDED": 6 if dims == 2 else 0,
        "ONE_TAP": True,
        "INDEX": tl.int32,
        "PRECISION": tl.constexpr(precision),
        **config._asdict(),
        **flags,
    }
    return _compile(kernel, given, config, architecture, folder, layout)


def compile_output(config, dtype, architecture: int, folder: Path, layout: str, dims=2, precision="ieee", **flags):
    """`conv_output_kernel` with a weight for each sample, of the type in which they are stored."""
    kernel = load_kernel("conv_products").conv_output_kernel
    given = layer(layout, dims) | {
        "x_ptr": POINTER[dtype],
        "gy_ptr": POINTER[dtype],
        "rows_ptr": POINTER[dtype] if dtype == torch.bfloat16 else "*fp32",
        "out_ptr": POINTER[dtype],
        "dots_ptr": None,
        **{name: "i32" for name in ("Cg", "Og", "T", "stride_wb", "tiles", "blocks_r")},
        "groups": 1,
        "factor": "fp32",
        "ADD": False,
        "DIMS": dims,
        "PADDED": 6 if dims == 2 else 0,
        "ONE_TAP": True,
        "INDEX": tl.int32,
        "PRECISION": tl.constexpr(precision),
        **config._asdict(),
        **flags,
    }
    return _compile(kernel, given, config, architecture, folder, layout)


def compile_input(config, dtype, architecture: int, folder: Path, layout: str, dims=2, precision="ieee", **flags):
    """`conv_input_kernel` with a weight for each sample, of the type in which they are stored."""
    kernel = load_kernel("conv_products").conv_input_kernel
    given = layer(layout, dims) | {
        "gy_ptr": POINTER[dtype],
        "rows_ptr": POINTER[dtype] if dtype == torch.bfloat16 else "*fp32",
        "out_ptr": POINTER[dtype],
        **{name: "i32" for name in ("Cg", "Og", "stride_wb", "tiles")},
        "M": (1, "i32", "i32") if dims == 2 else (1, 1, "i32"),
        "phase_step": (1, 1, 1),
        "groups": 1,
        "factor": "fp32",
        "ADD": False,
        "DIMS": dims,
        "INDEX": tl.int32,
        "PRECISION": tl.constexpr(precision),
        **config._asdict(),
        **flags,
    }
    return _compile(kernel, given, config, architecture, folder, layout)


def compile_narrow(name: str, dtype, architecture: int, folder: Path, layout: str, **flags) -> Compiled:
    """``conv_narrow_<name>_kernel``, "rows", "output" or "input", of a depthwise 3×3 convolution."""
    module = load_kernel("conv_narrow")
    kernel = getattr(module, f"conv_narrow_{name}_kernel")
    whole = ("x_ptr", "gy_ptr", "out_ptr")
    wide = ("rows_ptr", "center_ptr", "norms_ptr", "deviation_ptr", "total_ptr")
    given = layer(layout) | {
        **dict.fromkeys(whole, POINTER[dtype]),
        **dict.fromkeys(wide, "*fp32"),
        "w_ptr": None,
        "dots_ptr": "*fp32",
        **dict.fromkeys(("L", "O", "C", "T", "units", "per_run", "segment", "stride_wb", "tiles"), "i32"),
        **dict.fromkeys(("Cg", "Og", "segments"), 1),
        "M": (1, "i32", "i32"),
        "phase_step": (1, 1, 1),
        "factor": "fp32",
        "ADD": False,
        "DIMS": 2,
        "PADDED": 6,
        "INDEX": tl.int32,
        "BLOCK_K": 16,
        "BLOCK_L": module.BLOCK_L,
        "BLOCK_O": module.BLOCK_C,
        "BLOCK_C": module.BLOCK_C,
        "BLOCK_T": module.BLOCK_T,
        **flags,
    }
    warps = module.ROWS_WARPS if name == "rows" else 4
    return _compile(kernel, given, None, architecture, folder, layout, warps)


def compile_reduce(name: str, architecture: int, folder: Path) -> Compiled:
    """``sum_rows`` or ``conv_combine``."""
    module = load_kernel("conv_reduce")
    kernel = getattr(module, f"{name}_kernel")
    given = {n: "*fp32" for n in kernel.arg_names if n.endswith("_ptr")}
    given |= {n: "i32" for n in ("B", "N", "E", "per_run", "segments")}
    given |= {"BLOCK_E": module.BLOCK_E, "BLOCK_B": 8, "BLOCK_N": 128}
    return _compile(kernel, given, None, architecture, folder, "channels first")


def _compile(kernel, given, config, architecture, folder, layout, warps=4) -> Compiled:
    given = {name: given[name] for name in kernel.arg_names}
    divisible = [n for n in (*DIVISIBLE_POINTERS, "Cg", "Og", "stride_wb") if isinstance(given.get(n), str)]
    for name in ("x_strides", "gy_strides", "out_strides"):
        if name in given:
            divisible += [(name, i) for i, v in enumerate(given[name]) if isinstance(v, str)]
    options = {} if config is None else {"num_stages": config.num_stages}
    warps = warps if config is None else config.num_warps
    return cross_compile(kernel, given, architecture, warps, folder, divisible, **options)
