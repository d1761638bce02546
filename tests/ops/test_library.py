"""Loading the compiled libraries: which are used, what is said when they are not."""

import os
import subprocess
import sys

import pytest
import torch

from bootgrad.errors import ArgumentError, BootgradWarning
from bootgrad.ops import library


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The module as before its first load, and looking for libraries in an empty folder."""
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    monkeypatch.setattr(library, "_loaded", set())
    monkeypatch.setattr(library, "_failures", {})
    monkeypatch.delenv("BOOTGRAD_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def reasons():
    return {info.name: info.reason for info in library.build_info()}


def test_a_missing_library_is_warned_of_once(fresh):
    with pytest.warns(BootgradWarning, match=r"_C is not used.*it was not built") as seen:
        library.load()
        library.load()
    assert len(seen) == 1
    assert reasons() == {"_C": "not built", "_C_cuda": "not built"}
    assert [info.loaded for info in library.build_info()] == [False, False]


def test_eager_loads_nothing_and_says_nothing(fresh, monkeypatch):
    (fresh / "_C.so").write_bytes(b"not a library")
    monkeypatch.setenv("BOOTGRAD_BACKEND", "eager")
    library.load()
    info = library.build_info()[0]
    assert (info.built, info.loaded, info.isa, info.reason) == (True, False, "", "BOOTGRAD_BACKEND=eager")


def test_a_library_that_does_not_load_is_reported_with_torchs_version(fresh):
    (fresh / "_C.so").write_bytes(b"not a library")
    with pytest.warns(BootgradWarning, match="does not load with torch"):
        library.load()
    assert torch.__version__ in reasons()["_C"]


def test_the_cuda_library_waits_for_a_device(fresh):
    (fresh / "_C_cuda.so").write_bytes(b"not a library")
    with pytest.warns(BootgradWarning, match="_C is not used"):
        library.load()
    assert reasons()["_C_cuda"] == "torch sees no CUDA device"


def test_an_unknown_backend_is_refused(fresh, monkeypatch):
    monkeypatch.setenv("BOOTGRAD_BACKEND", "fast")
    with pytest.raises(ArgumentError, match="BOOTGRAD_BACKEND must be one of auto, eager.*got 'fast'"):
        library.load()


def test_what_is_loaded_computes_with_the_instruction_set_it_names():
    info = library.build_info()[0]
    if not info.loaded:
        pytest.skip("the CPU library is not loaded here")
    assert info.isa in ("avx512", "avx2", "baseline")
    code = (
        "import torch, bootgrad\n"
        "from bootgrad.ops.library import build_info\n"
        "x, gy = torch.arange(12.0).reshape(2, 6), torch.ones(2, 4)\n"
        "print(build_info()[0].isa, torch.ops.bootgrad.linear_rank1_sq_norms(x, gy).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "BOOTGRAD_ISA": "baseline"}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("baseline [220.0, 1804.0]\n", "")  # 4 · Σ n², n = 0 … 5 and 6 … 11
