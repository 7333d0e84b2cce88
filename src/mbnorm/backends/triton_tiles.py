"""How the Triton kernels go through the values: in tiles with channels as rows and values as lanes.

The values of a channel lie in ``outer`` runs of ``inner`` values; with ``ROWS`` a channel's neighbours in
memory are the other channels (channels_last, or no map), and there is one run. Tiles are walked block by
block of a run, through all runs each; as a tile is of one run or a run one block, a lane that falls out stays
out. A program takes all tiles of its channels or ``per_split`` of them. What goes through the values a second
time goes last first: what was read last is in the cache.

Kernels get ``inner`` as ``units`` times ``UNIT``, the power of two up to 16 in it: by that the compiler knows
how wide it may load. Numbers of runs, samples and parts are not compiled into them.
"""

import triton
import triton.language as tl


@triton.jit
def channel_offsets(BLOCK_C: tl.constexpr, LAST_FIRST: tl.constexpr = False):
    """Return the channels of this program; the last ones may not be there."""
    block = tl.program_id(0)
    if LAST_FIRST:
        block = tl.num_programs(0) - 1 - block
    return block.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def tile_range(
    outer,
    inner,
    per_split,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    LAST_FIRST: tl.constexpr = False,
):
    """Return the first of this program's tiles, and the first that is not."""
    steps = tl.cdiv(outer, BLOCK_O) * tl.cdiv(inner, BLOCK_I)
    split = tl.program_id(1)
    if LAST_FIRST:
        split = tl.num_programs(1) - 1 - split
    begin = split * per_split
    return begin, tl.minimum(begin + per_split, steps)


@triton.jit
def tile_offsets(
    step,
    offs_c,
    channels,
    outer,
    inner,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Return the offsets of a tile, the mask of those that are there, and that of the lanes."""
    runs = tl.cdiv(outer, BLOCK_O)
    lane = tl.arange(0, BLOCK_O * BLOCK_I)
    offs_o = tl.cast(step % runs, tl.int64) * BLOCK_O + lane // BLOCK_I
    offs_i = tl.cast(step // runs, tl.int64) * BLOCK_I + lane % BLOCK_I
    lane_mask = (offs_o < outer) & (offs_i < inner)
    if ROWS:
        offs = offs_c[:, None] + (offs_i * channels)[None, :]
    else:
        offs = (offs_c * inner)[:, None] + (offs_o * channels * inner + offs_i)[None, :]
    return offs, (offs_c < channels)[:, None] & lane_mask[None, :], lane_mask
