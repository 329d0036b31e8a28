"""Tiles for AMD GPUs: pure functions of an architecture and a shape.

A class of calls has candidates that differ in rows and columns only, so that a row's bits are the same in all of them.
None of them spills a register on any architecture that has it here (docs/kernels.md).
"""

from __future__ import annotations

from dataclasses import replace

from moekern.backends._triton.targets import Target
from moekern.backends._triton.tiles import Shape, Tiles, cheapest, splits_of

_FLOAT32 = (Tiles(64, 64, 8, 2, 32), Tiles(32, 32, 4, 2, 32), Tiles(16, 32, 4, 2, 32))
_DECODED = (Tiles(64, 128, 8, 3, 64), Tiles(64, 64, 4, 3, 64), Tiles(32, 64, 4, 3, 64), Tiles(16, 64, 4, 3, 64))
_NATIVE = (Tiles(128, 128, 8, 3), Tiles(64, 128, 8, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3), Tiles(16, 64, 4, 3))
# of e4m3fn on units for e4m3fnuz: all bytes pass through registers, to be converted
_CONVERTED = (Tiles(64, 128, 8, 2, 64), Tiles(64, 64, 8, 2, 64), Tiles(32, 64, 4, 2, 64), Tiles(16, 64, 4, 2, 64))
_STRIDED = Tiles(64, 128, 8, 2, 64)


def choose(target: Target, shape: Shape) -> Tiles:
    if shape.bits_a == 32:
        return cheapest(target, _FLOAT32, shape)
    if shape.strided:
        # 128 columns of k, which its instructions of the full rate take 64 or 128 at a time of
        return Tiles(64, 64, 8, 2) if target.name == "gfx950" else _STRIDED
    if shape.paired:
        return Tiles(64, 256, 8, 2) if target.name == "gfx950" else Tiles(32, 256, 8, 2, 64)
    if not shape.native:
        return cheapest(target, _DECODED, shape)
    return cheapest(target, _CONVERTED if target.name == "gfx942" else _NATIVE, shape)


def choose_for_few_rows(target: Target, shape: Shape) -> Tiles:
    if shape.bits_a == 32 or shape.strided:
        return choose(target, shape)
    if shape.paired:
        return Tiles(16, 256, 8, 2, 128 if target.name == "gfx950" else 64, swap=True)
    stages = 4 if target.name == "gfx950" else 2
    tiles = Tiles(16, 128, 4, stages, 128 if shape.native else 64, swap=True)
    return tiles if shape.groups > 1 else replace(tiles, splits=splits_of(target, tiles, shape))
