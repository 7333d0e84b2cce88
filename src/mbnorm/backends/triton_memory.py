"""Forwards that read a memory, normalize and commit by Triton kernels; the host waits for nothing.

The forward itself reads a moving average, and one more launch commits. A ring is read by a launch before.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbnorm.backends.triton_cut import power_of_two
from mbnorm.backends.triton_forward import IN_THE_RECORD, Past, normalize
from mbnorm.backends.triton_launch import (
    ROWS,
    Kind,
    forward_shapes,
    kind_of,
    launch,
    on_device_of,
    register,
)
from mbnorm.backends.triton_statistics import (
    POOLED,
    UNCENTERED,
    batches_seen,
    blend,
    measure,
    number,
    squared_distances,
)
from mbnorm.backends.triton_tiles import channel_offsets

READ_TILE = 2048
MOST_ENTRIES = 256
"""Entries of a ring that a program looks at in one go."""
CHANNELS_OF_ONE = 2048
"""Channels that the one program which commits looks at in one go: it waits for memory, time and again."""
CHANNELS_A_WARP = 128


@triton.jit
def _entry_weights(counts_ptr, ages_ptr, offs_s, n, size, limit, LOG2_DECAY: tl.constexpr):
    """Return the weights of the entries of a ring: their numbers of values, or the batch's if initialized."""
    mask = offs_s < size
    count = tl.load(counts_ptr + offs_s, mask=mask, other=0.0)
    age = tl.load(ages_ptr + offs_s, mask=mask, other=0.0)
    entry_weight = tl.where(count < 0, tl.cast(n, count.dtype), count)
    if LOG2_DECAY != 0.0:
        entry_weight *= tl.exp2(age * LOG2_DECAY)
    return tl.where((age > 0) & (age <= limit), entry_weight, 0.0)


