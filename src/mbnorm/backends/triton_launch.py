"""The registered operators of the Triton backend, and how kernels are launched."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mbnorm.backends import triton_backward, triton_forward
from mbnorm.backends.triton_cut import cut, parts_cut, runs_of
from mbnorm.blend import statistics_dtype

STATES = {torch.float32: tl.float32, torch.float64: tl.float64}
ALIGNED = 16
"""Bytes; what kernels are compiled for depends on whether tensors begin at a multiple of them."""

_compiled: dict[Any, Any] = {}


class History(NamedTuple):
    """What a batch is blended with, as the kernels take it.

    The batch weighs ``batch_weight``; where that is None, what `triton_average.batch_weight_of_average` finds
    from the rest, for ``n`` values per channel.
    """

    mean: Tensor
    var: Tensor
    batch_weight: Tensor | None
    filled: Tensor | None = None
    weight: Tensor | None = None
    fixed_weight: float = 0.0
    measured: Tensor | None = None
    n: int = 1


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _dense(x: Tensor) -> Tensor:
    """Return ``x``, copied if neither its maps nor its channels lie together."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Return what makes Triton launch on the device of ``x``: it does on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def launch(kernel: Any, grid: tuple[int, int], key: Any, *arguments: Any, warps: int = 4) -> None:
    """Launch a kernel on the current device.

    Triton looks at every argument to find what it has compiled, which takes longer than the launch. Where all
    tensors are aligned, ``key`` says as much: it has the device, the types and all that it is compiled for.
    """
    addresses = 0
    for argument in arguments:
        if isinstance(argument, Tensor):
            addresses |= argument.data_ptr()
    # on ROCm it depends on the sizes of storages, too
    follows = addresses % ALIGNED == 0 and torch.version.hip is None
    # the hash of a kernel itself takes a lock
    whole = id(kernel), warps, key
    if follows and (known := _compiled.get(whole)):
        known[(*grid, 1)](*arguments)
        return
    made = kernel[grid](*arguments, num_warps=warps)
    # interpreted kernels are not compiled
    if follows and made is not None:
        _compiled[whole] = made


def kind_of(x: Tensor) -> tuple[torch.device, int, torch.Size | None]:
    """Return what every kernel is compiled for: device, channels, and where 32 bits do not suffice, sizes."""
    return x.device, x.shape[1], x.shape if x.numel() >= 2**31 else None


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
    past = History(past_mean.contiguous(), past_var.contiguous(), batch_weight.to(x.device))
    with on_device_of(x):
        return normalize(x, weight, bias, past, pooled, eps)


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, past: History, pooled: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Do as `forward` on the current device."""
    x = _dense(x)
    y = torch.empty_like(x)
    channels = x.shape[1]
    dtype = statistics_dtype(x.dtype)
    statistics = x.new_empty((4, channels), dtype=dtype)
    outer, inner, rows, unit = runs_of(x)
    made = cut(channels, outer, inner, rows, _processors(x.device))
    weight, bias = _contiguous(weight), _contiguous(bias)
    grid, warps = (made.blocks, made.splits), made.warps
    sizes = channels, outer, inner // unit, made.per_split
    tiles = STATES[dtype], rows, unit, made.c, made.o, made.i
    computed = past.batch_weight is None, past.measured is None, getattr(past.weight, "dtype", None)
    optional = weight is None, bias is None, *computed
    key = *kind_of(x), x.dtype, tiles, optional, pooled, eps
    given = x, y, weight, bias
    if made.splits == 1:
        launch(
            triton_forward.forward_whole,
            grid,
            key,
            *given,
            *past,
            statistics,
            *sizes,
            eps,
            pooled,
            *tiles,
            warps=warps,
        )
        return y, statistics
    parts = x.new_empty((5, made.splits, channels), dtype=dtype)
    s, c, blocks = parts_cut(made.splits, channels)
    launch(triton_forward.moments_part, grid, key, x, parts, *sizes, *tiles, warps=warps)
    numbers = channels, made.splits, pooled, s, c
    launch(triton_forward.blend_parts, (blocks, 1), (key, s, c), parts, *past, statistics, *numbers)
    launch(triton_forward.normalize_part, grid, key, *given, statistics, *sizes, eps, *tiles, warps=warps)
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
    outer, inner, rows, unit = runs_of(x)
    made = cut(channels, outer, inner, rows, _processors(x.device))
    grid, warps = (made.blocks, made.splits), made.warps
    sizes = channels, outer, inner // unit, made.per_split
    weight, batch_weight = _contiguous(weight), batch_weight.to(x.device)
    statistics = statistics.contiguous()
    given = dy, x, dx, weight, batch_weight, statistics, parameters
    tiles = STATES[dtype], rows, unit, made.c, made.o, made.i
    key = *kind_of(x), x.dtype, tiles, weight is None, need_dx, pooled, eps
    with on_device_of(x):
        if made.splits == 1:
            whole = triton_backward.backward_whole
            launch(whole, grid, key, *given, *sizes, eps, pooled, *tiles, warps=warps)
        else:
            parts = x.new_empty((2, made.splits, channels), dtype=dtype)
            s, c, blocks = parts_cut(made.splits, channels)
            sums = dy, x, statistics, parts
            launch(triton_backward.sums_part, grid, key, *sums, *sizes, *tiles, warps=warps)
            numbers = channels, made.splits, eps, s, c
            launch(
                triton_backward.add_parts, (blocks, 1), (key, s, c), parts, statistics, parameters, *numbers
            )
            if need_dx:
                part = triton_backward.input_gradient_part
                launch(part, grid, key, *given, *sizes, eps, pooled, *tiles, warps=warps)
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
