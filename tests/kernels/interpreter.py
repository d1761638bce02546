"""Launchers on the CPU, in Triton's interpreter: in a process of its own, as TRITON_INTERPRET counts at import."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .loading import ROOT, load_kernel


def interpret(stem: str, cases: Sequence[tuple], folder: Path) -> list[Tensor]:
    """Results of the launcher ``stem`` on the arguments of every case; what it leaves unwritten is NaN."""
    torch.save(list(cases), folder / "cases.pt")
    run_interpreted("-m", __name__, stem, str(folder))
    return torch.load(folder / "results.pt")


def run_interpreted(*arguments: str) -> str:
    """Output of Python under the interpreter, from the root of the checkout, without the compiled libraries."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "BOOTGRAD_BACKEND": "eager", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _main(stem: str, folder: Path) -> None:
    torch.use_deterministic_algorithms(True)  # with this torch.empty is filled with NaN
    assert torch.empty(1).isnan().all()
    launcher = getattr(load_kernel(stem), stem)
    torch.save([launcher(*case) for case in torch.load(folder / "cases.pt")], folder / "results.pt")


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
