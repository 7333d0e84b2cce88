"""The forward as Triton kernels: one for short channels, three for long ones."""

import triton
import triton.language as tl

from mbnorm.backends.triton_average import batch_weight_of_average
from mbnorm.backends.triton_tiles import my_channels, my_tiles, tile


@triton.jit
def _pool(count, mean, rest, m2, AXIS: tl.constexpr):
    """Return groups together: values, mean and what rounding took from it, squared deviations.

    Equal means stay as they are.
    """
    # channels that are not there have no values
    total = tl.maximum(tl.sum(count, AXIS), 1.0)
    rough = tl.sum(count * mean, AXIS) / total
    away = mean - tl.expand_dims(rough, AXIS) + rest
    finer = tl.sum(count * away, AXIS) / total
    away -= tl.expand_dims(finer, AXIS)
    return total, rough, finer, tl.sum(m2 + count * away * away, AXIS)


@triton.jit
def _moments(
    x,
    channel,
    begin,
    end,
    channels,
    outer,
    inner,
    STATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Return what `_pool` does, means from a centre near the channel's values, and that centre."""
    count = tl.zeros((1, BLOCK_O * BLOCK_I), STATE)
    mean = tl.zeros((BLOCK_C, BLOCK_O * BLOCK_I), STATE)
    m2 = tl.zeros((BLOCK_C, BLOCK_O * BLOCK_I), STATE)
    # the mean of some values: those from near it are exact, and so are sums of them, to rounding
    offsets, mask, valid = tile(0, channel, channels, outer, inner, ROWS, BLOCK_O, BLOCK_I)
    first = tl.load(x + offsets, mask=mask, other=0.0).to(STATE)
    centre = tl.sum(first, 1) / tl.sum(valid.to(STATE), 0)
    for step in range(begin, end):
        offsets, mask, valid = tile(step, channel, channels, outer, inner, ROWS, BLOCK_O, BLOCK_I)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(STATE) - centre[:, None]
        delta = tl.where(mask, values - mean, 0.0)
        # every lane that is still there has seen as many values
        mean += delta * (1.0 / tl.cast(step - begin + 1, STATE))
        m2 += delta * (values - mean)
        count += valid.to(STATE)[None, :]
    total, mean, rest, m2 = _pool(count, mean, 0.0, m2, 1)
    return total, mean, rest, m2, centre


@triton.jit
def _blend(
    batch_mean,
    batch_var,
    past_mean,
    past_var,
    batch_weight,
    filled,
    history,
    fixed_weight,
    measured,
    n,
    record,
    channel,
    channels,
    POOLED: tl.constexpr,
):
    """Return the blended mean and variance; write them and the batch's.

    The past is that of ``past_mean`` and ``past_var``, or else what the record has of it. The batch weighs
    ``batch_weight``, or else what follows from an average that is ``filled`` or not, or what the record has.
    """
    there = channel < channels
    if past_mean is None:
        past_mean = record + 4 * channels
        past_var = record + 5 * channels
        batch_weight = record + 6 * channels
    old_mean = tl.load(past_mean + channel, mask=there, other=0.0)
    old_var = tl.load(past_var + channel, mask=there, other=1.0)
    if batch_weight is None:
        STATE: tl.constexpr = record.dtype.element_ty
        weight = batch_weight_of_average(filled, history, fixed_weight, measured, n, STATE)
    else:
        weight = tl.load(batch_weight)
    rest = 1.0 - weight
    mean = weight * batch_mean + rest * old_mean
    var = weight * batch_var + rest * old_var
    if POOLED:
        away = batch_mean - old_mean
        var += weight * rest * away * away
    tl.store(record + channel, batch_mean, mask=there)
    tl.store(record + channels + channel, batch_var, mask=there)
    tl.store(record + 2 * channels + channel, mean, mask=there)
    tl.store(record + 3 * channels + channel, var, mask=there)
    return mean, var


@triton.jit
def _normalize(
    x,
    y,
    weight,
    bias,
    mean,
    var,
    channel,
    begin,
    end,
    channels,
    outer,
    inner,
    EPS: tl.constexpr,
    STATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    scale = tl.rsqrt(var + EPS)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=channel < channels, other=0.0)
    shift = tl.zeros_like(scale)
    if bias is not None:
        shift += tl.load(bias + channel, mask=channel < channels, other=0.0)
    for back in range(begin, end):
        step = begin + end - 1 - back
        offsets, mask, _ = tile(step, channel, channels, outer, inner, ROWS, BLOCK_O, BLOCK_I)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(STATE)
        result = (values - mean[:, None]) * scale[:, None] + shift[:, None]
        tl.store(y + offsets, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "outer", "units", "per_split"])
