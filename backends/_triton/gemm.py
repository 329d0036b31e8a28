"""D = cast(C + bias + A B^T) in Triton: FP8 weights, and FP8 or float activations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from moekern.backends._triton.formats import decode, dot, load_scale, rounded
from moekern.backends._triton.launch import Launch, strides
from moekern.backends._triton.targets import Target
from moekern.scaled import BLOCK, FORMATS, ScaledTensor

LEAST_K = 16  # columns of a step: what the matrix instructions take at least


@dataclass(frozen=True)
class Tiles:
    """rows x columns of D that one program computes, and how."""

    rows: int
    columns: int
    warps: int
    stages: int


@triton.jit
def load_operand(pointer, mask, FORMAT: tl.constexpr, NATIVE: tl.constexpr, TO: tl.constexpr):
    """A tile as the matrix instruction takes it: FP8 as it is, or decoded, which is exact; floats as they are."""
    if FORMAT == "":
        return tl.load(pointer, mask=mask, other=0.0).to(TO)
    if NATIVE:
        return tl.load(pointer, mask=mask, other=0.0)
    return decode(tl.load(pointer, mask=mask, other=0), FORMAT).to(TO)


@triton.jit
def gemm_kernel(
    a, a_scale, b, b_scale, c, bias, out, m, n, k,
    a_block_rows, a_block_columns, b_block_rows, b_block_columns,
    a_row, a_column, a_scale_row, a_scale_column, b_row, b_column, b_scale_row, b_scale_column,
    c_row, c_column, out_row, out_column,
    A: tl.constexpr, B: tl.constexpr, NATIVE: tl.constexpr, TO: tl.constexpr, A_UE8M0: tl.constexpr,
    B_UE8M0: tl.constexpr, HAS_C: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of D. Every STEP columns of K, which have one scale a row, the product joins the float32 sum.

    Programs go through GROUP rows of tiles column by column, so that those in flight share their operands in L2.
    """
    tiles_m, tiles_n = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height
    i = tile_m * ROWS + tl.arange(0, ROWS)
    j = tile_n * COLUMNS + tl.arange(0, COLUMNS)
    i_wide, j_wide = i.to(tl.int64), j.to(tl.int64)
    step = tl.arange(0, STEP)
    a_at = a + i_wide[:, None] * a_row + step[None, :] * a_column
    b_at = b + j_wide[None, :] * b_row + step[:, None] * b_column
    a_scale_at, b_scale_at = a_scale + i_wide // a_block_rows * a_scale_row, b_scale + j_wide // b_block_rows * b_scale_row
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, k, STEP):
        inside = step < k - start
        left = load_operand(a_at, (i < m)[:, None] & inside[None, :], A, NATIVE, TO)
        right = load_operand(b_at, (j < n)[None, :] & inside[:, None], B, NATIVE, TO)
        scale = load_scale(b_scale_at + start // b_block_columns * b_scale_column, j < n, B_UE8M0)[None, :]
        if TO == tl.float32:  # whose activations times 448 may be beyond float32
            sums += dot(left, right * scale)
        elif A == "":
            sums += dot(left, right) * scale
        else:  # scales first: the sum times one of them may overflow where both are far apart
            scale_a = load_scale(a_scale_at + start // a_block_columns * a_scale_column, i < m, A_UE8M0)
            sums += dot(left, right) * (scale_a[:, None] * scale)
        a_at += STEP * a_column
        b_at += STEP * b_column
    inside = (i < m)[:, None] & (j < n)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + j, mask=j < n, other=0.0).to(tl.float32)[None, :]
    if HAS_C:
        sums += tl.load(c + i_wide[:, None] * c_row + j_wide[None, :] * c_column, mask=inside, other=0.0).to(tl.float32)
    at = out + i_wide[:, None] * out_row + j_wide[None, :] * out_column
    tl.store(at, rounded(sums, out.dtype.element_ty), mask=inside)


def step_of(k: int, *blocks: int) -> int:
    """The most columns, up to 128, in which no scale changes: a power of two."""
    inner = [block for block in blocks if block < k]
    common = math.gcd(BLOCK, *inner) if inner else BLOCK
    return min(common, BLOCK)


def refuses(target: Target, a: Any, b: ScaledTensor, c: Any, bias: Any, out: torch.Tensor, out_dtype: Any) -> str | None:
    blocks = [x.block[1] for x in (a, b) if isinstance(x, ScaledTensor)]
    if step_of(b.shape[1], *blocks) < LEAST_K:
        return f"takes scales of {LEAST_K} columns and more; these are of {' and '.join(map(str, blocks))}"
    return None


def gemm(target: Target, tiles: Tiles, a: Any, b: ScaledTensor, c: Any, bias: Any, out: torch.Tensor) -> Launch:
    """Of a prepared call."""
    m, n = out.shape
    k = b.shape[1]
    quantised = isinstance(a, ScaledTensor)
    format_a, format_b = a.format if quantised else "", b.format
    native = quantised and format_a == format_b and format_a in target.native
    to = tl.float16 if quantised else {torch.float32: tl.float32, torch.float16: tl.float16}.get(a.dtype, tl.bfloat16)
    data_a, scale_a = (a.data, a.scale) if quantised else (a, b.scale)
    blocks_a = a.block if quantised else (1, 1)
    parts: dict[str, Any] = {
        "a": data_a if native or not quantised else data_a.view(torch.uint8),
        "a_scale": _numbers(scale_a),
        "b": b.data if native else b.data.view(torch.uint8),
        "b_scale": _numbers(b.scale),
        "c": out if c is None else c,
        "bias": out if bias is None else bias,
        "out": out,
        "m": m,
        "n": n,
        "k": k,
        "a_block_rows": blocks_a[0],
        "a_block_columns": blocks_a[1],
        "b_block_rows": b.block[0],
        "b_block_columns": b.block[1],
    }
    for name, x in (("a", data_a), ("a_scale", scale_a), ("b", b.data), ("b_scale", b.scale)):
        parts |= strides(name, x)
    parts |= strides("c", out if c is None else c) | strides("out", out)
    return Launch(
        gemm_kernel,
        (triton.cdiv(m, tiles.rows) * triton.cdiv(n, tiles.columns),),
        parts,
        {
            "A": format_a,
            "B": format_b,
            "NATIVE": native,
            "TO": to,
            "A_UE8M0": scale_a.dtype not in (torch.float32,),
            "B_UE8M0": b.scale.dtype not in (torch.float32,),
            "HAS_C": c is not None,
            "HAS_BIAS": bias is not None,
            "ROWS": tiles.rows,
            "COLUMNS": tiles.columns,
            "STEP": step_of(k, *([a.block[1]] if quantised else []), b.block[1]),
            "GROUP": 8,
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _numbers(scale: torch.Tensor) -> torch.Tensor:
    return scale if scale.dtype == torch.float32 else scale.view(torch.uint8)
