"""How a product is cut into tiles: what the tables of the backends answer, and the budget that it has to fit."""

from __future__ import annotations

from dataclasses import dataclass


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
