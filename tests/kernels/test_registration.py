"""Which implementation a GPU runs: ``BOOTGRAD_BACKEND``, the dtype, what is installed, and what the card can do."""

import inspect
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from bootgrad.errors import ArgumentError, BootgradWarning
from bootgrad.ops import library, schema
from bootgrad.ops.backends import eager, gpu
from bootgrad.ops.backends import triton as backend

from .interpreter import run_interpreted
from .loading import load_kernels

OPS = tuple(schema.SCHEMAS)
CARD = torch.device("cuda", 0)


@pytest.fixture
def registered(monkeypatch):
    """(op, implementation, dispatch key) of every registration, none of which reaches torch."""
    calls = []
    double = SimpleNamespace(**vars(schema), impl=None)
    double.library = SimpleNamespace(impl=lambda *call: calls.append(call))
    monkeypatch.setattr(gpu, "schema", double)
    monkeypatch.setattr(gpu, "has_cuda_kernel", lambda namespace, name: False)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    return calls


@pytest.fixture
def machine(monkeypatch):
    """A machine with a card of Hopper's, both libraries, and no call yet: a namespace to change."""
    has = SimpleNamespace(cuda=OPS, triton=OPS, reason="", capability=(9, 0))
    monkeypatch.setattr(
        gpu, "has_cuda_kernel", lambda namespace, name: namespace == "bootgrad_cuda" and name in has.cuda
    )
    monkeypatch.setattr(gpu, "_has_launcher", lambda name, path: name in has.triton)
    monkeypatch.setattr(gpu, "triton_reason", lambda: has.reason)
    monkeypatch.setattr(gpu, "card_reason", gpu.card_reason.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has.capability)
    monkeypatch.setattr(gpu, "_warned", set())
    gpu._function.cache_clear()
    yield has
    gpu._function.cache_clear()


def chosen(name="conv_sq_norms", dtype=torch.bfloat16, asked="auto"):
    return gpu.choose(name, dtype, "direct", asked, CARD)


@pytest.mark.parametrize("name", ["auto", "triton", "cuda"])
def test_every_op_is_registered_once_for_gpus(registered, name):
    assert gpu.register(name) == OPS
    assert [(op, key) for op, _, key in registered] == [(op, "CUDA") for op in OPS]


def test_eager_registers_nothing_and_what_is_registered_stays(registered, monkeypatch):
    assert gpu.register("eager") == ()
    monkeypatch.setattr(gpu, "has_cuda_kernel", lambda namespace, name: (namespace, name) == ("bootgrad", OPS[0]))
    assert gpu.register("auto") == OPS[1:]
    assert len(registered) == len(OPS) - 1


def test_forcing_triton_needs_triton(registered, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match="needs the package triton"):
        gpu.register("triton")
    assert gpu.register("auto") == OPS  # the first call says what is missing


@pytest.mark.parametrize(
    ("name", "dtype", "asked", "expected"),
    [
        ("conv_sq_norms", torch.bfloat16, "auto", "triton"),
        ("linear_rank1_sq_norms", torch.float32, "auto", "cuda"),
        ("linear_jvp", torch.float64, "auto", "cuda"),
        ("linear_jvp", torch.float64, "triton", "eager"),
        ("linear_jvp", torch.float16, "cuda", "cuda"),
        ("linear_rank1_sq_norms", torch.float16, "triton", "triton"),
    ],
)
def test_the_table_chooses(machine, name, dtype, asked, expected):
    assert chosen(name, dtype, asked) == expected


def test_what_is_not_there_is_passed_over(machine):
    machine.cuda = ("conv_sq_norms",)
    assert chosen("conv_jvp", torch.float64) == "eager"
    assert chosen("linear_rank1_sq_norms") == "triton"
    assert chosen("conv_jvp", asked="cuda") == "eager"
    machine.triton = ()
    assert (chosen(), chosen("conv_jvp")) == ("cuda", "eager")


def test_a_triton_that_cannot_be_used_is_warned_of_once(machine):
    machine.reason = "Triton does not start"
    machine.cuda = ("conv_sq_norms",)
    with pytest.warns(BootgradWarning, match="run on the compiled CUDA library: Triton does not start") as caught:
        assert chosen() == "cuda"
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen("conv_jvp") == "eager"
        assert chosen("linear_jvp", torch.float64) == "eager"


