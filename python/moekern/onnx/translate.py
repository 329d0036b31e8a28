"""The operators of library.py in ONNX's: functions that torch.onnx.export calls to build their parts of a graph."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from moekern.experts import ExpertWeights
from moekern.onnx import casts, grouped, routing
from moekern.onnx.experts import Expert, Gating, Network, experts_of
from moekern.onnx.forms import Routed
from moekern.onnx.graph import BF16, FLOAT, FP8, Graph, Value
from moekern.onnx.program import Program
from moekern.onnx.weights import Stored, Weight, one
from moekern.scaled import BLOCK, ScaledTensor


class Call(NamedTuple):
    """One that was translated: the operator, its arguments by name, of which values of the graph are not known yet."""

    op: str
    arguments: dict[str, Any]
    outputs: tuple[Value, ...]


def values_in(x: Any) -> Iterator[Value]:
    """Of a graph, in arguments."""
    if isinstance(x, (list, tuple, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from values_in(part)
    elif hasattr(x, "producer"):
        yield x


def replaced(x: Any, by: Callable[[Value], Any]) -> Any:
    """Arguments with other things for their values of a graph."""
    if isinstance(x, dict):
        return {key: replaced(part, by) for key, part in x.items()}
    if isinstance(x, (list, tuple)):
        return [replaced(part, by) for part in x]
    return by(x) if hasattr(x, "producer") else x


class Translation:
    """Of one program into one graph. quantise: cast float activations of products to FP8 first."""

    def __init__(self, program: Program, graph: Graph, stored: Stored, moe: str, quantise: bool) -> None:
        self.program, self.graph, self.stored, self.moe, self.quantise = program, graph, stored, moe, quantise
        self.calls: list[Call] = []

    def table(self) -> dict[Any, Callable[..., Any]]:
        methods = (
            self.fp8_gemm_nt,
            self.m_grouped_fp8_gemm_nt_contiguous,
            self.m_grouped_fp8_gemm_nt_masked,
            self.k_grouped_fp8_gemm_tn_contiguous,
            self.per_token_cast_to_fp8,
            self.per_block_cast_to_fp8,
            self.per_channel_cast_to_fp8,
            self.silu_mul_cast_to_fp8,
            self.dequantize,
            self.moe_gate,
            self.moe_permute,
            self.moe_unpermute,
            self.fused_experts,
        )
        return {getattr(torch.ops.moekern, method.__name__).default: self._noted(method) for method in methods}

    def _noted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **options: Any) -> Any:
            results = method(*arguments, **options)
            bound = inspect.signature(method).bind(*arguments, **options)
            bound.apply_defaults()
            outputs = results if isinstance(results, tuple) else (results,)
            known = replaced(dict(bound.arguments), lambda v: v if (own := self.program.tensor(v)) is None else own)
            self.calls.append(Call(method.__name__, known, outputs))
            return results

        return call

    # ---- products ------------------------------------------------------------------------------------

    def fp8_gemm_nt(self, a, sa, block_a, b, sb, block_b, c, bias, out_dtype=None):  # type: ignore[no-untyped-def]
        sums = self.stored.times(self._rows(a, sa, block_a, self.quantise), self._weight(b, sb, block_b))
        for term in (bias, c):
            if term is not None:
                sums = self.graph.op.Add(sums, self._work(term))
        return self._as(out_dtype, sums, a, sa)

    def m_grouped_fp8_gemm_nt_contiguous(  # type: ignore[no-untyped-def]
        self, a, sa, block_a, b, sb, block_b, starts, counts, rows, capacity=None, out_dtype=None
    ):
        weights = self._weights(b, sb, block_b)
        wide = self._rows(a, sa, block_a)
        sums = grouped.m_grouped(self.graph, self.stored, wide, weights, starts, counts, self.moe == "dense")
        return self._as(out_dtype, sums, a, sa)

    def m_grouped_fp8_gemm_nt_masked(  # type: ignore[no-untyped-def]
        self, a, sa, block_a, b, sb, block_b, starts, counts, rows, capacity, out_dtype=None
    ):
        op, (groups, slots, k) = self.graph.op, map(int, a.shape)
        weights = self._weights(b, sb, block_b)

        def flat(x: Value) -> Value:
            return op.Reshape(x, self.graph.ints(groups * slots, int(x.shape[2])))

        if sa is None:
            wide = flat(self._work(a))
        else:
            wide = self._work(casts.dequantized(self.graph, flat(a), flat(sa), k, block_a))
        sums = grouped.m_grouped(self.graph, self.stored, wide, weights, starts, counts, self.moe == "dense")
        return self._as(out_dtype, op.Reshape(sums, self.graph.ints(groups, slots, weights[0].shape[0])), a, sa)

    def k_grouped_fp8_gemm_tn_contiguous(  # type: ignore[no-untyped-def]
        self, a, sa, block_a, b, sb, block_b, starts, counts, rows, c, out_dtype=None
    ):
        graph = self.graph
        left = graph.cast(a, FLOAT) if sa is None else casts.dequantized(graph, a, sa, int(a.shape[1]), block_a)
        right = casts.dequantized(graph, b, sb, int(b.shape[1]), block_b)
        sums = grouped.k_grouped(graph, left, right, starts, counts, int(counts.shape[0]))
        sums = sums if c is None else graph.op.Add(sums, graph.cast(c, FLOAT))
        return sums if out_dtype is None else graph.op.Cast(sums, to=out_dtype)

    # ---- casts ---------------------------------------------------------------------------------------

    def per_token_cast_to_fp8(self, x, format, round_scale_up):  # type: ignore[no-untyped-def]
        return casts.per_token(self.graph, self.graph.cast(x, FLOAT), int(x.shape[1]), format, round_scale_up)

    def per_block_cast_to_fp8(self, x, format, round_scale_up):  # type: ignore[no-untyped-def]
        return casts.per_rows(self.graph, self.graph.cast(x, FLOAT), int(x.shape[1]), True, format, round_scale_up)

    def per_channel_cast_to_fp8(self, x, format, round_scale_up):  # type: ignore[no-untyped-def]
        return casts.per_rows(self.graph, self.graph.cast(x, FLOAT), int(x.shape[1]), False, format, round_scale_up)

    def silu_mul_cast_to_fp8(self, x, format, round_scale_up):  # type: ignore[no-untyped-def]
        intermediate = int(x.shape[1]) // 2
        y = casts.silu_mul(self.graph, self.graph.cast(x, FLOAT), intermediate)
        return casts.per_token(self.graph, y, intermediate, format, round_scale_up)

    def dequantize(self, data, scale, block, out_dtype=None):  # type: ignore[no-untyped-def]
        values = casts.dequantized(self.graph, data, scale, int(data.shape[1]), block)
        return values if out_dtype is None else self.graph.op.Cast(values, to=out_dtype)

    # ---- routing -------------------------------------------------------------------------------------

    def moe_gate(  # type: ignore[no-untyped-def]
        self, logits, topk, scoring, correction_bias, num_expert_group, topk_group, renormalize,
        routed_scaling_factor, mask_value,
    ):  # fmt: skip
        return routing.gate(
            self.graph, self.graph.cast(logits, FLOAT), int(logits.shape[1]), topk, scoring, correction_bias,
            num_expert_group, topk_group, renormalize, routed_scaling_factor, mask_value,
        )  # fmt: skip

    def moe_permute(  # type: ignore[no-untyped-def]
        self, x, scale, block, ids, num_experts, alignment, expert_map, format, round_scale_up
    ):
        if format is not None:
            codes, scale = self.per_token_cast_to_fp8(x, format, round_scale_up)
            x = self.graph.typed(codes, FP8[format])
        return routing.permute(self.graph, x, scale, ids, int(ids.shape[1]), num_experts, alignment, expert_map)

    def moe_unpermute(self, y, inverse, weights, out_dtype=None):  # type: ignore[no-untyped-def]
        sums = routing.unpermute(self.graph, y, inverse, weights)
        return self.graph.op.Cast(sums, to=y.dtype if out_dtype is None else out_dtype)

    # ---- experts -------------------------------------------------------------------------------------

    def fused_experts(  # type: ignore[no-untyped-def]
        self, x, sx, block_x, experts, layout, shared, shared_layout, ids, weights, expert_map, activation, alpha,
        beta, limit, quantize_activations, apply_router_weight_on_input, reduce, out_dtype=None,
    ):  # fmt: skip
        graph, op, topk = self.graph, self.graph.op, int(ids.shape[1])
        quantise = sx is not None or quantize_activations or self.quantise
        network = Network(graph, self.stored, Gating(activation, alpha, beta, limit, quantise, int(x.dtype)))
        rows = self._rows(x, sx, block_x, quantise)
        here = routing.local_ids(graph, ids, expert_map)
        factors = None if weights is None else self._work(weights)
        routed = self._described(experts, layout)
        if reduce and not apply_router_weight_on_input:
            total = Routed(graph, network, rows, here, topk, factors).apply(routed, self.moe)
        else:  # slots, each with a row of its own
            column = graph.ints(-1, 1)
            slot_ids = graph.typed(op.Reshape(here, column), int(here.dtype))
            token = op.Div(graph.counted(slot_ids), graph.constant(torch.tensor(topk)))
            on_input = op.Reshape(factors, column) if factors is not None and apply_router_weight_on_input else None
            slots = Routed(graph, network, op.Gather(rows, token), slot_ids, 1, None, on_input)
            total = slots.apply(routed, self.moe)
            if reduce:
                total = op.ReduceSum(
                    op.Reshape(total, graph.ints(-1, topk, int(x.shape[1]))), graph.ints(1), keepdims=0
                )
        for expert in self._described(shared, shared_layout) if shared else ():
            total = op.Add(total, network(rows, expert))
        return self._as(out_dtype, total, x, sx)

    def _described(self, tensors: Sequence[Value], layout: Sequence[int]) -> list[Expert]:
        names, own = zip(*map(self.program.own, tensors), strict=True)
        return experts_of(ExpertWeights.from_tensors(own, layout), names)

    # ---- operands ------------------------------------------------------------------------------------

    def _rows(self, a: Value, sa: Value | None, block: Sequence[int], quantise: bool = False) -> Value:
        """Activations [T, K] in the products' type: float ones, or the values of FP8 ones."""
        if sa is None and not quantise:
            return self._work(a)
        k = int(a.shape[1])
        pair = (a, sa) if sa is not None else casts.per_token(self.graph, self.graph.cast(a, FLOAT), k)
        values = casts.dequantized(self.graph, *pair, k, block if sa is not None else (1, BLOCK))
        return values if self.stored.type == FLOAT else self.graph.op.Cast(values, to=self.stored.type)

    def _weight(self, data: Value, scale: Value, block: Sequence[int]) -> Weight:
        (name, matrix), (_, of_matrix) = self.program.own(data), self.program.own(scale)
        return one(name, ScaledTensor(matrix, of_matrix, (block[0], block[1])))

    def _weights(self, data: list[Value], scale: list[Value], block: Sequence[int]) -> list[Weight]:
        """Of every group: a list, or a stack, whose parts have their number behind its name."""
        found = [self._weight(*pair, block) for pair in zip(data, scale, strict=True)]
        whole = found[0].matrices[0]
        if whole.data.dim() == 2:
            return found
        parts = (ScaledTensor(whole.data[g], whole.scale[g], whole.block) for g in range(len(whole.data)))
        return [one(f"{found[0].name}.{g}", part) for g, part in enumerate(parts)]

    def _work(self, x: Value) -> Value:
        return self.graph.cast(x, self.stored.type)

    def _as(self, dtype: int | None, result: Value, a: Value, sa: Value | None) -> Value:
        """In out_dtype, or what it is by default: that of float activations, else bfloat16."""
        to = dtype if dtype is not None else BF16 if sa is not None else int(a.dtype)
        return result if to == self.stored.type else self.graph.op.Cast(result, to=to)
