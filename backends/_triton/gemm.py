"""D = cast(C + bias + A B^T): the dense product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from moekern.backends._triton.formats import rounded
from moekern.backends._triton.launch import Launch, cdiv
from moekern.backends._triton.order import rasterised
from moekern.backends._triton.product import (
    Pair,
    multiply_tiles,
    normalised,
    overflowed,
    pair,
    product,
    refuses_scales,
    tiles_and_repair,
)
from moekern.backends._triton.targets import Target
from moekern.backends._triton.tiles import Shape, Tiles
from moekern.scaled import ScaledTensor


@triton.jit
def gemm_kernel(
    a, a_scale, a_row, a_step, a_scale_row, a_scale_step, a_block_rows,
    b, b_scale, b_row, b_step, b_scale_row, b_scale_step, b_block_rows,
    c, c_row, c_column, bias, out, out_split, out_row, out_column, flags, flag_rows, m, n, k, chunk,
    A: tl.constexpr, B: tl.constexpr, A_BLOCK: tl.constexpr, B_BLOCK: tl.constexpr, A_UE8M0: tl.constexpr,
    B_UE8M0: tl.constexpr, NATIVE: tl.constexpr,
    TO: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, ONE_B_SCALE: tl.constexpr,
    HAS_C: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWAP: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr,
    TILES: tl.constexpr, SPECIALISED: tl.constexpr, REPAIR: tl.constexpr, FLAGGED: tl.constexpr,
):  # fmt: skip
    """Tiles of D, or with several programs along axis 1, of as many sums over `chunk` columns of k each.

    TILES: operands come by descriptors; rows of a tile where float32 overflowed are flagged and not stored. A
    second launch with REPAIR does them. (In the same kernel that would take registers from the main loop.)
    """
    tiles_m, tiles_n = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, k)
    if TILES:
        a_tiles = tl.make_tensor_descriptor(a, [m, k], [a_row, 1], [ROWS, STEP])
        b_tiles = tl.make_tensor_descriptor(b, [n, k], [b_row, 1], [COLUMNS, STEP])
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = rasterised(tile, tiles_m, tiles_n, GROUP)
        # not `tile_m * ROWS`, which is the tile's row in its descriptor: where warps are specialised, each half of them
        # loads half of the rows, and Triton (3.9) adds the half's first row to that number wherever it is used
        i = tile_m.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        j = (tile_n * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        # rows past the end are read as the last one, and not stored
        row, column = tl.minimum(i, m - 1), tl.minimum(j, n - 1)
        a_at, b_at = a + row * a_row, b + column * b_row
        a_scale_at = a_scale + row // a_block_rows * a_scale_row
        if ONE_B_SCALE:
            b_scale_at = b_scale + (tile_n * COLUMNS // b_block_rows).to(tl.int64) * b_scale_row
        else:
            b_scale_at = b_scale + column // b_block_rows * b_scale_row
        if SWAP:
            sums = product(
                b_at, b_step, b_scale_at, b_scale_step, a_at, a_step, a_scale_at, a_scale_step, first, last,
                B, A, B_BLOCK, A_BLOCK, not ONE_B_SCALE, True, B_UE8M0, A_UE8M0, NATIVE, TO, EVEN, STEP, WIDE,
            )  # fmt: skip
            i, j = i[None, :], j[:, None]
        else:
            if TILES:
                sums = multiply_tiles(
                    a_tiles, tile_m * ROWS, a_scale_at, a_scale_step, b_tiles, tile_n * COLUMNS, b_scale_at,
                    b_scale_step, first, last, A_BLOCK, B_BLOCK, True, not ONE_B_SCALE, A_UE8M0, B_UE8M0,
                    ROWS, COLUMNS, STEP, SPECIALISED,
                )  # fmt: skip
            elif REPAIR:
                flag = tl.load(flags + (tile_n * COLUMNS // FLAGGED).to(tl.int64) * flag_rows + i, mask=i < m, other=0)
                end = tl.where(tl.max(flag, 0) != 0, last, first)
                sums = normalised(
                    a_at, a_step, a_scale_at, a_scale_step, b_at, b_step, b_scale_at, b_scale_step, first, end,
                    A, B, A_BLOCK, B_BLOCK, True, not ONE_B_SCALE, A_UE8M0, B_UE8M0, NATIVE, TO, EVEN, STEP,
                ).to(tl.float32)  # fmt: skip
            else:
                sums = product(
                    a_at, a_step, a_scale_at, a_scale_step, b_at, b_step, b_scale_at, b_scale_step, first, last,
                    A, B, A_BLOCK, B_BLOCK, True, not ONE_B_SCALE, A_UE8M0, B_UE8M0, NATIVE, TO, EVEN, STEP, WIDE,
                )  # fmt: skip
            i, j = i[:, None], j[None, :]
        inside = (i < m) & (j < n)
        if TILES:
            flag = overflowed(sums)
            tl.store(flags + tile_n.to(tl.int64) * flag_rows + i, flag[:, None], mask=i < m)
            inside = inside & (flag == 0)[:, None]
        if REPAIR:
            inside = inside & (flag != 0)[:, None]
        if HAS_BIAS:
            sums += tl.load(bias + j, mask=j < n, other=0.0).to(tl.float32)
        if HAS_C:
            sums += tl.load(c + i * c_row + j * c_column, mask=inside, other=0.0).to(tl.float32)
        at = out + tl.program_id(1).to(tl.int64) * out_split + i * out_row + j * out_column
        tl.store(at, sums if WIDE else rounded(sums, out.dtype.element_ty), mask=inside)


@triton.jit
def add_splits_kernel(
    sums, splits, split, c, c_row, c_column, bias, out, out_row, out_column, n, elements,
    HAS_C: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """D from the sums over parts of k, [splits, m, n] float64, in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.zeros((BLOCK,), tl.float64)
    for part in range(splits):
        total += tl.load(sums + part * split + at, mask=inside, other=0.0)
    i, j = at // n, at % n
    total = total.to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + j, mask=inside, other=0.0).to(tl.float32)
    if HAS_C:
        total += tl.load(c + i * c_row + j * c_column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i * out_row + j * out_column, rounded(total, out.dtype.element_ty), mask=inside)


