"""Which tiles the hand-written products of sm_90a are cut into: pure functions of a device's limits and a shape.

An analytic model: how long a step of 128 columns of k takes, by whichever unit is busiest, times the steps of all waves
of tiles. Nothing is timed. docs/hopper.md has its predictions beside published numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

STEP = 128  # columns of k between promotions
SHARED_BYTES = 227 * 1024  # of a block
MATH_WARPS = 8
MOST_STAGES = 8

# Rows x columns, as in kernels/gemm_tiles.inc.
TILES = (
    (128, 32), (128, 48), (128, 64), (128, 80), (128, 96), (128, 112), (128, 128), (128, 144), (128, 160), (128, 192),
    (256, 96), (256, 112), (256, 128),
)  # fmt: skip
STREAM_ROWS = (8, 16, 32, 64)  # of tokens, in kernels/gemm_stream.cu: the columns of its wgmma
STREAM_COLUMNS = 64
STREAM_SPLITS = (1, 2, 4, 8)  # blocks of a cluster, which is portable up to 8

_MACS = 4096  # a cycle of a multiprocessor's matrix units, dense e4m3
_SHARED_WIDTH = 128  # bytes a cycle
_L2_WIDTH = 48  # bytes a cycle and multiprocessor: three quarters of the port
_HBM_WIDTH = 14  # bytes a cycle and multiprocessor: 3.35 TB/s at 1.83 GHz, of 132
_TURN = 160  # cycles from a full stage to its first product, and from the last to the first promotion
_START, _TILE = 2500, 500  # cycles before the first products, and to hand a tile's result over, beside its bytes


@dataclass(frozen=True)
class Limits:
    """Of a device. processors: that run blocks at a time."""

    processors: int = 132


@dataclass(frozen=True)
class Shape:
    """rows: of the product, or of a group on average. out_bytes: of an element of the result."""

    rows: int
    columns: int
    k: int
    groups: int = 1
    out_bytes: int = 2


@dataclass(frozen=True)
class Plan:
    """shared: which operand the two blocks of a cluster have in common: 0 none (no cluster), 1 a, 2 b.

    band: rows of tiles, or of pairs of them, that blocks go through together, column by column.
    """

    rows: int
    columns: int
    shared: int
    band: int


@dataclass(frozen=True)
class StreamPlan:
    """tokens: rows of a tile. splits: blocks of a cluster that share a tile's k."""

    tokens: int
    splits: int


# ---- shared memory, as kernels/gemm_parameters.h has it


def granule(columns: int) -> int:
    return math.gcd(columns, 128)


