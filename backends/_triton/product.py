"""One tile of a product of FP8 operands, for every kernel that multiplies: dense, grouped, experts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from moekern.backends._triton.formats import decode, dot, load_scale, rounded, to_fnuz
from moekern.backends._triton.launch import Launch, cdiv
from moekern.backends._triton.targets import Target
from moekern.backends._triton.tiles import Shape, Tiles
from moekern.scaled import BLOCK, ScaledTensor

LEAST_STEP = 16  # columns of k: what the matrix instructions take at least


@triton.jit
def load_operand(at, inside, FORMAT: tl.constexpr, NATIVE: tl.constexpr, TO: tl.constexpr, EVEN: tl.constexpr):
    """A tile as the matrix instruction takes it: FP8 as it is or as fnuz, or decoded, which is exact; or floats."""
    zero: tl.constexpr = 0.0 if FORMAT == "" or NATIVE == "same" else 0
    value = tl.load(at) if EVEN else tl.load(at, mask=inside, other=zero)
    if FORMAT == "":
        value = value.to(TO)
    elif NATIVE == "fnuz":
        value = to_fnuz(value)
    elif NATIVE == "":
        value = decode(value, FORMAT).to(TO)
    return value


@triton.jit
def block_of(column, BLOCK: tl.constexpr):
    """The scale of a column of k. BLOCK is 0 where there is one for all; a division at run time would take a call."""
    if BLOCK == 0:
        return 0
    else:
        return column // BLOCK


@triton.jit
def multiply(
    x, x_step, x_scale, x_scale_step, y, y_step, y_scale, y_scale_step, first, last, x_factor, y_factor,
    X: tl.constexpr, Y: tl.constexpr, X_BLOCK: tl.constexpr, Y_BLOCK: tl.constexpr, X_SCALES: tl.constexpr,
    Y_SCALES: tl.constexpr,
    X_UE8M0: tl.constexpr, Y_UE8M0: tl.constexpr, NATIVE: tl.constexpr, TO: tl.constexpr,
    EVEN: tl.constexpr, STEP: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """The sum of x y^T over the columns first .. last of k, [P, Q] float32, where x [P] and y [Q] point to rows. Every
    STEP columns, which have one scale a row, their product joins the sum. BLOCK: columns of a scale.

    x_scale and y_scale point to the scales of rows, or, without X_SCALES and Y_SCALES, to the one of all rows.
    FACTORS: rows are multiplied by x_factor [P] and y_factor [Q], powers of two, first.
    """
    step = tl.arange(0, STEP)
    from_first = tl.cast(first, tl.int64)
    x_at = x[:, None] + from_first * x_step + step[None, :] * x_step
    y_at = y[None, :] + from_first * y_step + step[:, None] * y_step
    sums = tl.zeros((x.shape[0], y.shape[0]), tl.float32)
    for start in tl.range(first, last, STEP, num_stages=1 if FACTORS else None):
        inside = step < last - start
        left = load_operand(x_at, inside[None, :], X, NATIVE, TO, EVEN)
        right = load_operand(y_at, inside[:, None], Y, NATIVE, TO, EVEN)
        if X != "":
            scale_x = load_scale(x_scale + block_of(start, X_BLOCK) * x_scale_step, X_UE8M0)
            if X_SCALES:
                scale_x = scale_x[:, None]
            if FACTORS:
                scale_x = scale_x * x_factor[:, None]
        elif FACTORS:
            left = rounded(left.to(tl.float32) * x_factor[:, None], TO)
        if Y != "":
            scale_y = load_scale(y_scale + block_of(start, Y_BLOCK) * y_scale_step, Y_UE8M0)
            if Y_SCALES:
                scale_y = scale_y[None, :]
            if FACTORS:
                scale_y = scale_y * y_factor[None, :]
        elif FACTORS:
            right = rounded(right.to(tl.float32) * y_factor[None, :], TO)
        if X == "":
            if TO == tl.float32:  # whose values times 448 may be beyond float32
                sums += dot(left, right * scale_y)
            else:
                sums += dot(left, right) * scale_y
        elif Y == "":
            if TO == tl.float32:
                sums += dot(left * scale_x, right)
            else:
                sums += dot(left, right) * scale_x
        else:  # scales first: the sum times one of them may overflow where they are far apart
            sums += dot(left, right) * (scale_x * scale_y)
        x_at += STEP * x_step
        y_at += STEP * y_step
    return sums * 4.0 if NATIVE == "fnuz" else sums


@triton.jit
def multiply_tiles(
    x, x_row, x_scale, x_scale_step, y, y_row, y_scale, y_scale_step, first, last,
    X_BLOCK: tl.constexpr, Y_BLOCK: tl.constexpr, X_SCALES: tl.constexpr, Y_SCALES: tl.constexpr,
    X_UE8M0: tl.constexpr, Y_UE8M0: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, STEP: tl.constexpr,
    SPECIALISED: tl.constexpr,
):  # fmt: skip
    """As `multiply`, of the rows from x_row and y_row on of tensor descriptors. What is outside of them is 0."""
    sums = tl.zeros((P, Q), tl.float32)
    for start in tl.range(first, last, STEP, warp_specialize=SPECIALISED):
        left = x.load([x_row, start])
        right = y.load([y_row, start])
        scale_x = load_scale(x_scale + block_of(start, X_BLOCK) * x_scale_step, X_UE8M0)
        scale_y = load_scale(y_scale + block_of(start, Y_BLOCK) * y_scale_step, Y_UE8M0)
        if X_SCALES:
            scale_x = scale_x[:, None]
        if Y_SCALES:
            scale_y = scale_y[None, :]
        sums += dot(left, right.T) * (scale_x * scale_y)
    return sums


@triton.jit
def exponent(
    x, x_step, x_scale, x_scale_step, first, last, X: tl.constexpr, X_BLOCK: tl.constexpr, X_SCALES: tl.constexpr,
    X_UE8M0: tl.constexpr, EVEN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """That of the largest finite scale of every row of an operand, or of its largest number: -126 .. 127, [P] int32."""
    largest = tl.zeros((x.shape[0],), tl.int32)
    for start in tl.range(first, last, STEP, num_stages=1):
        if X != "":
            scale = load_scale(x_scale + block_of(start, X_BLOCK) * x_scale_step, X_UE8M0)
            size = tl.broadcast_to(scale, (x.shape[0],)).to(tl.int32, bitcast=True) & 0x7F800000
            largest = tl.maximum(largest, tl.where(size == 0x7F800000, 0, size))
        else:
            step = start + tl.arange(0, STEP)
            value = tl.load(x[:, None] + step.to(tl.int64)[None, :] * x_step, mask=(step < last)[None, :], other=0.0)
            size = value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7F800000
            largest = tl.maximum(largest, tl.max(tl.where(size == 0x7F800000, 0, size), 1))
    return tl.where(largest == 0, 0, (largest >> 23) - 127)


@triton.jit
def power(e, dtype: tl.constexpr):
    """2^e, for e in -126 .. 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True).to(dtype)


