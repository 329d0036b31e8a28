"""Casts to FP8 and back. One program is one tile of whole blocks: read once, reduced, written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moekern.backends._triton.formats import decode, encode, load_scale, rounded, rounded_up
from moekern.backends._triton.launch import Launch, cdiv, strides
from moekern.scaled import FORMATS, MAX, ScaledTensor

ROWS = {(1, 128): 16, (128, 128): 128, (128, 1): 128}  # of a tile
COLUMNS = {(1, 128): 128, (128, 128): 128, (128, 1): 32}
_BACK = (32, 128)  # a tile of dequantize


@triton.jit
def cast_kernel(
    x, data, scale, rows, columns, x_row, x_column, data_row, data_column, scale_row, scale_column,
    MOST: tl.constexpr, FORMAT: tl.constexpr, ROUND_UP: tl.constexpr, GATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """s = max(amax, 1e-4) / max of each block, q = rne(clamp(x (1 / s)))."""
    i = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    j = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    at = i.to(tl.int64)[:, None] * x_row + j.to(tl.int64)[None, :] * x_column
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x + at + columns.to(tl.int64) * x_column, mask=inside, other=0.0).to(tl.float32)
        values = tl.div_rn(values, 1.0 + tl.exp(-values)) * up
    # of bits, which order as the magnitudes do, with NaN above all
    size = (values.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32)
    if BLOCK_ROWS == 1:
        amax = tl.max(size, 1)[:, None]
    elif BLOCK_COLUMNS == 1:
        amax = tl.max(size, 0)[None, :]
    else:
        amax = tl.max(tl.max(size, 1), 0)[None, None]
    amax = amax.to(tl.float32, bitcast=True)
    s = tl.div_rn(tl.where(amax < 1e-4, 1e-4, amax), MOST)
    if ROUND_UP:
        s = rounded_up(s)
    q = encode(values * tl.broadcast_to(tl.div_rn(1.0, s), values.shape), FORMAT)
    tl.store(data + i.to(tl.int64)[:, None] * data_row + j.to(tl.int64)[None, :] * data_column, q, mask=inside)
    si, sj = i // BLOCK_ROWS, j // BLOCK_COLUMNS
    first = inside & (i % BLOCK_ROWS == 0)[:, None] & (j % BLOCK_COLUMNS == 0)[None, :]
    where = si.to(tl.int64)[:, None] * scale_row + sj.to(tl.int64)[None, :] * scale_column
    tl.store(scale + where, tl.broadcast_to(s, values.shape), mask=first)


def cast(x: torch.Tensor, round_scale_up: bool, out: ScaledTensor, gated: bool) -> Launch:
    """out.block says which cast."""
    rows, columns = out.shape
    block = (out.block[0], out.block[1])
    tile = ROWS[block], COLUMNS[block]
    return Launch(
        cast_kernel,
        (cdiv(rows, tile[0]), cdiv(columns, tile[1])),
        {
            "x": x,
            "data": out.data.view(torch.uint8),
            "scale": out.scale,
            "rows": rows,
            "columns": columns,
            **strides("x", x),
            **strides("data", out.data),
            **strides("scale", out.scale),
        },
        {
            "MOST": MAX[out.format],
            "FORMAT": out.format,
            "ROUND_UP": round_scale_up,
            "GATED": gated,
            "BLOCK_ROWS": block[0],
            "BLOCK_COLUMNS": block[1],
            "TILE_ROWS": tile[0],
            "TILE_COLUMNS": tile[1],
        },
    )


def to_fp8(x: torch.Tensor, format: str, round_scale_up: bool, out: ScaledTensor) -> list[Launch]:
    """Of a prepared call."""
    return [cast(x, round_scale_up, out, gated=False)]


def silu_mul_to_fp8(x: torch.Tensor, format: str, round_scale_up: bool, out: ScaledTensor) -> list[Launch]:
    """Of a prepared call."""
    return [cast(x, round_scale_up, out, gated=True)]


@triton.jit
def dequantize_kernel(
    data, scale, out, rows, columns, block_rows, block_columns, data_row, data_column, scale_row, scale_column,
    out_row, out_column, FORMAT: tl.constexpr, UE8M0: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = cast(q s)."""
    i = (tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
    j = (tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)).to(tl.int64)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    code = tl.load(data + i[:, None] * data_row + j[None, :] * data_column, mask=inside, other=0)
    si, sj = tl.minimum(i, rows - 1) // block_rows, tl.minimum(j, columns - 1) // block_columns
    values = decode(code, FORMAT).to(tl.float32) * load_scale(
        scale + si[:, None] * scale_row + sj[None, :] * scale_column, UE8M0
    )
    tl.store(out + i[:, None] * out_row + j[None, :] * out_column, rounded(values, out.dtype.element_ty), mask=inside)


def dequantize(x: ScaledTensor, out: torch.Tensor, out_dtype: Any = None) -> list[Launch]:
    """Of a prepared call."""
    rows, columns = x.shape
    ue8m0 = x.scale.dtype not in (torch.float32,)
    scale = x.scale.view(torch.uint8) if ue8m0 else x.scale
    return [
        Launch(
            dequantize_kernel,
            (cdiv(rows, _BACK[0]), cdiv(columns, _BACK[1])),
            {
                "data": x.data.view(torch.uint8),
                "scale": scale,
                "out": out,
                "rows": rows,
                "columns": columns,
                "block_rows": x.block[0],
                "block_columns": x.block[1],
                **strides("data", x.data),
                **strides("scale", scale),
                **strides("out", out),
            },
            {"FORMAT": FORMATS[x.data.dtype], "UE8M0": ue8m0, "TILE_ROWS": _BACK[0], "TILE_COLUMNS": _BACK[1]},
        )
    ]
