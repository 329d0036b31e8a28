"""fused_experts: slots sorted by expert, gate and up with their gating, down, and the sum of every token's slots.

Tokens are taken in chunks, so that intermediate results stay below _MOST_BYTES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from moekern.backends._triton.casts import cast
from moekern.backends._triton.formats import encode, rounded
from moekern.backends._triton.gating import gated
from moekern.backends._triton.grouped import group_product
from moekern.backends._triton.launch import Launch, cdiv, strides
from moekern.backends._triton.order import group_of, rasterised, rows_of_groups
from moekern.backends._triton.permute import sort
from moekern.backends._triton.product import pair, product, refuses_scales
from moekern.backends._triton.targets import Target
from moekern.backends._triton.tiles import Shape, Tiles, next_power_of_2
from moekern.backends._triton.weights import Projections, projections
from moekern.backends._triton.workspace import Workspace
from moekern.experts import ExpertWeights
from moekern.scaled import BLOCK, ScaledTensor

_MOST_BYTES = 1 << 30

Choose = Callable[[Target, Shape], Tiles]


@triton.jit
def gate_up_kernel(
    x, x_scale, x_row, x_step, x_scale_row, x_scale_step, x_block_rows, source, topk,
    w, w_scale, w_row, w_step, w_scale_row, w_scale_step, w_block_rows,
    gate_table, up_table, gate_scale_table, up_scale_table, up_first,
    bias, gate_bias_table, up_bias_table, bias_step, weights, weights_row, weights_column,
    starts, counts, groups, rows, h, h_scale, h_row, h_scale_row, size, k, alpha, beta, limit,
    A: tl.constexpr, B: tl.constexpr, A_BLOCK: tl.constexpr, B_BLOCK: tl.constexpr, A_UE8M0: tl.constexpr,
    B_UE8M0: tl.constexpr, NATIVE: tl.constexpr,
    TO: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, SORTED: tl.constexpr,
    HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_LIMIT: tl.constexpr,
    QUANTISE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, SWAP: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """h[r] = gated(gate x + its bias, up x + its bias) of the expert whose row r is; x is the slot's token.

    Rows of gate and up alternate in the product, so that both values of a unit are in one thread. SORTED: the
    rows are slots, `source` says which; else every group has all tokens in their order. QUANTISE: h in FP8, with one
    scale for the UNITS units of a tile.
    """
    starts_of, counts_of = rows_of_groups(starts, counts, groups, rows, False, GROUPS)
    heights = tl.cdiv(counts_of, ROWS)
    tiles_n = tl.cdiv(size, UNITS)
    for tile in tl.range(tl.program_id(0), tl.sum(heights, 0) * tiles_n, tl.num_programs(0)):
        g, before = group_of(tile, heights, tiles_n, GROUPS)
        mine = tl.arange(0, GROUPS) == g
        height = tl.sum(tl.where(mine, heights, 0), 0)
        count = tl.sum(tl.where(mine, counts_of, 0), 0)
        start = tl.sum(tl.where(mine, starts_of, 0), 0)
        tile_m, tile_n = rasterised(tile - before * tiles_n, height, tiles_n, GROUP)
        i = tile_m * ROWS + tl.arange(0, ROWS)
        last_row = tl.minimum(i, count - 1)
        if SORTED:
            slot = tl.load(source + start + last_row)
            token = (slot // topk).to(tl.int64)
        else:
            slot = last_row
            token = last_row.to(tl.int64)
        c = tl.arange(0, 2 * UNITS)
        unit = tl.minimum(tile_n * UNITS + c // 2, size - 1).to(tl.int64)
        is_up = c % 2 == 1
        row = tl.where(is_up, unit + up_first, unit)
        gate_at, up_at = tl.load(gate_table + g), tl.load(up_table + g)
        if ALIGNED:
            gate_at, up_at = tl.multiple_of(gate_at, 16), tl.multiple_of(up_at, 16)
        gate_scale_at, up_scale_at = tl.load(gate_scale_table + g), tl.load(up_scale_table + g)
        x_at = x + token * x_row
        # a product, which the compiler knows to be a multiple of 16; of a choice it does not, and loads single bytes
        up_from_gate = up_at + tl.cast(up_first, tl.int64) * w_row - gate_at
        w_at = w + gate_at + (c % 2).to(tl.int64) * up_from_gate + unit * w_row
        x_scale_at = x_scale + token // x_block_rows * x_scale_row
        w_scale_at = w_scale + tl.where(is_up, up_scale_at, gate_scale_at) + row // w_block_rows * w_scale_row
        if SWAP:
            sums = product(
                w_at, w_step, w_scale_at, w_scale_step, x_at, x_step, x_scale_at, x_scale_step,
                0, k, B, A, B_BLOCK, A_BLOCK, True, True, B_UE8M0, A_UE8M0, NATIVE, TO, EVEN, STEP, False,
            )  # fmt: skip
            sums = tl.trans(sums)
        else:
            sums = product(
                x_at, x_step, x_scale_at, x_scale_step, w_at, w_step, w_scale_at, w_scale_step,
                0, k, A, B, A_BLOCK, B_BLOCK, True, True, A_UE8M0, B_UE8M0, NATIVE, TO, EVEN, STEP, False,
            )  # fmt: skip
        gate, up = tl.split(tl.reshape(sums, (ROWS, UNITS, 2)))
        if WEIGHTED:
            factor = tl.load(weights + token * weights_row + slot % topk * weights_column).to(tl.float32)[:, None]
            gate, up = gate * factor, up * factor
        j = tile_n * UNITS + tl.arange(0, UNITS)
        if HAS_BIAS:
            at = bias + tl.minimum(j, size - 1).to(tl.int64) * bias_step
            gate += tl.load(at + tl.load(gate_bias_table + g)).to(tl.float32)[None, :]
            up += tl.load(at + tl.load(up_bias_table + g)).to(tl.float32)[None, :]
        value = gated(gate, up, alpha, beta, limit, ACTIVATION, HAS_LIMIT)
        inside = (i < count)[:, None] & (j < size)[None, :]
        target = start + i.to(tl.int64)
        at = h + target[:, None] * h_row + j[None, :]
        if QUANTISE:
            value = tl.where((j < size)[None, :], value, 0.0)
            amax = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
            scale = tl.div_rn(tl.where(amax < 1e-4, 1e-4, amax), 448.0)
            tl.store(at, encode(value * tl.div_rn(1.0, scale)[:, None], "e4m3fn"), mask=inside)
            tl.store(h_scale + target * h_scale_row + tile_n, scale, mask=i < count)
        else:
            tl.store(at, rounded(value, h.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(
    y, inverse, weights, shared_y, shared, out, tokens, topk, columns,
    y_row, inverse_row, inverse_column, weights_row, weights_column, out_row, out_column,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[t] = cast(sum_j weights[t, j] y[inverse[t, j]] + sum_s shared_y[s, t]), slots of -1 left out."""
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    real = (t < tokens)[:, None] & (j < columns)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for slot in range(topk):
        row = tl.load(inverse + t * inverse_row + slot * inverse_column, mask=t < tokens, other=-1).to(tl.int64)
        there = row >= 0
        term = tl.load(y + row[:, None] * y_row + j, mask=there[:, None] & real, other=0.0)
        if WEIGHTED:
            w = tl.load(weights + t * weights_row + slot * weights_column, mask=there, other=0.0)
            term *= w.to(tl.float32)[:, None]
        sums += term
    for s in range(shared):
        sums += tl.load(shared_y + (s * tokens + t)[:, None] * y_row + j, mask=real, other=0.0)
    tl.store(out + t[:, None] * out_row + j * out_column, rounded(sums, out.dtype.element_ty), mask=real)


