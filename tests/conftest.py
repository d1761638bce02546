"""Settings of all tests."""

import gc
import os

import pytest
import torch

from . import proved

# The tensors are small: one thread is quicker than two, and far quicker where other processes want the cores, too.
torch.set_num_threads(1)
# Triton 3.9 warns, which fails tests, where this is unset; 1 is its default and what earlier versions do.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def pytest_collection_modifyitems(config, items):
    """Leave out what has been shown already."""
    items[:], left = proved.select(items, proved.is_forced())
    config.hook.pytest_deselected(items=left)


@pytest.fixture
def no_collector():
    """No cyclic garbage is collected during the test, and all is imported and cached before."""
    from .alive import warm

    warm()
    gc.disable()
    yield
    gc.enable()
