"""The backward by Triton kernels: one launch for short channels, three for long ones."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbnorm.backends.triton_cut import parts_cut
from mbnorm.backends.triton_launch import contiguous, empty_like, kind_of, launch, on_device_of, register
from mbnorm.backends.triton_statistics import POOLED, UNCENTERED
from mbnorm.backends.triton_tiles import channel_offsets, tile_offsets, tile_range
from mbnorm.blend import statistics_dtype

PAST_ROWS = 3
"""Of what is read of a remembered gradient: its two means, and the weight of the batch beside them."""
MOST_AT_ONCE = 1024
"""Channels that one program remembers at a time."""


@triton.jit
def _sums(
    dy_ptr,
    x_ptr,
    mean,
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
    """Return the sums of dy (x - mean) and of dy."""
    product = tl.zeros((BLOCK_C, BLOCK_O * BLOCK_I), STATE)
    plain = tl.zeros((BLOCK_C, BLOCK_O * BLOCK_I), STATE)
    for step in range(begin, end):
        offs, mask, _ = tile_offsets(step, offs_c, channels, outer, inner, ROWS, BLOCK_O, BLOCK_I)
        gradient = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(STATE)
        values = tl.load(x_ptr + offs, mask=mask, other=0.0).to(STATE)
        # a value that is not there has no gradient, whatever the mean
        product += tl.where(mask, gradient * (values - mean[:, None]), 0.0)
        plain += gradient
    return tl.sum(product, 1), tl.sum(plain, 1)


@triton.jit
def _weight_of_batch(record_ptr, past_ptr, past_scale_ptr, channels):
    """Return the weight of the batch beside the past means: one tensor, or two that are remembered."""
    if past_ptr is not None and past_scale_ptr is None:
        weight = tl.load(past_ptr + 2 * channels)
    else:
        weight = tl.load(record_ptr + 6 * channels)
        if past_ptr is not None:
            squared = (1 - weight) * (1 - weight)
            weight = 1 - squared * squared
    return weight


@triton.jit
def _input_gradient(
    dy_ptr,
    x_ptr,
    dx_ptr,
    weight_ptr,
    record_ptr,
    past_ptr,
    past_scale_ptr,
    dw,
    db,
    offs_c,
    begin,
    end,
    channels,
    outer,
    inner,
    EPS: tl.constexpr,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    STATE: tl.constexpr = record_ptr.dtype.element_ty
    channel_mask = offs_c < channels
    rstd = tl.rsqrt(tl.load(record_ptr + 3 * channels + offs_c, mask=channel_mask, other=1.0) + EPS)
    scale = rstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + offs_c, mask=channel_mask, other=0.0)
    # of the pooled variance the gradient is about the blended mean, of the averaged about the batch's
    row = 2 * channels if RULE == POOLED else 0
    centre = tl.load(record_ptr + row + offs_c, mask=channel_mask, other=0.0)
    batch_weight = _weight_of_batch(record_ptr, past_ptr, past_scale_ptr, channels)
    share = batch_weight / (tl.cast(outer, STATE) * tl.cast(inner, STATE))
    level = share * db
    slope = share * rstd * dw
    if past_ptr is not None:
        level += (1 - batch_weight) * tl.load(past_ptr + offs_c, mask=channel_mask, other=0.0)
        scale_ptr = past_ptr + channels if past_scale_ptr is None else past_scale_ptr
        past_scale = tl.load(scale_ptr + offs_c, mask=channel_mask, other=0.0)
        slope += (1 - batch_weight) * rstd * past_scale
    if RULE == UNCENTERED:
        level = tl.zeros_like(level)
    for back in range(begin, end):
        step = begin + end - 1 - back
        offs, mask, _ = tile_offsets(step, offs_c, channels, outer, inner, ROWS, BLOCK_O, BLOCK_I)
        gradient = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(STATE)
        values = tl.load(x_ptr + offs, mask=mask, other=0.0).to(STATE)
        distance = values - centre[:, None]
        result = scale[:, None] * (gradient - level[:, None] - slope[:, None] * distance)
        tl.store(dx_ptr + offs, result.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["outer", "units", "per_split"])
def backward_whole(
    dy_ptr,
    x_ptr,
    dx_ptr,
    weight_ptr,
    record_ptr,
    past_ptr,
    past_scale_ptr,
    dw_ptr,
    db_ptr,
    channels,
    outer,
    units,
    per_split,
    EPS: tl.constexpr,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """All of a backward, for channels that one program can go through twice; without ``dx`` once."""
    STATE: tl.constexpr = record_ptr.dtype.element_ty
    inner = units * UNIT
    offs_c = channel_offsets(BLOCK_C)
    mask = offs_c < channels
    begin, end = tile_range(outer, inner, per_split, BLOCK_O, BLOCK_I)
    mean = tl.load(record_ptr + 2 * channels + offs_c, mask=mask, other=0.0)
    var = tl.load(record_ptr + 3 * channels + offs_c, mask=mask, other=1.0)
    product, db = _sums(
        dy_ptr,
        x_ptr,
        mean,
        offs_c,
        begin,
        end,
        channels,
        outer,
        inner,
        STATE,
        ROWS,
        BLOCK_C,
        BLOCK_O,
        BLOCK_I,
    )
    dw = product * tl.rsqrt(var + EPS)
    tl.store(dw_ptr + offs_c, dw, mask=mask)
    tl.store(db_ptr + offs_c, db, mask=mask)
    if dx_ptr is not None:
        _input_gradient(
            dy_ptr,
            x_ptr,
            dx_ptr,
            weight_ptr,
            record_ptr,
            past_ptr,
            past_scale_ptr,
            dw,
            db,
            offs_c,
            begin,
            end,
            channels,
            outer,
            inner,
            EPS,
            RULE,
            ROWS,
            BLOCK_O,
            BLOCK_I,
        )


@triton.jit(do_not_specialize=["outer", "units", "per_split"])
def sums_part(
    dy_ptr,
    x_ptr,
    record_ptr,
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
    """The sums of dy (x - mean) and of dy over a part of the values: rows of ``parts``, (2, splits, C)."""
    STATE: tl.constexpr = record_ptr.dtype.element_ty
    inner = units * UNIT
    offs_c = channel_offsets(BLOCK_C)
    mask = offs_c < channels
    begin, end = tile_range(outer, inner, per_split, BLOCK_O, BLOCK_I)
    mean = tl.load(record_ptr + 2 * channels + offs_c, mask=mask, other=0.0)
    product, plain = _sums(
        dy_ptr,
        x_ptr,
        mean,
        offs_c,
        begin,
        end,
        channels,
        outer,
        inner,
        STATE,
        ROWS,
        BLOCK_C,
        BLOCK_O,
        BLOCK_I,
    )
    offs = tl.program_id(1).to(tl.int64) * channels + offs_c
    tl.store(parts_ptr + offs, product, mask=mask)
    tl.store(parts_ptr + tl.num_programs(1).to(tl.int64) * channels + offs, plain, mask=mask)


@triton.jit(do_not_specialize=["splits"])
def add_parts(
    parts_ptr,
    record_ptr,
    dw_ptr,
    db_ptr,
    channels,
    splits,
    EPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of weight and bias, of all parts together."""
    offs_c = channel_offsets(BLOCK_C)
    channel_mask = offs_c < channels
    offs_s = tl.arange(0, BLOCK_S)
    mask = (offs_s < splits)[:, None] & channel_mask[None, :]
    offs = offs_s.to(tl.int64)[:, None] * channels + offs_c[None, :]
    row = tl.cast(splits, tl.int64) * channels
    product = tl.sum(tl.load(parts_ptr + offs, mask=mask, other=0.0), 0)
    plain = tl.sum(tl.load(parts_ptr + row + offs, mask=mask, other=0.0), 0)
    var = tl.load(record_ptr + 3 * channels + offs_c, mask=channel_mask, other=1.0)
    tl.store(dw_ptr + offs_c, product * tl.rsqrt(var + EPS), mask=channel_mask)
    tl.store(db_ptr + offs_c, plain, mask=channel_mask)


