"""Which implementation a GPU runs: ``BOOTGRAD_BACKEND``, what is installed, and what is registered already."""

from types import SimpleNamespace

import pytest
import torch

from bootgrad.errors import ArgumentError
from bootgrad.ops.backends import triton as backend

from .interpreter import run_interpreted
from .loading import load_kernels

OPS = ("linear_rank1_sq_norms",)


@pytest.fixture
def registered(monkeypatch):
    """(op, implementation, dispatch key) of every registration, none of which reaches torch."""
    calls = []
    library = SimpleNamespace(impl=lambda *call: calls.append(call))
    monkeypatch.setattr(backend, "schema", SimpleNamespace(library=library, NAMESPACE="bootgrad"))
    monkeypatch.setattr(backend, "has_cuda_kernel", lambda name: False)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: name)
    return calls


@pytest.mark.parametrize(("name", "expected"), [("auto", OPS), ("triton", OPS), ("eager", ()), ("cuda", ())])
def test_backend_chooses(registered, name, expected):
    assert backend.register(name) == expected
    assert registered == [(op, getattr(backend, op), "CUDA") for op in expected]


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_what_is_registered_stays(registered, monkeypatch, name):
    monkeypatch.setattr(backend, "has_cuda_kernel", lambda name: name == "linear_rank1_sq_norms")
    assert backend.register(name) == ()
    assert registered == []


def test_without_triton_nothing_is_registered_and_nothing_said(registered, monkeypatch, recwarn):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None if name == "triton" else name)
    assert backend.register("auto") == ()
    assert (registered, list(recwarn)) == ([], [])
    with pytest.raises(ArgumentError, match="needs the package triton"):
        backend.register("triton")


def test_arguments_are_checked():
    pytest.importorskip("triton", reason="Triton is not installed")
    load_kernels()
    x, gy = torch.ones(2, 3), torch.ones(2, 4)
    for bad, message in (
        ((x[None], gy), r"must be \(B, I\)"),
        ((x, gy[:1]), "one batch size"),
        ((x, gy.half()), "one dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backend.linear_rank1_sq_norms(*bad)


# None in sys.modules is how Python says that a module is not there. With Triton back, the dispatcher is told to take
# the CUDA kernel for tensors of the CPU, which the interpreter can run.
DISPATCH = """
import sys, warnings
sys.modules["triton"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bootgrad
    from bootgrad.ops.backends import triton as backend
    registered = backend.register("auto")
said = [str(w.message) for w in caught if "triton" in str(w.message).lower()]
print(registered, backend.has_cuda_kernel("linear_rank1_sq_norms"), said)

import torch
from tests.kernels.loading import load_kernels
del sys.modules["triton"]
load_kernels()
registered = backend.register("auto")
op, cuda = torch.ops.bootgrad.linear_rank1_sq_norms.default, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
x, gy = torch.arange(6.).view(2, 3), torch.arange(8.).view(2, 4)
print(registered, backend.has_cuda_kernel("linear_rank1_sq_norms"), op.redispatch(cuda, x, gy).tolist())
"""


def test_bootgrad_is_silent_without_triton_and_the_dispatcher_finds_the_launcher_with_it():
    pytest.importorskip("triton", reason="Triton is not installed")
    squares = [[0 + 1 + 4, 9 + 16 + 25], [0 + 1 + 4 + 9, 16 + 25 + 36 + 49]]
    expected = [float(a * b) for a, b in zip(*squares, strict=True)]
    assert run_interpreted("-c", DISPATCH).splitlines() == ["() False []", f"{OPS} True {expected}"]