@triton.jit(do_not_specialize=["n"])
def read_ring(
    mean_ptr,
    var_ptr,
    counts_ptr,
    ages_ptr,
    limit: tl.float64,
    n,
    size,
    record_ptr,
    channels,
    LOG2_DECAY: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the past statistics and the weight of a batch of ``n`` values per channel into the record."""
    STATE: tl.constexpr = record_ptr.dtype.element_ty
    limit = number(limit, STATE)
    offs_c = channel_offsets(BLOCK_C)
    channel_mask = offs_c < channels
    total = tl.zeros((BLOCK_S,), STATE)
    for first in range(0, size, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        total += _entry_weights(counts_ptr, ages_ptr, offs_s, n, size, limit, LOG2_DECAY)
    total = tl.sum(total, 0)
    # the history weight of an empty memory is 0 / 1
    divisor = tl.where(total > 0, total, 1.0)
    mean = tl.zeros((BLOCK_S, BLOCK_C), STATE)
    var = tl.zeros((BLOCK_S, BLOCK_C), STATE)
    for first in range(0, size, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        entry_weight = _entry_weights(counts_ptr, ages_ptr, offs_s, n, size, limit, LOG2_DECAY)
        share = (entry_weight / divisor)[:, None]
        mask = (entry_weight > 0)[:, None] & channel_mask[None, :]
        offs = offs_s.to(tl.int64)[:, None] * channels + offs_c[None, :]
        mean += share * tl.load(mean_ptr + offs, mask=mask, other=0.0)
        var += share * tl.load(var_ptr + offs, mask=mask, other=0.0)
    mean = tl.sum(mean, 0)
    if RULE == POOLED:
        for first in range(0, size, BLOCK_S):
            offs_s = first + tl.arange(0, BLOCK_S)
            entry_weight = _entry_weights(counts_ptr, ages_ptr, offs_s, n, size, limit, LOG2_DECAY)
            share = (entry_weight / divisor)[:, None]
            mask = (entry_weight > 0)[:, None] & channel_mask[None, :]
            offs = offs_s.to(tl.int64)[:, None] * channels + offs_c[None, :]
            distance = tl.load(mean_ptr + offs, mask=mask, other=0.0) - mean[None, :]
            var += tl.where(mask, share * distance * distance, 0.0)
    var = tl.sum(var, 0)
    batch_weight = tl.cast(n, STATE) / (tl.cast(n, STATE) + total)
    tl.store(record_ptr + 4 * channels + offs_c, mean, mask=channel_mask)
    tl.store(record_ptr + 5 * channels + offs_c, var, mask=channel_mask)
    tl.store(record_ptr + 6 * channels + offs_c, tl.zeros_like(mean) + batch_weight, mask=channel_mask)


@triton.jit
def _running_after(
    record_ptr,
    running_mean_ptr,
    running_var_ptr,
    new_weight,
    correction,
    offs_c,
    channels,
    BLENDED: tl.constexpr,
    REPLACES: tl.constexpr,
    POOLED: tl.constexpr,
):
    """Return the averages for inference as they are once this forward is in them."""
    mask = offs_c < channels
    offs = (2 * channels if BLENDED else 0) + offs_c
    mean = tl.load(record_ptr + offs, mask=mask, other=0.0)
    var = tl.load(record_ptr + channels + offs, mask=mask, other=0.0) * correction
    if not REPLACES:
        old_mean = tl.load(running_mean_ptr + offs_c, mask=mask, other=0.0)
        old_var = tl.load(running_var_ptr + offs_c, mask=mask, other=0.0)
        mean, var = blend(mean, var, old_mean, old_var, new_weight, POOLED)
    return mean, var


@triton.jit
def _next_slot(ages_ptr, size, BLOCK_S: tl.constexpr):
    """Return the slot after a ring's newest entry, the first one of an empty ring."""
    newest = tl.full((BLOCK_S,), -1, tl.int64)
    for first in range(0, size, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        age = tl.load(ages_ptr + offs_s, mask=offs_s < size, other=0.0)
        newest = tl.maximum(newest, tl.where(age == 1, offs_s, -1).to(tl.int64))
    return (tl.max(newest, 0) + 1) % size


@triton.jit(do_not_specialize=["n"])
def commit(
    record_ptr,
    mean_ptr,
    var_ptr,
    filled_ptr,
    last_ptr,
    measured_ptr,
    counts_ptr,
    ages_ptr,
    running_mean_ptr,
    running_var_ptr,
    tracked_ptr,
    skipped_ptr,
    update_weight: tl.float64,
    early: tl.float64,
    n,
    size,
    channels,
    CUMULATIVE: tl.constexpr,
    BLENDED: tl.constexpr,
    UNBIASED: tl.constexpr,
    POOLED: tl.constexpr,
    EARLY: tl.constexpr,
    REPLACES: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store a forward in a memory, a ring if it has ``counts``, and in the averages, if all of it is finite.

    One program does it: what one channel has decides on all of them, and measures of an average are sums over
    all.
    """
    STATE: tl.constexpr = record_ptr.dtype.element_ty
    new_weight = number(update_weight, STATE)
    if CUMULATIVE:
        new_weight = 1.0 / (tl.load(tracked_ptr).to(STATE) + 1.0)
    elif EARLY:
        at_first = number(early, STATE)
        new_weight = tl.maximum(new_weight, at_first / (batches_seen(filled_ptr, measured_ptr) + at_first))
    correction = tl.cast(1.0, STATE)
    if UNBIASED:
        values = tl.cast(n, STATE)
        correction = values / tl.maximum(values - 1.0, 1.0)
    # what is measured of the batch, and what it is compared with
    new_ptr = record_ptr + channels if SQUARES else record_ptr
    held_ptr = var_ptr if SQUARES else mean_ptr
    wrong = tl.zeros((BLOCK_C,), tl.int32)
    step = tl.zeros((BLOCK_C,), STATE)
    distance = tl.zeros((BLOCK_C,), STATE)
    live = tl.zeros((BLOCK_C,), tl.int32)
    for first in range(0, channels, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask = offs_c < channels
        mean, var = _running_after(
            record_ptr,
            running_mean_ptr,
            running_var_ptr,
            new_weight,
            correction,
            offs_c,
            channels,
            BLENDED,
            REPLACES,
            POOLED,
        )
        blended_mean = tl.load(record_ptr + 2 * channels + offs_c, mask=mask, other=0.0)
        blended_var = tl.load(record_ptr + 3 * channels + offs_c, mask=mask, other=0.0)
        finite = (tl.abs(mean) < float("inf")) & (tl.abs(var) < float("inf"))
        finite &= (tl.abs(blended_mean) < float("inf")) & (tl.abs(blended_var) < float("inf"))
        wrong += tl.where(mask & (finite == 0), 1, 0)
        if measured_ptr is not None:
            stepped, off, lives = squared_distances(
                new_ptr, last_ptr, held_ptr, record_ptr, offs_c, channels, SQUARES
            )
            step += stepped
            distance += off
            live += lives
    finite = tl.sum(wrong, 0) == 0
    if measured_ptr is not None:
        ratio, error, last_n, samples = measure(
            measured_ptr, filled_ptr, tl.sum(step, 0), tl.sum(distance, 0), tl.sum(live, 0), n
        )
    if counts_ptr is None:
        slot = 0
        stored_ptr = record_ptr + 2 * channels
    else:
        slot = _next_slot(ages_ptr, size, BLOCK_S)
        stored_ptr = record_ptr
    # no thread overwrites what another has yet to read
    tl.debug_barrier()
    for first in range(0, channels, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask = offs_c < channels
        mean, var = _running_after(
            record_ptr,
            running_mean_ptr,
            running_var_ptr,
            new_weight,
            correction,
            offs_c,
            channels,
            BLENDED,
            REPLACES,
            POOLED,
        )
        stored_mean = tl.load(stored_ptr + offs_c, mask=mask, other=0.0)
        stored_var = tl.load(stored_ptr + channels + offs_c, mask=mask, other=0.0)
        if measured_ptr is not None:
            new = tl.load(new_ptr + offs_c, mask=mask, other=0.0)
            tl.store(last_ptr + offs_c, new, mask=mask & finite)
        offs = slot * channels + offs_c
        tl.store(mean_ptr + offs, stored_mean, mask=mask & finite)
        tl.store(var_ptr + offs, stored_var, mask=mask & finite)
        tl.store(running_mean_ptr + offs_c, mean, mask=mask & finite)
        tl.store(running_var_ptr + offs_c, var, mask=mask & finite)
    if measured_ptr is not None:
        # statistics may be finite whose distances are not
        sound = finite & (tl.abs(ratio) < float("inf")) & (tl.abs(error) < float("inf"))
        tl.store(measured_ptr, ratio, mask=sound)
        tl.store(measured_ptr + 1, error, mask=sound)
        tl.store(measured_ptr + 2, last_n, mask=sound)
        tl.store(measured_ptr + 3, samples, mask=sound)
    if counts_ptr is None:
        tl.store(filled_ptr, 1.0, mask=finite)
    else:
        for first in range(0, size, BLOCK_S):
            offs_s = first + tl.arange(0, BLOCK_S)
            mask = offs_s < size
            age = tl.load(ages_ptr + offs_s, mask=mask, other=0.0)
            age = tl.where(offs_s == slot, 1.0, tl.where(age > 0, age + 1.0, age))
            tl.store(ages_ptr + offs_s, age, mask=mask & finite)
        tl.store(counts_ptr + slot, tl.cast(n, STATE), mask=finite)
    tracked = tl.load(tracked_ptr) + finite.to(tl.int64)
    skipped = tl.load(skipped_ptr) + 1 - finite.to(tl.int64)
    tl.store(tracked_ptr, tracked)
    tl.store(skipped_ptr, skipped)


def forward_with_average(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    memory: Sequence[Tensor],
    averages: Sequence[Tensor],
    read: Sequence[float],
    update: Sequence[float],
    rule: int,
    eps: float,
    store: bool,
) -> tuple[Tensor, Tensor]:
    """Read a moving average, normalize and store or not; see `mbnorm.backends.triton`."""
    kind = kind_of(x)
    record = _new_record(x, kind, memory, averages)
    mean, var, filled, *rest = memory
    last = measured = history_weight = None
    matched_batch_size, measures, m = 0.0, 0.0, 1.0
    if len(rest) == 1:
        (history_weight,) = rest
    else:
        last, measured = rest
        matched_batch_size, measures, m = read
    past = Past(mean, var, None, filled, history_weight, measured, matched_batch_size, m, kind.n)
    with on_device_of(x):
        y = normalize(kind, x, weight, bias, past, bool(measures), record, rule, eps)
        if store:
            _commit(kind, record, (mean, var, filled, last, measured, None, None), averages, update, rule)
    return y, record


def forward_with_ring(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    memory: Sequence[Tensor],
    averages: Sequence[Tensor],
    read: Sequence[float],
    update: Sequence[float],
    rule: int,
    eps: float,
    store: bool,
) -> tuple[Tensor, Tensor]:
    """Read a ring of recent batches, normalize and store or not; see `mbnorm.backends.triton`."""
    kind = kind_of(x)
    record = _new_record(x, kind, memory, averages)
    mean, var, counts, ages = memory
    limit, decay = read
    size = counts.shape[0]
    entries = min(power_of_two(size), MOST_ENTRIES)
    block = min(power_of_two(kind.channels), max(1, READ_TILE // entries))
    with on_device_of(x):
        launch(
            read_ring,
            (-(-kind.channels // block), 1),
            (kind.number, size, entries, block, decay, rule),
            *memory,
            limit,
            kind.n,
            size,
            record,
            kind.channels,
            math.log2(decay),
            rule,
            entries,
            block,
        )
        y = normalize(kind, x, weight, bias, IN_THE_RECORD, False, record, rule, eps)
        if store:
            _commit(kind, record, (mean, var, None, None, None, counts, ages), averages, update, rule)
    return y, record


def _new_record(x: Tensor, kind: Kind, memory: Sequence[Tensor], averages: Sequence[Tensor]) -> Tensor:
    """Return an empty record, once it is known that kernels can take the states as they are.

    Raises:
        RuntimeError: one is not contiguous, or neither int64 nor of the dtype of statistics.
    """
    for state in (*memory, *averages):
        if not state.is_contiguous() or (state.dtype != kind.state and state.dtype != torch.int64):
            raise RuntimeError(
                f"expected contiguous state in {kind.state} for an input in {x.dtype}, "
                f"got {state.dtype} with strides {state.stride()}"
            )
    return x.new_empty((ROWS, kind.channels), dtype=kind.state)


def _commit(
    kind: Kind,
    record: Tensor,
    memory: Sequence[Tensor | None],
    averages: Sequence[Tensor],
    update: Sequence[float],
    rule: int,
) -> None:
    """Store a forward.

    ``memory`` has mean and variance; ``filled``, ``last`` and what is measured of an average; counts and ages
    of a ring.
    """
    *_, measured, counts, _ = memory
    update_weight, early, cumulative, blended, unbiased, pooled = update
    size = 1 if counts is None else counts.shape[0]
    # the constants that decide what is computed
    rules = (
        cumulative > 0,
        blended > 0,
        unbiased > 0 and kind.n > 1,
        pooled > 0,
        early > 0 and measured is not None,
        update_weight == 1,
        rule == UNCENTERED and measured is not None,
    )
    entries = min(power_of_two(size), MOST_ENTRIES)
    block = min(power_of_two(kind.channels), CHANNELS_OF_ONE)
    launch(
        commit,
        (1, 1),
        (kind.number, rules, size, block, counts is None, measured is None),
        record,
        *memory,
        *averages,
        update_weight,
        early,
        kind.n,
        size,
        kind.channels,
        *rules,
        entries,
        block,
        warps=max(1, block // CHANNELS_A_WARP),
    )


for _name, _operator in (
    ("forward_with_average", forward_with_average),
    ("forward_with_ring", forward_with_ring),
):
    register(
        f"{_name}(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)[] memory, Tensor(b!)[] averages, "
        "float[] read, float[] update, int rule, float eps, bool store) -> (Tensor, Tensor)",
        _operator,
        forward_shapes,
    )
