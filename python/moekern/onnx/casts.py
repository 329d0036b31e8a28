"""The casts to FP8 and back in a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from moekern.onnx.graph import BLOCKS_SINCE, FLOAT, FP8, Graph, Value
from moekern.op import NotSupported
from moekern.ops.quantize import SMALLEST_AMAX
from moekern.scaled import BLOCK, MAX


def per_token(
    graph: Graph, x: Value, k: int, format: str = "e4m3fn", round_scale_up: bool = False
) -> tuple[Value, Value]:
    """x [T, k] float32 -> 1 x 128 FP8 [T, k], scales [T, k / 128]: max(amax, 1e-4) / max, q = rne(clamp(x (1 / s)))."""
    op, blocks = graph.op, -(-k // BLOCK)
    wide = op.Reshape(op.Pad(x, graph.ints(0, 0, 0, -k % BLOCK)), graph.ints(-1, blocks, BLOCK))
    q, scale = _quantised(graph, wide, (2,), format, round_scale_up)
    rows = op.Reshape(q, graph.ints(-1, blocks * BLOCK))
    rows = op.Slice(rows, graph.ints(0), graph.ints(k), graph.ints(1))
    return op.Cast(rows, to=FP8[format]), op.Squeeze(scale, graph.ints(2))


def per_rows(
    graph: Graph, x: Value, k: int, whole: bool, format: str = "e4m3fn", round_scale_up: bool = False
) -> tuple[Value, Value]:
    """The same for blocks of 128 rows and one column, or, whole, of 128 x 128. T need not be known."""
    op, width = graph.op, BLOCK if whole else 1
    rows = op.Shape(x, start=0, end=1)
    up = op.Mod(op.Neg(rows), graph.ints(BLOCK))  # of the divisor's sign
    zeros = graph.ints(0)
    padded = op.Pad(x, op.Concat(zeros, zeros, up, graph.ints(-k % width), axis=0))
    wide = op.Reshape(padded, graph.ints(-1, BLOCK, -(-k // width), width))
    q, scale = _quantised(graph, wide, (1, 3), format, round_scale_up)
    flat = op.Reshape(q, graph.ints(-1, -(-k // width) * width))
    flat = op.Slice(flat, graph.ints(0, 0), op.Concat(rows, graph.ints(k), axis=0), graph.ints(0, 1))
    return op.Cast(flat, to=FP8[format]), op.Squeeze(scale, graph.ints(1, 3))


def _quantised(graph: Graph, x: Value, axes: Sequence[int], format: str, round_scale_up: bool) -> tuple[Value, Value]:
    _check_opset(graph)
    op, largest = graph.op, MAX[format]
    amax = op.Max(op.ReduceMax(op.Abs(x), graph.ints(*axes), keepdims=1), graph.number(SMALLEST_AMAX))
    scale = op.Div(amax, graph.number(largest))
    if round_scale_up:
        # log2 may be off by an ulp where the scale is a power of two: a little less than it rounds up to it
        exponent = op.Ceil(op.Sub(op.Div(op.Log(scale), graph.number(math.log(2))), graph.number(1e-5)))
        scale = op.Pow(graph.number(2.0), exponent)
    return op.Clip(op.Mul(x, op.Reciprocal(scale)), graph.number(-largest), graph.number(largest)), scale


def dequantized(graph: Graph, data: Value, scale: Value, k: int, block: Sequence[int] = (1, BLOCK)) -> Value:
    """FP8 activations [T, k] in float32."""
    _check_opset(graph)
    op, (rows, columns) = graph.op, block
    scale = graph.cast(scale, FLOAT)
    if rows == 1:
        return op.DequantizeLinear(data, scale, axis=1, block_size=min(columns, k))
    spread = op.Gather(scale, op.Div(graph.counted(data), graph.ints(rows)), axis=0)
    spread = op.Gather(spread, graph.constant(torch.arange(k) // columns), axis=1)
    return op.Mul(op.Cast(data, to=FLOAT), spread)


def _check_opset(graph: Graph) -> None:
    if graph.opset < BLOCKS_SINCE:
        raise NotSupported(f"ONNX export has FP8 activations from opset {BLOCKS_SINCE} on, not {graph.opset}")


def silu_mul(graph: Graph, x: Value, intermediate: int) -> Value:
    """x [T, 2 I], gate before up -> silu(gate) up [T, I]."""
    op, axis = graph.op, graph.ints(1)
    gate = op.Slice(x, graph.ints(0), graph.ints(intermediate), axis)
    up = op.Slice(x, graph.ints(intermediate), graph.ints(2 * intermediate), axis)
    return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)
