"""Slots sorted by their experts, rows moved to where their slots went, and back."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moekern.backends._triton.casts import cast
from moekern.backends._triton.formats import rounded
from moekern.backends._triton.launch import Launch, cdiv, strides
from moekern.backends._triton.tiles import next_power_of_2
from moekern.scaled import ScaledTensor

_CHUNK = 128  # slots that are compared with one another
_WARPS = 2  # that compare them: with one a slot on AMD, the compiler has every thread load all of them
_ONE_PROGRAM = 2 * _CHUNK  # slots up to which one program sorts: the rest of a sort's time is that of its launches
_BINS = 1024  # experts that one program takes at a time
_SCANNED = (64, 32)  # chunks and experts of a tile
_FASTER = 16 if triton.knobs.runtime.interpret else 1  # the interpreter's time goes by operations, whatever their size
_TILE = 2048 * _FASTER  # elements of rows that a program has at a time
_COLUMNS = 1024 * _FASTER
_MOST_ROWS = 16 * _FASTER
_FILLED = 4096


@triton.jit
def expert_of(ids, ids_row, ids_column, expert_map, map_step, mapped, slot, slots, topk, experts):
    """The expert here of every slot, -1 where it is none. An id that no expert has is -1."""
    at = (slot // topk).to(tl.int64) * ids_row + (slot % topk).to(tl.int64) * ids_column
    expert = tl.load(ids + at, mask=slot < slots, other=-1).to(tl.int64)
    if expert_map is not None:
        known = (expert >= 0) & (expert < mapped)
        expert = tl.load(expert_map + expert * map_step, mask=known, other=-1).to(tl.int64)
    return tl.where((expert >= 0) & (expert < experts), expert, -1).to(tl.int32)


@triton.jit
def earlier_alike(expert, SLOTS: tl.constexpr):
    """How many slots before each of a chunk have the same expert."""
    i = tl.arange(0, SLOTS)
    key = expert * SLOTS + i
    # From a slot back to the same expert's earlier ones it is 0 to i - 1, to all others at least i, as negative numbers
    # are large ones. Axis 0 is summed, so that threads share no sum.
    distance = (key[None, :] - key[:, None] - 1).to(tl.uint32, bitcast=True)
    return tl.sum((distance < i.to(tl.uint32)[None, :]).to(tl.int32), 0)


@triton.jit
def put(inverse, inverse_row, inverse_column, source, rows, slot, slots, topk, expert, row):
    """The row of every slot, and the slot of every row."""
    row = tl.where(expert >= 0, row, -1)
    at = (slot // topk).to(tl.int64) * inverse_row + (slot % topk).to(tl.int64) * inverse_column
    tl.store(inverse + at, row.to(tl.int32), mask=slot < slots)
    if source is not None:
        tl.store(source + row, slot, mask=(row >= 0) & (row < rows))


@triton.jit
def sort_kernel(
    ids, expert_map, starts, counts, inverse, source, slots, topk, experts, mapped, alignment, rows,
    ids_row, ids_column, map_step, starts_step, counts_step, inverse_row, inverse_column,
    CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """All of a sort of few slots, in one program."""
    i = tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)
    count = tl.zeros((BINS,), tl.int32)
    for first in range(0, slots, CHUNK):
        expert = expert_of(ids, ids_row, ids_column, expert_map, map_step, mapped, first + i, slots, topk, experts)
        count += tl.histogram(expert, BINS, mask=expert >= 0)
    count = count.to(tl.int64)
    padded = (count + (alignment - 1)) // alignment * alignment
    following = tl.cumsum(padded, 0) - padded  # the row of an expert's next slot
    tl.store(starts + bins * starts_step, following, mask=bins < experts)
    tl.store(counts + bins * counts_step, count, mask=bins < experts)
    for first in range(0, slots, CHUNK):
        expert = expert_of(ids, ids_row, ids_column, expert_map, map_step, mapped, first + i, slots, topk, experts)
        row = tl.gather(following, tl.maximum(expert, 0), 0) + earlier_alike(expert, CHUNK)
        put(inverse, inverse_row, inverse_column, source, rows, first + i, slots, topk, expert, row)
        following += tl.histogram(expert, BINS, mask=expert >= 0)


@triton.jit
def count_kernel(
    ids, expert_map, before, slots, topk, experts, mapped, ids_row, ids_column, map_step,
    CHUNK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """before[chunk, expert] = the slots of a chunk that are the expert's."""
    chunk = tl.program_id(0)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = expert_of(ids, ids_row, ids_column, expert_map, map_step, mapped, slot, slots, topk, experts)
    for first in range(0, experts, BINS):
        bins = first + tl.arange(0, BINS)
        count = tl.histogram(expert - first, BINS, mask=(expert >= first) & (expert < first + BINS))
        tl.store(before + chunk.to(tl.int64) * experts + bins, count, mask=bins < experts)


