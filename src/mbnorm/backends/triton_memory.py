"""The memories of `mbnorm.memory` as Triton kernels: to read before a forward, and to commit after it."""

import triton
import triton.language as tl

from mbnorm.backends.triton_tiles import my_channels


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
    channel,
    channels,
):
    """Write the state before a forward into a slot of an undo log."""
    there = channel < channels
    row = rows + tl.cast(slot, tl.int64) * 4 * channels + channel
    tl.store(row, past_mean, mask=there)
    tl.store(row + channels, past_var, mask=there)
    tl.store(row + 2 * channels, tl.load(running_mean + channel, mask=there, other=0.0), mask=there)
    tl.store(row + 3 * channels, tl.load(running_var + channel, mask=there, other=0.0), mask=there)
    if tl.program_id(0) == 0:
        tl.store(counters + slot * 3, tl.load(batches))
        tl.store(counters + slot * 3 + 1, tl.load(skipped))
        tl.store(counters + slot * 3 + 2, tl.load(counter))


@triton.jit(do_not_specialize=["slot"])
def read_average(
    memory_mean,
    memory_var,
    filled,
    history,
    fixed_weight: tl.float64,
    past,
    batch_weight,
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
    """Read a moving average: rows of ``past``, (2, C), and the weight of the batch."""
    channel = my_channels(BLOCK_C)
    there = channel < channels
    mean = tl.load(memory_mean + channel, mask=there, other=0.0)
    var = tl.load(memory_var + channel, mask=there, other=0.0)
    tl.store(past + channel, mean, mask=there)
    tl.store(past + channels + channel, var, mask=there)
    if tl.program_id(0) == 0:
        weight = fixed_weight if history is None else tl.load(history).to(tl.float64)
        held = (tl.load(filled) > 0).to(tl.float64)
        tl.store(batch_weight, (1.0 - held * weight).to(batch_weight.dtype.element_ty))
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
            channel,
            channels,
        )


