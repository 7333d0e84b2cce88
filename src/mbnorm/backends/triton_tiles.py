"""How the Triton kernels go through the values: in tiles with channels as rows and values as lanes.

The values of a channel lie in ``outer`` runs of ``inner`` values; with ``ROWS`` a channel's neighbours in
memory are the other channels (channels_last, or no map), and there is one run. Tiles are walked block by
block of a run, through all runs each; as a tile is of one run or a run one block, a lane that falls out stays
out. A program takes all tiles of its channels or ``per_split`` of them.

Numbers of runs, samples and parts are not compiled into the kernels: a new batch size compiles nothing.
"""

import triton
import triton.language as tl


@triton.jit
def my_channels(BLOCK_C: tl.constexpr):
    """Return the channels of this program; the last ones may not be there."""
    return tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def my_tiles(outer, inner, per_split, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """Return the first of this program's tiles, and the first that is not."""
    steps = tl.cdiv(outer, BLOCK_O) * tl.cdiv(inner, BLOCK_I)
    begin = tl.program_id(1) * per_split
    return begin, tl.minimum(begin + per_split, steps)


@triton.jit
def tile(
    step,
    channel,
    channels,
    outer,
    inner,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Return the offsets of a tile, which of them are there, and which lanes."""
    runs = tl.cdiv(outer, BLOCK_O)
    lane = tl.arange(0, BLOCK_O * BLOCK_I)
    o = tl.cast(step % runs, tl.int64) * BLOCK_O + lane // BLOCK_I
    i = tl.cast(step // runs, tl.int64) * BLOCK_I + lane % BLOCK_I
    valid = (o < outer) & (i < inner)
    if ROWS:
        offsets = channel[:, None] + (i * channels)[None, :]
    else:
        offsets = (channel * inner)[:, None] + (o * channels * inner + i)[None, :]
    return offsets, (channel < channels)[:, None] & valid[None, :], valid
