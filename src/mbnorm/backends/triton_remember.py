"""The registered operators that read a memory, normalize and commit; the host waits for nothing."""

import math
from typing import Any

import torch
from torch import Tensor

from mbnorm.backends import triton_launch, triton_memory
from mbnorm.blend import statistics_dtype

READ_TILE = 2048
MOST_ENTRIES = 256
"""Entries of a ring that a program looks at in one go."""
CHANNELS_OF_ONE = 1024
"""Channels that the one program which commits looks at in one go."""

Remembered = tuple[Tensor, Tensor, Tensor, Tensor]


class _Normalized:
    """The rest of a forward once the past is read, and its commit."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.channels = x.shape[1]
        self.n = x.numel() // x.shape[1]
        self.dtype = statistics_dtype(x.dtype)
        self.past = x.new_empty((2, self.channels), dtype=self.dtype)
        self.batch_weight = x.new_empty((), dtype=self.dtype)

    def check(self, *states: Tensor) -> None:
        """Refuse states that kernels cannot write in place.

        Raises:
            RuntimeError: one is not contiguous, or neither int64 nor of the dtype of statistics.
        """
        for state in states:
            if not state.is_contiguous() or state.dtype not in (self.dtype, torch.int64):
                raise RuntimeError(
                    f"expected contiguous state in {self.dtype} for an input in {self.x.dtype}, "
                    f"got {state.dtype} with strides {state.stride()}"
                )

    def run(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        pooled: bool,
        eps: float,
        memory: tuple[Tensor, Tensor, Tensor | None, Tensor],
        averages: tuple[Tensor, Tensor, Tensor, Tensor],
        store: bool,
        blended: bool,
        unbiased: bool,
        new_weight: float,
        new_pooled: bool,
        early: float,
    ) -> Remembered:
        """Normalize with what was read, and commit."""
        mean, var = self.past.unbind()
        y, statistics = triton_launch.forward(self.x, weight, bias, mean, var, self.batch_weight, pooled, eps)
        if store:
            counts = memory[2]
            size = 1 if counts is None else counts.shape[0]
            triton_memory.commit[(1,)](
                statistics,
                *memory,
                *averages,
                new_weight,
                early,
                self.n,
                size,
                self.channels,
                blended,
                unbiased and self.n > 1,
                early > 0,
                new_weight == 1,
                new_pooled,
                triton_launch.STATES[self.dtype],
                min(triton_launch.power_of_two(self.channels), CHANNELS_OF_ONE),
            )
        return y, statistics, self.past, self.batch_weight


def _with_average(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pooled: bool,
    eps: float,
    memory_mean: Tensor,
    memory_var: Tensor,
    filled: Tensor,
    history_weight: Tensor | None,
    fixed_weight: float,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    skipped: Tensor,
    log: Tensor | None,
    log_counters: Tensor | None,
    slot: int,
    *rest: Any,
) -> Remembered:
    averages = running_mean, running_var, batches, skipped
    made = _Normalized(x)
    made.check(memory_mean, memory_var, filled, *averages)
    block = min(triton_launch.power_of_two(made.channels), READ_TILE // 8)
    with triton_launch.on_device_of(x):
        triton_memory.read_average[(-(-made.channels // block),)](
            memory_mean,
            memory_var,
            filled,
            history_weight,
            fixed_weight,
            made.past,
            made.batch_weight,
            *averages,
            log,
            log_counters,
            slot,
            made.channels,
            block,
        )
        return made.run(weight, bias, pooled, eps, (memory_mean, memory_var, None, filled), averages, *rest)


def _with_ring(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pooled: bool,
    eps: float,
    memory_mean: Tensor,
    memory_var: Tensor,
    counts: Tensor,
    position: Tensor,
    limit: int,
    decay: float,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    skipped: Tensor,
    log: Tensor | None,
    log_counters: Tensor | None,
    slot: int,
    *rest: Any,
) -> Remembered:
    averages = running_mean, running_var, batches, skipped
    made = _Normalized(x)
    made.check(memory_mean, memory_var, counts, position, *averages)
    size = counts.shape[0]
    entries = min(triton_launch.power_of_two(size), MOST_ENTRIES)
    block = min(triton_launch.power_of_two(made.channels), max(1, READ_TILE // entries))
    with triton_launch.on_device_of(x):
        triton_memory.read_ring[(-(-made.channels // block),)](
            memory_mean,
            memory_var,
            counts,
            position,
            limit,
            made.n,
            size,
            made.past,
            made.batch_weight,
            *averages,
            log,
            log_counters,
            slot,
            made.channels,
            math.log2(decay),
            pooled,
            triton_launch.STATES[made.dtype],
            entries,
            block,
        )
        memory = memory_mean, memory_var, counts, position
        return made.run(weight, bias, pooled, eps, memory, averages, *rest)


def _shapes(x: Tensor, *_: Any) -> Remembered:
    past, batch_weight = (x.new_empty(s, dtype=statistics_dtype(x.dtype)) for s in ((2, x.shape[1]), ()))
    return *triton_launch.forward_shapes(x), past, batch_weight


_AROUND = (
    "Tensor({}!) running_mean, Tensor({}!) running_var, Tensor({}!) batches, Tensor({}!) skipped, "
    "Tensor({}!)? log, Tensor({}!)? log_counters, int slot, bool store, bool blended, bool unbiased, "
    "float new_weight, bool new_pooled, float early) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library: Any = torch.library.Library("mbnorm_triton", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "forward_with_average(Tensor x, Tensor? weight, Tensor? bias, bool pooled, float eps, "
    "Tensor(a!) memory_mean, Tensor(b!) memory_var, Tensor(c!) filled, Tensor? history_weight, "
    "float fixed_weight, " + _AROUND.format(*"defghi")
)
_library.define(
    "forward_with_ring(Tensor x, Tensor? weight, Tensor? bias, bool pooled, float eps, "
    "Tensor(a!) memory_mean, Tensor(b!) memory_var, Tensor(c!) counts, Tensor(d!) position, int limit, "
    "float decay, " + _AROUND.format(*"efghij")
)
for _name, _operator in (("forward_with_average", _with_average), ("forward_with_ring", _with_ring)):
    # on the CPU they run under TRITON_INTERPRET=1
    for _key in ("CUDA", "CPU"):
        _library.impl(_name, _operator, _key)
    torch.library.register_fake(f"mbnorm_triton::{_name}", _shapes, lib=_library)
