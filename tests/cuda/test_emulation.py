"""The emulation of CUDA on the CPU computes what CUDA would, and its sanitizers find what tests on a GPU would miss."""

import subprocess

import pytest

from .toolchain import build_emulated, needs_cxx20, run

STEM = "emulation_faults"


@needs_cxx20("address")
def test_block_sum_is_exact_and_bad_accesses_are_found(tmp_path):
    program = build_emulated(STEM, "address", tmp_path)
    sums = [sum(range(64))] * 64 + [sum(range(64, 128))] * 64
    assert list(map(float, run([program, "sum"]).split())) == sums
    for fault, report in (("overrun", "heap-buffer-overflow"), ("misaligned", "misaligned address")):
        done = subprocess.run([program, fault], capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert report in done.stderr


@pytest.mark.slow
@needs_cxx20("thread")
def test_missing_syncthreads_is_found(tmp_path):
    program = build_emulated(STEM, "thread", tmp_path)
    assert float(run([program, "sum"]).split()[0]) == sum(range(64))
    done = subprocess.run([program, "race"], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "data race" in done.stderr
    assert "block_sum" in done.stderr
