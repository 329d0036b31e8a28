"""The grouped products in a graph."""

from __future__ import annotations

import torch

from moekern.onnx.graph import Graph, Value
from moekern.onnx.weights import Stored, Weight


def owned(graph: Graph, rows: Value, starts: Value, counts: Value, g: int) -> Value:
    """[T, 1] bool: the rows of group g; rows is a tensor [T, *]."""
    op, group = graph.op, graph.constant(torch.tensor([g]))
    start = op.Gather(starts, group)
    numbers = graph.counted(rows)
    behind = op.Less(numbers, op.Add(start, op.Gather(counts, group)))
    return op.Unsqueeze(op.And(op.Not(op.Less(numbers, start)), behind), graph.ints(1))


def m_grouped(
    graph: Graph, stored: Stored, rows: Value, weights: list[Weight], starts: Value, counts: Value, dense: bool
) -> Value:
    """D[i] = rows[i] B[g]^T for the rows i of group g, zeros for those of none.

    dense: every group's product for every row, with static shapes; otherwise of its own rows, found by NonZero.
    """
    op, n = graph.op, weights[0].shape[0]
    shape = op.Concat(op.Shape(rows, start=0, end=1), graph.ints(n), axis=0)
    total = op.Expand(graph.number(0.0, stored.type), shape)
    for g, weight in enumerate(weights):
        own = owned(graph, rows, starts, counts, g)
        if dense:
            total = op.Where(own, stored.times(rows, weight), total)
        else:
            tokens = graph.rows_of(own)
            total = op.ScatterND(total, tokens, stored.times(op.GatherND(rows, tokens), weight))
    return total


def k_grouped(graph: Graph, a: Value, b: Value, starts: Value, counts: Value, groups: int) -> Value:
    """D[g] = A[rows of g]^T B[rows of g], [G, N, K] float32: every group takes all rows, those of others as zeros."""
    op, zero = graph.op, graph.number(0.0)
    parts = []
    for g in range(groups):
        own = owned(graph, a, starts, counts, g)
        left = op.Transpose(op.Where(own, a, zero), perm=[1, 0])
        parts.append(op.Unsqueeze(op.MatMul(left, op.Where(own, b, zero)), graph.ints(0)))
    return op.Concat(*parts, axis=0)
