"""The operators between a router and its experts in a graph."""

from __future__ import annotations

import torch

from moekern.onnx.graph import BOOL, FLOAT, FP8, INT32, INT64, Graph, Value
from moekern.ops.gate import SMALLEST_SUM


def gate(
    graph: Graph, logits: Value, experts: int, topk: int, scoring: str, correction_bias: Value | None,
    num_expert_group: int, topk_group: int, renormalize: bool, factor: float, mask_value: float,
) -> tuple[Value, Value]:  # fmt: skip
    """moe_gate of logits [T, experts] float32: weights and ids, [T, topk]."""
    op = graph.op
    scores = op.Softmax(logits, axis=1) if scoring == "softmax" else op.Sigmoid(logits)
    selection = scores if correction_bias is None else op.Add(scores, graph.cast(correction_bias, FLOAT))
    if topk_group < num_expert_group:
        members = experts // num_expert_group
        grouped = op.Reshape(selection, graph.ints(-1, num_expert_group, members))
        best, _ = op.TopK(grouped, graph.ints(1 if correction_bias is None else min(2, members)))
        _, groups = op.TopK(op.ReduceSum(best, graph.ints(2), keepdims=0), graph.ints(topk_group))
        groups = graph.typed(groups, INT64)
        kept = op.Cast(op.Unsqueeze(shares(graph, groups, num_expert_group, None, FLOAT), graph.ints(2)), to=BOOL)
        selection = op.Reshape(op.Where(kept, grouped, graph.number(mask_value)), graph.ints(-1, experts))
    _, ids = op.TopK(selection, graph.ints(topk))  # of equal ones the first
    weights = op.GatherElements(scores, ids, axis=1)
    if renormalize:
        total = op.ReduceSum(weights, graph.ints(1), keepdims=1)
        weights = op.Div(weights, op.Add(total, graph.number(SMALLEST_SUM)))
    return op.Mul(weights, graph.number(factor)), op.Cast(ids, to=INT32)


def shares(graph: Graph, ids: Value, count: int, weights: Value | None, to: int) -> Value:
    """[T, count]: at e the sum of weights[t, j], or of ones, over the j with ids[t, j] = e."""
    op = graph.op
    hits = op.Equal(op.Unsqueeze(ids, graph.ints(2)), graph.numbers(torch.arange(count), ids))
    terms = graph.number(1.0, to) if weights is None else op.Unsqueeze(weights, graph.ints(2))
    return op.ReduceSum(op.Where(hits, terms, graph.number(0.0, to)), graph.ints(1), keepdims=0)


def local_ids(graph: Graph, ids: Value, expert_map: Value | None) -> Value:
    """ids of the experts here; -1 for no expert, or one elsewhere."""
    op = graph.op
    if expert_map is None:
        return ids
    local = op.Gather(expert_map, ids)  # -1 reads the map's last element, which Where leaves out
    none = graph.numbers(torch.tensor(-1), expert_map)
    here = op.Where(op.Less(ids, graph.numbers(torch.tensor(0), ids)), none, local)
    return graph.typed(here, int(expert_map.dtype))


def permute(
    graph: Graph, x: Value, scale: Value | None, ids: Value, topk: int, num_experts: int, alignment: int,
    expert_map: Value | None,
) -> tuple[Value, Value, Value, Value, Value]:  # fmt: skip
    """moe_permute by counting: a slot's row is its expert's first one and the slots before it of that expert."""
    op, one, zero = graph.op, graph.constant(torch.tensor(1)), graph.constant(torch.tensor(0))
    slots = op.Reshape(graph.cast(local_ids(graph, ids, expert_map), INT64), graph.ints(-1, 1))
    chosen = op.Cast(op.Equal(slots, graph.constant(torch.arange(num_experts))), to=INT64)  # [T k, experts]
    up_to = op.CumSum(chosen, zero)
    counts = op.ReduceSum(chosen, graph.ints(0), keepdims=0)
    step = graph.ints(alignment)
    padded = op.Mul(op.Div(op.Add(counts, graph.ints(alignment - 1)), step), step)
    starts = op.Sub(op.CumSum(padded, zero), padded)
    row = op.ReduceSum(op.Mul(chosen, op.Sub(op.Add(starts, up_to), one)), graph.ints(1), keepdims=0)
    kept = op.Cast(op.ReduceSum(chosen, graph.ints(1), keepdims=0), to=BOOL)
    inverse = op.Reshape(op.Where(kept, row, graph.constant(torch.tensor(-1))), op.Shape(ids))
    count = op.Shape(slots, start=0, end=1)
    most = op.Add(count, op.Mul(op.Min(count, graph.ints(num_experts)), graph.ints(alignment - 1)))
    rows = op.Mul(op.Div(most, step), step)  # permuted_rows
    target = op.Unsqueeze(op.Where(kept, row, rows), graph.ints(1))  # dropped slots: one row too many
    token = op.Div(graph.counted(slots), graph.constant(torch.tensor(topk)))

    def moved(data: Value, to: int | None = None) -> Value:
        data = data if to is None else op.Cast(data, to=FLOAT)  # no operator moves FP8, and all of it is in float32
        shape = op.Concat(op.Add(rows, graph.ints(1)), op.Shape(data, start=1, end=2), axis=0)
        zeros = op.Expand(op.CastLike(graph.number(0.0), data), shape)
        scattered = op.ScatterND(zeros, target, op.Gather(data, token))
        result = op.Slice(scattered, graph.ints(0), rows, graph.ints(0))
        return result if to is None else op.Cast(result, to=to)

    is_fp8 = int(x.dtype) in FP8.values()
    scales = graph.constant(torch.zeros(0)) if scale is None else moved(scale)
    return moved(x, int(x.dtype) if is_fp8 else None), scales, starts, counts, op.Cast(inverse, to=INT32)


def unpermute(graph: Graph, y: Value, inverse: Value, weights: Value | None) -> Value:
    """The float32 sums of moe_unpermute."""
    op, zero = graph.op, graph.constant(torch.tensor(0))
    rows = graph.cast(inverse, INT64)
    kept = op.Unsqueeze(op.Not(op.Less(rows, zero)), graph.ints(2))
    terms = op.Gather(graph.cast(y, FLOAT), op.Max(rows, zero))
    if weights is not None:
        terms = op.Mul(terms, op.Unsqueeze(graph.cast(weights, FLOAT), graph.ints(2)))
    return op.ReduceSum(op.Where(kept, terms, graph.number(0.0)), graph.ints(1), keepdims=0)
