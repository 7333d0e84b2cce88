"""The registered operators that read a memory, normalize and commit; the host waits for nothing."""

import math
from typing import Any

import torch
from torch import Tensor

from mbnorm.backends import triton_commit, triton_memory
from mbnorm.backends.triton_cut import power_of_two
from mbnorm.backends.triton_kinds import Kind, kind_of
from mbnorm.backends.triton_launch import (
    IN_THE_RECORD,
    STATES,
    History,
    empty_output,
    launch,
    normalize,
    on_device_of,
)
from mbnorm.blend import statistics_dtype

NOTE_TILE = 256
READ_TILE = 2048
MOST_ENTRIES = 256
"""Entries of a ring that a program looks at in one go."""
CHANNELS_OF_ONE = 2048
"""Channels that the one program which commits looks at in one go: it waits for memory, time and again."""
CHANNELS_A_WARP = 128

Remembered = tuple[Tensor, Tensor]
"""Output, and record: rows are the batch's mean and variance, the blended ones, the past ones that were read,
and the weight of the batch."""
ROWS = 7


def _new_record(x: Tensor, kind: Kind, states: tuple[Tensor | None, ...]) -> Tensor:
    """Return an empty record, once it is known that kernels can write the states in place.

    Raises:
        RuntimeError: one is not contiguous, or neither int64 nor of the dtype of statistics.
    """
    for state in states:
        if state is None:
            continue
        if not state.is_contiguous() or (state.dtype != kind.state and state.dtype != torch.int64):
            raise RuntimeError(
                f"expected contiguous state in {kind.state} for an input in {x.dtype}, "
                f"got {state.dtype} with strides {state.stride()}"
            )
    return x.new_empty((ROWS, kind.channels), dtype=kind.state)


def _commit(
    kind: Kind,
    record: Tensor,
    memory: tuple[Tensor | None, ...],
    averages: tuple[Tensor, ...],
    history: tuple[Tensor | None, float],
    log: tuple[Tensor | None, Tensor | None, int],
    blended: bool,
    unbiased: bool,
    new_weight: float,
    new_pooled: bool,
    early: float,
) -> None:
    """Store a forward.

    ``memory`` has mean, variance, counts, counter, and ``last`` and ``measured``; what was read of a moving
    average, which weighs as ``history`` tells, is written to the record and the log before.
    """
    counts, measured, weight = memory[2], memory[5], history[0]
    # the constants that decide what is computed
    rules = blended, unbiased and kind.n > 1, early > 0, new_weight == 1, new_pooled
    size = 1 if counts is None else counts.shape[0]
    absent = counts is None, measured is None, weight is None or weight.dtype, log[0] is None
    block = min(power_of_two(kind.channels), CHANNELS_OF_ONE)
    launch(
        triton_commit.commit,
        (1, 1),
        (kind.number, rules, size, block, absent),
        record,
        *memory,
        *averages,
        new_weight,
        early,
        kind.n,
        size,
        *history,
        *log,
        kind.channels,
        *rules,
        STATES[kind.state],
        block,
        warps=max(1, block // CHANNELS_A_WARP),
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
    kind = kind_of(x)
    record = _new_record(x, kind, (memory_mean, memory_var, filled, last, measured, *averages))
    history, noted = (history_weight, fixed_weight), (log, log_counters, slot)
    past = History(memory_mean, memory_var, None, filled, history_weight, fixed_weight, measured, kind.n)
    with on_device_of(x):
        y = normalize(kind, x, weight, bias, past, record, pooled, eps)
        # only now: the commit overwrites what was read
        if store:
            memory = memory_mean, memory_var, None, filled, last, measured
            _commit(kind, record, memory, averages, history, noted, *update)
        else:
            block = min(power_of_two(kind.channels), NOTE_TILE)
            absent = measured is None, history_weight is None or history_weight.dtype, log is None
            launch(
                triton_memory.note_average,
                (-(-kind.channels // block), 1),
                (kind.number, block, absent),
                memory_mean,
                memory_var,
                filled,
                last,
                measured,
                *history,
                kind.n,
                record,
                *averages,
                *noted,
                kind.channels,
                block,
            )
    return y, record


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
    kind = kind_of(x)
    record = _new_record(x, kind, (*memory, *averages))
    size = counts.shape[0]
    entries = min(power_of_two(size), MOST_ENTRIES)
    block = min(power_of_two(kind.channels), max(1, READ_TILE // entries))
    with on_device_of(x):
        launch(
            triton_memory.read_ring,
            (-(-kind.channels // block), 1),
            (kind.number, size, entries, block, decay, pooled, log is None),
            *memory,
            limit,
            kind.n,
            size,
            record,
            *averages,
            log,
            log_counters,
            slot,
            kind.channels,
            math.log2(decay),
            pooled,
            STATES[kind.state],
            entries,
            block,
        )
        y = normalize(kind, x, weight, bias, IN_THE_RECORD, record, pooled, eps)
        if store:
            noted = None, None, 0
            _commit(kind, record, (*memory, None, None), averages, (None, 0.0), noted, *update)
    return y, record


def _shapes(x: Tensor, *_: Any) -> Remembered:
    return empty_output(x), x.new_empty((ROWS, x.shape[1]), dtype=statistics_dtype(x.dtype))


_AROUND = (
    "Tensor({}!) running_mean, Tensor({}!) running_var, Tensor({}!) batches, Tensor({}!) skipped, "
    "Tensor({}!)? log, Tensor({}!)? log_counters, int slot, bool store, bool blended, bool unbiased, "
    "float new_weight, bool new_pooled, float early) -> (Tensor, Tensor)"
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
