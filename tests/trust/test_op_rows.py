"""What is not a number, or too large or too small for one, stays in its own sample's rows; and ops lose no memory."""

import pytest
import torch
from torch import Tensor

from bootgrad.ops import library
from bootgrad.ops.backends import (
    eager,
    eager_applied,
    eager_attention,
    eager_convolution,
    eager_embedding,
    eager_norms,
    eager_pooling,
)

from ..memory import heap_bytes
from .op_calls import NAMES, B, argument_names, call, dtypes_of

EAGER = (eager, eager_applied, eager_attention, eager_convolution, eager_embedding, eager_norms, eager_pooling)
SPECIAL = [torch.nan, torch.inf, -torch.inf, "largest", "smallest", "denormal"]
OF_SAMPLES = [name for name in NAMES if name != "sq_distances"]
PATHS = [
    (name, path)
    for name in OF_SAMPLES
    for path in (("direct", "gram") if "path" in argument_names(name) else ("direct",))
]


def special(value, dtype):
    kind = torch.finfo(dtype)
    return {"largest": kind.max, "smallest": kind.tiny, "denormal": kind.smallest_normal / 4}.get(value, value)


def eager_results(given, **changes):
    """What plain torch makes of it in float64."""
    function = next(getattr(module, given.name) for module in EAGER if hasattr(module, given.name))
    doubled = {
        key: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for key, v in (given.values | changes).items()
    }
    results = function(*doubled.values())
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize(("name", "path"), PATHS)
def test_what_is_no_number_stays_in_its_row(name, path):
    """Every result's other rows are the same to the bit, whatever one number of a sample is; its own row shows what it is."""
    seen = 0
    for dtype in dtypes_of(name):
        for optional in (True, False):
            given = call(name, dtype, path, optional)
            clean = given.run()
            for k, argument in enumerate(given.rows):
                for j, value in enumerate(SPECIAL):
                    sample, spoiled = (k + j) % B, given.values[argument].clone()
                    row = spoiled[given.rows_of(sample, len(spoiled))]
                    row.view(-1)[(7 * k + 3 * j) % row.numel()] = special(value, dtype)
                    ours = given.run(**{argument: spoiled})
                    expected = eager_results(given, **{argument: spoiled})
                    for a, b, c in zip(ours, clean, expected, strict=True):
                        rows = given.rows_of(sample, len(a)) if a.dim() else None
                        if rows is None:
                            continue
                        others = torch.ones(len(a), dtype=torch.bool)
                        others[rows] = False
                        assert torch.equal(a[others], b[others]), (dtype, argument, value)
                        assert value == "largest" or a[others].isfinite().all()
                        if isinstance(value, float):  # no number, so that rounding has no part
                            lost = ~c[rows].isfinite() & a[rows].isfinite()
                            assert not lost.any(), (dtype, argument, value)
                        seen += 1
    assert seen or name.endswith(("weighted_sum", "conv3x3_weighted_sum"))


@pytest.mark.skipif(not library.is_loaded("_C") or not heap_bytes(), reason="needs compiled ops and glibc's count")
@pytest.mark.parametrize("name", NAMES)
def test_an_op_loses_no_memory(name):
    """Of C's heap a call leaves nothing: a lost string or list of arguments would be 32 bytes or more for each."""
    given, calls = call(name, torch.float32), 200
    with torch.no_grad():
        for _ in range(50):
            given.run()
        grown = []
        for _ in range(3):
            before = heap_bytes()
            for _ in range(calls):
                given.run()
            grown.append((heap_bytes() - before) / calls)
    assert min(grown) < 8, grown
