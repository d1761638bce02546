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


def interpret_ops(calls: Sequence[tuple[str, list]], folder: Path, **settings) -> list:
    """Results of `backends.triton`'s functions (name, arguments); ``module__NAME=value`` sets constants of the kernels.

    The module ``planning`` is bootgrad's own.
    """
    torch.save((list(calls), settings), folder / "calls.pt")
    run_interpreted("-m", __name__, str(folder))
    return torch.load(folder / "op_results.pt")


def run_interpreted(*arguments: str) -> str:
    """Output of Python under the interpreter, from the root of the checkout, without the compiled libraries."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "BOOTGRAD_BACKEND": "eager", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _main(stem: str, folder: Path) -> None:
    torch.use_deterministic_algorithms(True)  # with this torch.empty is filled with NaN
    assert torch.empty(1).isnan().all()
    launcher = getattr(load_kernel(stem), stem)
    torch.save([launcher(*case) for case in torch.load(folder / "cases.pt")], folder / "results.pt")


def _ops_main(folder: Path) -> None:
    torch.use_deterministic_algorithms(True)
    load_kernel("layer")
    from bootgrad import planning
    from bootgrad.ops.backends import triton

    calls, settings = torch.load(folder / "calls.pt")
    for name, value in settings.items():
        module, constant = name.split("__")
        setattr(planning if module == "planning" else load_kernel(module), constant, value)
    torch.save([getattr(triton, name)(*arguments) for name, arguments in calls], folder / "op_results.pt")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _ops_main(Path(sys.argv[1]))
    else:
        _main(sys.argv[1], Path(sys.argv[2]))