@triton.jit(do_not_specialize=["outer", "units", "per_split"])
def input_gradient_part(
    dy_ptr,
    x_ptr,
    dx_ptr,
    weight_ptr,
    record_ptr,
    past_ptr,
    past_scale_ptr,
    dw_ptr,
    db_ptr,
    channels,
    outer,
    units,
    per_split,
    EPS: tl.constexpr,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """The gradient of the input for a part of the values."""
    inner = units * UNIT
    offs_c = channel_offsets(BLOCK_C, True)
    mask = offs_c < channels
    begin, end = tile_range(outer, inner, per_split, BLOCK_O, BLOCK_I, True)
    dw = tl.load(dw_ptr + offs_c, mask=mask, other=0.0)
    db = tl.load(db_ptr + offs_c, mask=mask, other=0.0)
    _input_gradient(
        dy_ptr,
        x_ptr,
        dx_ptr,
        weight_ptr,
        record_ptr,
        past_ptr,
        past_scale_ptr,
        dw,
        db,
        offs_c,
        begin,
        end,
        channels,
        outer,
        inner,
        EPS,
        RULE,
        ROWS,
        BLOCK_O,
        BLOCK_I,
    )


@triton.jit(do_not_specialize=["n"])
def remember(
    record_ptr,
    dw_ptr,
    db_ptr,
    mean_ptr,
    scale_ptr,
    past_ptr,
    channels,
    n,
    STORE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the past means into ``past``, and replace them by their blend with the batch.

    Only if that is finite, and so are the batch's statistics.
    """
    STATE: tl.constexpr = record_ptr.dtype.element_ty
    weight = _weight_of_batch(record_ptr, mean_ptr, scale_ptr, channels)
    share = weight / tl.cast(n, STATE)
    wrong = tl.zeros((BLOCK_C,), tl.int32)
    for first in range(0, channels, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask = offs_c < channels
        mean = tl.load(mean_ptr + offs_c, mask=mask, other=0.0)
        scale = tl.load(scale_ptr + offs_c, mask=mask, other=0.0)
        tl.store(past_ptr + offs_c, mean, mask=mask)
        tl.store(past_ptr + channels + offs_c, scale, mask=mask)
        tl.store(past_ptr + 2 * channels + offs_c, tl.zeros((BLOCK_C,), STATE) + weight, mask=mask)
        mean = (1 - weight) * mean + share * tl.load(db_ptr + offs_c, mask=mask, other=0.0)
        scale = (1 - weight) * scale + share * tl.load(dw_ptr + offs_c, mask=mask, other=0.0)
        finite = (tl.abs(mean) < float("inf")) & (tl.abs(scale) < float("inf"))
        for row in tl.static_range(4):
            number = tl.load(record_ptr + row * channels + offs_c, mask=mask, other=0.0)
            finite &= tl.abs(number) < float("inf")
        wrong += tl.where(mask & (finite == 0), 1, 0)
    if STORE:
        finite = tl.sum(wrong, 0) == 0
        # no thread overwrites what another has yet to read
        tl.debug_barrier()
        for first in range(0, channels, BLOCK_C):
            offs_c = first + tl.arange(0, BLOCK_C)
            mask = offs_c < channels
            mean = tl.load(past_ptr + offs_c, mask=mask, other=0.0)
            scale = tl.load(past_ptr + channels + offs_c, mask=mask, other=0.0)
            mean = (1 - weight) * mean + share * tl.load(db_ptr + offs_c, mask=mask, other=0.0)
            scale = (1 - weight) * scale + share * tl.load(dw_ptr + offs_c, mask=mask, other=0.0)
            tl.store(mean_ptr + offs_c, mean, mask=mask & finite)
            tl.store(scale_ptr + offs_c, scale, mask=mask & finite)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    record: Tensor,
    past: Tensor | None,
    rule: int,
    eps: float,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``dx``, empty if it is not needed, ``dw`` and ``db``."""
    return _backward(dy, x, weight, record, past, None, rule, eps, need_dx)


def remembering_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    record: Tensor,
    mean: Tensor,
    scale: Tensor,
    rule: int,
    eps: float,
    need_dx: bool,
    store: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do as `backward` with past means ``mean`` and ``scale``; return them, too, and ``store`` or not."""
    gradients = _backward(dy, x, weight, record, mean, scale, rule, eps, need_dx)
    _, dw, db = gradients
    kind = kind_of(x)
    past = x.new_empty((PAST_ROWS, kind.channels), dtype=kind.state)
    block = min(triton.next_power_of_2(kind.channels), MOST_AT_ONCE)
    values = record.contiguous(), dw, db, mean, scale, past
    with on_device_of(x):
        key = kind.number, store
        launch(remember, (1, 1), key, *values, kind.channels, kind.n, store, block)
    return *gradients, past


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    record: Tensor,
    past: Tensor | None,
    past_scale: Tensor | None,
    rule: int,
    eps: float,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kind = kind_of(x)
    x = x if kind.dense else x.contiguous()
    if dy.stride() != x.stride() or dy.dtype != x.dtype:
        dy = torch.empty_like(x).copy_(dy)
    dx = torch.empty_like(x) if need_dx else None
    made, channels = kind.cut, kind.channels
    dw, db = (x.new_empty(channels, dtype=kind.state) for _ in range(2))
    grid, warps = (made.blocks, made.splits), made.warps
    weight, past, record = contiguous(weight), contiguous(past), record.contiguous()
    values = dy, x, dx, weight, record, past, past_scale, dw, db
    key: Any = kind.number, weight is None, past is None, past_scale is None, need_dx, rule, eps
    rules = *kind.sizes, eps, rule, *kind.layout
    with on_device_of(x):
        if made.splits == 1:
            launch(backward_whole, grid, key, *values, *rules, warps=warps)
        else:
            parts = x.new_empty((2, made.splits, channels), dtype=kind.state)
            s, c, blocks = parts_cut(made.splits, channels)
            launch(sums_part, grid, key, dy, x, record, parts, *kind.sizes, *kind.layout, warps=warps)
            numbers = channels, made.splits, eps, s, c
            launch(add_parts, (blocks, 1), (key, s, c), parts, record, dw, db, *numbers)
            if need_dx:
                launch(input_gradient_part, grid, key, *values, *rules, warps=warps)
    return x.new_empty(0) if dx is None else dx, dw, db


def _shapes(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_dx = others[-1]
    dw, db = (x.new_empty(x.shape[1], dtype=statistics_dtype(x.dtype)) for _ in range(2))
    return empty_like(x) if need_dx else x.new_empty(0), dw, db


def _remembering_shapes(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, need_dx, _store = others
    past = x.new_empty((PAST_ROWS, x.shape[1]), dtype=statistics_dtype(x.dtype))
    return *_shapes(dy, x, need_dx), past


register(
    "remembering_backward(Tensor dy, Tensor x, Tensor? weight, Tensor record, Tensor(a!) mean, "
    "Tensor(b!) scale, int rule, float eps, bool need_dx, bool store) -> (Tensor, Tensor, Tensor, Tensor)",
    remembering_backward,
    _remembering_shapes,
)
register(
    "backward(Tensor dy, Tensor x, Tensor? weight, Tensor record, Tensor? past, int rule, float eps, "
    "bool need_dx) -> (Tensor, Tensor, Tensor)",
    backward,
    _shapes,
)
