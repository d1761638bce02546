"""The built libraries: on torch's stable ABI, for every torch from the oldest one on, and free of Python."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch_abi_audit import inspect_package

from bootgrad.ops import library

ROOT = Path(__file__).parents[2]
BUILT = [info.path for info in library.build_info() if info.built]


def oldest_torch():
    found = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return tuple(map(int, found.groups()))


@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.name)
def test_a_library_asks_for_no_more_than_the_oldest_torch(path):
    package = inspect_package(str(path))
    assert [Path(b.path).name for b in package.bundled_libs] == [path.name] and not package.extensions
    (audited,) = package.bundled_libs
    assert audited.error is None and audited.torch.uses_torch and audited.torch.stable
    assert not audited.torch.unstable_symbols and not audited.torch.unknown_shim_symbols
    version = tuple(map(int, audited.torch.min_torch_version.split(".")[:2]))
    assert version <= oldest_torch()


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.name)
def test_a_library_knows_nothing_of_python(path):
    symbols = subprocess.run(["nm", "--dynamic", path], capture_output=True, text=True, check=True).stdout.split()
    assert "torch_library_impl" in symbols or any(name.startswith("torch_") for name in symbols)
    assert [name for name in symbols if re.match(r"_?Py[A-Z_]", name)] == []
