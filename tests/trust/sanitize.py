"""The CPU library under sanitizers, inside of Python: torch's tensors, the ops' registration, and tests of all that calls it.

The library is built in a folder of its own, beside a copy of the sources, and tests run there with the sanitizers' runtime
loaded first. What is instrumented is this library alone: of torch and Python are seen the memory that they allocate, threads
that they start, and locks.

    address    AddressSanitizer and UndefinedBehaviorSanitizer: accesses outside of tensors, or after their end; overflow
    thread     ThreadSanitizer. Torch's threads are those of GNU's OpenMP, whose barriers it does not see: in their place come
               threads that are started and joined for each parallel region, by `threads.cpp`

    python -m tests.trust.sanitize [address] [thread] [-- arguments of pytest]
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.utils.cpp_extension as cpp

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")
COPIED = ("bootgrad", "kernels", "tests", "pyproject.toml")
FLAGS = "-std=c++17 -O1 -g1 -fno-omit-frame-pointer -fPIC -ffp-contract=fast -fvisibility=hidden -Wno-psabi -DNDEBUG".split()
WIDE = ("kernels_avx2", "kernels_avx512")
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
OPTIONS = {
    # Python and torch end without giving all back. What is freed otherwise than it was allocated is torch's.
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:detect_odr_violation=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "2",
    },
    "thread": {
        "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:report_signal_unsafe=0:exitcode=66",
        "OMP_NUM_THREADS": "3",
        "MKL_NUM_THREADS": "1",
    },
}
# What calls the library most: the raw ops, each with every dtype, path and layout, and steps that go through all of it.
TESTS = {
    "address": ["tests/trust/test_op_rows.py", "tests/ops", "tests/rules", "tests/test_quantities.py"],
    "thread": ["tests/trust/test_several_threads.py", "tests/ops/test_conv3x3.py", "tests/ops/test_raw_ops.py"],
}
# There AddressSanitizer ends the process, and nothing is thrown.
NOT_ENOUGH_MEMORY = "tests/ops/test_raw_ops.py::test_memory_that_there_is_not_is_said_to_be_missing[compiled]"
SLICES = {
    "address": ["tests/trust/test_op_rows.py", "-k", "row"],
    "thread": ["tests/trust/test_several_threads.py"],
}


def build(folder: Path, kind: str, every_isa: bool = True) -> None:
    """Copy the sources there, and put the instrumented library among them.

    Where not ``every_isa`` is wanted, kernels for wide vectors, which take minutes to instrument, are compiled as they are: it
    runs with ``BOOTGRAD_ISA=baseline``.
    """
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, folder / name)
    plain = [*FLAGS, f"-I{ROOT / 'csrc/include'}", *(f"-I{path}" for path in cpp.include_paths())]
    plain.append("-DTORCH_TARGET_VERSION=0x020b000000000000")
    flags = [*plain, f"-fsanitize={SANITIZERS[kind]}", "-fno-sanitize-recover=all"]
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))

    def compiled_alike(source: Path) -> Path:
        return compiled(source, folder, plain if source.stem in WIDE and not every_isa else flags)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled_alike, sources))
    libraries = [f"-L{path}" for path in cpp.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    target = folder / "bootgrad/_C.so"
    run(COMPILER, "-shared", f"-fsanitize={SANITIZERS[kind]}", *objects, *libraries, "-o", target)
    if kind == "thread":
        threads = Path(__file__).with_name("threads.cpp")
        run(
            COMPILER,
            *FLAGS[:-1],
            "-fvisibility=default",
            "-shared",
            "-fsanitize=thread",
            threads,
            "-o",
            folder / "threads.so",
        )


def compiled(source: Path, folder: Path, flags: Sequence[str]) -> Path:
    """The object file of a source, through a cache where there is one."""
    target = folder / f"{source.stem}.o"
    run(*filter(None, [shutil.which("ccache")]), COMPILER, "-c", *flags, source, "-o", target)
    return target


def run(*command: object) -> None:
    """A command, whose output is shown where it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def environment(folder: Path, kind: str, every_isa: bool = True) -> dict[str, str]:
    """In which Python loads the sanitizers before all else."""
    names = {"address": ["libasan.so", "libubsan.so", "libstdc++.so.6"], "thread": ["libtsan.so", "libstdc++.so.6"]}[
        kind
    ]
    found = [
        subprocess.run([COMPILER, f"-print-file-name={n}"], capture_output=True, text=True).stdout.strip()
        for n in names
    ]
    if kind == "thread":
        found.append(str(folder / "threads.so"))
    isa = {} if every_isa else {"BOOTGRAD_ISA": "baseline"}
    return {**os.environ, **OPTIONS[kind], **isa, "LD_PRELOAD": ":".join(found), "PYTHONPATH": str(folder)}


def command(kind: str, *arguments: object) -> list[str]:
    """Of Python; ThreadSanitizer's shadow memory wants addresses where they are without randomization."""
    before = ["setarch", platform.machine(), "--addr-no-randomize"] if kind == "thread" else []
    return [*before, sys.executable, *map(str, arguments)]


def tested(folder: Path, kind: str, arguments: Sequence[str], every_isa: bool = True) -> int:
    """Run tests of what was built there, with stderr as it is, for reports; the exit code of pytest, or of the sanitizer."""
    options = ["-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    options += ["--deselect", NOT_ENOUGH_MEMORY]
    run_tests = command(kind, "-m", "pytest", *options, *arguments)
    return subprocess.run(run_tests, cwd=folder, env=environment(folder, kind, every_isa)).returncode


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.trust.sanitize", description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(SANITIZERS), help="address, thread; both by default")
    parser.add_argument("--slice", action="store_true", help="a part of the tests, in a minute")
    own, rest = sys.argv[1:], []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), kind, not options.slice)
            code = tested(Path(folder), kind, rest or (SLICES if options.slice else TESTS)[kind], not options.slice)
        print(f"{kind}: {'nothing was found' if code == 0 else f'exit code {code}'}", flush=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
