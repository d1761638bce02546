"""Triton kernels compiled for GPUs that are not there: the PTX, and what the assembler says of the machine code."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..resources import note

ARCHITECTURES = (80, 90, 100)
# Shared memory that a block may take: NVIDIA, CUDA C++ Programming Guide, table of technical specifications. Of the
# family of sm_80, which has 163 KiB itself, the least: that of 8.6, 8.9 and 12.x.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

# The assembler parks up to this many bytes on the stack in order to let one more program run at 64, 80, 96, 128 or 168
# registers, by its own choice, which changes with its version; where registers do not suffice it is hundreds.
PARKED = 48


@dataclass
class Compiled:
    """A kernel for one architecture: its PTX, bytes of shared memory, registers, bytes of them spilled to the stack."""

    ptx: str
    shared: int
    registers: int
    stack: int

    @property
    def spills(self) -> bool:
        """Whether its registers do not suffice."""
        return self.stack > PARKED

    def global_loads(self) -> set[str]:
        """The distinct instructions that load from global memory."""
        return set(re.findall(r"ld\.global[\w.:]*", self.ptx))


def cross_compile(
    kernel, arguments: dict, architecture: int, num_warps: int, folder: Path, divisible=(), **options
) -> Compiled:
    """Compile ``kernel`` with one entry per parameter in ``arguments``: a type's name, or a value that is constant.

    Args:
        kernel: what ``triton.jit`` returned.
        arguments: parameter → "*bf16", "i64", … or what is constant, a number,
            None, or a string as `tl.constexpr`; tuples of these for tuples.
        architecture: compute capability, 90 for sm_90.
        num_warps: warps of a program.
        folder: where the machine code may be written.
        divisible: parameters known to be multiples of 16, as Triton finds out for itself when it launches; (name, n) is
            the n-th of a tuple.
        options: of the compiler, ``num_stages``.
    """
    assert list(arguments) == kernel.arg_names
    signature, constants = {}, {}
    for index, (name, value) in enumerate(arguments.items()):
        parts = {(index, i): v for i, v in enumerate(value)} if isinstance(value, tuple) else {(index,): value}
        constants |= {path: getattr(v, "value", v) for path, v in parts.items() if not isinstance(v, str)}
        types = tuple("constexpr" if path in constants else v for path, v in parts.items())
        signature[name] = types if isinstance(value, tuple) else types[0]
    paths = [
        (kernel.arg_names.index(n), *rest) for n, *rest in (d if isinstance(d, tuple) else (d,) for d in divisible)
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={path: [["tt.divisibility", 16]] for path in paths},
    )
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps, **options})
    cubin = folder / f"{kernel.__name__}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([cuobjdump, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    out = Compiled(compiled.asm["ptx"], compiled.metadata.shared, usage["REG"], usage["STACK"] + usage["LOCAL"])
    pointers = (
        t[1:] for types in signature.values() for t in ([types] if isinstance(types, str) else types) if "*" in t
    )
    note(kernel.__name__, next(pointers), architecture, out.registers, out.shared, out.stack)
    return out
