"""The choice of tiles for the products of sm_90a: budgets of a block, and what the model says of shapes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

import moekern.backends.cuda as cuda
from moekern.backends.cuda import hopper
from moekern.backends.cuda.hopper import Limits, Plan, Shape

KERNELS = Path(cuda.__file__).parent / "kernels"
DEVICES = (Limits(132), Limits(114), Limits(78), Limits(5), Limits(1))  # SXM, PCIe, H20, and the emulator's
ROWS = (1, 8, 17, 64, 65, 128, 129, 500, 4096, 100_000)
SIZES = (
    (2112, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (576, 7168),
    (1, 1),
    (129, 300),
    (5, 0),
)
SHAPES = [Shape(m, n, k, g, o) for (n, k), m, g, o in itertools.product(SIZES, ROWS, (1, 8, 256), (2, 4))]


def test_the_list_is_that_of_the_kernels() -> None:
    """gemm_tiles.inc is read where nvcc's sources lie, which wheels leave out."""
    listed = KERNELS / "gemm_tiles.inc"
    if not listed.exists():
        pytest.skip("installed without sources")
    found = re.findall(r"^MOEKERN_TILE\((\d+), (\d+)\)", listed.read_text(), re.MULTILINE)
    assert tuple((int(rows), int(columns)) for rows, columns in found) == hopper.TILES


@pytest.mark.parametrize("tile", hopper.TILES, ids=str)
def test_a_tile_fits_a_block(tile: tuple[int, int]) -> None:
    rows, columns = tile
    assert rows in (128, 256) and columns % 16 == 0
    assert 3 <= hopper.stages(rows, columns) <= hopper.MOST_STAGES
    assert hopper.shared_bytes(rows, columns) <= hopper.SHARED_BYTES
    assert hopper.registers(rows, columns) + 32 <= 224  # addresses, scales and positions
    assert columns % hopper.granule(columns) == 0 and 128 % hopper.granule(columns) == 0
    # blocks of 128 columns begin where granules do, whichever tile it is
    assert all(first % hopper.granule(columns) == 0 for first in range(0, 20 * columns, columns))


@pytest.mark.parametrize("limits", DEVICES, ids=str)
def test_every_shape_has_a_plan(limits: Limits) -> None:
    for shape in SHAPES:
        plan = hopper.plan(limits, shape)
        assert (plan.rows, plan.columns) in hopper.TILES
        assert plan.shared in (0, 1, 2) and plan.band >= 1
        assert plan.shared == 0 or limits.processors >= 2
        if shape.groups > 1:
            assert plan.shared != 2  # a pair of tiles would be one group's
        arguments = (limits.processors, shape.rows, shape.columns, shape.k, shape.groups, shape.out_bytes)
        assert hopper.tile_plan(*arguments) == (plan.rows, plan.columns, plan.shared, plan.band)
        few = hopper.for_few_rows(limits, shape)
        assert few.tokens in hopper.STREAM_ROWS and few.splits in hopper.STREAM_SPLITS
        assert few.tokens >= min(shape.rows, 64) and few.splits <= max(2 * limits.processors, 1)
        assert hopper.stream_plan(*arguments) == (few.tokens, few.splits)


def test_splits_depend_on_the_weights_alone() -> None:
    for limits, (n, k) in itertools.product(DEVICES, SIZES):
        assert len({hopper.for_few_rows(limits, Shape(m, n, k)).splits for m in range(1, 65)}) == 1


def test_few_columns_fill_the_device() -> None:
    """A decode of 2112 x 7168 would leave half of the processors idle without a division of k."""
    plan = hopper.for_few_rows(Limits(132), Shape(1, 2112, 7168))
    assert plan.splits * -(-2112 // hopper.STREAM_COLUMNS) >= 132


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        (Shape(4096, 2112, 7168), 1127), (Shape(4096, 24576, 1536), 1212), (Shape(4096, 32768, 512), 775),
        (Shape(4096, 7168, 16384), 1520), (Shape(4096, 7168, 2048), 1168), (Shape(128, 7168, 16384), 645),
    ],
    ids=str,
)  # fmt: skip
def test_predictions_are_of_this_world(shape: Shape, published: int) -> None:
    """DeepGEMM's last published TFLOP/s on H800: the model leaves out clocks that sag, and nothing that is a factor."""
    predicted = hopper.tflops(Limits(132), shape)
    assert 0.9 * published < predicted < 1.7 * published and predicted < 1979


def test_no_other_tile_is_cheaper() -> None:
    for shape in SHAPES[::7]:
        best = hopper.cycles(Limits(), shape, hopper.plan(Limits(), shape))
        assert all(best <= hopper.cycles(Limits(), shape, Plan(m, n, 0, 8)) for m, n in hopper.TILES)
