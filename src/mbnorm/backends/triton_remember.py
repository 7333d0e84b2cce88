"""The registered operators that read a memory, normalize and commit; the host waits for nothing."""

import math
from typing import Any

import torch
from torch import Tensor

from mbnorm.backends import triton_commit, triton_launch, triton_memory
from mbnorm.backends.triton_cut import power_of_two
from mbnorm.blend import statistics_dtype

NOTE_TILE = 256
READ_TILE = 2048
MOST_ENTRIES = 256
"""Entries of a ring that a program looks at in one go."""
CHANNELS_OF_ONE = 1024
"""Channels that the one program which commits looks at in one go."""
WARPS_OF_ONE = 8

Remembered = tuple[Tensor, Tensor, Tensor, Tensor]


class _Forward:
    """A forward with a memory: what it is about, and its commit."""

    def __init__(self, x: Tensor, states: tuple[Tensor | None, ...]) -> None:
        self.x = x
        self.channels = x.shape[1]
        self.n = x.numel() // x.shape[1]
        self.dtype = statistics_dtype(x.dtype)
        self._check(states)
        self.past = x.new_empty((2, self.channels), dtype=self.dtype)
        self.batch_weight = x.new_empty((), dtype=self.dtype)
        self.key = *triton_launch.kind_of(x), self.dtype

    def _check(self, states: tuple[Tensor | None, ...]) -> None:
        """Refuse states that kernels cannot write in place.

        Raises:
            RuntimeError: one is not contiguous, or neither int64 nor of the dtype of statistics.
        """
        for state in states:
            if state is None:
                continue
            if not state.is_contiguous() or state.dtype not in (self.dtype, torch.int64):
                raise RuntimeError(
                    f"expected contiguous state in {self.dtype} for an input in {self.x.dtype}, "
                    f"got {state.dtype} with strides {state.stride()}"
                )

    def commit(
        self,
        statistics: Tensor,
        memory: tuple[Tensor | None, ...],
        averages: tuple[Tensor, ...],
        read: tuple[Any, ...],
        blended: bool,
        unbiased: bool,
        new_weight: float,
        new_pooled: bool,
        early: float,
    ) -> None:
        """Store a forward.

        ``memory`` has mean, variance, counts, counter, and ``last`` and ``measured``; ``read`` tells what of
        a moving average to write elsewhere before.
        """
        counts, measured, log = memory[2], memory[5], read[4]
        # the constants that decide what is computed
        rules = blended, unbiased and self.n > 1, early > 0, new_weight == 1, new_pooled
        size = 1 if counts is None else counts.shape[0]
        block = min(power_of_two(self.channels), CHANNELS_OF_ONE)
        triton_launch.launch(
            triton_commit.commit,
            (1, 1),
            (
                *self.key,
                rules,
                size,
                block,
                counts is None,
                measured is None,
                getattr(read[0], "dtype", None),
                log is None,
            ),
            statistics,
            *memory,
            *averages,
            new_weight,
            early,
            self.n,
            size,
            *read,
            self.channels,
            *rules,
            triton_launch.STATES[self.dtype],
            block,
            warps=WARPS_OF_ONE,
        )


def forward_with_average(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pooled: bool,
    eps: float,
    memory_mean: Tensor,
    memory_var: Tensor,
    filled: Tensor,
    last: Tensor | None,
    measured: Tensor | None,
    history_weight: Tensor | None,
    fixed_weight: float,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    skipped: Tensor,
    log: Tensor | None,
    log_counters: Tensor | None,
    slot: int,
    store: bool,
    *update: Any,
) -> Remembered:
    """Read a moving average, normalize and store or not; see `mbnorm.backends.cpu.forward_with_average`."""
    averages = running_mean, running_var, batches, skipped
    made = _Forward(x, (memory_mean, memory_var, filled, last, measured, *averages))
    history = history_weight, fixed_weight
    with triton_launch.on_device_of(x):
        past = triton_launch.History(memory_mean, memory_var, None, filled, *history, measured, made.n)
        y, statistics = triton_launch.normalize(x, weight, bias, past, pooled, eps)
        # only now: the commit overwrites what was read
        if store:
            read = *history, made.past, made.batch_weight, log, log_counters, slot
            memory = memory_mean, memory_var, None, filled, last, measured
            made.commit(statistics, memory, averages, read, *update)
        else:
            block = min(power_of_two(made.channels), NOTE_TILE)
            average = memory_mean, memory_var, filled, last, measured
            noted = *history, made.n, made.past, made.batch_weight, *averages, log, log_counters, slot
            triton_launch.launch(
                triton_memory.note_average,
                (-(-made.channels // block), 1),
                (*made.key, block, measured is None, getattr(history_weight, "dtype", None), log is None),
                *average,
                *noted,
                made.channels,
                block,
            )
    return y, statistics, made.past, made.batch_weight


def forward_with_ring(
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
    store: bool,
    *update: Any,
) -> Remembered:
    """Read recent batches, normalize and store or not; see `mbnorm.backends.cpu.forward_with_ring`."""
    averages = running_mean, running_var, batches, skipped
    memory = memory_mean, memory_var, counts, position
    made = _Forward(x, (*memory, *averages))
    size = counts.shape[0]
    entries = min(power_of_two(size), MOST_ENTRIES)
    block = min(power_of_two(made.channels), max(1, READ_TILE // entries))
    past_mean, past_var = made.past.unbind()
    with triton_launch.on_device_of(x):
        triton_launch.launch(
            triton_memory.read_ring,
            (-(-made.channels // block), 1),
            (*made.key, size, entries, block, decay, pooled, log is None),
            *memory,
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
        past = triton_launch.History(past_mean, past_var, made.batch_weight)
        y, statistics = triton_launch.normalize(x, weight, bias, past, pooled, eps)
        if store:
            unread = None, 0.0, None, None, None, None, 0
            made.commit(statistics, (*memory, None, None), averages, unread, *update)
    return y, statistics, made.past, made.batch_weight


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
    "Tensor(a!) memory_mean, Tensor(b!) memory_var, Tensor(c!) filled, Tensor(d!)? last, "
    "Tensor(e!)? measured, Tensor? history_weight, float fixed_weight, " + _AROUND.format(*"fghijk")
)
_library.define(
    "forward_with_ring(Tensor x, Tensor? weight, Tensor? bias, bool pooled, float eps, "
    "Tensor(a!) memory_mean, Tensor(b!) memory_var, Tensor(c!) counts, Tensor(d!) position, int limit, "
    "float decay, " + _AROUND.format(*"efghij")
)
_operators = {"forward_with_average": forward_with_average, "forward_with_ring": forward_with_ring}
for _name, _operator in _operators.items():
    # on the CPU they run under TRITON_INTERPRET=1
    for _key in ("CUDA", "CPU"):
        _library.impl(_name, _operator, _key)
    torch.library.register_fake(f"mbnorm_triton::{_name}", _shapes, lib=_library)