@dataclass(frozen=True)
class _Rows:
    """Which rows of h are whose."""

    starts: torch.Tensor
    counts: torch.Tensor
    rows: int
    source: torch.Tensor | None  # the slot of every row; None: all tokens for every group, in their order


@dataclass(frozen=True)
class _Options:
    activation: str
    alpha: float
    beta: float
    limit: float | None
    quantise: bool
    weights: torch.Tensor | None  # on the input
    topk: int


def refuses(x: Any, experts: ExpertWeights, *rest: Any) -> str | None:
    shared = rest[9]
    for weights in (experts, shared):
        if weights is not None:
            of = projections(weights)
            reason = refuses_scales(weights.hidden_size, x, of.gate_up) or refuses_scales(
                weights.intermediate_size, of.down
            )
            if reason:
                return reason
    return None


def fused_experts(
    target: Target, choose: Choose, x: Any, experts: ExpertWeights, ids: torch.Tensor, weights: torch.Tensor | None,
    activation: str, alpha: float, beta: float, limit: float | None, quantize_activations: bool,
    apply_router_weight_on_input: bool, expert_map: torch.Tensor | None, shared: ExpertWeights | None, reduce: bool,
    out: torch.Tensor, out_dtype: Any, workspace: torch.Tensor | None,
) -> list[Launch]:  # fmt: skip
    """Of a prepared call."""
    tokens, topk = ids.shape
    quantise = quantize_activations or isinstance(x, ScaledTensor)
    options = _Options(
        activation, alpha, beta, limit, quantise, weights if apply_router_weight_on_input else None, topk
    )
    launches: list[Launch] = []
    chunk = tokens_of_chunk(experts, shared, topk, x, quantise)
    for t in range(0, tokens, chunk):
        of_chunk = slice(t, min(t + chunk, tokens))
        space = Workspace(workspace, ids.device)
        part = (
            ScaledTensor(x.data[of_chunk], x.scale[of_chunk], x.block) if isinstance(x, ScaledTensor) else x[of_chunk]
        )
        written = out[of_chunk] if reduce else out[t * topk : of_chunk.stop * topk]
        launches += _chunk(
            target, choose, part, experts, ids[of_chunk], None if weights is None else weights[of_chunk], expert_map,
            shared, reduce, written, space,
            replace(options, weights=None if options.weights is None else options.weights[of_chunk]),
        )  # fmt: skip
    return launches