def refuses(a: Any, b: ScaledTensor, c: Any, bias: Any, out: torch.Tensor, out_dtype: Any) -> str | None:
    return refuses_scales(b.shape[1], a, b)


def gemm(
    target: Target, choose: Callable[[Target, Shape], Tiles], a: Any, b: ScaledTensor, c: Any, bias: Any,
    out: torch.Tensor, out_dtype: Any = None,
) -> list[Launch]:  # fmt: skip
    """Of a prepared call."""
    operands = pair(target, a, b, b.shape[1])
    m, n = out.shape
    described = operands.describable()
    tiles = choose(target, operands.shape(m, n, described=described))
    if tiles.splits > 1 and operands.k > operands.step:
        sums = torch.empty((tiles.splits, m, n), dtype=torch.float64, device=out.device)
        return [
            _product(target, operands, tiles, None, None, sums, sums.stride()[1:], tiles.splits),
            _add_splits(sums, c, bias, out),
        ]
    product = _product(target, operands, tiles, c, bias, out, out.stride(), 1)
    if not (tiles.descriptors and described):
        return [product]
    return tiles_and_repair(product, tiles, m, n, out.device)


def _product(
    target: Target, operands: Pair, tiles: Tiles, c: Any, bias: Any, out: torch.Tensor, steps: Any, splits: int
) -> Launch:
    m, n = out.shape[-2:]
    k, step = operands.k, operands.step
    count = cdiv(m, tiles.rows) * cdiv(n, tiles.columns)
    chunk = max(cdiv(cdiv(k, splits), step) * step, step)
    block = operands.b.block[0]
    return Launch(
        gemm_kernel,
        (min(count, target.processors), splits),
        {
            **operands.a.arguments("a"),
            **operands.b.arguments("b"),
            "c": out if c is None else c,
            "c_row": 0 if c is None else c.stride(0),
            "c_column": 0 if c is None else c.stride(1),
            "bias": out if bias is None else bias,
            "out": out,
            "out_split": out.stride(0) if splits > 1 else 0,
            "out_row": steps[0],
            "out_column": steps[1],
            "flags": out,
            "flag_rows": m,
            "m": m,
            "n": n,
            "k": k,
            "chunk": chunk,
        },
        {
            **operands.constants(tiles),
            "EVEN": k % step == 0,
            "ONE_B_SCALE": block >= n or block % tiles.columns == 0,
            "HAS_C": c is not None,
            "HAS_BIAS": bias is not None,
            "ROWS": tiles.rows,
            "COLUMNS": tiles.columns,
            "SWAP": tiles.swap,
            "GROUP": tiles.group,
            "WIDE": splits > 1,
            "TILES": False,
            "SPECIALISED": False,
            "REPAIR": False,
            "FLAGGED": tiles.columns,
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _add_splits(sums: torch.Tensor, c: Any, bias: Any, out: torch.Tensor) -> Launch:
    elements, block = out.numel(), 1024
    return Launch(
        add_splits_kernel,
        (cdiv(elements, block),),
        {
            "sums": sums,
            "splits": len(sums),
            "split": sums.stride(0),
            "c": out if c is None else c,
            "c_row": 0 if c is None else c.stride(0),
            "c_column": 0 if c is None else c.stride(1),
            "bias": out if bias is None else bias,
            "out": out,
            "out_row": out.stride(0),
            "out_column": out.stride(1),
            "n": out.shape[1],
            "elements": elements,
        },
        {"HAS_C": c is not None, "HAS_BIAS": bias is not None, "BLOCK": block},
    )
