"""Freed memory stays with the process while penalties are trained with on a CPU.

A step allocates what the step before it freed. By default glibc gives the top of the heap back to the system as soon as a few
tens of megabytes are free there, so that the next step takes every page anew: 7,000 to 14,000 a step on a small CNN, a
twentieth to a tenth of its time. Plain steps, whose peak is lower, suffer less. `mallopt` turns that off.
"""

import ctypes
import functools
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
# Of freed memory at the top of the heap that is kept, and of what is put there: both together, since setting one of them
# stops glibc from raising the other with what it sees.
KEPT_BYTES = 2**31 - 1
HEAP_BYTES = (2**30, 2**25)  # older versions take no more than the latter
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES", "LD_PRELOAD")


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep up to 2 GiB of freed memory, once; whether it does.

    Nothing is changed where another C library is used, where the environment says how memory is to be treated already
    (MALLOC_*_, GLIBC_TUNABLES, LD_PRELOAD), or with BOOTGRAD_KEEP_HEAP=0. ``malloc_trim(0)`` gives the memory back at any time.
    """
    if os.environ.get("BOOTGRAD_KEEP_HEAP") == "0" or any(map(os.environ.get, _VARIABLES)):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 — an AttributeError where it is not glibc
        if sys.platform != "linux" or not any(libc.mallopt(M_MMAP_THRESHOLD, bytes) for bytes in HEAP_BYTES):
            return False
        return bool(libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
    except (AttributeError, OSError):
        return False
