"""A slice of the tests under sanitizers, which find what is put before them; all of it is ``make sanitize``."""

import subprocess
import sys

import pytest

from . import sanitize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or sanitize.COMPILER is None, reason="needs g++ and glibc"),
]

FAULTS = {
    "address": [
        ("library.past_the_end(t.data_ptr(), 64)", "heap-buffer-overflow"),
        ("library.overflowing(2**31 - 1)", "signed integer overflow"),
    ],
    "thread": [("library.racing()", "data race")],
}
PROGRAM = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
library.past_the_end.argtypes = [ctypes.c_void_p, ctypes.c_int64]
t = torch.ones(64)
{fault}
"""


@pytest.mark.parametrize("kind", sanitize.SANITIZERS)
def test_sanitizers_find_nothing_in_a_slice_and_each_fault_that_is_there(kind, tmp_path):
    sanitize.build(tmp_path, kind, every_isa=False)
    assert sanitize.tested(tmp_path, kind, sanitize.SLICES[kind], every_isa=False) == 0
    source, library = tmp_path / "tests/trust/faults.cpp", tmp_path / "faults.so"
    own = [f"-fsanitize={sanitize.SANITIZERS[kind]}", "-fno-sanitize-recover=all"]
    sanitize.run(sanitize.COMPILER, *sanitize.FLAGS, *own, "-shared", source, "-o", library)
    for fault, message in FAULTS[kind]:
        command = sanitize.command(kind, "-c", PROGRAM.format(fault=fault), library)
        found = subprocess.run(command, capture_output=True, text=True, env=sanitize.environment(tmp_path, kind))
        assert found.returncode != 0 and message in found.stderr, found.stderr
