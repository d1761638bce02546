"""Bytes that a step holds at most, as torch's allocator counts them, without the heap's own moods; and those of the heap."""

import ctypes
import functools
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], None]) -> int:
    """The most bytes of tensors that were held at a time, beyond those from before; after one step to warm up."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def heap_bytes() -> int:
    """Bytes of C's heap that are in use, as glibc counts them; 0 where it does not."""
    mallinfo = _mallinfo()
    if mallinfo is None:
        return 0
    info = mallinfo()
    return info.uordblks + info.hblkhd


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


@functools.cache
def _mallinfo() -> Callable[[], _Mallinfo] | None:
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is not None:
        mallinfo.restype = _Mallinfo
    return mallinfo