def test_a_card_that_is_too_old_runs_plain_torch(machine):
    """The compiled library has no kernel for it either."""
    machine.capability = (7, 5)
    with pytest.warns(BootgradWarning, match="s kernels are not used, .* plain torch, .*: Old Card has .* 7.5, .* 8.0"):
        assert chosen() == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {chosen(name, dtype) for name in OPS for dtype in (torch.float32, torch.float64)} == {"eager"}
        assert chosen(asked="triton") == "eager"
    with pytest.raises(ArgumentError, match="BOOTGRAD_BACKEND=cuda cannot run conv_sq_norms: Old Card has"):
        chosen(asked="cuda")


def test_reasons_name_the_import_and_the_version(monkeypatch):
    load_kernels()
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.5.1+cu13"))
    assert gpu.triton_reason.__wrapped__().startswith("they need Triton 3.6 or newer, and 3.5.1+cu13 is installed")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton cannot be imported" in gpu.triton_reason.__wrapped__()


def test_triton_may_be_of_version_3_10(monkeypatch):
    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))
    double = SimpleNamespace(__version__="3.10.0", runtime=SimpleNamespace(driver=driver))
    load_kernels()
    monkeypatch.setitem(sys.modules, "triton", double)
    assert gpu.triton_reason.__wrapped__() == ""


def test_the_chosen_function_gets_the_arguments(machine, monkeypatch):
    seen = []
    for module, label in ((backend, "triton"), (eager, "eager")):
        monkeypatch.setattr(module, "linear_sq_norms", lambda *arguments, label=label: seen.append((label, arguments)))
    run = gpu.implementation("linear_sq_norms", "auto")
    x = torch.ones(2, 3, 4)
    run(x, x, "gram")
    machine.cuda = ()
    gpu._function.cache_clear()
    run(x.double(), x, "direct")
    assert [(label, arguments[2]) for label, arguments in seen] == [("triton", "gram"), ("eager", "direct")]
    assert seen[0][1][0] is x


def test_description(machine, monkeypatch):
    monkeypatch.setattr(library, "backend", lambda: "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert set(gpu.describe()["conv_jvp"].values()) == {"eager"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = gpu.describe()
    assert found.keys() == schema.SCHEMAS.keys()
    assert found["conv_jvp"] == {"float32": "triton", "bfloat16": "triton", "float16": "triton", "float64": "cuda"}
    machine.reason, machine.cuda = "none", ()
    assert set(gpu.describe()["conv_jvp"].values()) == {"eager"}
    with pytest.warns(BootgradWarning):  # describing is not what was warned of
        chosen()


def test_every_op_has_a_launcher_with_the_schema_s_arguments():
    load_kernels()
    for name in OPS:
        own = list(inspect.signature(getattr(backend, name)).parameters)
        assert own == list(inspect.signature(getattr(eager, name)).parameters)
        assert gpu._has_launcher.__wrapped__(name, "gram")


def test_the_namespace_of_the_cuda_library_has_the_same_schemas():
    for name in OPS:
        ours, theirs = (getattr(getattr(torch.ops, n), name).default._schema for n in ("bootgrad", "bootgrad_cuda"))
        assert str(ours).removeprefix("bootgrad::") == str(theirs).removeprefix("bootgrad_cuda::")


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
import os, sys, warnings
os.environ["BOOTGRAD_BACKEND"] = "auto"
sys.modules["triton"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bootgrad
print([str(w.message) for w in caught if "triton" in str(w.message).lower()])

import torch
from bootgrad.ops.backends import gpu
from tests.kernels.loading import load_kernels
op, cuda = torch.ops.bootgrad.linear_rank1_sq_norms.default, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
x, gy = torch.arange(6.).view(2, 3), torch.arange(8.).view(2, 4)
torch.cuda.get_device_capability = lambda device: (9, 0)
del sys.modules["triton"]
load_kernels()
gpu.triton_reason = lambda: "a reason"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(op.redispatch(cuda, x, gy).tolist(), [str(w.message).partition(": ")[2] for w in caught])
gpu._function.cache_clear()
gpu.triton_reason = lambda: ""
print(gpu.choose("linear_rank1_sq_norms", x.dtype, "", "auto", x.device), op.redispatch(cuda, x, gy).tolist())
"""


def test_bootgrad_imports_silently_without_triton_and_the_dispatcher_finds_the_launcher_with_it():
    pytest.importorskip("triton", reason="Triton is not installed")
    squares = [[0 + 1 + 4, 9 + 16 + 25], [0 + 1 + 4 + 9, 16 + 25 + 36 + 49]]
    expected = [float(a * b) for a, b in zip(*squares, strict=True)]
    silent, without, with_triton = run_interpreted("-c", DISPATCH).splitlines()
    assert (silent, without, with_triton) == ("[]", f"{expected} ['a reason']", f"triton {expected}")
