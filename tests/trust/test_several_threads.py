"""Ops on several threads: the bits of their results are those that one thread makes, or differ by the order of sums alone.

Small enough for ThreadSanitizer to watch, and with as many tasks as threads.
"""

import pytest
import torch

from .op_calls import NAMES, argument_names, call, dtypes_of


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def enlarged(given):
    """The same call with more samples, so that there is work for each thread; of embeddings and lists as it is."""
    if given.name.startswith(("embedding", "sq_distances")):
        return given.values
    return {
        key: torch.cat([v] * 8) if isinstance(v, torch.Tensor) and v.dim() and v.size(0) == 5 else v
        for key, v in given.values.items()
    }


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (name, path)
        for name in NAMES
        for path in (("direct", "gram") if "path" in argument_names(name) else ("direct",))
    ],
)
def test_threads_make_what_one_makes(name, path):
    for dtype in dtypes_of(name)[:2]:
        for optional in (True, False):
            values, results = enlarged(call(name, dtype, path, optional)), []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found = getattr(torch.ops.bootgrad, name)(*values.values())
                results.append(found if isinstance(found, tuple) else (found,))
            for one, several in zip(*results, strict=True):
                torch.testing.assert_close(one, several, rtol=1e-5, atol=1e-5)