@triton.jit
def _shares(counts, first, newest, n, size, limit, LOG2_DECAY: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return the slots from ``first`` on, and what the entries in them weigh; float64, few as they are."""
    slot = first + tl.arange(0, BLOCK_S)
    count = tl.load(counts + slot, mask=slot < size, other=0.0).to(tl.float64)
    back = (newest - slot) % size
    # the remainder has the sign of what is divided
    age = tl.where(back < 0, back + size, back) + 1
    # a seeded entry counts as many values as the batch
    weight = tl.where(count < 0, tl.cast(n, tl.float64), count)
    weight = tl.where(age <= limit, weight, 0.0)
    if LOG2_DECAY != 0.0:
        weight *= tl.exp2(age.to(tl.float64) * LOG2_DECAY)
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
    past,
    batch_weight,
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
    """Read recent batches: rows of ``past``, (2, C), and the weight of the batch."""
    channel = my_channels(BLOCK_C)
    there = channel < channels
    newest = tl.load(position) - 1
    total = tl.zeros((BLOCK_S,), tl.float64)
    for first in range(0, size, BLOCK_S):
        total += _shares(counts, first, newest, n, size, limit, LOG2_DECAY, BLOCK_S)[1]
    total = tl.sum(total, 0)
    # an empty memory weighs nothing: 0 / 1
    one = tl.where(total > 0, total, 1.0)
    mean = tl.zeros((BLOCK_S, BLOCK_C), STATE)
    var = tl.zeros((BLOCK_S, BLOCK_C), STATE)
    for first in range(0, size, BLOCK_S):
        entry, weight = _shares(counts, first, newest, n, size, limit, LOG2_DECAY, BLOCK_S)
        share = (weight / one).to(STATE)[:, None]
        mask = (weight > 0)[:, None] & there[None, :]
        place = entry.to(tl.int64)[:, None] * channels + channel[None, :]
        mean += share * tl.load(memory_mean + place, mask=mask, other=0.0)
        var += share * tl.load(memory_var + place, mask=mask, other=0.0)
    mean = tl.sum(mean, 0)
    if POOLED:
        for first in range(0, size, BLOCK_S):
            entry, weight = _shares(counts, first, newest, n, size, limit, LOG2_DECAY, BLOCK_S)
            share = (weight / one).to(STATE)[:, None]
            mask = (weight > 0)[:, None] & there[None, :]
            place = entry.to(tl.int64)[:, None] * channels + channel[None, :]
            away = tl.load(memory_mean + place, mask=mask, other=0.0) - mean[None, :]
            var += tl.where(mask, share * away * away, 0.0)
    var = tl.sum(var, 0)
    tl.store(past + channel, mean, mask=there)
    tl.store(past + channels + channel, var, mask=there)
    if tl.program_id(0) == 0:
        tl.store(batch_weight, (n / (n + total)).to(batch_weight.dtype.element_ty))
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
            channel,
            channels,
        )


@triton.jit
def _averages_after(
    statistics,
    running_mean,
    running_var,
    weight,
    correction,
    channel,
    channels,
    BLENDED: tl.constexpr,
    REPLACES: tl.constexpr,
    POOLED: tl.constexpr,
):
    """Return the averages for inference as they are once this forward is in them."""
    there = channel < channels
    row = statistics + (2 * channels if BLENDED else 0) + channel
    mean = tl.load(row, mask=there, other=0.0)
    var = tl.load(row + channels, mask=there, other=0.0) * correction
    if not REPLACES:
        old_mean = tl.load(running_mean + channel, mask=there, other=0.0)
        old_var = tl.load(running_var + channel, mask=there, other=0.0)
        rest = 1.0 - weight
        away = mean - old_mean
        mean = weight * mean + rest * old_mean
        var = weight * var + rest * old_var
        if POOLED:
            var += weight * rest * away * away
    return mean, var


@triton.jit(do_not_specialize=["n"])
def commit(
    statistics,
    memory_mean,
    memory_var,
    counts,
    counter,
    running_mean,
    running_var,
    batches,
    skipped,
    new_weight: tl.float64,
    early: tl.float64,
    n,
    size,
    channels,
    BLENDED: tl.constexpr,
    UNBIASED: tl.constexpr,
    EARLY: tl.constexpr,
    REPLACES: tl.constexpr,
    POOLED: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store a forward in a memory, a ring if it has ``counts``, and in the averages, if all of it is finite.

    One program does it: what one channel has decides on all of them.
    """
    before = tl.load(batches).to(tl.float64)
    # the zero, since a float alone is float32 where kernels are interpreted
    weight = 0.0 * before + new_weight
    if EARLY:
        weight = tl.maximum(weight, early / (before + early))
    weight = weight.to(STATE)
    correction = (0.0 * before + 1.0).to(STATE)
    if UNBIASED:
        values = tl.cast(n, tl.float64)
        correction = (values / tl.maximum(values - 1.0, 1.0)).to(STATE)
    lanes = tl.arange(0, BLOCK_C)
    wrong = tl.zeros((BLOCK_C,), tl.int32)
    for first in range(0, channels, BLOCK_C):
        channel = first + lanes
        there = channel < channels
        mean, var = _averages_after(
            statistics,
            running_mean,
            running_var,
            weight,
            correction,
            channel,
            channels,
            BLENDED,
            REPLACES,
            POOLED,
        )
        blended = statistics + 2 * channels + channel
        finite = (tl.abs(mean) < float("inf")) & (tl.abs(var) < float("inf"))
        finite &= tl.abs(tl.load(blended, mask=there, other=0.0)) < float("inf")
        finite &= tl.abs(tl.load(blended + channels, mask=there, other=0.0)) < float("inf")
        wrong += tl.where(there & (finite == 0), 1, 0)
    finite = tl.sum(wrong, 0) == 0
    here = tl.load(counter)
    if counts is None:
        row = 0
        stored = statistics + 2 * channels
    else:
        row = here % size
        stored = statistics
    for first in range(0, channels, BLOCK_C):
        channel = first + lanes
        there = channel < channels
        mean, var = _averages_after(
            statistics,
            running_mean,
            running_var,
            weight,
            correction,
            channel,
            channels,
            BLENDED,
            REPLACES,
            POOLED,
        )
        mask = there & finite
        place = row * channels + channel
        tl.store(memory_mean + place, tl.load(stored + channel, mask=there, other=0.0), mask=mask)
        tl.store(memory_var + place, tl.load(stored + channels + channel, mask=there, other=0.0), mask=mask)
        tl.store(running_mean + channel, mean, mask=mask)
        tl.store(running_var + channel, var, mask=mask)
    if counts is None:
        tl.store(counter, 1, mask=finite)
    else:
        tl.store(counts + row, tl.cast(n, STATE), mask=finite)
        tl.store(counter, here + 1, mask=finite)
    stores = finite.to(tl.int64)
    tl.store(batches, tl.load(batches) + stores)
    tl.store(skipped, tl.load(skipped) + 1 - stores)