@triton.jit
def scan_kernel(before, counts, chunks, experts, counts_step, CHUNKS: tl.constexpr, BINS: tl.constexpr):
    """before[chunk, expert] = the slots of all earlier chunks that are the expert's, in place; and counts of all."""
    bins = tl.program_id(0) * BINS + tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = (first + tl.arange(0, CHUNKS)).to(tl.int64)[:, None]
        inside = (chunk < chunks) & (bins < experts)[None, :]
        at = before + chunk * experts + bins[None, :]
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, tl.cumsum(count, 0) - count + total[None, :], mask=inside)
        total += tl.sum(count, 0)
    tl.store(counts + bins * counts_step, total.to(tl.int64), mask=bins < experts)


@triton.jit
def start_kernel(counts, starts, experts, alignment, counts_step, starts_step, BINS: tl.constexpr):
    """starts[expert] = the aligned counts of all before it, in one program."""
    end = tl.zeros((), tl.int64)
    for first in range(0, experts, BINS):
        bins = first + tl.arange(0, BINS)
        count = tl.load(counts + bins * counts_step, mask=bins < experts, other=0)
        padded = (count + (alignment - 1)) // alignment * alignment
        tl.store(starts + bins * starts_step, end + tl.cumsum(padded, 0) - padded, mask=bins < experts)
        end += tl.sum(padded, 0)


