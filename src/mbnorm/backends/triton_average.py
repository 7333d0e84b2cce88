"""What a moving average weighs in Triton kernels, and what a measured one learns of a batch.

See `mbnorm.memory.MeasuredAverage`; ``measured`` and ``last`` are None for a `mbnorm.memory.MovingAverage`.
All is computed in the dtype of statistics: most GPUs are slow in float64.
"""

import triton
import triton.language as tl

from mbnorm.measures import EARLY, MEASURED_WEIGHT, MOST_IF_ALIKE, SEEDED

_MEASURED_WEIGHT = tl.constexpr(MEASURED_WEIGHT)
_EARLY = tl.constexpr(EARLY)
_SEEDED = tl.constexpr(SEEDED)
_MOST_IF_ALIKE = tl.constexpr(MOST_IF_ALIKE)


@triton.jit
def number(value, STATE: tl.constexpr):
    """Return a float argument in a dtype; by itself it is float32 where kernels are interpreted."""
    return (tl.cast(0.0, STATE) + value).to(STATE)


@triton.jit
def _measured_weight(measured, matched_values, n):
    """Return what the past weighs for a batch of ``n`` values per channel."""
    ratio = tl.load(measured)
    error = tl.load(measured + 1)
    known = tl.load(measured + 3) > 0
    ratio = tl.where(known, tl.maximum(ratio, 1.0), 1.0)
    noise = tl.minimum(tl.where(known, ratio / n, 1.0), 1.0)
    inverse = noise * tl.minimum(ratio, _MOST_IF_ALIKE) * matched_values
    matched = (inverse - 1.0) / (inverse + 1.0)
    return tl.maximum(tl.minimum(noise / (noise + tl.maximum(error, 0.0)), matched), 0.0)


@triton.jit
def batch_weight_of_average(filled, history, fixed_weight, measured, n, STATE: tl.constexpr):
    """Return what a batch weighs beside a moving average.

    The average weighs ``history``, or else ``fixed_weight``, which is the values to be matched for one that
    measures.
    """
    if measured is not None:
        weight = _measured_weight(measured, number(fixed_weight, STATE), n)
    elif history is not None:
        weight = tl.load(history).to(STATE)
    else:
        weight = number(fixed_weight, STATE)
    held = (tl.load(filled) > 0).to(STATE)
    return 1.0 - held * weight


@triton.jit
def distances(record, last, memory_mean, channel, channels):
    """Return squared distances from the batch before and from the average, in variances, and who has one."""
    there = channel < channels
    mean = tl.load(record + channel, mask=there, other=0.0)
    var = tl.load(record + 3 * channels + channel, mask=there, other=0.0)
    live = var > 0
    one = tl.where(live, var, 1.0)
    step = mean - tl.load(last + channel, mask=there, other=0.0)
    off = mean - tl.load(memory_mean + channel, mask=there, other=0.0)
    return tl.where(live, step * step / one, 0.0), tl.where(live, off * off / one, 0.0), live.to(tl.int32)


@triton.jit
def measure(measured, filled, step, distance, live, n):
    """Return what has been measured once a batch of ``n`` values is, from sums over channels."""
    ratio = tl.load(measured)
    error = tl.load(measured + 1)
    last_n = tl.load(measured + 2)
    samples = tl.load(measured + 3)
    values = tl.cast(n, step.dtype)
    channels = tl.maximum(live, 1).to(step.dtype)
    per_value = step / channels / (1.0 / values + 1.0 / tl.maximum(last_n, 1.0))
    early = number(_EARLY, step.dtype)
    weight = tl.maximum(number(_MEASURED_WEIGHT, step.dtype), early / (samples + early))
    first = samples < 0
    seeded = tl.load(filled) > 0
    off = distance / channels - per_value / values
    new_ratio = tl.where(first, tl.where(seeded, values, 0.0), ratio + weight * (per_value - ratio))
    new_error = tl.where(first, tl.where(seeded, 0.0, 1.0), error + weight * (off - error))
    return new_ratio, new_error, values, tl.where(first & seeded, _SEEDED, samples + 1.0)
