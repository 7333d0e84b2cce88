"""The forward by Triton kernels: one launch for short channels, three for long ones."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbnorm.backends.triton_cut import parts_cut
from mbnorm.backends.triton_launch import (
    ROWS,
    Kind,
    contiguous,
    forward_shapes,
    kind_of,
    launch,
    on_device_of,
    register,
)
from mbnorm.backends.triton_statistics import POOLED, blend, matched_history_weight, ruled
from mbnorm.backends.triton_tiles import channel_offsets, tile_offsets, tile_range


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
    x_ptr,
    offs_c,
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
    offs, mask, lane_mask = tile_offsets(0, offs_c, channels, outer, inner, ROWS, BLOCK_O, BLOCK_I)
    first = tl.load(x_ptr + offs, mask=mask, other=0.0).to(STATE)
    centre = tl.sum(first, 1) / tl.sum(lane_mask.to(STATE), 0)
    for step in range(begin, end):
        offs, mask, lane_mask = tile_offsets(step, offs_c, channels, outer, inner, ROWS, BLOCK_O, BLOCK_I)
        values = tl.load(x_ptr + offs, mask=mask, other=0.0).to(STATE) - centre[:, None]
        delta = tl.where(mask, values - mean, 0.0)
        # every lane that is still there has seen as many values
        mean += delta * (1.0 / tl.cast(step - begin + 1, STATE))
        m2 += delta * (values - mean)
        count += lane_mask.to(STATE)[None, :]
    total, mean, rest, m2 = _pool(count, mean, 0.0, m2, 1)
    return total, mean, rest, m2, centre


@triton.jit
def _batch_weight(
    filled_ptr, history_weight_ptr, measured_ptr, matched_batch_size, m, n, MEASURED: tl.constexpr
):
    """Return the weight of a batch beside a moving average."""
    if measured_ptr is None:
        history_weight = tl.load(history_weight_ptr)
    else:
        history_weight = matched_history_weight(measured_ptr, matched_batch_size, m, n, MEASURED)
    return 1.0 - tl.where(tl.load(filled_ptr) > 0, history_weight, 0.0)


@triton.jit
def _blend(
    batch_mean,
    batch_var,
    past_mean_ptr,
    past_var_ptr,
    batch_weight_ptr,
    filled_ptr,
    history_weight_ptr,
    measured_ptr,
    matched_batch_size,
    m,
    n,
    record_ptr,
    offs_c,
    channels,
    MEASURED: tl.constexpr,
    RULE: tl.constexpr,
):
    """Return the blended mean and variance, and write the record; see `Past`."""
    mask = offs_c < channels
    if past_mean_ptr is None:
        past_mean = tl.load(record_ptr + 4 * channels + offs_c, mask=mask, other=0.0)
        past_var = tl.load(record_ptr + 5 * channels + offs_c, mask=mask, other=1.0)
        batch_weight = tl.load(record_ptr + 6 * channels)
    else:
        past_mean = tl.load(past_mean_ptr + offs_c, mask=mask, other=0.0)
        past_var = tl.load(past_var_ptr + offs_c, mask=mask, other=1.0)
        if batch_weight_ptr is None:
            batch_weight = _batch_weight(
                filled_ptr, history_weight_ptr, measured_ptr, matched_batch_size, m, n, MEASURED
            )
        else:
            batch_weight = tl.load(batch_weight_ptr)
        tl.store(record_ptr + 4 * channels + offs_c, past_mean, mask=mask)
        tl.store(record_ptr + 5 * channels + offs_c, past_var, mask=mask)
        tl.store(record_ptr + 6 * channels + offs_c, tl.zeros_like(past_mean) + batch_weight, mask=mask)
    batch_mean, batch_var = ruled(batch_mean, batch_var, RULE)
    mean, var = blend(batch_mean, batch_var, past_mean, past_var, batch_weight, RULE == POOLED)
    tl.store(record_ptr + offs_c, batch_mean, mask=mask)
    tl.store(record_ptr + channels + offs_c, batch_var, mask=mask)
    tl.store(record_ptr + 2 * channels + offs_c, mean, mask=mask)
    tl.store(record_ptr + 3 * channels + offs_c, var, mask=mask)
    return mean, var


@triton.jit
def _normalize(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    mean,
    var,
    offs_c,
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
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + offs_c, mask=offs_c < channels, other=0.0)
    shift = tl.zeros_like(scale)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + offs_c, mask=offs_c < channels, other=0.0)
    for back in range(begin, end):
        step = begin + end - 1 - back
        offs, mask, _ = tile_offsets(step, offs_c, channels, outer, inner, ROWS, BLOCK_O, BLOCK_I)
        values = tl.load(x_ptr + offs, mask=mask, other=0.0).to(STATE)
        result = (values - mean[:, None]) * scale[:, None] + shift[:, None]
        tl.store(y_ptr + offs, result.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "outer", "units", "per_split"])
def forward_whole(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    past_mean_ptr,
    past_var_ptr,
    batch_weight_ptr,
    filled_ptr,
    history_weight_ptr,
    measured_ptr,
    matched_batch_size: tl.float64,
    m: tl.float64,
    n,
    record_ptr,
    channels,
    outer,
    units,
    per_split,
    EPS: tl.constexpr,
    MEASURED: tl.constexpr,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """All of a forward, for channels that one program can go through twice."""
    STATE: tl.constexpr = record_ptr.dtype.element_ty
    inner = units * UNIT
    offs_c = channel_offsets(BLOCK_C)
    begin, end = tile_range(outer, inner, per_split, BLOCK_O, BLOCK_I)
    total, mean, rest, m2, centre = _moments(
        x_ptr, offs_c, begin, end, channels, outer, inner, STATE, ROWS, BLOCK_C, BLOCK_O, BLOCK_I
    )
    # where an outlier has pulled the centre away, the first sum cancels, and the rest counts
    mean = centre + mean + rest
    mean, var = _blend(
        mean,
        m2 / total,
        past_mean_ptr,
        past_var_ptr,
        batch_weight_ptr,
        filled_ptr,
        history_weight_ptr,
        measured_ptr,
        matched_batch_size,
        m,
        n,
        record_ptr,
        offs_c,
        channels,
        MEASURED,
        RULE,
    )
    _normalize(
        x_ptr,
        y_ptr,
        weight_ptr,
        bias_ptr,
        mean,
        var,
        offs_c,
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
    x_ptr,
    parts_ptr,
    channels,
    outer,
    units,
    per_split,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """What `_moments` finds in a part of the values: rows of ``parts``, (5, splits, C)."""
    STATE: tl.constexpr = parts_ptr.dtype.element_ty
    inner = units * UNIT
    offs_c = channel_offsets(BLOCK_C)
    begin, end = tile_range(outer, inner, per_split, BLOCK_O, BLOCK_I)
    total, mean, rest, m2, centre = _moments(
        x_ptr, offs_c, begin, end, channels, outer, inner, STATE, ROWS, BLOCK_C, BLOCK_O, BLOCK_I
    )
    mask = offs_c < channels
    offs = tl.program_id(1).to(tl.int64) * channels + offs_c
    row = tl.num_programs(1).to(tl.int64) * channels
    tl.store(parts_ptr + offs, tl.zeros_like(mean) + total, mask=mask)
    tl.store(parts_ptr + row + offs, mean, mask=mask)
    tl.store(parts_ptr + 2 * row + offs, rest, mask=mask)
    tl.store(parts_ptr + 3 * row + offs, m2, mask=mask)
    tl.store(parts_ptr + 4 * row + offs, centre, mask=mask)


@triton.jit(do_not_specialize=["n", "splits"])
def blend_parts(
    parts_ptr,
    past_mean_ptr,
    past_var_ptr,
    batch_weight_ptr,
    filled_ptr,
    history_weight_ptr,
    measured_ptr,
    matched_batch_size: tl.float64,
    m: tl.float64,
    n,
    record_ptr,
    channels,
    splits,
    MEASURED: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The record, of all parts together."""
    offs_c = channel_offsets(BLOCK_C)
    offs_s = tl.arange(0, BLOCK_S)
    mask = (offs_s < splits)[:, None] & (offs_c < channels)[None, :]
    offs = offs_s.to(tl.int64)[:, None] * channels + offs_c[None, :]
    row = tl.cast(splits, tl.int64) * channels
    count = tl.load(parts_ptr + offs, mask=mask, other=0.0)
    mean = tl.load(parts_ptr + row + offs, mask=mask, other=0.0)
    rest = tl.load(parts_ptr + 2 * row + offs, mask=mask, other=0.0)
    m2 = tl.load(parts_ptr + 3 * row + offs, mask=mask, other=0.0)
    total, mean, rest, m2 = _pool(count, mean, rest, m2, 0)
    # all parts have the same centre
    centre = tl.load(parts_ptr + 4 * row + offs_c, mask=offs_c < channels, other=0.0)
    mean = centre + mean + rest
    _blend(
        mean,
        m2 / total,
        past_mean_ptr,
        past_var_ptr,
        batch_weight_ptr,
        filled_ptr,
        history_weight_ptr,
        measured_ptr,
        matched_batch_size,
        m,
        n,
        record_ptr,
        offs_c,
        channels,
        MEASURED,
        RULE,
    )


