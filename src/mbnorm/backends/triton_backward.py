"""The backward as Triton kernels: one for short channels, three for long ones."""

import triton
import triton.language as tl

from mbnorm.backends.triton_tiles import my_channels, my_tiles, tile


@triton.jit
def _sums(
    dy,
    x,
    mean,
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
    """Return the sums of dy (x - mean) and of dy."""
    product = tl.zeros((BLOCK_C, BLOCK_O * BLOCK_I), STATE)
    plain = tl.zeros((BLOCK_C, BLOCK_O * BLOCK_I), STATE)
    for step in range(begin, end):
        offsets, mask, _ = tile(step, channel, channels, outer, inner, ROWS, BLOCK_O, BLOCK_I)
        gradient = tl.load(dy + offsets, mask=mask, other=0.0).to(STATE)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(STATE)
        # a value that is not there has no gradient, whatever the mean
        product += tl.where(mask, gradient * (values - mean[:, None]), 0.0)
        plain += gradient
    return tl.sum(product, 1), tl.sum(plain, 1)


@triton.jit
def _input_gradient(
    dy,
    x,
    dx,
    weight,
    batch_weight,
    record,
    dw,
    db,
    channel,
    begin,
    end,
    channels,
    outer,
    inner,
    EPS: tl.constexpr,
    POOLED: tl.constexpr,
    STATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    there = channel < channels
    rstd = tl.rsqrt(tl.load(record + 3 * channels + channel, mask=there, other=1.0) + EPS)
    scale = rstd
    if weight is not None:
        scale *= tl.load(weight + channel, mask=there, other=0.0)
    # of the pooled variance the gradient is about the blended mean, of the averaged about the batch's
    centre = tl.load(record + (2 * channels if POOLED else 0) + channel, mask=there, other=0.0)
    if batch_weight is None:
        batch_weight = record + 6 * channels
    share = tl.load(batch_weight) / (tl.cast(outer, STATE) * tl.cast(inner, STATE))
    level = share * db
    slope = share * rstd * dw
    for back in range(begin, end):
        step = begin + end - 1 - back
        offsets, mask, _ = tile(step, channel, channels, outer, inner, ROWS, BLOCK_O, BLOCK_I)
        gradient = tl.load(dy + offsets, mask=mask, other=0.0).to(STATE)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(STATE)
        away = values - centre[:, None]
        result = scale[:, None] * (gradient - level[:, None] - slope[:, None] * away)
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["outer", "units", "per_split"])
def backward_whole(
    dy,
    x,
    dx,
    weight,
    batch_weight,
    record,
    parameters,
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
    """All of a backward, for channels that one program can go through twice; without ``dx`` once."""
    inner = units * UNIT
    channel = my_channels(BLOCK_C)
    there = channel < channels
    begin, end = my_tiles(outer, inner, per_split, BLOCK_O, BLOCK_I)
    mean = tl.load(record + 2 * channels + channel, mask=there, other=0.0)
    var = tl.load(record + 3 * channels + channel, mask=there, other=1.0)
    product, db = _sums(
        dy, x, mean, channel, begin, end, channels, outer, inner, STATE, ROWS, BLOCK_C, BLOCK_O, BLOCK_I
    )
    dw = product * tl.rsqrt(var + EPS)
    tl.store(parameters + channel, dw, mask=there)
    tl.store(parameters + channels + channel, db, mask=there)
    if dx is not None:
        _input_gradient(
            dy,
            x,
            dx,
            weight,
            batch_weight,
            record,
            dw,
            db,
            channel,
            begin,
            end,
            channels,
            outer,
            inner,
            EPS,
            POOLED,
            STATE,
            ROWS,
            BLOCK_O,
            BLOCK_I,
        )


@triton.jit(do_not_specialize=["outer", "units", "per_split"])
def sums_part(
    dy,
    x,
    record,
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
    """The sums of dy (x - mean) and of dy over a part of the values: rows of ``parts``, (2, splits, C)."""
    inner = units * UNIT
    channel = my_channels(BLOCK_C)
    there = channel < channels
    begin, end = my_tiles(outer, inner, per_split, BLOCK_O, BLOCK_I)
    mean = tl.load(record + 2 * channels + channel, mask=there, other=0.0)
    product, plain = _sums(
        dy, x, mean, channel, begin, end, channels, outer, inner, STATE, ROWS, BLOCK_C, BLOCK_O, BLOCK_I
    )
    row = tl.program_id(1).to(tl.int64) * channels + channel
    tl.store(parts + row, product, mask=there)
    tl.store(parts + tl.num_programs(1).to(tl.int64) * channels + row, plain, mask=there)


@triton.jit(do_not_specialize=["splits"])
def add_parts(
    parts,
    record,
    parameters,
    channels,
    splits,
    EPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of weight and bias, rows of ``parameters``, of all parts together."""
    channel = my_channels(BLOCK_C)
    there = channel < channels
    split = tl.arange(0, BLOCK_S)
    mask = (split < splits)[:, None] & there[None, :]
    place = parts + split.to(tl.int64)[:, None] * channels + channel[None, :]
    product = tl.sum(tl.load(place, mask=mask, other=0.0), 0)
    plain = tl.sum(tl.load(place + tl.cast(splits, tl.int64) * channels, mask=mask, other=0.0), 0)
    var = tl.load(record + 3 * channels + channel, mask=there, other=1.0)
    tl.store(parameters + channel, product * tl.rsqrt(var + EPS), mask=there)
    tl.store(parameters + channels + channel, plain, mask=there)


@triton.jit(do_not_specialize=["outer", "units", "per_split"])
def input_gradient_part(
    dy,
    x,
    dx,
    weight,
    batch_weight,
    record,
    parameters,
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
    """The gradient of the input for a part of the values."""
    inner = units * UNIT
    channel = my_channels(BLOCK_C, True)
    there = channel < channels
    begin, end = my_tiles(outer, inner, per_split, BLOCK_O, BLOCK_I, True)
    dw = tl.load(parameters + channel, mask=there, other=0.0)
    db = tl.load(parameters + channels + channel, mask=there, other=0.0)
    _input_gradient(
        dy,
        x,
        dx,
        weight,
        batch_weight,
        record,
        dw,
        db,
        channel,
        begin,
        end,
        channels,
        outer,
        inner,
        EPS,
        POOLED,
        STATE,
        ROWS,
        BLOCK_O,
        BLOCK_I,
    )
