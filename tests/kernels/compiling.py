"""Triton kernels compiled for GPUs that are not there: the PTX, and what the assembler says of the machine code."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
# Shared memory that a block may take: NVIDIA, CUDA C++ Programming Guide, table of technical specifications.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass
class Compiled:
    """A kernel for one architecture: its PTX, bytes of shared memory, bytes of registers spilled to the stack."""

    ptx: str
    shared: int
    stack: int

    def global_loads(self) -> set[str]:
        """The distinct instructions that load from global memory."""
        return set(re.findall(r"ld\.global[\w.:]*", self.ptx))


def cross_compile(kernel, arguments: dict, architecture: int, num_warps: int, folder: Path, divisible=()) -> Compiled:
    """Compile ``kernel`` with one entry per parameter in ``arguments``: a type's name, or a value that is constant.

    Args:
        kernel: what ``triton.jit`` returned.
        arguments: parameter → "*bf16", "i64", … or a number.
        architecture: compute capability, 90 for sm_90.
        num_warps: warps of a program.
        folder: where the machine code may be written.
        divisible: parameters known to be multiples of 16, as Triton finds out for itself when it launches.
    """
    assert list(arguments) == kernel.arg_names
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else value for name, value in arguments.items()},
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": num_warps})
    cubin = folder / f"{kernel.__name__}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([cuobjdump, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    return Compiled(compiled.asm["ptx"], compiled.metadata.shared, usage["STACK"] + usage["LOCAL"])
