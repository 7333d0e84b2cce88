"""The law of mixing statistics in Triton kernels, the weight of a moving average, and what it measures.

All is computed in the dtype of statistics: most GPUs are slow in float64.
"""

import triton
import triton.language as tl

from mbnorm import measures
from mbnorm.blend import number_of

_MEASURED_WEIGHT = tl.constexpr(measures.MEASURED_WEIGHT)
_EARLY = tl.constexpr(measures.EARLY)
POOLED = tl.constexpr(number_of("pooled"))
UNCENTERED = tl.constexpr(number_of("uncentered"))


@triton.jit
def number(value, STATE: tl.constexpr):
    """Return a float argument in a dtype; by itself it is float32 where kernels are interpreted."""
    return (tl.cast(0.0, STATE) + value).to(STATE)


@triton.jit
def ruled(mean, var, RULE: tl.constexpr):
    """Return what counts as the statistics of a batch; see `mbnorm.blend.ruled`."""
    if RULE == UNCENTERED:
        var += mean * mean
        mean = tl.zeros_like(mean)
    return mean, var


@triton.jit
def blend(new_mean, new_var, old_mean, old_var, new_weight, POOLED: tl.constexpr):
    """Return new and old statistics as one; see `mbnorm.blend.blend`."""
    old_weight = 1.0 - new_weight
    mean = new_weight * new_mean + old_weight * old_mean
    var = new_weight * new_var + old_weight * old_var
    if POOLED:
        distance = new_mean - old_mean
        var += new_weight * old_weight * distance * distance
    return mean, var


@triton.jit
def matched_history_weight(measured_ptr, matched_batch_size, m, n, MEASURED: tl.constexpr):
    """Return the history weight that matches the noise of batches of another size.

    With ``MEASURED`` it follows from the measured ratio and error, too; else from the sizes alone.
    """
    STATE: tl.constexpr = measured_ptr.dtype.element_ty
    wanted = number(matched_batch_size, STATE)
    # of samples that are independent
    inverse = wanted / number(m, STATE)
    least_error = 1.0
    if MEASURED:
        known = tl.load(measured_ptr + 3) > 0
        ratio = tl.where(known, tl.maximum(tl.load(measured_ptr), 1.0), 1.0)
        noise = tl.minimum(tl.where(known, ratio / n, 1.0), 1.0)
        inverse = tl.maximum(inverse, noise * wanted)
        least_error = noise / (noise + tl.maximum(tl.load(measured_ptr + 1), 0.0))
    return tl.maximum(tl.minimum((inverse - 1.0) / (inverse + 1.0), least_error), 0.0)


@triton.jit
def squared_distances(new_ptr, last_ptr, held_ptr, record_ptr, offs_c, channels, SQUARES: tl.constexpr):
    """Return squared distances from the batch before and from the average, in their units, and who has one.

    These are variances for means, and for mean squares the ``SQUARES`` of those.
    """
    mask = offs_c < channels
    new = tl.load(new_ptr + offs_c, mask=mask, other=0.0)
    unit = tl.load(record_ptr + 3 * channels + offs_c, mask=mask, other=0.0)
    if SQUARES:
        unit *= unit
    live = unit > 0
    divisor = tl.where(live, unit, 1.0)
    step = new - tl.load(last_ptr + offs_c, mask=mask, other=0.0)
    off = new - tl.load(held_ptr + offs_c, mask=mask, other=0.0)
    return (
        tl.where(live, step * step / divisor, 0.0),
        tl.where(live, off * off / divisor, 0.0),
        live.to(tl.int32),
    )


@triton.jit
def is_seeded(filled_ptr, measured_ptr):
    """Return whether an average holds statistics that were given to it, and no batch yet."""
    return (tl.load(measured_ptr + 3) < 0) & (tl.load(filled_ptr) > 0)


@triton.jit
def batches_seen(filled_ptr, measured_ptr):
    """Return how many batches an average that measures stands for."""
    samples = tl.load(measured_ptr + 3)
    return tl.where(is_seeded(filled_ptr, measured_ptr), -samples, samples + 1.0)


@triton.jit
def measure(measured_ptr, filled_ptr, step, distance, live, n):
    """Return what has been measured once a batch of ``n`` values is, from sums over channels."""
    ratio = tl.load(measured_ptr)
    error = tl.load(measured_ptr + 1)
    last_n = tl.load(measured_ptr + 2)
    samples = tl.load(measured_ptr + 3)
    values = tl.cast(n, step.dtype)
    channels = tl.maximum(live, 1).to(step.dtype)
    per_value = step / channels / (1.0 / values + 1.0 / tl.maximum(last_n, 1.0))
    early = number(_EARLY, step.dtype)
    sample_weight = tl.maximum(number(_MEASURED_WEIGHT, step.dtype), early / (samples + early))
    first = samples < 0
    seeded = is_seeded(filled_ptr, measured_ptr)
    off = distance / channels - per_value / values
    # what was given is right, and an empty memory becomes this batch
    new_ratio = tl.where(first, tl.where(seeded, values, 0.0), ratio + sample_weight * (per_value - ratio))
    new_error = tl.where(first, tl.where(seeded, 0.0, 1.0), error + sample_weight * (off - error))
    return new_ratio, new_error, values, batches_seen(filled_ptr, measured_ptr)