def _chunk(
    target: Target, choose: Choose, x: Any, experts: ExpertWeights, ids: torch.Tensor, weights: torch.Tensor | None,
    expert_map: torch.Tensor | None, shared: ExpertWeights | None, reduce: bool, out: torch.Tensor, space: Workspace,
    options: _Options,
) -> list[Launch]:  # fmt: skip
    tokens, topk = ids.shape
    launches: list[Launch] = []
    hidden = experts.hidden_size
    if options.quantise and not isinstance(x, ScaledTensor):
        quantised = ScaledTensor(
            space.take((tokens, hidden), torch.float8_e4m3fn),
            space.take((tokens, cdiv(hidden, BLOCK)), torch.float32),
            (1, BLOCK),
        )
        launches.append(cast(x, False, quantised, gated=False))
        x = quantised
    slots = tokens * topk
    inverse = space.take((tokens, topk), torch.int32)
    source = space.take((slots,), torch.int32)
    starts, counts = (space.take((experts.num_experts,), torch.int64) for _ in range(2))
    launches += sort(ids, experts.num_experts, 1, expert_map, starts, counts, inverse, source)
    y = space.take((slots, hidden), torch.float32)
    launches += _experts(target, choose, x, experts, _Rows(starts, counts, slots, source), options, y, space)
    shared_y, own = y, 0
    if shared is not None and reduce:
        own = shared.num_experts
        shared_y = space.take((own * tokens, hidden), torch.float32)
        everyone = _Rows(
            torch.arange(0, own * tokens, tokens, device=ids.device),
            torch.full((own,), tokens, dtype=torch.int64, device=ids.device),
            own * tokens,
            None,
        )
        launches += _experts(target, choose, x, shared, everyone, replace(options, weights=None), shared_y, space)
    factors = None if options.weights is not None or not reduce else weights
    if not reduce:
        inverse = inverse.reshape(-1, 1)
    return [*launches, _combine(y, inverse, factors, shared_y, own, out)]


def _experts(
    target: Target, choose: Choose, x: Any, weights: ExpertWeights, rows: _Rows, options: _Options, y: torch.Tensor,
    space: Workspace,
) -> list[Launch]:  # fmt: skip
    """y[r] = the expert's output for every row r, in float32."""
    of = projections(weights)
    size, x_dtype = weights.intermediate_size, x.data.dtype if isinstance(x, ScaledTensor) else x.dtype
    h: Any
    if options.quantise:
        blocks = cdiv(size, BLOCK)
        h = ScaledTensor(
            space.take((rows.rows, size), torch.float8_e4m3fn), space.take((rows.rows, blocks), torch.float32),
            (1, BLOCK),
        )  # fmt: skip
    else:
        h = space.take((rows.rows, size), x_dtype)
    down = pair(target, h, of.down, size)
    average = cdiv(rows.rows, weights.num_experts)
    shape = down.shape(average, weights.hidden_size, weights.num_experts)
    return [
        _gate_up(target, choose, x, of, weights, rows, options, h),
        *group_product(
            target,
            choose(target, shape),
            down,
            of.down_places,
            rows.starts,
            rows.counts,
            weights.num_experts,
            y,
            of.down_bias,
        ),
    ]


