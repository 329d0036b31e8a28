"""Tiles for NVIDIA GPUs: pure functions of an architecture and a shape."""

from __future__ import annotations

from moekern.backends._triton.targets import Target
from moekern.backends._triton.tiles import Shape, Tiles


def choose(target: Target, shape: Shape) -> Tiles:
    return Tiles(128, 128, 8, 3)


def choose_for_few_rows(target: Target, shape: Shape) -> Tiles:
    return Tiles(16, 128, 4, 4, swap=True, splits=2 if shape.groups == 1 else 1)
