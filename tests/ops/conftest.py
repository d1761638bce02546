"""Backends, poisoned memory and the number of drawn examples, for the tests of the raw ops."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

import bootgrad.ops  # noqa: F401 — registers and loads the backends
from bootgrad.ops import schema
from bootgrad.ops.backends import eager

_COMMON = dict(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.register_profile("quick", max_examples=12, **_COMMON)
settings.register_profile("thorough", max_examples=300, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


class Backend:
    """The raw ops as one backend implements them."""

    def __init__(self, name: str):
        self.name = name

    def op(self, name: str):
        """The function behind an op; skips a test of an op that the backend leaves to another."""
        if self.name == "eager":
            return getattr(eager, name)
        if name not in COMPILED:
            pytest.skip(f"{name} has no compiled kernel")
        return getattr(torch.ops.bootgrad, name)


# Where the library of compiled kernels is loaded, the dispatcher finds them before the eager ones.
COMPILED = [
    name
    for name in schema.SCHEMAS
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{schema.NAMESPACE}::{name}", "CPU")
]


@pytest.fixture(params=["eager", "compiled"] if COMPILED else ["eager"])
def backend(request) -> Backend:
    """Each backend in turn; the compiled one where its library is loaded."""
    return Backend(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what `torch.empty` returns with NaN, so that an unwritten result fails."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