@triton.jit(do_not_specialize=["outer", "units", "per_split"])
def normalize_part(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    record_ptr,
    channels,
    outer,
    units,
    per_split,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """The output for a part of the values."""
    STATE: tl.constexpr = record_ptr.dtype.element_ty
    inner = units * UNIT
    offs_c = channel_offsets(BLOCK_C, True)
    begin, end = tile_range(outer, inner, per_split, BLOCK_O, BLOCK_I, True)
    mean = tl.load(record_ptr + 2 * channels + offs_c, mask=offs_c < channels, other=0.0)
    var = tl.load(record_ptr + 3 * channels + offs_c, mask=offs_c < channels, other=1.0)
    _normalize(
        x_ptr,
        y_ptr,
        weight_ptr,
        bias_ptr,
        mean,
        var,
        offs_c,
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


class Past(NamedTuple):
    """What a batch is blended with, as the kernels take it; without ``mean`` the record has it.

    The batch has the weight ``batch_weight``, or what a moving average leaves: one that is ``filled`` has the
    weight ``history_weight``, or that which matches ``matched_batch_size`` for a batch of ``m`` samples with
    ``n`` values per channel.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    batch_weight: Tensor | None = None
    filled: Tensor | None = None
    history_weight: Tensor | None = None
    measured: Tensor | None = None
    matched_batch_size: float = 0.0
    m: float = 1.0
    n: int = 1


IN_THE_RECORD = Past()


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past_mean: Tensor,
    past_var: Tensor,
    batch_weight: Tensor,
    rule: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return ``y`` and the record."""
    kind = kind_of(x)
    record = x.new_empty((ROWS, kind.channels), dtype=kind.state)
    past = Past(past_mean.contiguous(), past_var.contiguous(), batch_weight.to(x.device))
    with on_device_of(x):
        return normalize(kind, x, weight, bias, past, False, record, rule, eps), record


def normalize(
    kind: Kind,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past: Past,
    measured: bool,
    record: Tensor,
    rule: int,
    eps: float,
) -> Tensor:
    """Return ``y``, and write the record, on the current device.

    ``measured`` lets an average that measures weigh what follows from its measures.
    """
    x = x if kind.dense else x.contiguous()
    y = torch.empty_like(x)
    made, channels = kind.cut, kind.channels
    weight, bias = contiguous(weight), contiguous(bias)
    grid, warps = (made.blocks, made.splits), made.warps
    given = past.mean is None, past.filled is None, past.measured is None, measured
    key: Any = kind.number, weight is None, bias is None, given, rule, eps
    values = x, y, weight, bias
    if made.splits == 1:
        rules = eps, measured, rule, *kind.layout
        launch(forward_whole, grid, key, *values, *past, record, *kind.sizes, *rules, warps=warps)
        return y
    parts = x.new_empty((5, made.splits, channels), dtype=kind.state)
    s, c, blocks = parts_cut(made.splits, channels)
    launch(moments_part, grid, key, x, parts, *kind.sizes, *kind.layout, warps=warps)
    numbers = channels, made.splits, measured, rule, s, c
    launch(blend_parts, (blocks, 1), (key, s, c), parts, *past, record, *numbers)
    launch(normalize_part, grid, key, *values, record, *kind.sizes, eps, *kind.layout, warps=warps)
    return y


register(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor past_mean, Tensor past_var, Tensor batch_weight, "
    "int rule, float eps) -> (Tensor, Tensor)",
    forward,
    forward_shapes,
)
