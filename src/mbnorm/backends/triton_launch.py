"""The registered operators of the Triton backend, and how kernels are launched."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mbnorm.backends import triton_backward, triton_forward
from mbnorm.backends.triton_cut import parts_cut
from mbnorm.backends.triton_kinds import Kind, kind_of
from mbnorm.blend import statistics_dtype

STATES = {torch.float32: tl.float32, torch.float64: tl.float64}
ALIGNED = 16
"""Bytes; what kernels are compiled for depends on whether tensors begin at a multiple of them."""

_NOWHERE_ELSE: AbstractContextManager[Any] = nullcontext()

_compiled: dict[Any, tuple[Any, tuple[int, ...]]] = {}


class History(NamedTuple):
    """What a batch is blended with, as the kernels take it; without ``mean`` it is what the record has.

    The batch weighs ``batch_weight``; where that is None, what `triton_average.batch_weight_of_average` finds
    from the rest, for ``n`` values per channel.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    batch_weight: Tensor | None = None
    filled: Tensor | None = None
    weight: Tensor | None = None
    fixed_weight: float = 0.0
    measured: Tensor | None = None
    n: int = 1


IN_THE_RECORD = History()


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Return what makes Triton launch on the device of ``x``: it does on the current one."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _NOWHERE_ELSE
    return torch.cuda.device(x.device)


def launch(kernel: Any, grid: tuple[int, int], key: Any, *arguments: Any, warps: int = 4) -> None:
    """Launch a kernel on the current device.

    Triton looks at every argument to find what it has compiled, which takes longer than the launch. Where all
    tensors are aligned, ``key`` says as much: it has the kind of input, which of the arguments are tensors,
    and all else that the kernel is compiled for.
    """
    # the hash of a kernel itself takes a lock
    whole = id(kernel), key
    if known := _compiled.get(whole):
        made, places = known
        if _aligned([arguments[place] for place in places]):
            made[(*grid, 1)](*arguments)
            return
    made = kernel[grid](*arguments, num_warps=warps)
    places = tuple(place for place, argument in enumerate(arguments) if isinstance(argument, Tensor))
    # interpreted kernels are not compiled; on ROCm what is compiled depends on the sizes of storages, too
    if made is not None and torch.version.hip is None and _aligned([arguments[place] for place in places]):
        _compiled[whole] = made, places


def _aligned(tensors: list[Tensor]) -> bool:
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    return addresses % ALIGNED == 0


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
    kind = kind_of(x)
    record = x.new_empty((4, kind.channels), dtype=kind.state)
    past = History(past_mean.contiguous(), past_var.contiguous(), batch_weight.to(x.device))
    with on_device_of(x):
        return normalize(kind, x, weight, bias, past, record, pooled, eps), record


def normalize(
    kind: Kind,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past: History,
    record: Tensor,
    pooled: bool,
    eps: float,
) -> Tensor:
    """Return ``y``, and write the statistics into the record, on the current device."""
    x = x if kind.dense else x.contiguous()
    y = torch.empty_like(x)
    made, state = kind.cut, STATES[kind.state]
    weight, bias = _contiguous(weight), _contiguous(bias)
    grid, warps = (made.blocks, made.splits), made.warps
    computed = past.filled is None, past.measured is None, past.weight is None or past.weight.dtype
    key = kind.number, weight is None, bias is None, past.mean is None, computed, pooled, eps
    given = x, y, weight, bias
    if made.splits == 1:
        launch(
            triton_forward.forward_whole,
            grid,
            key,
            *given,
            *past,
            record,
            *kind.sizes,
            eps,
            pooled,
            state,
            *kind.layout,
            warps=warps,
        )
        return y
    channels = kind.channels
    parts = x.new_empty((5, made.splits, channels), dtype=kind.state)
    s, c, blocks = parts_cut(made.splits, channels)
    tiles = *kind.sizes, state, *kind.layout
    launch(triton_forward.moments_part, grid, key, x, parts, *tiles, warps=warps)
    numbers = channels, made.splits, pooled, s, c
    launch(triton_forward.blend_parts, (blocks, 1), (key, s, c), parts, *past, record, *numbers)
    sizes = *kind.sizes, eps, state, *kind.layout
    launch(triton_forward.normalize_part, grid, key, *given, record, *sizes, warps=warps)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    batch_weight: Tensor | None,
    record: Tensor,
    pooled: bool,
    eps: float,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``dx``, empty if it is not needed, and the rows ``(dw, db)``.

    Where ``batch_weight`` is None the record has it.
    """
    kind = kind_of(x)
    x = x if kind.dense else x.contiguous()
    if dy.stride() != x.stride() or dy.dtype != x.dtype:
        dy = torch.empty_like(x).copy_(dy)
    dx = torch.empty_like(x) if need_dx else None
    made, state, channels = kind.cut, STATES[kind.state], kind.channels
    parameters = x.new_empty((2, channels), dtype=kind.state)
    grid, warps = (made.blocks, made.splits), made.warps
    weight = _contiguous(weight)
    if batch_weight is not None:
        batch_weight, record = batch_weight.to(x.device), record.contiguous()
    given = dy, x, dx, weight, batch_weight, record, parameters
    key = kind.number, weight is None, batch_weight is None, need_dx, pooled, eps
    rules = *kind.sizes, eps, pooled, state, *kind.layout
    with on_device_of(x):
        if made.splits == 1:
            launch(triton_backward.backward_whole, grid, key, *given, *rules, warps=warps)
        else:
            parts = x.new_empty((2, made.splits, channels), dtype=kind.state)
            s, c, blocks = parts_cut(made.splits, channels)
            sums = dy, x, record, parts, *kind.sizes, state, *kind.layout
            launch(triton_backward.sums_part, grid, key, *sums, warps=warps)
            numbers = channels, made.splits, eps, s, c
            launch(triton_backward.add_parts, (blocks, 1), (key, s, c), parts, record, parameters, *numbers)
            if need_dx:
                launch(triton_backward.input_gradient_part, grid, key, *given, *rules, warps=warps)
    return x.new_empty(0) if dx is None else dx, parameters


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def empty_output(x: Tensor) -> Tensor:
    """Return a tensor like the output for ``x``, without values."""
    dense = x.is_contiguous() or x.movedim(1, -1).is_contiguous()
    return torch.empty_like(x if dense else x.contiguous())


def _forward_shapes(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_output(x), x.new_empty((4, x.shape[1]), dtype=statistics_dtype(x.dtype))


def _backward_shapes(dy: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    need_dx = others[-1]
    dx = empty_output(x) if need_dx else x.new_empty(0)
    return dx, x.new_empty((2, x.shape[1]), dtype=statistics_dtype(x.dtype))


_library: Any = torch.library.Library("mbnorm_triton", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor past_mean, Tensor past_var, Tensor batch_weight, "
    "bool pooled, float eps) -> (Tensor, Tensor)"
)
_library.define(
    "backward(Tensor dy, Tensor x, Tensor? weight, Tensor? batch_weight, Tensor record, bool pooled, "
    "float eps, bool need_dx) -> (Tensor, Tensor)"
)
# on the CPU they run under TRITON_INTERPRET=1
for _key in ("CUDA", "CPU"):
    _library.impl("forward", forward, _key)
    _library.impl("backward", backward, _key)
torch.library.register_fake("mbnorm_triton::forward", _forward_shapes, lib=_library)
torch.library.register_fake("mbnorm_triton::backward", _backward_shapes, lib=_library)
