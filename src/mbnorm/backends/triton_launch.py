"""The registered operators of the Triton backend: how a tensor is cut into programs, and their launch."""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mbnorm.backends import triton_backward, triton_forward
from mbnorm.blend import statistics_dtype

TILE = 2048
STEPS_OF_ONE = 16
"""Tiles of a channel up to which one program takes them all: launches of further kernels cost more."""
PROGRAMS_A_PROCESSOR = 8
MOST_SPLITS = 512
STATES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Cut(NamedTuple):
    """How the values of all channels are divided among programs.

    A tile has ``c`` channels and ``o`` times ``i`` values of each. Of the ``steps`` tiles a channel has, a
    program takes ``per_split``; ``blocks`` times ``splits`` programs do it all.
    """

    c: int
    o: int
    i: int
    blocks: int
    steps: int
    splits: int
    per_split: int


def power_of_two(number: int) -> int:
    """Return the next power of two."""
    return 1 << (number - 1).bit_length()


@cache
def cut(channels: int, outer: int, inner: int, rows: bool, processors: int) -> Cut:
    """Return the division for ``outer`` runs of ``inner`` values, where ``rows`` have one of each channel."""
    if rows:
        c = min(power_of_two(channels), 64)
        o, i = 1, min(power_of_two(inner), TILE // c)
    else:
        i = min(power_of_two(inner), TILE)
        o = min(power_of_two(outer), TILE // i)
        c = min(power_of_two(channels), TILE // (o * i))
    blocks = -(-channels // c)
    steps = -(-outer // o) * -(-inner // i)
    wanted = PROGRAMS_A_PROCESSOR * processors
    splits = 1
    if steps > STEPS_OF_ONE:
        splits = max(1, min(wanted // blocks, steps, MOST_SPLITS))
    per_split = -(-steps // splits)
    return Cut(c, o, i, blocks, steps, -(-steps // per_split), per_split)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _dense(x: Tensor) -> Tensor:
    """Return ``x``, copied if neither its maps nor its channels lie together."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def _runs(x: Tensor) -> tuple[int, int, bool]:
    """Return outer, inner and rows of a dense ``x``."""
    values = math.prod(x.shape[2:])
    if x.is_contiguous() and values > 1:
        return x.shape[0], values, False
    return 1, x.shape[0] * values, True


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Return what makes Triton launch on the device of ``x``: it does on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _blocks_of_parts(made: Cut, channels: int) -> tuple[int, int, int]:
    """Return how many splits and channels a program puts together, and how many programs that takes."""
    splits = power_of_two(made.splits)
    c = max(1, TILE // splits // 2)
    return splits, c, -(-channels // c)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past_mean: Tensor,
    past_var: Tensor,
    batch_weight: Tensor,
    pooled: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return ``y`` and the rows ``(batch_mean, batch_var, mean, var)``."""
    x = _dense(x)
    y = torch.empty_like(x)
    channels = x.shape[1]
    dtype = statistics_dtype(x.dtype)
    statistics = x.new_empty((4, channels), dtype=dtype)
    outer, inner, rows = _runs(x)
    made = cut(channels, outer, inner, rows, _processors(x.device))
    state, grid = STATES[dtype], (made.blocks, made.splits)
    sizes = channels, outer, inner, made.per_split
    past = past_mean.contiguous(), past_var.contiguous(), batch_weight.to(x.device)
    weight, bias = _contiguous(weight), _contiguous(bias)
    tiles = state, rows, made.c, made.o, made.i
    with on_device_of(x):
        if made.splits == 1:
            triton_forward.forward_whole[grid](
                x, y, weight, bias, *past, statistics, *sizes, eps, pooled, *tiles
            )
            return y, statistics
        parts = x.new_empty((5, made.splits, channels), dtype=dtype)
        s, c, blocks = _blocks_of_parts(made, channels)
        triton_forward.moments_part[grid](x, parts, *sizes, *tiles)
        triton_forward.blend_parts[(blocks,)](parts, *past, statistics, channels, made.splits, pooled, s, c)
        triton_forward.normalize_part[grid](x, y, weight, bias, statistics, *sizes, eps, *tiles)
    return y, statistics


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    batch_weight: Tensor,
    statistics: Tensor,
    pooled: bool,
    eps: float,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``dx``, empty if it is not needed, and the rows ``(dw, db)``."""
    x = _dense(x)
    if dy.stride() != x.stride() or dy.dtype != x.dtype:
        dy = torch.empty_like(x).copy_(dy)
    dx = torch.empty_like(x) if need_dx else None
    channels = x.shape[1]
    dtype = statistics_dtype(x.dtype)
    parameters = x.new_empty((2, channels), dtype=dtype)
    outer, inner, rows = _runs(x)
    made = cut(channels, outer, inner, rows, _processors(x.device))
    state, grid = STATES[dtype], (made.blocks, made.splits)
    sizes = channels, outer, inner, made.per_split
    weight, batch_weight = _contiguous(weight), batch_weight.to(x.device)
    statistics = statistics.contiguous()
    given = weight, batch_weight, statistics, parameters
    tiles = state, rows, made.c, made.o, made.i
    with on_device_of(x):
        if made.splits == 1:
            triton_backward.backward_whole[grid](dy, x, dx, *given, *sizes, eps, pooled, *tiles)
        else:
            parts = x.new_empty((2, made.splits, channels), dtype=dtype)
            s, c, blocks = _blocks_of_parts(made, channels)
            triton_backward.sums_part[grid](dy, x, statistics, parts, *sizes, *tiles)
            triton_backward.add_parts[(blocks,)](
                parts, statistics, parameters, channels, made.splits, eps, s, c
            )
            if need_dx:
                triton_backward.input_gradient_part[grid](dy, x, dx, *given, *sizes, eps, pooled, *tiles)
    return x.new_empty(0) if dx is None else dx, parameters


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward_shapes(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Return what `forward` does, without the values."""
    return torch.empty_like(_dense(x)), x.new_empty((4, x.shape[1]), dtype=statistics_dtype(x.dtype))


def _backward_shapes(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    need_dx = others[-1]
    dx = torch.empty_like(_dense(x)) if need_dx else x.new_empty(0)
    return dx, x.new_empty((2, x.shape[1]), dtype=statistics_dtype(x.dtype))


_library: Any = torch.library.Library("mbnorm_triton", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor past_mean, Tensor past_var, Tensor batch_weight, "
    "bool pooled, float eps) -> (Tensor, Tensor)"
)
_library.define(
    "backward(Tensor dy, Tensor x, Tensor? weight, Tensor batch_weight, Tensor statistics, bool pooled, "
    "float eps, bool need_dx) -> (Tensor, Tensor)"
)
# on the CPU they run under TRITON_INTERPRET=1
for _key in ("CUDA", "CPU"):
    _library.impl("forward", forward, _key)
    _library.impl("backward", backward, _key)
torch.library.register_fake("mbnorm_triton::forward", forward_shapes, lib=_library)
torch.library.register_fake("mbnorm_triton::backward", _backward_shapes, lib=_library)