@triton.jit
def normalised(
    x, x_step, x_scale, x_scale_step, y, y_step, y_scale, y_scale_step, first, last, X: tl.constexpr, Y: tl.constexpr,
    X_BLOCK: tl.constexpr, Y_BLOCK: tl.constexpr, X_SCALES: tl.constexpr, Y_SCALES: tl.constexpr, X_UE8M0: tl.constexpr,
    Y_UE8M0: tl.constexpr, NATIVE: tl.constexpr, TO: tl.constexpr, EVEN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """As `multiply`, in float64, with rows multiplied by powers of two that keep sums far from float32's largest."""
    REST: tl.constexpr = min(STEP, 32)  # fewer registers: this is rare
    x_exponent = exponent(x, x_step, x_scale, x_scale_step, first, last, X, X_BLOCK, X_SCALES, X_UE8M0, EVEN, REST)
    y_exponent = exponent(y, y_step, y_scale, y_scale_step, first, last, Y, Y_BLOCK, Y_SCALES, Y_UE8M0, EVEN, REST)
    sums = multiply(
        x, x_step, x_scale, x_scale_step, y, y_step, y_scale, y_scale_step, first, last,
        power(tl.maximum(-x_exponent, -126), tl.float32), power(tl.maximum(-y_exponent, -126), tl.float32),
        X, Y, X_BLOCK, Y_BLOCK, X_SCALES, Y_SCALES, X_UE8M0, Y_UE8M0, NATIVE, TO, EVEN, REST, True,
    )  # fmt: skip
    back = power(tl.minimum(x_exponent, 126), tl.float64)[:, None] * power(tl.minimum(y_exponent, 126), tl.float64)
    return sums.to(tl.float64) * back


@triton.jit
def overflowed(sums):
    """Which rows of a tile have a sum that is infinite or NaN: [P] uint8."""
    return (tl.max(sums.to(tl.int32, bitcast=True) & 0x7F800000, 1) == 0x7F800000).to(tl.uint8)


@triton.jit
def product(
    x, x_step, x_scale, x_scale_step, y, y_step, y_scale, y_scale_step, first, last, X: tl.constexpr, Y: tl.constexpr,
    X_BLOCK: tl.constexpr, Y_BLOCK: tl.constexpr, X_SCALES: tl.constexpr, Y_SCALES: tl.constexpr, X_UE8M0: tl.constexpr,
    Y_UE8M0: tl.constexpr, NATIVE: tl.constexpr, TO: tl.constexpr, EVEN: tl.constexpr, STEP: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """As `multiply`; where float32 overflows on the way, as `normalised`. WIDE: in float64, so that what is too large
    for float32 here may still cancel.
    """
    one_x, one_y = tl.full((x.shape[0],), 1.0, tl.float32), tl.full((y.shape[0],), 1.0, tl.float32)
    sums = multiply(
        x, x_step, x_scale, x_scale_step, y, y_step, y_scale, y_scale_step, first, last, one_x, one_y,
        X, Y, X_BLOCK, Y_BLOCK, X_SCALES, Y_SCALES, X_UE8M0, Y_UE8M0, NATIVE, TO, EVEN, STEP, False,
    )  # fmt: skip
    total = sums.to(tl.float64) if WIDE else sums
    if tl.max(overflowed(sums), 0) != 0:
        total = normalised(
            x, x_step, x_scale, x_scale_step, y, y_step, y_scale, y_scale_step, first, last,
            X, Y, X_BLOCK, Y_BLOCK, X_SCALES, Y_SCALES, X_UE8M0, Y_UE8M0, NATIVE, TO, EVEN, STEP,
        ).to(total.dtype)  # fmt: skip
    return total


class Operand(NamedTuple):
    """One side of a product, as a kernel takes it: rows of k."""

    data: torch.Tensor
    scale: torch.Tensor  # of a float operand: data again, which nobody reads
    block: tuple[int, int]
    format: str  # "" for floats

    def arguments(self, name: str) -> dict[str, Any]:
        """The kernel's arguments for it: pointers, strides of the last two dimensions, the scale's block."""
        data, scale = self.data, self.scale
        row, step = data.stride()[-2:]
        scale_row, scale_step = scale.stride()[-2:]
        return {
            name: data,
            f"{name}_scale": scale,
            f"{name}_row": row,
            f"{name}_step": step,
            f"{name}_scale_row": scale_row,
            f"{name}_scale_step": scale_step,
            f"{name}_block_rows": self.block[0],
        }


class Pair(NamedTuple):
    """Both operands of a product, and how a target multiplies them."""

    a: Operand
    b: Operand
    k: int
    step: int
    native: str  # "same": FP8 units take both as they are; "fnuz": as e4m3fnuz; "": they are decoded
    to: Any  # the type that decoded and float operands have in the matrix instruction

    def constants(self, tiles: Tiles) -> dict[str, Any]:
        return {
            "A": self.a.format,
            "B": self.b.format,
            "A_BLOCK": self._block(self.a),
            "B_BLOCK": self._block(self.b),
            "A_UE8M0": _ue8m0(self.a),
            "B_UE8M0": _ue8m0(self.b),
            "NATIVE": self.native,
            "TO": self.to,
            "STEP": min(self.step, tiles.depth),
        }

    def shape(self, rows: int, columns: int, groups: int = 1, **what: bool) -> Shape:
        """What tiles are chosen by. what: further fields of it."""
        bits_a, bits_b = 8 * self.a.data.element_size(), 8 * self.b.data.element_size()
        return Shape(rows, columns, self.k, groups, bits_a, bits_b, native=self.native != "", **what)

    def describable(self) -> bool:
        """Whether tensor descriptors may stand for both operands: rows of bytes, 16-byte aligned, also of a stack."""
        if self.native != "same" or not self.k:
            return False
        return _describable(self.a.data) and _describable(self.b.data)

    def _block(self, x: Operand) -> int:
        return 0 if x.format == "" or x.block[1] >= self.k else x.block[1]


def pair(target: Target, a: Any, b: Any, k: int) -> Pair:
    """a, b: ScaledTensor or float tensor; matrices, or stacks of them."""
    a_format, b_format = (x.format if isinstance(x, ScaledTensor) else "" for x in (a, b))
    native = ""
    if a_format == b_format and a_format in target.native:
        native = "same"
    elif a_format == b_format == "e4m3fn" and "e4m3fnuz" in target.native:
        native = "fnuz"
    to = _TYPES[a.dtype] if not a_format else _TYPES[b.dtype] if not b_format else tl.float16
    same = native == "same"
    return Pair(_operand(a, a_format, same), _operand(b, b_format, same), k, step_of(k, a, b), native, to)


_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _operand(x: Any, format: str, native: bool) -> Operand:
    if not format:
        return Operand(x, x, (1, 1), "")
    scale = x.scale if x.scale.dtype == torch.float32 else x.scale.view(torch.uint8)
    return Operand(x.data if native else x.data.view(torch.uint8), scale, x.block, format)


def _describable(x: torch.Tensor) -> bool:
    strides = x.stride()
    return (
        strides[-1] == 1
        and strides[-2] % 16 == 0
        and x.data_ptr() % 16 == 0
        and (len(strides) == 2 or strides[0] == x.shape[1] * strides[1])
    )


def _ue8m0(x: Operand) -> bool:
    return x.format != "" and x.scale.dtype == torch.uint8


def step_of(k: int, *operands: Any) -> int:
    """The most columns, up to 128, in which no scale changes: a power of two."""
    step = BLOCK
    for x in operands:
        if isinstance(x, ScaledTensor) and x.block[1] < k:
            step = math.gcd(step, x.block[1])
    return step


def refuses_scales(k: int, *operands: Any) -> str | None:
    if step_of(k, *operands) < LEAST_STEP:
        blocks = " and ".join(str(x.block[1]) for x in operands if isinstance(x, ScaledTensor))
        return f"takes scales of multiples of {LEAST_STEP} columns; these are of {blocks}"
    return None


def tiles_and_repair(product: Launch, tiles: Tiles, rows: int, columns: int, device: torch.device) -> list[Launch]:
    """The product by descriptors, and another, in small tiles, of what it flags: rows of a tile's columns."""
    flags = torch.empty((cdiv(columns, tiles.columns), rows), dtype=torch.uint8, device=device)
    arguments = {**product.arguments, "flags": flags, "flag_rows": rows}
    by_tiles = {"TILES": True, "SPECIALISED": tiles.specialised}
    repair = {"REPAIR": True, "ROWS": min(tiles.rows, 64), "COLUMNS": min(tiles.columns, 64)}
    return [
        replace(product, arguments=arguments, constants={**product.constants, **by_tiles}),
        replace(product, arguments=arguments, constants={**product.constants, **repair}, num_warps=4, num_stages=1),
    ]
