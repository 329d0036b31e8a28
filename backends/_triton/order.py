"""The order in which programs take tiles."""

import triton
import triton.language as tl


@triton.jit
def rasterised(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row, column) of a tile. GROUP rows of tiles go column by column: those in flight share operands in L2."""
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inner = tile % (GROUP * tiles_n)
    return first + inner % height, inner // height


@triton.jit
def rows_of_groups(starts, counts, groups, rows, MASKED: tl.constexpr, GROUPS: tl.constexpr):
    """(starts, counts) of all groups, [GROUPS], clipped to the operand's rows. Slots start at 0 each."""
    g = tl.arange(0, GROUPS)
    count = tl.load(counts + g, mask=g < groups, other=0)
    if MASKED:
        start = tl.zeros((GROUPS,), tl.int64)
    else:
        start = tl.load(starts + g, mask=g < groups, other=0)
    start = tl.minimum(tl.maximum(start, 0), rows)
    return start, tl.minimum(tl.maximum(count, 0), rows - start).to(tl.int32)


@triton.jit
def group_of(tile, heights, tiles_n, GROUPS: tl.constexpr):
    """(group, rows of tiles before it): groups come one after another, each `heights` rows of `tiles_n` tiles."""
    ends = tl.cumsum(heights, 0)
    g = tl.sum((ends * tiles_n <= tile).to(tl.int32), 0)
    return g, tl.sum(tl.where(tl.arange(0, GROUPS) < g, heights, 0), 0)