def _gate_up(
    target: Target, choose: Choose, x: Any, of: Projections, weights: ExpertWeights, rows: _Rows, options: _Options,
    h: Any,
) -> Launch:  # fmt: skip
    operands = pair(target, x, of.gate_up, weights.hidden_size)
    size, groups = weights.intermediate_size, weights.num_experts
    average = cdiv(rows.rows, groups)
    shape = operands.shape(average, 2 * size, groups, paired=options.quantise)
    tiles = choose(target, shape)
    units = BLOCK if options.quantise else tiles.columns // 2
    most = (cdiv(rows.rows, tiles.rows) + groups) * cdiv(size, units)
    data, scale = (h.data.view(torch.uint8), h.scale) if options.quantise else (h, h)
    bias = of.gate_up_bias
    on_input = rows.starts if options.weights is None else options.weights
    return Launch(
        gate_up_kernel,
        (min(most, target.processors) if rows.rows else 0,),
        {
            **operands.a.arguments("x"),
            "source": rows.starts if rows.source is None else rows.source,
            "topk": options.topk if rows.source is not None else 1,
            **operands.b.arguments("w"),
            "gate_table": of.gate,
            "up_table": of.up,
            "gate_scale_table": of.gate_scale,
            "up_scale_table": of.up_scale,
            "up_first": of.up_first,
            "bias": rows.starts if bias is None else bias.first,
            "gate_bias_table": rows.starts if bias is None else bias.gate,
            "up_bias_table": rows.starts if bias is None else bias.up,
            "bias_step": 1 if bias is None else bias.first.stride(0),
            "weights": on_input,
            "weights_row": 0 if options.weights is None else options.weights.stride(0),
            "weights_column": 0 if options.weights is None else options.weights.stride(1),
            "starts": rows.starts,
            "counts": rows.counts,
            "groups": groups,
            "rows": rows.rows,
            "h": data,
            "h_scale": scale,
            "h_row": data.stride(0),
            "h_scale_row": scale.stride(0),
            "size": size,
            "k": operands.k,
            "alpha": options.alpha,
            "beta": options.beta,
            "limit": options.limit or 0.0,
        },
        {
            **operands.constants(tiles),
            "EVEN": operands.k % operands.step == 0,
            "ALIGNED": of.aligned,
            "SORTED": rows.source is not None,
            "HAS_BIAS": bias is not None,
            "WEIGHTED": options.weights is not None,
            "ACTIVATION": options.activation,
            "HAS_LIMIT": options.limit is not None,
            "QUANTISE": options.quantise,
            "GROUPS": next_power_of_2(groups),
            "ROWS": tiles.rows,
            "UNITS": units,
            "SWAP": tiles.swap,
            "GROUP": tiles.group,
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _combine(
    y: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor | None, shared_y: torch.Tensor, shared: int,
    out: torch.Tensor,
) -> Launch:  # fmt: skip
    rows, width = 4, 1024
    tokens, columns = out.shape
    return Launch(
        combine_kernel,
        (cdiv(tokens, rows), cdiv(columns, width)),
        {
            "y": y,
            "inverse": inverse,
            "weights": inverse if weights is None else weights,
            "shared_y": shared_y,
            "shared": shared,
            "out": out,
            "tokens": tokens,
            "topk": inverse.shape[1],
            "columns": columns,
            "y_row": columns,
            **strides("inverse", inverse),
            "weights_row": 0 if weights is None else weights.stride(0),
            "weights_column": 0 if weights is None else weights.stride(1),
            **strides("out", out),
        },
        {"WEIGHTED": weights is not None, "ROWS": rows, "COLUMNS": width},
    )


def _bytes_of_token(experts: ExpertWeights, shared: ExpertWeights | None, topk: int, x: Any, quantise: bool) -> int:
    """Bytes of intermediate results for one token, without what rounding up to _ALIGNED takes."""
    hidden = experts.hidden_size
    element = 1 if quantise else x.element_size()
    total = topk * 8 + (hidden + 4 * cdiv(hidden, BLOCK) if quantise else 0)
    for weights, rows in ((experts, topk), (shared, shared.num_experts if shared is not None else 0)):
        if weights is not None:
            size = weights.intermediate_size
            total += rows * (4 * hidden + element * size + (4 * cdiv(size, BLOCK) if quantise else 0))
    return total


def tokens_of_chunk(experts: ExpertWeights, shared: ExpertWeights | None, topk: int, x: Any, quantise: bool) -> int:
    return max(_MOST_BYTES // max(_bytes_of_token(experts, shared, topk, x, quantise), 1), 1)


def workspace_bytes(*call: Any) -> int:
    """Of a prepared call, whatever the values of its operands."""
    x, experts, ids, quantize, shared = call[0], call[1], call[2], call[8], call[11]
    quantise = quantize or isinstance(x, ScaledTensor)
    tokens = min(len(ids), tokens_of_chunk(experts, shared, ids.shape[1], x, quantise))
    parts = 12  # at most: see _chunk
    return (
        tokens * _bytes_of_token(experts, shared, ids.shape[1], x, quantise)
        + 16 * experts.num_experts
        + parts * Workspace.ALIGNED
    )