def forward_whole(
    x,
    y,
    weight,
    bias,
    past_mean,
    past_var,
    batch_weight,
    filled,
    history,
    fixed_weight: tl.float64,
    measured,
    n,
    record,
    channels,
    outer,
    units,
    per_split,
    EPS: tl.constexpr,
    POOLED: tl.constexpr,
    STATE: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """All of a forward, for channels that one program can go through twice."""
    inner = units * UNIT
    channel = my_channels(BLOCK_C)
    begin, end = my_tiles(outer, inner, per_split, BLOCK_O, BLOCK_I)
    total, mean, rest, m2, centre = _moments(
        x, channel, begin, end, channels, outer, inner, STATE, ROWS, BLOCK_C, BLOCK_O, BLOCK_I
    )
    # where an outlier has pulled the centre away, the first sum cancels, and the rest counts
    mean = centre + mean + rest
    mean, var = _blend(
        mean,
        m2 / total,
        past_mean,
        past_var,
        batch_weight,
        filled,
        history,
        fixed_weight,
        measured,
        n,
        record,
        channel,
        channels,
        POOLED,
    )
    _normalize(
        x,
        y,
        weight,
        bias,
        mean,
        var,
        channel,
        begin,
        end,
        channels,
        outer,
        inner,
        EPS,
        STATE,
        ROWS,
        BLOCK_O,
        BLOCK_I,
    )


@triton.jit(do_not_specialize=["outer", "units", "per_split"])
def moments_part(
    x,
    parts,
    channels,
    outer,
    units,
    per_split,
    STATE: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """What `_moments` finds in a part of the values: rows of ``parts``, (5, splits, C)."""
    inner = units * UNIT
    channel = my_channels(BLOCK_C)
    begin, end = my_tiles(outer, inner, per_split, BLOCK_O, BLOCK_I)
    total, mean, rest, m2, centre = _moments(
        x, channel, begin, end, channels, outer, inner, STATE, ROWS, BLOCK_C, BLOCK_O, BLOCK_I
    )
    there = channel < channels
    row = tl.program_id(1).to(tl.int64) * channels + channel
    rows = tl.num_programs(1).to(tl.int64) * channels
    tl.store(parts + row, tl.zeros_like(mean) + total, mask=there)
    tl.store(parts + rows + row, mean, mask=there)
    tl.store(parts + 2 * rows + row, rest, mask=there)
    tl.store(parts + 3 * rows + row, m2, mask=there)
    tl.store(parts + 4 * rows + row, centre, mask=there)


@triton.jit(do_not_specialize=["n", "splits"])
def blend_parts(
    parts,
    past_mean,
    past_var,
    batch_weight,
    filled,
    history,
    fixed_weight: tl.float64,
    measured,
    n,
    record,
    channels,
    splits,
    POOLED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The statistics, of all parts together."""
    channel = my_channels(BLOCK_C)
    split = tl.arange(0, BLOCK_S)
    mask = (split < splits)[:, None] & (channel < channels)[None, :]
    place = parts + split.to(tl.int64)[:, None] * channels + channel[None, :]
    rows = tl.cast(splits, tl.int64) * channels
    count = tl.load(place, mask=mask, other=0.0)
    mean = tl.load(place + rows, mask=mask, other=0.0)
    rest = tl.load(place + 2 * rows, mask=mask, other=0.0)
    m2 = tl.load(place + 3 * rows, mask=mask, other=0.0)
    total, mean, rest, m2 = _pool(count, mean, rest, m2, 0)
    # all parts have the same centre
    centre = tl.load(parts + 4 * rows + channel, mask=channel < channels, other=0.0)
    mean = centre + mean + rest
    _blend(
        mean,
        m2 / total,
        past_mean,
        past_var,
        batch_weight,
        filled,
        history,
        fixed_weight,
        measured,
        n,
        record,
        channel,
        channels,
        POOLED,
    )


@triton.jit(do_not_specialize=["outer", "units", "per_split"])
def normalize_part(
    x,
    y,
    weight,
    bias,
    record,
    channels,
    outer,
    units,
    per_split,
    EPS: tl.constexpr,
    STATE: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """The output for a part of the values."""
    inner = units * UNIT
    channel = my_channels(BLOCK_C, True)
    begin, end = my_tiles(outer, inner, per_split, BLOCK_O, BLOCK_I, True)
    mean = tl.load(record + 2 * channels + channel, mask=channel < channels, other=0.0)
    var = tl.load(record + 3 * channels + channel, mask=channel < channels, other=1.0)
    _normalize(
        x,
        y,
        weight,
        bias,
        mean,
        var,
        channel,
        begin,
        end,
        channels,
        outer,
        inner,
        EPS,
        STATE,
        ROWS,
        BLOCK_O,
        BLOCK_I,
    )
