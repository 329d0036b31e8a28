"""How a product is cut into tiles: the candidates' cost, and the memory that they have to fit.

Which tiles there are to choose from is the backends' knowledge: backends/<device>/tiles.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moekern.backends._triton.targets import Target

_L2_BYTES = 64  # that a processor reads in a cycle
_LANES = 128  # in which it multiplies float32
_FRAGMENTS = 64  # elements of a column of k that it brings to its matrix units in a cycle, roughly


@dataclass(frozen=True)
class Shape:
    """What the choice depends on. rows: of the product, or of a group on average; groups: 1 for a dense one."""

    rows: int
    columns: int
    k: int
    groups: int = 1
    bits_a: int = 8  # of an element of each operand in memory
    bits_b: int = 8
    described: bool = False  # tensor descriptors may stand for both operands
    native: bool = False  # the matrix instructions take both in FP8
    paired: bool = False  # columns are of gate and up in turn, and 128 of each have to be in one tile
    strided: bool = False  # k runs along the rows of memory


@dataclass(frozen=True)
class Tiles:
    """rows x columns of D that one program computes at a time, and how.

    depth: columns of k at a time, a power of two.
    swap: D^T = B A^T, so that the columns of D, and not few rows, fill the height of the matrix instruction.
    splits: parts of k, whose sums a second kernel adds up.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    depth: int = 128
    swap: bool = False
    splits: int = 1
    descriptors: bool = False  # operands come by the tensor memory accelerator (TMA)
    specialised: bool = False  # warps that load beside warps that multiply
    group: int = 8  # rows of tiles that programs go through together


def next_power_of_2(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()


def shared_bytes(tiles: Tiles, shape: Shape) -> int:
    """The most shared memory that the compiler takes: tiles of both operands in every stage, and decoded ones once."""
    size_a, size_b = shape.bits_a // 8, shape.bits_b // 8
    staged = tiles.stages * tiles.depth * (tiles.rows * size_a + tiles.columns * size_b)
    if shape.native:
        # specialised warps hand the sums over through it, too
        return staged + (17 * 1024 if tiles.specialised else 1024)
    decoded = max(size_a, 2)
    return staged + tiles.depth * (tiles.columns * decoded + (tiles.rows * decoded if size_a == 1 else 0))


def cost(target: Target, tiles: Tiles, shape: Shape) -> float:
    """Cycles: waves of tiles, each as long as its products, or as its operands take from the second-level cache.

    Scaling, fragments and addresses come on top, unless others multiply meanwhile: specialised warps, or blocks that a
    processor has several of, as descriptors leave it registers for. Of operands that are decoded, the decoding takes
    the place of bytes: about as long for an element.
    """
    count = -(-shape.rows // tiles.rows) * -(-shape.columns // tiles.columns) * shape.groups
    waves = -(-count // target.processors)
    multiply = tiles.rows * tiles.columns / target.macs
    beside = tiles.rows * tiles.columns / _LANES / tiles.depth + (tiles.rows + tiles.columns) / _FRAGMENTS
    multiply = max(multiply, beside) if tiles.descriptors else multiply + beside
    load = (tiles.rows * shape.bits_a + tiles.columns * shape.bits_b) / 8 / _L2_BYTES
    return waves * max(multiply, load) * (shape.k + 4 * tiles.depth)


def cheapest(target: Target, candidates: Iterable[Tiles], shape: Shape) -> Tiles:
    """The first of the candidates that cost least, among those that fit."""
    fitting = [tiles for tiles in candidates if shared_bytes(tiles, shape) <= target.shared_memory]
    if not fitting:
        raise ValueError(f"no tile of {shape} fits the {target.shared_memory} bytes of {target.name}")
    return min(fitting, key=lambda tiles: cost(target, tiles, shape))


def splits_of(target: Target, tiles: Tiles, shape: Shape) -> int:
    """Parts of k that give every processor a tile, each of four steps at least; at most 16."""
    count = -(-shape.rows // tiles.rows) * -(-shape.columns // tiles.columns)
    return max(1, min(16, target.processors // max(count, 1), shape.k // (4 * tiles.depth)))
