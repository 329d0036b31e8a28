"""The grouped products. Which rows are whose only the device knows: shapes bound the grids, and programs persist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from moekern.backends._triton.formats import rounded
from moekern.backends._triton.launch import Launch, cdiv
from moekern.backends._triton.order import group_of, rasterised, rows_of_groups
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
from moekern.backends._triton.tiles import Shape, Tiles, next_power_of_2
from moekern.backends._triton.weights import Places, of_weights
from moekern.layout import GroupedLayout
from moekern.scaled import ScaledTensor
from moekern.weights import GroupedWeights


@triton.jit
def m_grouped_kernel(
    a, a_scale, a_row, a_step, a_scale_row, a_scale_step, a_block_rows, a_group, a_scale_group,
    b, b_scale, b_row, b_step, b_scale_row, b_scale_step, b_block_rows,
    b_group, b_table, b_scale_group, b_scale_table, bias, bias_step, bias_table,
    starts, counts, groups, rows, out, out_group, out_row, out_column, flags, flag_rows,
    n, k, A: tl.constexpr, B: tl.constexpr, A_BLOCK: tl.constexpr, B_BLOCK: tl.constexpr, A_UE8M0: tl.constexpr,
    B_UE8M0: tl.constexpr, NATIVE: tl.constexpr,
    TO: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, ONE_B_SCALE: tl.constexpr, MASKED: tl.constexpr,
    TABLE: tl.constexpr, ALIGNED: tl.constexpr, HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,     SWAP: tl.constexpr, GROUP: tl.constexpr,
    TILES: tl.constexpr, SPECIALISED: tl.constexpr, REPAIR: tl.constexpr, FLAGGED: tl.constexpr,
):  # fmt: skip
    """D[i] = cast(bias[g] + A[i] B[g]^T) for the rows of every group.

    rows: of the operand, or of a group's slots if MASKED.
    """
    starts_of, counts_of = rows_of_groups(starts, counts, groups, rows, MASKED, GROUPS)
    if TILES:
        a_tiles = tl.make_tensor_descriptor(a, [groups * rows if MASKED else rows, k], [a_row, 1], [ROWS, STEP])
        b_tiles = tl.make_tensor_descriptor(b, [groups * n, k], [b_row, 1], [COLUMNS, STEP])
    heights = tl.cdiv(counts_of, ROWS)
    tiles_n = tl.cdiv(n, COLUMNS)
    for tile in tl.range(tl.program_id(0), tl.sum(heights, 0) * tiles_n, tl.num_programs(0)):
        g, before = group_of(tile, heights, tiles_n, GROUPS)
        mine = tl.arange(0, GROUPS) == g
        height = tl.sum(tl.where(mine, heights, 0), 0)
        count = tl.sum(tl.where(mine, counts_of, 0), 0)
        start = tl.sum(tl.where(mine, starts_of, 0), 0)
        tile_m, tile_n = rasterised(tile - before * tiles_n, height, tiles_n, GROUP)
        group = g.to(tl.int64)
        i = (tile_m * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        j = (tile_n * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        first_row = group * rows if MASKED else start  # of all groups' rows
        row, column = start + tl.minimum(i, count - 1), tl.minimum(j, n - 1)
        a_at = a + group * a_group + row * a_row
        a_scale_at = a_scale + group * a_scale_group + row // a_block_rows * a_scale_row
        if TABLE:
            at, scale_at = tl.load(b_table + group), tl.load(b_scale_table + group)
            if ALIGNED:
                at, scale_at = tl.multiple_of(at, 16), tl.multiple_of(scale_at, 4)
        else:
            at, scale_at = group * b_group, group * b_scale_group
        b_at = b + at + column * b_row
        if ONE_B_SCALE:
            b_scale_at = b_scale + scale_at + (tile_n * COLUMNS // b_block_rows).to(tl.int64) * b_scale_row
        else:
            b_scale_at = b_scale + scale_at + column // b_block_rows * b_scale_row
        if SWAP:
            sums = product(
                b_at, b_step, b_scale_at, b_scale_step, a_at, a_step, a_scale_at, a_scale_step,
                0, k, B, A, B_BLOCK, A_BLOCK, not ONE_B_SCALE, True, B_UE8M0, A_UE8M0, NATIVE, TO, EVEN, STEP, False,
            )  # fmt: skip
            i, j = i[None, :], j[:, None]
        else:
            if TILES:
                sums = multiply_tiles(
                    a_tiles, first_row.to(tl.int32) + tile_m * ROWS, a_scale_at, a_scale_step,
                    b_tiles, g * n + tile_n * COLUMNS, b_scale_at, b_scale_step, 0, k, A_BLOCK, B_BLOCK, True,
                    not ONE_B_SCALE, A_UE8M0, B_UE8M0, ROWS, COLUMNS, STEP, SPECIALISED,
                )  # fmt: skip
            elif REPAIR:
                at = flags + (tile_n * COLUMNS // FLAGGED).to(tl.int64) * flag_rows + first_row
                flag = tl.load(at + i, mask=i < count, other=0)
                sums = normalised(
                    a_at, a_step, a_scale_at, a_scale_step, b_at, b_step, b_scale_at, b_scale_step, 0,
                    tl.where(tl.max(flag, 0) != 0, k, 0),
                    A, B, A_BLOCK, B_BLOCK, True, not ONE_B_SCALE, A_UE8M0, B_UE8M0, NATIVE, TO, EVEN, STEP,
                ).to(tl.float32)  # fmt: skip
            else:
                sums = product(
                    a_at, a_step, a_scale_at, a_scale_step, b_at, b_step, b_scale_at, b_scale_step, 0, k,
                    A, B, A_BLOCK, B_BLOCK, True, not ONE_B_SCALE, A_UE8M0, B_UE8M0, NATIVE, TO, EVEN, STEP, False,
                )  # fmt: skip
            i, j = i[:, None], j[None, :]
        inside = (i < count) & (j < n)
        if TILES:
            flag = overflowed(sums)
            tl.store(flags + tile_n.to(tl.int64) * flag_rows + first_row + i, flag[:, None], mask=i < count)
            inside = inside & (flag == 0)[:, None]
        if REPAIR:
            inside = inside & (flag != 0)[:, None]
        if HAS_BIAS:
            sums += tl.load(bias + tl.load(bias_table + group) + j * bias_step, mask=j < n, other=0.0).to(tl.float32)
        at = out + group * out_group + (start + i) * out_row + j * out_column
        tl.store(at, rounded(sums, out.dtype.element_ty), mask=inside)


@triton.jit
def k_grouped_kernel(
    a, a_scale, a_row, a_step, a_scale_row, a_scale_step, a_block_rows,
    b, b_scale, b_row, b_step, b_scale_row, b_scale_step, b_block_rows,
    starts, counts, groups, rows, c, c_group, c_row, c_column, out, out_group, out_row, out_column, m, n,
    A: tl.constexpr, B: tl.constexpr, A_BLOCK: tl.constexpr, B_BLOCK: tl.constexpr, A_UE8M0: tl.constexpr,
    B_UE8M0: tl.constexpr, NATIVE: tl.constexpr,
    TO: tl.constexpr, STEP: tl.constexpr, HAS_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """D[g] = cast(C[g] + A^T B) over the rows of group g, which are the columns of k of this product."""
    tiles_m, tiles_n = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    of_group = tiles_m * tiles_n
    for tile in tl.range(tl.program_id(0), groups * of_group, tl.num_programs(0)):
        group = (tile // of_group).to(tl.int64)
        tile_m, tile_n = rasterised(tile % of_group, tiles_m, tiles_n, GROUP)
        start, count = tl.load(starts + group), tl.load(counts + group)
        first = tl.minimum(tl.maximum(start, 0), rows).to(tl.int32)
        last = tl.minimum(tl.maximum(start + count, first), rows).to(tl.int32)
        i = (tile_m * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        j = (tile_n * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        row, column = tl.minimum(i, m - 1), tl.minimum(j, n - 1)
        sums = product(
            a + row * a_row, a_step, a_scale + row // a_block_rows * a_scale_row, a_scale_step,
            b + column * b_row, b_step, b_scale + column // b_block_rows * b_scale_row, b_scale_step,
            first, last, A, B, A_BLOCK, B_BLOCK, True, True, A_UE8M0, B_UE8M0, NATIVE, TO, False, STEP, False,
        )  # fmt: skip
        i, j = i[:, None], j[None, :]
        inside = (i < m) & (j < n)
        if HAS_C:
            at = c + group * c_group + i * c_row + j * c_column
            sums += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at = out + group * out_group + i * out_row + j * out_column
        tl.store(at, rounded(sums, out.dtype.element_ty), mask=inside)


def refuses_m_grouped(a: Any, b: Any, layout: GroupedLayout, out: torch.Tensor, out_dtype: Any) -> str | None:
    return refuses_scales(b.shape[-1], a, b)


def m_grouped(
    target: Target, choose: Callable[[Target, Shape], Tiles], a: Any, b: ScaledTensor | GroupedWeights,
    layout: GroupedLayout, out: torch.Tensor, out_dtype: Any = None,
) -> list[Launch]:  # fmt: skip
    """Of a prepared call, masked if a is a stack."""
    groups, n, k = b.shape
    if not groups:
        return []
    first, *places = of_weights(b)
    operands = pair(target, a, first, k)
    rows = out.shape[-2] if out.dim() == 3 else cdiv(out.shape[0], groups)
    described = operands.describable() and places[0].table is None
    tiles = choose(target, operands.shape(rows, n, groups, described=described))
    return group_product(
        target, tiles, operands, (places[0], places[1]), layout.starts, layout.counts, groups, out, described=described
    )


def group_product(
    target: Target, tiles: Tiles, operands: Pair, places: tuple[Places, Places], starts: torch.Tensor,
    counts: torch.Tensor, groups: int, out: torch.Tensor, bias: tuple[torch.Tensor, Places] | None = None,
    described: bool = False,
) -> list[Launch]:  # fmt: skip
    """places: of the data and scales of b's matrices. bias: the first group's, and where all are.

    described: tensor descriptors may stand for all of a, and all of b.
    """
    left, k = operands.a, operands.k
    masked, rows, n = out.dim() == 3, out.shape[-2], out.shape[-1]
    heights = groups * cdiv(rows, tiles.rows) if masked else cdiv(rows, tiles.rows) + groups
    most = heights * cdiv(n, tiles.columns) if rows else 0
    block = operands.b.block[0]
    product = Launch(
        m_grouped_kernel,
        (min(most, target.processors),),
        {
            **left.arguments("a"),
            "a_group": left.data.stride(0) if masked else 0,
            "a_scale_group": left.scale.stride(0) if masked else 0,
            **operands.b.arguments("b"),
            **places[0].arguments("b", counts),
            **places[1].arguments("b_scale", counts),
            "bias": counts if bias is None else bias[0],
            "bias_step": 1 if bias is None else bias[0].stride(0),
            "bias_table": counts if bias is None else bias[1].table,
            "starts": starts,
            "counts": counts,
            "groups": groups,
            "rows": rows,
            "out": out,
            "out_group": out.stride(0) if masked else 0,
            "out_row": out.stride(-2),
            "out_column": out.stride(-1),
            "flags": counts,
            "flag_rows": rows,
            "n": n,
            "k": k,
        },
        {
            **operands.constants(tiles),
            "EVEN": k % operands.step == 0,
            "ONE_B_SCALE": block >= n or block % tiles.columns == 0,
            "MASKED": masked,
            "TABLE": places[0].table is not None,
            "ALIGNED": places[0].aligned,
            "HAS_BIAS": bias is not None,
            "GROUPS": next_power_of_2(groups),
            "ROWS": tiles.rows,
            "COLUMNS": tiles.columns,
            "SWAP": tiles.swap,
            "GROUP": tiles.group,
            "TILES": False,
            "SPECIALISED": False,
            "REPAIR": False,
            "FLAGGED": tiles.columns,
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if not (tiles.descriptors and described) or not most:
        return [product]
    return tiles_and_repair(product, tiles, groups * rows if masked else rows, n, out.device)


def refuses_k_grouped(
    a: Any, b: ScaledTensor, layout: GroupedLayout, c: Any, out: torch.Tensor, out_dtype: Any
) -> str | None:
    return refuses_scales(layout.rows, *(x.T for x in (a, b) if isinstance(x, ScaledTensor)))


def k_grouped(
    target: Target, choose: Callable[[Target, Shape], Tiles], a: Any, b: ScaledTensor, layout: GroupedLayout,
    c: torch.Tensor | None, out: torch.Tensor, out_dtype: Any = None,
) -> list[Launch]:  # fmt: skip
    """Of a prepared call."""
    groups, m, n = out.shape
    operands = pair(target, a.T, b.T, layout.rows)
    tiles = choose(target, operands.shape(m, n, groups, strided=True))
    most = groups * cdiv(m, tiles.rows) * cdiv(n, tiles.columns)
    like = out if c is None else c
    return [
        Launch(
            k_grouped_kernel,
            (min(most, target.processors),),
            {
                **operands.a.arguments("a"),
                **operands.b.arguments("b"),
                "starts": layout.starts,
                "counts": layout.counts,
                "groups": groups,
                "rows": layout.rows,
                "c": like,
                "c_group": like.stride(0),
                "c_row": like.stride(1),
                "c_column": like.stride(2),
                "out": out,
                "out_group": out.stride(0),
                "out_row": out.stride(1),
                "out_column": out.stride(2),
                "m": m,
                "n": n,
            },
            {
                **operands.constants(tiles),
                "HAS_C": c is not None,
                "ROWS": tiles.rows,
                "COLUMNS": tiles.columns,
                "GROUP": tiles.group,
            },
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    ]
