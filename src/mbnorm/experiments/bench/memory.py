"""The memory of what is measured: how freed pages are kept, and how many bytes tensors take at most."""

import ctypes
import os
import platform
from collections.abc import Callable

# the profiler tells of each start and stop otherwise
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from torch.profiler import ProfilerActivity, profile

# of glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
ONE_GIB = 1 << 30


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory, as other allocators do, for all that is measured in this process.

    Otherwise it gives large blocks back to the system and takes them again page by page, at microseconds a
    page on virtual machines: more than any normalization costs, and up to chance.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, ONE_GIB)
        libc.mallopt(M_MMAP_THRESHOLD, ONE_GIB)


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes that tensors made by ``call`` take at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    results = profiler.profiler.kineto_results
    held = most = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
