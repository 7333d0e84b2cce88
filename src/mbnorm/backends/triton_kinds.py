"""What the launches of the Triton backend have in common for all inputs of a shape, layout and dtype."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mbnorm.backends.triton_cut import Cut, cut, runs_of
from mbnorm.blend import statistics_dtype

MOST_KINDS = 4096
"""Detectors and the like have thousands of shapes."""


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
    dense = x.is_contiguous() or x.movedim(1, -1).is_contiguous()
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


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
