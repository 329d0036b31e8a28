"""The emulator's fragments, descriptors and swizzles against CuTe's headers (tests/golden), not against our reading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import golden_ptx
import ml_dtypes
import numpy
import pytest

from moekern.backends.cuda import emulator
from moekern.backends.cuda.emulator import Module, TensorMap
from moekern.backends.cuda.emulator.tensor_maps import _SWIZZLES

GOLDEN = json.loads((Path(__file__).parent / "golden" / "cute_layouts.json").read_text())
BASE = GOLDEN["base_address"]
B_AT = 32 * 1024  # of the tile's 64 KB, where the second operand begins
WGMMA = {8: ("e4m3", 32, numpy.dtype(ml_dtypes.float8_e4m3fn)), 16: ("bf16", 16, numpy.dtype(ml_dtypes.bfloat16))}

Array = numpy.ndarray[Any, Any]

pytestmark = pytest.mark.skipif(not emulator.library_path().exists(), reason="the emulated driver is not built")


def run(text: str, threads: int, operands: Array, out: Array, *maps: TensorMap) -> None:
    """operands, out: what p0 and p1 point to."""
    operands = operands.view()
    operands.flags.writeable = False
    arguments = [*maps, operands, out]
    Module(text).launch("program", 1, threads, arguments, shared_bytes=golden_ptx.SHARED_BYTES, races=False)


def table(halves: dict[str, list[int]], outer: str = "threads", inner: str = "values") -> Array:
    return numpy.array(halves[outer])[:, None] + numpy.array(halves[inner])[None]


def byte_offsets(tile: dict[str, Any]) -> Array:
    return numpy.array(tile["bytes"]["rows"])[:, None] ^ numpy.array(tile["bytes"]["columns"])[None]


def name(tile: dict[str, Any]) -> str:
    return f"{tile['major']}-{tile['swizzle']}-{tile['bits']}bit"


OPERANDS = [tile for tile in GOLDEN["tiles"] if "a" in tile]


def placed(matrix: Array, tile: dict[str, Any]) -> Array:
    """The bytes of a tile that holds the matrix in its first rows, and NaN elsewhere."""
    bytes_ = numpy.full(golden_ptx.SHARED_BYTES // 2, 0xFF, numpy.uint8)
    size = tile["bits"] // 8
    at = byte_offsets(tile)[: len(matrix)]
    for byte in range(size):
        bytes_[at + byte] = matrix.view(numpy.uint8).reshape(*matrix.shape, size)[..., byte]
    return bytes_


def small(rng: numpy.random.Generator, *shape: int, dtype: Any) -> Array:
    return rng.integers(-3, 4, shape).astype(dtype)


def wgmma(
    n: int,
    bits: int,
    a: Sequence[int] | None,
    b: Sequence[int],
    tiles: Array,
    mn_major: tuple[bool, bool] = (False, False),
) -> Array:
    """What each thread's registers hold."""
    kind, k, _ = WGMMA[bits]
    out = numpy.full((128, n // 2), numpy.nan, numpy.float32)
    b = [descriptor + (B_AT >> 4 << GOLDEN["descriptor"]["address"][0]) for descriptor in b]
    text = golden_ptx.wgmma(kind, k, n, a, b, BASE, mn_major)
    run(text, 128, tiles, out)
    return out


@pytest.mark.parametrize("n", [int(n) for n in GOLDEN["wgmma_accumulator"]])
def test_accumulators(n: int) -> None:
    """Each element of the product is its own position, row + 64 * column, written in digits of 8."""
    tile = next(tile for tile in OPERANDS if name(tile) == "k-128-8bit")
    kind = WGMMA[8][2]
    rows, columns = numpy.arange(64), numpy.arange(n)
    a, b = numpy.zeros((64, 32)), numpy.zeros((n, 32))
    for digit, (left, right) in enumerate(
        ((rows % 8, 1), (rows // 8, 8), (64, columns % 8), (256, 2 * (columns // 8 % 8)), (256, 16 * (columns // 64)))
    ):
        a[:, digit], b[:, digit] = left, right
    tiles = numpy.concatenate([placed(x.astype(kind), tile | {"bytes": _cut(tile, 32)}) for x in (a, b)])
    out = wgmma(n, 8, tile["a"][0][:1], tile["b"][:1], tiles)
    numpy.testing.assert_array_equal(out, table(GOLDEN["wgmma_accumulator"][str(n)]))


def _cut(tile: dict[str, Any], columns: int) -> dict[str, Any]:
    return {**tile["bytes"], "columns": tile["bytes"]["columns"][:columns]}


def _product(out: Array, n: int) -> Array:
    where = table(GOLDEN["wgmma_accumulator"][str(n)])
    product = numpy.full(64 * n, numpy.nan, numpy.float32)
    product[where.ravel()] = out.ravel()
    return product.reshape(n, 64).T


@pytest.mark.parametrize("left", OPERANDS, ids=name)
def test_operands_in_shared_memory(left: dict[str, Any]) -> None:
    """With the other operand in every layout of its own: what both misread alike would cancel out."""
    bits, n = left["bits"], 128
    kind = WGMMA[bits][2]
    rng = numpy.random.default_rng(bits)
    for right in (tile for tile in OPERANDS if tile["bits"] == bits):
        columns = len(left["bytes"]["columns"])
        a, b = small(rng, 256, columns, dtype=kind), small(rng, n, columns, dtype=kind)
        tiles = numpy.concatenate([placed(a, left), placed(b, right)])
        part = int(rng.integers(len(left["a"])))
        mn_major = (left["major"] == "mn", right["major"] == "mn")
        out = wgmma(n, bits, left["a"][part], right["b"], tiles, mn_major)
        rows = a[64 * part : 64 * part + 64].astype(numpy.float32)
        numpy.testing.assert_array_equal(_product(out, n), rows @ b.astype(numpy.float32).T, err_msg=name(right))


@pytest.mark.parametrize("right", OPERANDS, ids=name)
def test_operands_in_registers(right: dict[str, Any]) -> None:
    bits, n = right["bits"], 64
    _, k, kind = WGMMA[bits]
    rng = numpy.random.default_rng(bits)
    columns = len(right["bytes"]["columns"])
    a, b = small(rng, 64, columns, dtype=kind), small(rng, n, columns, dtype=kind)
    where = table(GOLDEN["wgmma_a"][str(bits)])
    steps = [a[:, i : i + k].T.ravel()[where] for i in range(0, columns, k)]  # [thread, value]
    registers = numpy.concatenate([numpy.ascontiguousarray(step).view(numpy.uint8).ravel() for step in steps])
    nothing = numpy.zeros(golden_ptx.SHARED_BYTES // 2, numpy.uint8)
    operands = numpy.concatenate([registers, nothing, placed(b, right)])
    out = wgmma(n, bits, None, right["b"], operands, (False, right["major"] == "mn"))
    numpy.testing.assert_array_equal(_product(out, n), a.astype(numpy.float32) @ b.astype(numpy.float32).T)


def _boxes(tile: dict[str, Any]) -> tuple[Array, tuple[int, int], list[tuple[int, int]]]:
    """A matrix in memory, contiguous along the tile's major dimension and 16 bytes a row longer, with the bytes that
    the tile takes, in a box's size and coordinates of bytes, atom by atom as they lie in the tile."""
    size, mn = tile["bits"] // 8, tile["major"] == "mn"
    rows, columns = len(tile["bytes"]["rows"]), len(tile["bytes"]["columns"])
    height, width = (columns, rows * size) if mn else (rows, columns * size)
    across, along = (tile["atom"][1], tile["atom"][0] * size) if mn else (tile["atom"][0], tile["atom"][1] * size)
    xs, ys = range(0, width, along), range(0, height, across)
    order = [(x, y) for y in ys for x in xs] if mn else [(x, y) for x in xs for y in ys]
    memory = numpy.random.default_rng(width).integers(0, 256, (height, width + 16), numpy.uint8)
    return memory, (along, across), order


def _tile_bytes(tile: dict[str, Any], memory: Array) -> Array:
    size = tile["bits"] // 8
    at = byte_offsets(tile)
    elements = memory[:, :-16].reshape(len(memory), -1, size)
    elements = elements.transpose(1, 0, 2) if tile["major"] == "mn" else elements
    expected = numpy.zeros(at.size * size, numpy.uint8)
    for byte in range(size):
        expected[at + byte] = elements[..., byte]
    return expected


def _map(memory: Array, box: tuple[int, int], tile: dict[str, Any]) -> TensorMap:
    """Of all but the last 16 bytes of each row."""
    swizzle = 0 if tile["swizzle"] == "none" else int(tile["swizzle"])
    assert _SWIZZLES[swizzle] == tile["mode"]
    return TensorMap(memory[:, :-16], box[::-1], swizzle=swizzle)


@pytest.mark.parametrize("tile", GOLDEN["tiles"], ids=name)
def test_loads_by_tma(tile: dict[str, Any]) -> None:
    memory, box, order = _boxes(tile)
    out = numpy.zeros(memory[:, :-16].size, numpy.uint8)
    run(golden_ptx.load_boxes(order, box[0] * box[1]), 32, out, out, _map(memory, box, tile))
    numpy.testing.assert_array_equal(out, _tile_bytes(tile, memory))


@pytest.mark.parametrize("tile", GOLDEN["tiles"], ids=name)
def test_stores_by_tma(tile: dict[str, Any]) -> None:
    memory, box, order = _boxes(tile)
    tile_bytes, out = _tile_bytes(tile, memory), numpy.full_like(memory, 0xA5)
    text = golden_ptx.store_boxes(order, box[0] * box[1])
    run(text, 32, tile_bytes, tile_bytes.copy(), _map(out, box, tile))
    numpy.testing.assert_array_equal(out[:, :-16], memory[:, :-16])
    assert (out[:, -16:] == 0xA5).all()


ROW_OF_LANE = (7 * numpy.arange(32) + 3) % 32  # not in order: rows are where lanes say


@pytest.mark.parametrize("variant", GOLDEN["matrix"])
def test_loads_of_matrices(variant: str) -> None:
    """Each element is its own position in the rows, in the order of the lanes that point to them."""
    rows = numpy.zeros((32, 8), numpy.uint16)
    rows[ROW_OF_LANE] = numpy.arange(256).reshape(32, 8)
    operands = numpy.concatenate([rows.view(numpy.uint8).ravel(), ROW_OF_LANE.astype(numpy.uint32).view(numpy.uint8)])
    where = table(GOLDEN["matrix"][variant]["load"])
    out = numpy.zeros(where.shape, numpy.uint16)
    run(golden_ptx.ldmatrix(variant), 32, operands, out)
    numpy.testing.assert_array_equal(out, where)


@pytest.mark.parametrize("variant", GOLDEN["matrix"])
def test_stores_of_matrices(variant: str) -> None:
    where = table(GOLDEN["matrix"][variant]["store"])
    rows = where.size // 8
    row_of_lane = (3 * numpy.arange(32) + 1) % rows
    registers = where.astype(numpy.uint16)
    operands = numpy.concatenate(
        [registers.view(numpy.uint8).ravel(), row_of_lane.astype(numpy.uint32).view(numpy.uint8)]
    )
    out = numpy.full((rows, 8), 0xFFFF, numpy.uint16)
    run(golden_ptx.stmatrix(variant), 32, operands, out)
    numpy.testing.assert_array_equal(out[row_of_lane[:rows]], numpy.arange(where.size).reshape(rows, 8))


@pytest.mark.parametrize(("shape", "bits"), [("m16n8k32", 8), ("m16n8k16", 16)])
def test_fragments_of_mma(shape: str, bits: int) -> None:
    kind, k, dtype = WGMMA[bits]
    rng = numpy.random.default_rng(bits)
    a, b, c = small(rng, 16, k, dtype=dtype), small(rng, 8, k, dtype=dtype), small(rng, 16, 8, dtype=numpy.float32)
    golden = GOLDEN["mma"][shape]
    words = [x.T.ravel()[table(golden[of])] for of, x in (("a", a), ("b", b), ("c", c))]
    lanes = [numpy.ascontiguousarray(x).view(numpy.uint8).reshape(32, -1) for x in words]
    operands = numpy.ascontiguousarray(numpy.concatenate(lanes, axis=1)).ravel()
    out = numpy.zeros((32, 4), numpy.float32)
    run(golden_ptx.mma(kind, k), 32, operands, out)
    product = numpy.full(128, numpy.nan, numpy.float32)
    product[table(golden["c"]).ravel()] = out.ravel()
    expected = c + a.astype(numpy.float32) @ b.astype(numpy.float32).T
    numpy.testing.assert_array_equal(product.reshape(8, 16).T, expected)
