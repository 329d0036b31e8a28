"""Which tiles a library's kernels have, and which of them it takes for a product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    depth: int = 128  # of k at a time
    split: int = 1  # of k, among cores


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def count(tile: Tile, rows: tuple[int, ...], n: int) -> int:
    """Tiles of a product whose groups have so many rows."""
    return sum(ceil_div(m, tile.rows) for m in rows) * ceil_div(n, tile.columns) * tile.split


@dataclass(frozen=True)
class Kernels:
    """A library's kernels. persistent: every core takes a tile of every wave; otherwise free cores take the next."""

    name: str
    persistent: bool
    candidates: Callable[[int, bool], list[Tile]]  # of the rows of a group, and whether groups are contiguous
    by_waves: bool  # the library's own rule: fewest waves, then the fullest last; otherwise whatever is fastest
    hides_step: bool = False  # operands of the next step arrive while the matrix unit has work


def _persistent(rows: tuple[int, ...], columns: tuple[int, ...]) -> Callable[[int, bool], list[Tile]]:
    def candidates(m: int, contiguous: bool) -> list[Tile]:
        # Contiguous groups are aligned to 128 rows. Accumulators of 256 x 128 are what registers hold.
        return [Tile(r, c) for r in ((128,) if contiguous else rows) for c in columns if min(r, c) <= 128]

    return candidates


def _first_release(m: int, contiguous: bool) -> list[Tile]:
    """128 rows, or 64 for so few; no more than 128 columns."""
    return [Tile(64 if m <= 64 and not contiguous else 128, c) for c in _NARROW]


_NARROW = tuple(range(16, 129, 8))
# A kernel's tile in rows x columns x depth, as AITER's tables name them, each with and without split k.
_CK = [(16, 64, 128), (16, 64, 256), (16, 128, 128), (16, 128, 256), (32, 64, 128), (32, 64, 256), (32, 128, 256),
       (64, 64, 128), (64, 64, 256), (64, 128, 128), (128, 128, 128)]  # fmt: skip
SPLITS = (1, 2, 4, 8)


def _ck(m: int, contiguous: bool) -> list[Tile]:
    return [Tile(*tile, split) for tile in _CK for split in (SPLITS if m <= 512 and not contiguous else (1,))]


def _cube(m: int, contiguous: bool) -> list[Tile]:
    """What L0C, 128 KB of f32, and L1 hold: 128 x 256 and its halves."""
    return [Tile(r, c) for r in (16, 32, 64, 128) for c in (64, 128, 256)] + [Tile(256, 128)]


KERNELS = {
    kernels.name: kernels
    for kernels in (
        Kernels("deepgemm-2025-02", True, _first_release, by_waves=True),
        Kernels("deepgemm-2025-03", True, _persistent((64, 128), (*_NARROW, 144, 160)), by_waves=True),
        Kernels("deepgemm-2025-04", True, _persistent((64, 128, 256), (*_NARROW, 144, 160)), by_waves=True),
        Kernels("aiter-ck", False, _ck, by_waves=False),
        Kernels("aiter-asm", False, _ck, by_waves=False),
        Kernels("aiter-fmoe", False, _ck, by_waves=False),
        Kernels("cube", True, _cube, by_waves=False, hides_step=True),
    )
}
BEST = {"hopper": "deepgemm-2025-04", "cdna3": "aiter-ck", "cdna4": "aiter-ck", "ascend": "cube"}  # of a family


def fewest_waves(tiles: list[Tile], rows: tuple[int, ...], n: int, cores: int) -> Tile:
    """The fewest waves; of these the fullest last one; of these the least padding."""

    def key(tile: Tile) -> tuple[int, int, int]:
        total = count(tile, rows, n)
        return ceil_div(total, cores), -((total - 1) % cores), tile.rows * tile.columns

    return min(tiles, key=key)
