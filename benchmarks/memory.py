"""The memory of what is measured: freed pages that are kept, and the bytes that tensors take."""

import ctypes
import os
import platform
from collections.abc import Callable

# the profiler tells of each start and stop otherwise
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch import Tensor, nn
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


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Return the bytes that a forward of ``model`` saves for its backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        # what it returns holds the graph, and with it each address
        held = forward()
    del held
    return sum(storages.values())


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Return the most bytes that the tensors of ``call`` take at one time beside those there before."""
    return _peak_on_cpu(call) if device == "cpu" else _peak_on_cuda(call)


def _peak_on_cpu(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    results = profiler.profiler.kineto_results
    held = most = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _peak_on_cuda(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
