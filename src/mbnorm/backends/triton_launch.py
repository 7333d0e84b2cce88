"""What the operators of the Triton backend share: kinds of inputs, launches, registration.

Neither Triton nor a device is needed to import this.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbnorm.backends.triton_cut import Cut, cut, runs_of
from mbnorm.blend import statistics_dtype

MOST_KINDS = 4096
"""Detectors and the like have thousands of shapes."""
ALIGNED = 16
"""Bytes; what kernels are compiled for depends on whether tensors begin at a multiple of them."""
ROWS = 7
"""Of a record: mean and variance of the batch, the blended ones, the past ones, and the batch's weight."""


class Kind(NamedTuple):
    """What to launch for an input.

    ``number`` stands for all that kernels are compiled for: two kinds with the same one have that in common.
    ``dense`` tells whether the input's maps or its channels lie together; ``n`` is its values per channel,
    ``state`` the dtype of statistics. Kernels get ``sizes``, of which ``channels`` is one, and ``layout``.
    """

    number: int
    dense: bool
    channels: int
    n: int
    state: torch.dtype
    cut: Cut
    sizes: tuple[int, int, int, int]
    layout: tuple[bool, int, int, int, int]


_kinds: dict[object, Kind] = {}
_numbers: dict[object, int] = {}


def kind_of(x: Tensor) -> Kind:
    """Return the kind of an input."""
    key = x.shape, x.stride(), x.dtype, x.device
    kind = _kinds.get(key)
    if kind is None:
        if len(_kinds) >= MOST_KINDS:
            forget_kinds()
        kind = _kinds[key] = _new_kind(x)
    return kind


def forget_kinds() -> None:
    """Look at every kind anew from now on."""
    _kinds.clear()


def _new_kind(x: Tensor) -> Kind:
    dense = _is_dense(x)
    channels = x.shape[1]
    # what is not dense gets copied, and is contiguous then
    outer, inner, rows, unit = runs_of(x if dense else torch.empty(x.shape, device="meta"))
    made = cut(channels, outer, inner, rows, _processors(x.device))
    layout = rows, unit, made.c, made.o, made.i
    # where 32 bits do not suffice, kernels are compiled for others, by the sizes
    sizes = x.shape if x.numel() >= 2**31 else None
    compiled_for = x.device, x.dtype, channels, sizes, layout, made.warps
    return Kind(
        number=_numbers.setdefault(compiled_for, len(_numbers)),
        dense=dense,
        channels=channels,
        n=x.numel() // channels,
        state=statistics_dtype(x.dtype),
        cut=made,
        sizes=(channels, outer, inner // unit, made.per_split),
        layout=layout,
    )


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


_NOWHERE_ELSE: AbstractContextManager[Any] = nullcontext()

_compiled: dict[Any, tuple[Any, tuple[int, ...]]] = {}


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


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return an optional parameter as kernels take it."""
    return None if tensor is None else tensor.contiguous()


def forward_shapes(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Return tensors like the output and the record of a forward, without values."""
    return empty_like(x), x.new_empty((ROWS, x.shape[1]), dtype=statistics_dtype(x.dtype))


def empty_like(x: Tensor) -> Tensor:
    """Return a tensor like the output for ``x``, without values."""
    return torch.empty_like(x if _is_dense(x) else x.contiguous())


_library: Any = torch.library.Library("mbnorm_triton", "DEF")  # type: ignore[no-untyped-call]


def register(schema: str, operator: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Register an operator of ``torch.ops.mbnorm_triton``, and what it returns for fake tensors."""
    _library.define(schema)
    name, _, _ = schema.partition("(")
    # on the CPU it runs under TRITON_INTERPRET=1
    for key in ("CUDA", "CPU"):
        _library.impl(name, operator, key)
    torch.library.register_fake(f"mbnorm_triton::{name}", shapes, lib=_library)