@triton.jit
def place_kernel(
    ids, expert_map, before, starts, inverse, source, slots, topk, experts, mapped, rows,
    ids_row, ids_column, map_step, starts_step, inverse_row, inverse_column,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """A slot's row: the expert's first, its slots of all earlier chunks, those of this chunk before it."""
    chunk = tl.program_id(0)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = expert_of(ids, ids_row, ids_column, expert_map, map_step, mapped, slot, slots, topk, experts)
    here = expert >= 0
    row = tl.load(starts + expert.to(tl.int64) * starts_step, mask=here, other=0)
    row += tl.load(before + chunk.to(tl.int64) * experts + expert, mask=here, other=0) + earlier_alike(expert, CHUNK)
    put(inverse, inverse_row, inverse_column, source, rows, slot, slots, topk, expert, row)


@triton.jit
def fill_kernel(x, size, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.full((BLOCK,), VALUE, x.dtype.element_ty), mask=at < size)


def sort(
    ids: torch.Tensor, num_experts: int, alignment: int, expert_map: torch.Tensor | None, starts: torch.Tensor,
    counts: torch.Tensor, inverse: torch.Tensor, source: torch.Tensor | None = None,
) -> list[Launch]:  # fmt: skip
    """Slots in the order of their experts, and of one expert in their own: a counting sort, chunk by chunk.

    ids: [T, topk] int32 or int64, fewer than 2^31 in all.
    expert_map: [E] int32 or int64, as in `moe_permute`.
    starts, counts: [num_experts] int64, the rows of every expert; starts are multiples of `alignment`.
    inverse: [T, topk] int32, the row of every slot, -1 where it is dropped.
    source: [rows] int32, the slot of every row, t * topk + j, -1 where it is none; contiguous.
    """
    slots, topk = ids.numel(), ids.shape[1]
    launches = []
    if source is not None:
        launches.append(
            Launch(
                fill_kernel,
                (cdiv(len(source), _FILLED),),
                {"x": source, "size": len(source)},
                {"VALUE": -1, "BLOCK": _FILLED},
            )
        )
    ids_and_map = {"ids": ids, "expert_map": expert_map}
    sizes = {
        "slots": slots,
        "topk": topk,
        "experts": num_experts,
        "mapped": 0 if expert_map is None else len(expert_map),
    }
    rows = 0 if source is None else len(source)
    steps = {**strides("ids", ids), "map_step": 0 if expert_map is None else expert_map.stride(0)}
    starts_step, counts_step = {"starts_step": starts.stride(0)}, {"counts_step": counts.stride(0)}
    if slots <= _ONE_PROGRAM and num_experts <= _BINS:
        return [
            *launches,
            Launch(
                sort_kernel,
                (1,),
                {
                    **ids_and_map,
                    "starts": starts,
                    "counts": counts,
                    "inverse": inverse,
                    "source": source,
                    **sizes,
                    "alignment": alignment,
                    "rows": rows,
                    **steps,
                    **starts_step,
                    **counts_step,
                    **strides("inverse", inverse),
                },
                {"CHUNK": _CHUNK, "BINS": max(next_power_of_2(num_experts), _CHUNK)},
                num_warps=_WARPS,
            ),
        ]
    chunks = cdiv(slots, _CHUNK)
    before = torch.empty((chunks, num_experts), dtype=torch.int32, device=ids.device)
    return [
        *launches,
        Launch(
            count_kernel,
            (chunks,),
            {**ids_and_map, "before": before, **sizes, **steps},
            {"CHUNK": _CHUNK, "BINS": min(max(next_power_of_2(num_experts), _CHUNK), _BINS)},
        ),
        Launch(
            scan_kernel,
            (cdiv(num_experts, _SCANNED[1]),),
            {"before": before, "counts": counts, "chunks": chunks, "experts": num_experts, **counts_step},
            {"CHUNKS": _SCANNED[0], "BINS": _SCANNED[1]},
        ),
        Launch(
            start_kernel,
            (1,),
            {
                "counts": counts,
                "starts": starts,
                "experts": num_experts,
                "alignment": alignment,
                **counts_step,
                **starts_step,
            },
            {"BINS": _BINS},
        ),
        Launch(
            place_kernel,
            (chunks,),
            {
                **ids_and_map,
                "before": before,
                "starts": starts,
                "inverse": inverse,
                "source": source,
                **sizes,
                "rows": rows,
                **steps,
                **starts_step,
                **strides("inverse", inverse),
            },
            {"CHUNK": _CHUNK},
            num_warps=_WARPS,
        ),
    ]


@triton.jit
def move_kernel(
    x, out, inverse, starts, counts, tokens, topk, columns, rows, alignment, tiles,
    x_row, x_column, out_row, out_column, inverse_row, inverse_column, starts_step, counts_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of x, read once, goes to the rows of all its slots. Programs behind those zero an expert's padding."""
    tile = tl.program_id(0)
    j = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    if tile < tiles:
        t = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (t < tokens)[:, None] & (j < columns)
        values = tl.load(x + t[:, None] * x_row + j * x_column, mask=inside)
        for slot in range(topk):
            row = tl.load(inverse + t * inverse_row + slot * inverse_column, mask=t < tokens, other=-1).to(tl.int64)
            there = ((row >= 0) & (row < rows))[:, None] & inside
            tl.store(out + row[:, None] * out_row + j * out_column, values, mask=there)
    else:
        expert = (tile - tiles).to(tl.int64)
        start, count = tl.load(starts + expert * starts_step), tl.load(counts + expert * counts_step)
        last = tl.minimum(start + (count + (alignment - 1)) // alignment * alignment, rows)
        zeros = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
        for first in range(start + count, last, ROWS):
            row = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
            tl.store(out + row * out_row + j * out_column, zeros, mask=(row < last) & (j < columns))


def _tile(columns: int) -> tuple[int, int]:
    width = min(next_power_of_2(max(columns, 1)), _COLUMNS)
    return min(_TILE // width, _MOST_ROWS), width


def _move(x: torch.Tensor, alignment: int, layout: Any, inverse: torch.Tensor, out: torch.Tensor) -> Launch:
    tokens, columns = x.shape
    rows, width = _tile(columns)
    tiles = cdiv(tokens, rows)
    return Launch(
        move_kernel,
        (tiles + (0 if alignment == 1 else len(layout.starts)), cdiv(columns, width)),
        {
            "x": x,
            "out": out,
            "inverse": inverse,
            "starts": layout.starts,
            "counts": layout.counts,
            "tokens": tokens,
            "topk": inverse.shape[1],
            "columns": columns,
            "rows": len(out),
            "alignment": alignment,
            "tiles": tiles,
            **strides("x", x),
            **strides("out", out),
            **strides("inverse", inverse),
            "starts_step": layout.starts.stride(0),
            "counts_step": layout.counts.stride(0),
        },
        {"ROWS": rows, "COLUMNS": width},
    )


def permute(
    x: Any, ids: torch.Tensor, num_experts: int, alignment: int, expert_map: torch.Tensor | None, format: str | None,
    round_scale_up: bool, out: Any,
) -> list[Launch]:  # fmt: skip
    """Of a prepared call. The layout's starts and counts are written, too. Rows are cast by a launch of their own."""
    moved, layout, inverse = out
    launches = sort(ids, num_experts, alignment, expert_map, layout.starts, layout.counts, inverse)
    if format is not None:
        data, scale = (torch.empty((len(x), part.shape[1]), dtype=part.dtype, device=x.device) for part in moved)
        q = ScaledTensor(data, scale, moved.block)
        launches.append(cast(x, round_scale_up, q, gated=False))
        x = q
    pairs = [(x.data, moved.data), (x.scale, moved.scale)] if isinstance(x, ScaledTensor) else [(x, moved)]
    for source, target in pairs:
        if source.element_size() == 1:
            source, target = source.view(torch.uint8), target.view(torch.uint8)
        launches.append(_move(source, alignment, layout, inverse, target))
    return launches


@triton.jit
def unpermute_kernel(
    y, inverse, weights, out, tokens, topk, columns, rows, y_row, y_column, inverse_row, inverse_column,
    weights_row, weights_column, out_row, out_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[t] = cast(sum_j weights[t, j] y[inverse[t, j]]), each product and each sum rounded."""
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    inside = j < columns
    # -0, to which the first term is added as it is: a sum of -0 stays -0. tl.full would make it +0.
    sums = tl.full((ROWS, COLUMNS), 0x80000000, tl.uint32).to(tl.float32, bitcast=True)
    some = tl.zeros((ROWS,), tl.int1)
    for slot in tl.range(0, topk, loop_unroll_factor=4):  # loads of four rows are in flight together
        row = tl.load(inverse + t * inverse_row + slot * inverse_column, mask=t < tokens, other=-1).to(tl.int64)
        there = (row >= 0) & (row < rows)
        term = tl.load(y + row[:, None] * y_row + j * y_column, mask=there[:, None] & inside, other=0.0)
        term = term.to(tl.float32)
        if weights is not None:
            w = tl.load(weights + t * weights_row + slot * weights_column, mask=there, other=0.0)
            term = w.to(tl.float32)[:, None] * term
        sums = tl.where(there[:, None], sums + term, sums)
        some = some | there
    sums = rounded(tl.where(some[:, None], sums, 0.0), out.dtype.element_ty)
    tl.store(out + t[:, None] * out_row + j * out_column, sums, mask=(t < tokens)[:, None] & inside)


def unpermute(
    y: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor | None, out: torch.Tensor, out_dtype: Any = None
) -> list[Launch]:
    """Of a prepared call."""
    tokens, columns = out.shape
    rows, width = _tile(columns)
    return [
        Launch(
            unpermute_kernel,
            (cdiv(tokens, rows), cdiv(columns, width)),
            {
                "y": y,
                "inverse": inverse,
                "weights": weights,
                "out": out,
                "tokens": tokens,
                "topk": inverse.shape[1],
                "columns": columns,
                "rows": len(y),
                **strides("y", y),
                **strides("inverse", inverse),
                "weights_row": 0 if weights is None else weights.stride(0),
                "weights_column": 0 if weights is None else weights.stride(1),
                **strides("out", out),
            },
            {"ROWS": rows, "COLUMNS": width},
            fp_fusion=False,
        )
    ]
