"""The memories of `mbnorm.memory` as Triton kernels: what a forward reads, and an undo log of it."""

import triton
import triton.language as tl

from mbnorm.backends.triton_average import batch_weight_of_average
from mbnorm.backends.triton_tiles import my_channels
from mbnorm.measures import MEASURES

_MEASURES = tl.constexpr(MEASURES)


@triton.jit
def _log(
    rows,
    counters,
    slot,
    past_mean,
    past_var,
    running_mean,
    running_var,
    batches,
    skipped,
    counter,
    last,
    measured,
    channel,
    channels,
):
    """Write the state before a forward into a slot of an undo log; see `mbnorm.layers.undo.Written`."""
    there = channel < channels
    width = 4 * channels if measured is None else 5 * channels + _MEASURES
    start = rows + tl.cast(slot, tl.int64) * width
    row = start + channel
    tl.store(row, past_mean, mask=there)
    tl.store(row + channels, past_var, mask=there)
    tl.store(row + 2 * channels, tl.load(running_mean + channel, mask=there, other=0.0), mask=there)
    tl.store(row + 3 * channels, tl.load(running_var + channel, mask=there, other=0.0), mask=there)
    if measured is not None:
        tl.store(row + 4 * channels, tl.load(last + channel, mask=there, other=0.0), mask=there)
        number = tl.arange(0, _MEASURES)
        tl.store(start + 5 * channels + number, tl.load(measured + number), mask=tl.program_id(0) == 0)
    if tl.program_id(0) == 0:
        tl.store(counters + slot * 3, tl.load(batches))
        tl.store(counters + slot * 3 + 1, tl.load(skipped))
        tl.store(counters + slot * 3 + 2, tl.load(counter))


@triton.jit
def note_of_average(
    memory_mean,
    memory_var,
    filled,
    last,
    measured,
    history,
    fixed_weight,
    n,
    record,
    running_mean,
    running_var,
    batches,
    skipped,
    log,
    log_counters,
    slot,
    channel,
    channels,
):
    """Write what a forward reads of a moving average into its record, and into a log."""
    there = channel < channels
    mean = tl.load(memory_mean + channel, mask=there, other=0.0)
    var = tl.load(memory_var + channel, mask=there, other=0.0)
    tl.store(record + 4 * channels + channel, mean, mask=there)
    tl.store(record + 5 * channels + channel, var, mask=there)
    STATE: tl.constexpr = record.dtype.element_ty
    weight = batch_weight_of_average(filled, history, fixed_weight, measured, n, STATE)
    tl.store(record + 6 * channels + channel, tl.zeros_like(mean) + weight, mask=there)
    if log is not None:
        _log(
            log,
            log_counters,
            slot,
            mean,
            var,
            running_mean,
            running_var,
            batches,
            skipped,
            filled,
            last,
            measured,
            channel,
            channels,
        )


@triton.jit(do_not_specialize=["n", "slot"])
def note_average(
    memory_mean,
    memory_var,
    filled,
    last,
    measured,
    history,
    fixed_weight: tl.float64,
    n,
    record,
    running_mean,
    running_var,
    batches,
    skipped,
    log,
    log_counters,
    slot,
    channels,
    BLOCK_C: tl.constexpr,
):
    """Write what a forward that stores nothing has read of a moving average."""
    note_of_average(
        memory_mean,
        memory_var,
        filled,
        last,
        measured,
        history,
        fixed_weight,
        n,
        record,
        running_mean,
        running_var,
        batches,
        skipped,
        log,
        log_counters,
        slot,
        my_channels(BLOCK_C),
        channels,
    )


@triton.jit
def _shares(counts, first, newest, n, size, limit, LOG2_DECAY: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return the slots from ``first`` on, and what the entries in them weigh."""
    slot = first + tl.arange(0, BLOCK_S)
    count = tl.load(counts + slot, mask=slot < size, other=0.0)
    back = (newest - slot) % size
    # the remainder has the sign of what is divided
    age = tl.where(back < 0, back + size, back) + 1
    # a seeded entry counts as many values as the batch
    weight = tl.where(count < 0, tl.cast(n, count.dtype), count)
    weight = tl.where(age <= limit, weight, 0.0)
    if LOG2_DECAY != 0.0:
        weight *= tl.exp2(age.to(count.dtype) * LOG2_DECAY)
    return slot, weight


@triton.jit(do_not_specialize=["slot", "n", "limit"])
def read_ring(
    memory_mean,
    memory_var,
    counts,
    position,
    limit,
    n,
    size,
    record,
    running_mean,
    running_var,
    batches,
    skipped,
    log,
    log_counters,
    slot,
    channels,
    LOG2_DECAY: tl.constexpr,
    POOLED: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Read recent batches, and write what that gives into the record of a forward."""
    channel = my_channels(BLOCK_C)
    there = channel < channels
    newest = tl.load(position) - 1
    total = tl.zeros((BLOCK_S,), STATE)
    for first in range(0, size, BLOCK_S):
        total += _shares(counts, first, newest, n, size, limit, LOG2_DECAY, BLOCK_S)[1]
    total = tl.sum(total, 0)
    # an empty memory weighs nothing: 0 / 1
    one = tl.where(total > 0, total, 1.0)
    mean = tl.zeros((BLOCK_S, BLOCK_C), STATE)
    var = tl.zeros((BLOCK_S, BLOCK_C), STATE)
    for first in range(0, size, BLOCK_S):
        entry, weight = _shares(counts, first, newest, n, size, limit, LOG2_DECAY, BLOCK_S)
        share = (weight / one)[:, None]
        mask = (weight > 0)[:, None] & there[None, :]
        place = entry.to(tl.int64)[:, None] * channels + channel[None, :]
        mean += share * tl.load(memory_mean + place, mask=mask, other=0.0)
        var += share * tl.load(memory_var + place, mask=mask, other=0.0)
    mean = tl.sum(mean, 0)
    if POOLED:
        for first in range(0, size, BLOCK_S):
            entry, weight = _shares(counts, first, newest, n, size, limit, LOG2_DECAY, BLOCK_S)
            share = (weight / one)[:, None]
            mask = (weight > 0)[:, None] & there[None, :]
            place = entry.to(tl.int64)[:, None] * channels + channel[None, :]
            away = tl.load(memory_mean + place, mask=mask, other=0.0) - mean[None, :]
            var += tl.where(mask, share * away * away, 0.0)
    var = tl.sum(var, 0)
    tl.store(record + 4 * channels + channel, mean, mask=there)
    tl.store(record + 5 * channels + channel, var, mask=there)
    tl.store(
        record + 6 * channels + channel,
        tl.zeros_like(mean) + tl.cast(n, STATE) / (tl.cast(n, STATE) + total),
        mask=there,
    )
    if log is not None:
        _log(
            log,
            log_counters,
            slot,
            mean,
            var,
            running_mean,
            running_var,
            batches,
            skipped,
            position,
            None,
            None,
            channel,
            channels,
        )
