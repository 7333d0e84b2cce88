"""What a moving average weighs in Triton kernels, and what a measured one learns of a batch.

See `mbnorm.memory.MeasuredAverage`; ``measured`` and ``last`` are None for a `mbnorm.memory.MovingAverage`.
"""

import triton
import triton.language as tl

from mbnorm.measures import EARLY, MEASURED_WEIGHT, MOST_IF_ALIKE, SEEDED

_MEASURED_WEIGHT = tl.constexpr(MEASURED_WEIGHT)
_EARLY = tl.constexpr(EARLY)
_SEEDED = tl.constexpr(SEEDED)
_MOST_IF_ALIKE = tl.constexpr(MOST_IF_ALIKE)


@triton.jit
def _measured_weight(measured, matched_values, n):
    """Return what the past weighs for a batch of ``n`` values per channel; float64."""
    ratio = tl.load(measured).to(tl.float64)
    error = tl.load(measured + 1).to(tl.float64)
    known = tl.load(measured + 3) > 0
    ratio = tl.where(known, tl.maximum(ratio, 1.0), 1.0)
    noise = tl.minimum(tl.where(known, ratio / n, 1.0), 1.0)
    inverse = noise * tl.minimum(ratio, _MOST_IF_ALIKE) * matched_values
    matched = (inverse - 1.0) / (inverse + 1.0)
    return tl.maximum(tl.minimum(noise / (noise + tl.maximum(error, 0.0)), matched), 0.0)


@triton.jit
def batch_weight_of_average(filled, history, fixed_weight, measured, n):
    """Return what a batch weighs beside a moving average; float64.

    The average weighs ``history``, or else ``fixed_weight``, which is the values to be matched for one that
    measures.
    """
    if measured is not None:
        weight = _measured_weight(measured, fixed_weight, n)
    elif history is not None:
        weight = tl.load(history).to(tl.float64)
    else:
        weight = fixed_weight
    held = (tl.load(filled) > 0).to(tl.float64)
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
    """Return what has been measured once a batch of ``n`` values is, from sums over channels; float64."""
    ratio = tl.load(measured).to(tl.float64)
    error = tl.load(measured + 1).to(tl.float64)
    last_n = tl.load(measured + 2).to(tl.float64)
    samples = tl.load(measured + 3).to(tl.float64)
    values = tl.cast(n, tl.float64)
    channels = tl.maximum(live, 1).to(tl.float64)
    per_value = step.to(tl.float64) / channels / (1.0 / values + 1.0 / tl.maximum(last_n, 1.0))
    # the zeros, since a float alone is float32 where kernels are interpreted
    late = 0.0 * samples + _MEASURED_WEIGHT
    weight = tl.maximum(late, (0.0 * samples + _EARLY) / (samples + _EARLY))
    first = samples < 0
    seeded = tl.load(filled) > 0
    off = distance.to(tl.float64) / channels - per_value / values
    new_ratio = tl.where(first, tl.where(seeded, values, 0.0), ratio + weight * (per_value - ratio))
    new_error = tl.where(first, tl.where(seeded, 0.0, 1.0), error + weight * (off - error))
    return new_ratio, new_error, values, tl.where(first & seeded, _SEEDED, samples + 1.0)
