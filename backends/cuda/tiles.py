"""Tiles for NVIDIA GPUs: pure functions of an architecture and a shape.

A class of calls has candidates that differ in rows and columns only, so that a row's bits are the same in all of them.
None of them spills a register on any architecture that has it here (docs/kernels.md).
"""

from __future__ import annotations

from dataclasses import replace

from moekern.backends._triton.targets import Target
from moekern.backends._triton.tiles import Shape, Tiles, cheapest, splits_of

_WIDE = ("sm_90", "sm_100")  # whose FP8 instructions are of 64 rows at least: fewer would be multiplied as float16
_FLOAT32 = (Tiles(64, 64, 8, 2, 32), Tiles(32, 32, 4, 2, 32), Tiles(16, 32, 4, 2, 32))
_DECODED = (Tiles(64, 128, 8, 3, 64), Tiles(64, 64, 4, 3, 64), Tiles(32, 64, 4, 3, 64), Tiles(16, 64, 4, 3, 64))
_NATIVE = (Tiles(128, 128, 8, 3), Tiles(64, 128, 8, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3), Tiles(16, 64, 4, 3))
_STRIDED = (Tiles(64, 64, 8, 2, 64),)
# two groups of warps multiply beside one that loads: while one scales and adds up, the other's products go on
_SPECIALISED = {
    "sm_90": Tiles(128, 128, 4, 4, descriptors=True, specialised=True),
    "sm_100": Tiles(128, 128, 8, 4, descriptors=True, specialised=True),
}
_DESCRIBED = {
    "sm_90": Tiles(64, 128, 4, 3, descriptors=True),
    "sm_120": Tiles(128, 128, 8, 3, descriptors=True),
}


def choose(target: Target, shape: Shape) -> Tiles:
    if shape.bits_a == 32:
        return cheapest(target, _FLOAT32, shape)
    if shape.strided:
        return cheapest(target, _STRIDED, shape)
    if shape.paired:
        return _paired(target, shape)
    if not shape.native:
        return cheapest(target, _DECODED, shape)
    least = 64 if target.name in _WIDE else 16
    candidates = [tiles for tiles in _NATIVE if tiles.rows >= least]
    if target.name == "sm_100" and shape.groups > 1:  # with a group's numbers in registers, too
        candidates = [tiles for tiles in candidates if tiles.rows <= 64]
    if shape.described:
        described = [_SPECIALISED.get(target.name), _DESCRIBED.get(target.name)]
        if target.name == "sm_90" and shape.groups > 1:  # whose compiler specialises no loop over groups
            described = described[1:]
        candidates = [*filter(None, described), *candidates]
    return cheapest(target, candidates, shape)


def _paired(target: Target, shape: Shape) -> Tiles:
    if target.name == "sm_90":
        return Tiles(64, 256, 8, 2)
    if target.name == "sm_100":
        return Tiles(32, 256, 8, 2, swap=True)
    return Tiles(32, 256, 8, 2, 64)


def choose_for_few_rows(target: Target, shape: Shape) -> Tiles:
    if shape.bits_a == 32 or shape.strided:
        return choose(target, shape)
    if shape.paired:
        return Tiles(16, 256, 8, 2, 128 if shape.native else 64, swap=True)
    if shape.native:
        tiles = Tiles(16, 128, 4, 4, swap=True)
    else:
        tiles = Tiles(16, 128, 8 if target.name == "sm_100" else 4, 3, 64, swap=True)
    if shape.groups > 1:
        return tiles
    return replace(tiles, splits=splits_of(target, tiles, shape))
