"""How a graph brings tokens to their experts and adds up what comes back.

dense    every expert for every token: static shapes, no control flow, experts / topk times the work
sparse   every expert for its own tokens, found by NonZero, if it has any
loop     sparse in a Loop over stacked weights: a graph as small for 256 experts as for one
contrib  one node, onnxruntime's com.microsoft MoE, or QMoE in the mode ort-contrib
"""

from __future__ import annotations

import torch

from moekern.onnx.contrib import mixture
from moekern.onnx.experts import Expert, Network, stacked
from moekern.onnx.graph import FLOAT, Graph, Value
from moekern.onnx.routing import shares
from moekern.op import NotSupported

FORMS = ("dense", "sparse", "loop", "contrib")


class Routed:
    """A call's tokens and where they go: rows [T, H] and weights [T, k] in the products' type, integer ids [T, k]."""

    def __init__(
        self, graph: Graph, network: Network, rows: Value, ids: Value, topk: int, weights: Value | None,
        on_input: Value | None = None,
    ) -> None:  # fmt: skip
        """on_input: factors of rows, [T, 1]."""
        self.graph, self.network, self.rows, self.on_input = graph, network, rows, on_input
        self.ids, self.topk, self.weights = ids, topk, weights

    def apply(self, experts: list[Expert], form: str) -> Value:
        """The sum over a token's slots, [T, H]."""
        if form == "contrib":
            if self.on_input is not None:
                raise NotSupported('com.microsoft has router weights behind the experts; moe="sparse" has both')
            share = shares(self.graph, self.ids, len(experts), self.weights, self.network.stored.type)
            return mixture(self.graph, self.network, self.rows, share, self.topk, experts)
        if form == "dense" and self.network.stored.mode == "fp16":
            return self._batched(experts)
        start = self.graph.op.Expand(self.graph.number(0.0), self.graph.op.Shape(self.rows))
        start = self.graph.typed(start, FLOAT)  # sums are float32: onnxruntime scatters no float16 on CPUs
        step = self._all_rows if form == "dense" else self._own_rows
        if form == "loop":
            whole = stacked(experts)
            kind = int(self.ids.dtype)
            total = self.graph.loop(
                len(experts), start, lambda i, total: step(total, self.graph.cast(i, kind), whole, i)
            )
        else:
            total = start
            for e, expert in enumerate(experts):
                total = step(total, self.graph.numbers(torch.tensor(e), self.ids), expert, None)
        return self.graph.cast(self.graph.typed(total, FLOAT), self.network.stored.type)

    def _all_rows(self, total: Value, e: Value, expert: Expert, index: Value | None) -> Value:
        op, chosen, share = self.graph.op, *self._slots(e)
        y = self._summand(self.network(self.rows, expert, self.on_input, index), share)
        # an infinity of an expert that a token does not go to must not reach it
        return op.Add(total, op.Where(chosen, y, self.graph.number(0.0)))

    def _own_rows(self, total: Value, e: Value, expert: Expert, index: Value | None) -> Value:
        graph, op, chosen, share = self.graph, self.graph.op, *self._slots(e)
        tokens = graph.rows_of(chosen)
        count = op.ReduceSum(op.Cast(chosen, to=FLOAT), keepdims=0)

        def computed() -> Value:
            factor = None if self.on_input is None else op.GatherND(self.on_input, tokens)
            y = self.network(op.GatherND(self.rows, tokens), expert, factor, index)
            return self._summand(y, op.GatherND(share, tokens))

        def none() -> Value:  # [0, H], of something that is no constant: those leave their branch
            return op.Cast(op.Slice(self.rows, graph.ints(0), graph.ints(0), graph.ints(0)), to=FLOAT)

        y = graph.either(op.Greater(count, graph.number(0.0)), computed, none, FLOAT)
        return op.ScatterND(total, tokens, y, reduction="add")

    def _summand(self, y: Value, share: Value) -> Value:
        weighted = self.graph.op.Mul(y, share)
        return weighted if self.network.stored.type == FLOAT else self.graph.op.Cast(weighted, to=FLOAT)

    def _slots(self, e: Value) -> tuple[Value, Value]:
        """Of an expert, [T, 1]: whether a token goes to it, and by how much."""
        op, graph = self.graph.op, self.graph
        hit = op.Equal(self.ids, e)
        terms = self._number(1.0) if self.weights is None else self.weights
        share = op.ReduceSum(op.Where(hit, terms, self._number(0.0)), graph.ints(1), keepdims=1)
        count = op.ReduceSum(op.Cast(hit, to=self.network.stored.type), graph.ints(1), keepdims=1)
        return op.Greater(count, self._number(0.0)), share

    def _batched(self, experts: list[Expert]) -> Value:
        """dense where weights need no decoding: one product for all experts."""
        graph, op, count, to = self.graph, self.graph.op, len(experts), self.network.stored.type
        factor = None if self.on_input is None else op.Unsqueeze(self.on_input, graph.ints(0))
        y = self.network(op.Unsqueeze(self.rows, graph.ints(0)), stacked(experts), factor)  # [E, T, H]

        def by_expert(x: Value) -> Value:
            return op.Unsqueeze(op.Transpose(x, perm=[1, 0]), graph.ints(2))  # [T, E] -> [E, T, 1]

        chosen = op.Greater(shares(graph, self.ids, count, None, to), self._number(0.0))
        weighted = op.Mul(y, by_expert(shares(graph, self.ids, count, self.weights, to)))
        return op.ReduceSum(op.Where(by_expert(chosen), weighted, self._number(0.0)), graph.ints(0), keepdims=0)

    def _number(self, x: float) -> Value:
        return self.graph.number(x, self.network.stored.type)
