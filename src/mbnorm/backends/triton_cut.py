"""How the Triton backend cuts the values of a tensor into programs, without a look at the device."""

import math
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

TILE = 2048
"""Values that four warps take in one go."""
WIDEST = 8192
"""Values of a tile of the widest program, which takes its channels by itself."""
NARROWEST = 512
"""Values of a tile below which a program is not cut further to keep all processors busy."""
STEPS_OF_ONE = 4
"""Widest tiles of a channel up to which one program takes them all: launches of further kernels cost more."""
PROGRAMS_A_PROCESSOR = 8
"""Of four warps each; of wider ones fewer."""
MOST_SPLITS = 512
MOST_WARPS = 16


class Cut(NamedTuple):
    """How the values of all channels are divided among programs.

    A tile has ``c`` channels and ``o`` times ``i`` values of each. Of the ``steps`` tiles a channel has, a
    program takes ``per_split``; ``blocks`` times ``splits`` programs of ``warps`` do it all.
    """

    c: int
    o: int
    i: int
    blocks: int
    steps: int
    splits: int
    per_split: int
    warps: int


class Runs(NamedTuple):
    """How the values of a channel lie: ``outer`` runs of ``inner``, or with ``rows`` between other channels.

    ``unit`` is a power of two that divides ``inner``.
    """

    outer: int
    inner: int
    rows: bool
    unit: int


def power_of_two(number: int) -> int:
    """Return the next power of two."""
    return 1 << (number - 1).bit_length()


def runs_of(x: Tensor) -> Runs:
    """Return how the channels of a dense ``x`` lie."""
    values = math.prod(x.shape[2:])
    if x.is_contiguous() and values > 1:
        # units are counted in 32 bits, and so is their product with the unit
        return Runs(x.shape[0], values, False, math.gcd(values, 16) if values < 2**31 else 1)
    return Runs(1, x.shape[0] * values, True, 1)


# detectors and the like have thousands of shapes
@lru_cache(4096)
def cut(channels: int, outer: int, inner: int, rows: bool, processors: int) -> Cut:
    """Return the division for ``outer`` runs of ``inner`` values, where ``rows`` have one of each channel."""
    of_one = _tile(channels, outer, inner, rows, WIDEST, processors)
    if of_one.steps <= STEPS_OF_ONE:
        return of_one
    made = _split(channels, outer, inner, rows, TILE, processors)
    # a part of a few rows is larger than what it saves to read
    wider = 2 * TILE
    while rows and wider <= WIDEST:
        other = _split(channels, outer, inner, rows, wider, processors)
        if 2 * other.blocks * other.splits < processors:
            break
        made, wider = other, 2 * wider
    return made


def _split(channels: int, outer: int, inner: int, rows: bool, widest: int, processors: int) -> Cut:
    """Return the division into programs that take parts of their channels."""
    made = _tile(channels, outer, inner, rows, widest, 1)
    wanted = PROGRAMS_A_PROCESSOR * processors * 4 // made.warps
    splits = max(1, min(wanted // made.blocks, made.steps, MOST_SPLITS))
    per_split = -(-made.steps // splits)
    return made._replace(splits=-(-made.steps // per_split), per_split=per_split)


def _tile(channels: int, outer: int, inner: int, rows: bool, widest: int, processors: int) -> Cut:
    """Return the division into programs that take all tiles of their channels."""
    # 32 values in a row are 64 bytes at least, what memory moves at once
    c, fewest = (min(power_of_two(channels), 64), 32) if rows else (power_of_two(channels), 1)
    if rows:
        while c > fewest and -(-channels // c) < processors:
            c //= 2
        o, i = 1, min(power_of_two(inner), widest // c)
    else:
        i = min(power_of_two(inner), widest)
        o = min(power_of_two(outer), widest // i)
        c = min(c, max(1, TILE // (o * i)))
        while c > fewest and c * o * i > NARROWEST and -(-channels // c) < processors:
            c //= 2
    steps = -(-outer // o) * -(-inner // i)
    warps = min(MOST_WARPS, max(4, 4 * c * o * i // TILE))
    return Cut(c, o, i, -(-channels // c), steps, 1, steps, warps)


def parts_cut(splits: int, channels: int) -> tuple[int, int, int]:
    """Return how many splits and channels a program puts together, and how many programs that takes."""
    s = power_of_two(splits)
    c = max(1, TILE // s // 2)
    return s, c, -(-channels // c)
