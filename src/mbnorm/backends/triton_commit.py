"""The commit of `mbnorm.averages` as a Triton kernel, after a forward."""

import triton
import triton.language as tl

from mbnorm.backends.triton_average import distances, measure, number
from mbnorm.backends.triton_memory import note_of_average


@triton.jit
def _averages_after(
    record,
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
    row = record + (2 * channels if BLENDED else 0) + channel
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


@triton.jit(do_not_specialize=["n", "slot"])
def commit(
    record,
    memory_mean,
    memory_var,
    counts,
    counter,
    last,
    measured,
    running_mean,
    running_var,
    batches,
    skipped,
    new_weight: tl.float64,
    early: tl.float64,
    n,
    size,
    history,
    fixed_weight: tl.float64,
    log,
    log_counters,
    slot,
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

    One program does it: what one channel has decides on all of them, and measures of an average are sums over
    all. What the forward has read of a moving average is written elsewhere before it is overwritten.
    """
    # in the dtype of statistics: most GPUs are slow in float64
    weight = number(new_weight, STATE)
    if EARLY:
        at_first = number(early, STATE)
        weight = tl.maximum(weight, at_first / (tl.load(batches).to(STATE) + at_first))
    correction = tl.cast(1.0, STATE)
    if UNBIASED:
        values = tl.cast(n, STATE)
        correction = values / tl.maximum(values - 1.0, 1.0)
    lanes = tl.arange(0, BLOCK_C)
    wrong = tl.zeros((BLOCK_C,), tl.int32)
    step = tl.zeros((BLOCK_C,), STATE)
    distance = tl.zeros((BLOCK_C,), STATE)
    live = tl.zeros((BLOCK_C,), tl.int32)
    for first in range(0, channels, BLOCK_C):
        channel = first + lanes
        there = channel < channels
        if counts is None:
            note_of_average(
                memory_mean,
                memory_var,
                counter,
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
            )
        mean, var = _averages_after(
            record,
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
        blended = record + 2 * channels + channel
        finite = (tl.abs(mean) < float("inf")) & (tl.abs(var) < float("inf"))
        finite &= tl.abs(tl.load(blended, mask=there, other=0.0)) < float("inf")
        finite &= tl.abs(tl.load(blended + channels, mask=there, other=0.0)) < float("inf")
        wrong += tl.where(there & (finite == 0), 1, 0)
        if measured is not None:
            stepped, off, lives = distances(record, last, memory_mean, channel, channels)
            step += stepped
            distance += off
            live += lives
    # no thread overwrites what another has yet to read
    tl.debug_barrier()
    finite = tl.sum(wrong, 0) == 0
    if measured is not None:
        ratio, error, values, samples = measure(
            measured, counter, tl.sum(step, 0), tl.sum(distance, 0), tl.sum(live, 0), n
        )
    here = tl.load(counter)
    if counts is None:
        row = 0
        stored = record + 2 * channels
    else:
        row = here % size
        stored = record
    for first in range(0, channels, BLOCK_C):
        channel = first + lanes
        there = channel < channels
        mean, var = _averages_after(
            record,
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
        if measured is not None:
            batch_mean = tl.load(record + channel, mask=there, other=0.0)
            tl.store(last + channel, batch_mean, mask=mask)
        tl.store(running_mean + channel, mean, mask=mask)
        tl.store(running_var + channel, var, mask=mask)
    # every thread has read these scalars for itself, and one of them writes them
    tl.debug_barrier()
    if measured is not None:
        # statistics may be finite whose distances are not
        sound = finite & (tl.abs(ratio) < float("inf")) & (tl.abs(error) < float("inf"))
        tl.store(measured, ratio.to(STATE), mask=sound)
        tl.store(measured + 1, error.to(STATE), mask=sound)
        tl.store(measured + 2, values.to(STATE), mask=sound)
        tl.store(measured + 3, samples.to(STATE), mask=sound)
    if counts is None:
        tl.store(counter, 1, mask=finite)
    else:
        tl.store(counts + row, tl.cast(n, STATE), mask=finite)
        tl.store(counter, here + 1, mask=finite)
    stores = finite.to(tl.int64)
    tl.store(batches, tl.load(batches) + stores)
    tl.store(skipped, tl.load(skipped) + 1 - stores)
