"""Freed memory: kept where penalties are trained with, left to the system where somebody says so."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch, bootgrad
from bootgrad.heap import keep_freed_memory

model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Tanh(), torch.nn.Conv2d(32, 32, 3), torch.nn.Flatten())
reg = bootgrad.GradientRegularizer(model, reg1=0.1)
faults = []
for _ in range(8):
    model.zero_grad()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    reg.backward(lambda x: model(x).square().mean(1), torch.randn(32, 3, 28, 28))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(keep_freed_memory(), sorted(faults[3:])[2])
"""


def run(**variables: str) -> tuple[str, int]:
    """Whether memory is kept, and how many pages a step takes from the system once all has happened before."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD", "BOOTGRAD_"))}
    command = [sys.executable, "-c", PROGRAM]
    kept, faults = subprocess.run(
        command, check=True, env=clean | {"OMP_NUM_THREADS": "1"} | variables, capture_output=True, text=True
    ).stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_step_takes_no_memory_that_the_step_before_it_had():
    kept, faults = run()
    assert kept == "True"
    assert faults < 500  # of 2 to 3 MiB for each of several activations


@pytest.mark.parametrize(
    "variables",
    [
        {"BOOTGRAD_KEEP_HEAP": "0"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=4"},
    ],
)
def test_who_says_so_keeps_the_heap_as_it_is(variables):
    assert run(**variables)[0] == "False"