def stage_bytes(rows: int, columns: int) -> int:
    granules = columns // granule(columns)
    return (rows + columns) * STEP + (rows + (granules + 3) // 4 * 4) * 4


def staging_bytes(columns: int) -> int:
    return MATH_WARPS * 16 * columns * 2


def stages(rows: int, columns: int) -> int:
    return min((SHARED_BYTES - staging_bytes(columns)) // (stage_bytes(rows, columns) + 16), MOST_STAGES)


def shared_bytes(rows: int, columns: int) -> int:
    return staging_bytes(columns) + stages(rows, columns) * (stage_bytes(rows, columns) + 16)


def registers(rows: int, columns: int) -> int:
    """That a math thread has for sums: of all its rows, and of the products of 64 of them."""
    return rows // 128 * columns // 2 + columns // 2


# ---- the large tiles


@dataclass(frozen=True)
class Step:
    """Cycles that a step takes of each unit."""

    matrix: float
    shared: float
    l2: float
    issue: float
    turns: float  # of one math warp group: its products, then its promotion

    @property
    def cycles(self) -> float:
        return max(self.matrix, self.shared, self.l2, self.issue, self.turns)


def step(rows: int, columns: int, shared: int) -> Step:
    matrix = rows * columns * STEP / _MACS
    read = rows // 64 * (64 + columns) * STEP
    written = (rows + columns) * STEP
    from_l2 = (rows / (2 if shared == 1 else 1) + columns / (2 if shared == 2 else 1)) * STEP
    blocks = rows // 128
    promotion = blocks * (columns / 2 + 2 * columns / granule(columns)) + 30 + 22 * blocks  # instructions of a warp
    # a scheduler has a warp of either math group, and now and then one that loads
    issue = 2 * promotion + 40
    turns = matrix / 2 + promotion + _TURN * blocks
    return Step(matrix, (read + written) / _SHARED_WIDTH, from_l2 / _L2_WIDTH, issue, turns)


def waves(limits: Limits, shape: Shape, plan: Plan) -> int:
    pair_m, pair_n = (2 if plan.shared == 2 else 1), (2 if plan.shared == 1 else 1)
    units = -(-shape.rows // (plan.rows * pair_m)) * -(-shape.columns // (plan.columns * pair_n)) * shape.groups
    return -(-units // (limits.processors // (2 if plan.shared else 1)))


def cycles(limits: Limits, shape: Shape, plan: Plan) -> float:
    """That a product takes, at least: by the units above, or by memory, which reads and writes everything once."""
    steps = -(-shape.k // STEP)
    hand_over = _TILE + plan.rows * plan.columns * shape.out_bytes / _L2_WIDTH
    busy = waves(limits, shape, plan) * (steps * step(plan.rows, plan.columns, plan.shared).cycles + hand_over)
    memory = moved_bytes(shape) / (_HBM_WIDTH * limits.processors)
    return _START + max(busy, memory)


def moved_bytes(shape: Shape) -> int:
    operands = shape.groups * (shape.rows + shape.columns) * shape.k
    return operands + shape.groups * shape.rows * shape.columns * shape.out_bytes


def candidates(limits: Limits, shape: Shape) -> Iterator[Plan]:
    for rows, columns in TILES:
        yield Plan(rows, columns, 0, _band(rows, columns, 1))
        if limits.processors < 2:
            continue
        if shape.columns > columns:
            yield Plan(rows, columns, 1, _band(rows, columns, 1))
        if shape.rows > rows and shape.groups == 1:
            yield Plan(rows, columns, 2, _band(rows, columns, 2))


def _band(rows: int, columns: int, pair: int) -> int:
    """Such that the tiles of a wave of 132 have about as many rows as columns: together they read least."""
    return max(1, round(math.sqrt(132 * columns / rows) / pair))


def plan(limits: Limits, shape: Shape) -> Plan:
    """The first of those that cost least."""
    return min(candidates(limits, shape), key=lambda one: cycles(limits, shape, one))


def tflops(limits: Limits, shape: Shape, gigahertz: float = 1.83) -> float:
    """What the model predicts, at H100 SXM's boost clock."""
    operations = 2 * shape.rows * shape.columns * shape.k * shape.groups
    return operations * gigahertz / cycles(limits, shape, plan(limits, shape)) / 1e3


def tile_plan(processors: int, rows: int, columns: int, k: int, groups: int, out_bytes: int) -> tuple[int, ...]:
    """`plan`, as backends/cuda/gemm/plan.cpp asks for it."""
    one = plan(Limits(processors), Shape(rows, columns, k, groups, out_bytes))
    return one.rows, one.columns, one.shared, one.band


# ---- few rows


def for_few_rows(limits: Limits, shape: Shape) -> StreamPlan:
    """splits: by the weights alone, so that a row's bits do not depend on the number of rows.

    A block's time is its steps, and as long as six more to begin, to end, and to add up.
    """
    tokens = min((rows for rows in STREAM_ROWS if rows >= shape.rows), default=STREAM_ROWS[-1])
    steps, blocks = -(-shape.k // STEP), 2 * limits.processors
    tiles = -(-shape.columns // STREAM_COLUMNS) * shape.groups

    def cost(splits: int) -> float:
        if splits > blocks:
            return math.inf
        return -(-tiles // max(blocks // splits, 1)) * (-(-steps // splits) + 6 + (splits > 1))

    return StreamPlan(tokens, min(STREAM_SPLITS, key=cost))


def stream_cycles(limits: Limits, shape: Shape, plan: StreamPlan) -> float:
    """That a product of few rows takes, at least: by memory, or by the steps of one block after another.

    A step takes a turn of one warp group: its products, 32 instructions and 5 for every 8 rows.
    """
    tiles = -(-shape.columns // STREAM_COLUMNS) * -(-shape.rows // plan.tokens) * shape.groups
    turns = -(-tiles // max(2 * limits.processors // plan.splits, 1)) * -(-shape.k // STEP // plan.splits)
    turn = _TURN + 4 * max(plan.tokens / 2, 16) + 32 + 5 * plan.tokens / 8
    return _START + max(turns * turn, moved_bytes(shape) / (_HBM_WIDTH * limits.processors))


def stream_plan(processors: int, rows: int, columns: int, k: int, groups: int, out_bytes: int) -> tuple[int, ...]:
    """`for_few_rows`, as backends/cuda/gemm/plan.cpp asks for it."""
    one = for_few_rows(Limits(processors), Shape(rows, columns, k, groups, out_bytes))
    return one.tokens, one.splits
