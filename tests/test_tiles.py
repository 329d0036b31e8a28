"""Tiles are pure functions of an architecture and a shape: what has to hold for all of them, with no device."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from moekern.backends._triton.targets import TARGETS, Target
from moekern.backends._triton.tiles import Shape, Tiles, cheapest, cost, shared_bytes
from moekern.backends.cuda import tiles as cuda
from moekern.backends.rocm import tiles as rocm

OTHERS = (Target("cuda", 86, 32, 99 * 1024, 84), Target("cuda", 121, 32, 99 * 1024, 48))  # of which nothing is known
ALL = (*TARGETS.values(), *OTHERS)
ROWS = (0, 1, 8, 16, 17, 64, 100, 512, 4096, 100_000)
SIZES = ((7168, 2048), (4096, 7168), (576, 7168), (24576, 1536), (1536, 2048), (2048, 768), (1, 1), (129, 300))


def shapes() -> list[Shape]:
    found = []
    for (columns, k), groups, bits in itertools.product(SIZES, (1, 8, 256), (8, 16, 32)):
        for described, paired, strided in ((False, False, False), (True, False, False), (False, True, False)):
            if bits == 8 or not (described or paired):
                found.append(Shape(0, columns, k, groups, bits, 8, described, False, paired, strided))
        found.append(Shape(0, columns, k, groups, bits, 8, strided=True))
    return found


def chosen(target: Target, shape: Shape) -> list[tuple[str, Any]]:
    backend = cuda if target.backend == "cuda" else rocm
    shape = replace(shape, native=shape.bits_a == 8 and bool(target.native))
    return [
        ("choose", backend.choose(target, shape)),
        ("choose_for_few_rows", backend.choose_for_few_rows(target, shape)),
    ]


@pytest.mark.parametrize("target", ALL, ids=lambda target: target.name)
def test_tiles(target: Target) -> None:
    for shape in shapes():
        by_rows = []
        for rows in ROWS:
            one = replace(shape, rows=rows, native=shape.bits_a == 8 and bool(target.native))
            for name, tiles in chosen(target, one):
                assert shared_bytes(tiles, one) <= target.shared_memory, (name, one, tiles)
                assert not one.paired or tiles.columns == 256, (name, one, tiles)
                assert one.described or not tiles.descriptors, (name, one, tiles)
                assert tiles.descriptors or not tiles.specialised, (name, one, tiles)
                assert tiles.splits == 1 or (name == "choose_for_few_rows" and one.groups == 1), (name, one, tiles)
                assert all(x & (x - 1) == 0 for x in (tiles.rows, tiles.columns, tiles.depth, tiles.warps))
            by_rows.append(chosen(target, one)[0][1])
        # what decides in which order a row's products are added up
        assert len({(tiles.depth, tiles.swap, tiles.splits) for tiles in by_rows}) == 1, shape


def test_few_tiles_become_smaller_ones() -> None:
    target = TARGETS["sm_90"]
    many, few = (cuda.choose(target, Shape(rows, 7168, 2048, native=True)) for rows in (8192, 64))
    assert many.rows * many.columns > few.rows * few.columns
    assert cuda.choose(target, Shape(4096, 7168, 2048, native=True, described=True)).specialised


def test_splits_occupy_the_processors() -> None:
    target = TARGETS["sm_90"]
    tiles = cuda.choose_for_few_rows(target, Shape(8, 576, 7168, native=True))
    assert 1 < tiles.splits <= 16 and 7168 // tiles.splits >= 4 * tiles.depth


def test_the_budget_decides() -> None:
    target = replace(TARGETS["sm_90"], shared_memory=40 * 1024)
    large, small = Tiles(128, 128, 8, 3), Tiles(64, 64, 4, 2)
    shape = Shape(4096, 4096, 4096, native=True)
    assert cost(target, large, shape) < cost(target, small, shape)
    assert cheapest(target, (large, small), shape) is small
    with pytest.raises(ValueError, match="fits the 40960 bytes of sm_90"):
        cheapest(target, (large,), shape)
