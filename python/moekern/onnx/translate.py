"""The operators of library.py in ONNX's: functions that torch.onnx.export calls to build their parts of a graph."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moekern.experts import ExpertWeights
from moekern.onnx.experts import Expert, Gating, experts_of
from moekern.onnx.weights import BOOL, FLOAT, INT32, INT64, Stored, Value, Weight, constant
from moekern.op import NotSupported
from moekern.ops.gate import SMALLEST_SUM
from moekern.ops.quantize import SMALLEST_AMAX
from moekern.scaled import BLOCK, MAX, ScaledTensor

BF16, FP8 = 16, {"e4m3fn": 17, "e4m3fnuz": 18, "e5m2": 19}  # ONNX's numbers for types
MOE = ("dense", "sparse")


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """The exporter sets attributes, which a method has no room for."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


class Translation:
    """op: the operators of an opset. own: a value of the program -> its name and tensor, which depend on no input."""

    def __init__(self, op: Any, mode: str, moe: str, own: Callable[[Value], tuple[str, torch.Tensor]]) -> None:
        self.op, self.moe, self.own = op, moe, own
        self.stored = Stored(op, mode)

    def table(self) -> dict[Any, Callable[..., Any]]:
        methods = self.fp8_gemm_nt, self.per_token_cast_to_fp8, self.moe_gate, self.fused_experts
        return {getattr(torch.ops.moekern, method.__name__).default: _function(method) for method in methods}

    # ---- products and casts --------------------------------------------------------------------------

    def fp8_gemm_nt(self, a, sa, block_a, b, sb, block_b, c, bias, out_dtype=None):  # type: ignore[no-untyped-def]
        left = self._float(a) if sa is None else self._dequantized(a, sa, int(a.shape[1]), block_a)
        (name, data), (_, scale) = self.own(b), self.own(sb)
        sums = self._times(left, Weight(name, ScaledTensor(data, scale, tuple(block_b))))
        for term in (bias, c):
            if term is not None:
                sums = self.op.Add(sums, self._float(term))
        return self._as(out_dtype, sums, a, sa)

    def per_token_cast_to_fp8(self, x, format, round_scale_up):  # type: ignore[no-untyped-def]
        return self._cast(self._float(x), int(x.shape[1]), format, round_scale_up)

    def _cast(self, x: Value, k: int, format: str = "e4m3fn", round_scale_up: bool = False) -> tuple[Value, Value]:
        """x [T, k] in 1x128 FP8, and its scales: max(amax, 1e-4) / max, q = rne(clamp(x (1 / scale)))."""
        op, blocks = self.op, -(-k // BLOCK)
        largest = MAX[format]
        wide = op.Reshape(op.Pad(x, self._ints(0, 0, 0, -k % BLOCK)), self._ints(-1, blocks, BLOCK))
        amax = op.Max(op.ReduceMax(op.Abs(wide), self._ints(-1), keepdims=1), self._number(SMALLEST_AMAX))
        scale = op.Div(amax, self._number(largest))
        if round_scale_up:
            # log2 may be off by an ulp where the scale is a power of two: a little less than it rounds up to it
            exponent = op.Ceil(op.Sub(op.Div(op.Log(scale), self._number(math.log(2))), self._number(1e-5)))
            scale = op.Pow(self._number(2.0), exponent)
        scaled = op.Clip(op.Mul(wide, op.Reciprocal(scale)), self._number(-largest), self._number(largest))
        rows = op.Reshape(scaled, self._ints(-1, blocks * BLOCK))
        rows = op.Slice(rows, self._ints(0), self._ints(k), self._ints(1))
        return op.Cast(rows, to=FP8[format]), op.Squeeze(scale, self._ints(2))

    def _dequantized(self, data: Value, scale: Value, k: int, block: Sequence[int] = (1, BLOCK)) -> Value:
        """The values of FP8 activations [T, k]."""
        if block[0] != 1:
            raise NotSupported(f"ONNX has FP8 activations in blocks of one row; these are {tuple(block)}")
        return self.op.DequantizeLinear(data, self._float(scale), axis=1, block_size=min(block[1], k))

    # ---- routing -------------------------------------------------------------------------------------

    def moe_gate(  # type: ignore[no-untyped-def]
        self, logits, topk, scoring, correction_bias, num_expert_group, topk_group, renormalize, factor, mask_value
    ):
        op, experts = self.op, int(logits.shape[1])
        logits = self._float(logits)
        scores = op.Softmax(logits, axis=1) if scoring == "softmax" else op.Sigmoid(logits)
        selection = scores if correction_bias is None else op.Add(scores, self._float(correction_bias))
        if topk_group < num_expert_group:
            members = experts // num_expert_group
            grouped = op.Reshape(selection, self._ints(-1, num_expert_group, members))
            best, _ = op.TopK(grouped, self._ints(1 if correction_bias is None else min(2, members)))
            _, groups = op.TopK(op.ReduceSum(best, self._ints(2), keepdims=0), self._ints(topk_group))
            kept = op.Cast(op.Unsqueeze(self._factors(groups, num_expert_group, None), self._ints(2)), to=BOOL)
            selection = op.Reshape(op.Where(kept, grouped, self._number(mask_value)), self._ints(-1, experts))
        _, ids = op.TopK(selection, self._ints(topk))
        weights = op.GatherElements(scores, ids, axis=1)
        if renormalize:
            total = op.ReduceSum(weights, self._ints(1), keepdims=1)
            weights = op.Div(weights, op.Add(total, self._number(SMALLEST_SUM)))
        return op.Mul(weights, self._number(factor)), op.Cast(ids, to=INT32)

    def _factors(self, ids: Value, count: int, weights: Value | None) -> Value:
        """[T, count]: at e the sum of weights[t, j], or of ones, over the j with ids[t, j] = e."""
        op = self.op
        hits = op.Equal(op.Unsqueeze(op.Cast(ids, to=INT64), self._ints(2)), constant(op, torch.arange(count)))
        terms = self._number(1.0) if weights is None else op.Unsqueeze(weights, self._ints(2))
        return op.ReduceSum(op.Where(hits, terms, self._number(0.0)), self._ints(1), keepdims=0)

    # ---- experts -------------------------------------------------------------------------------------

    def fused_experts(  # type: ignore[no-untyped-def]
        self, x, sx, block_x, experts, layout, shared, shared_layout, ids, weights, expert_map, activation, alpha,
        beta, limit, quantize_activations, apply_router_weight_on_input, reduce, out_dtype=None,
    ):  # fmt: skip
        if apply_router_weight_on_input or not reduce:
            raise NotSupported("ONNX export has fused_experts with its sum, and the router's weights in that")
        op, gating = self.op, Gating(activation, alpha, beta, limit, sx is not None or quantize_activations, x.dtype)
        hidden = int(x.shape[1])
        rows = self._float(x) if sx is None else self._dequantized(x, sx, hidden, block_x)
        if quantize_activations and sx is None:
            rows = self._dequantized(*self._cast(rows, hidden), hidden)
        if expert_map is not None:
            # -1 reads the map's last element, which Where then leaves out
            local = op.Cast(op.Gather(expert_map, op.Cast(ids, to=INT64)), to=INT64)
            minus_one = constant(op, torch.tensor(-1))
            ids = op.Where(op.Less(op.Cast(ids, to=INT64), constant(op, torch.tensor(0))), minus_one, local)
        routed = self._described(experts, layout)
        total = self._routed(rows, routed, gating, self._factors(ids, len(routed), weights), ids)
        for expert in self._described(shared, shared_layout) if shared else ():
            total = op.Add(total, self._expert(rows, expert, gating))
        return self._as(out_dtype, total, x, sx)

    def _described(self, tensors: Sequence[Value], layout: Sequence[int]) -> list[Expert]:
        names, own = zip(*map(self.own, tensors), strict=True)
        return experts_of(ExpertWeights.from_tensors(own, layout), names)

    def _routed(self, rows: Value, experts: list[Expert], gating: Gating, factors: Value, ids: Value) -> Value:
        """dense: each expert for every token, static shapes, experts / topk times the work. sparse: for its own."""
        op = self.op
        total = op.Expand(self._number(0.0), op.Shape(rows))
        for e, expert in enumerate(experts):
            index = constant(op, torch.tensor(e))
            factor = op.Gather(factors, constant(op, torch.tensor([e])), axis=1)  # [T, 1]
            chosen = op.Equal(op.Cast(ids, to=INT64), index)
            chosen = op.ReduceMax(op.Cast(chosen, to=INT32), self._ints(1), keepdims=1)
            if self.moe == "dense":
                y = op.Mul(self._expert(rows, expert, gating), factor)
                # an infinity of an expert that a token does not go to must not reach it
                total = op.Add(total, op.Where(op.Cast(chosen, to=BOOL), y, self._number(0.0)))
            else:
                tokens = op.Transpose(op.NonZero(op.Squeeze(chosen, self._ints(1))), perm=[1, 0])  # [n, 1]
                y = self._expert(op.GatherND(rows, tokens), expert, gating)
                total = op.ScatterND(total, tokens, op.Mul(y, op.GatherND(factor, tokens)), reduction="add")
        return total

    def _expert(self, rows: Value, expert: Expert, gating: Gating) -> Value:
        op = self.op
        g, u = (self._plus(self._times(rows, w), b) for w, b in (expert.gate, expert.up))
        h = gating.apply(op, g, u, self._number)
        if gating.quantise:
            intermediate = expert.down.weight.matrix.shape[1]
            h = self._dequantized(*self._cast(h, intermediate), intermediate)
        elif gating.dtype != FLOAT:
            h = op.Cast(op.Cast(h, to=gating.dtype), to=FLOAT)
        return self._plus(self._times(h, expert.down.weight), expert.down.bias)

    # ---- shorthand -----------------------------------------------------------------------------------

    def _times(self, rows: Value, weight: Weight) -> Value:
        return self.op.MatMul(rows, self.op.Transpose(self.stored.values(weight, after=rows), perm=[1, 0]))

    def _plus(self, x: Value, bias: torch.Tensor | None) -> Value:
        return x if bias is None else self.op.Add(x, constant(self.op, bias.float()))

    def _as(self, dtype: Any, result: Value, a: Value, sa: Value | None) -> Value:
        """In out_dtype, or what it is by default: that of float activations, else bfloat16."""
        return self.op.Cast(result, to=dtype if dtype is not None else BF16 if sa is not None else a.dtype)

    def _float(self, x: Value) -> Value:
        return self.op.Cast(x, to=FLOAT)

    def _ints(self, *x: int) -> Value:
        return constant(self.op, torch.tensor(x, dtype=torch.int64))

    def _number(self, x: float) -> Value:
        return constant(self.op, torch.tensor(x, dtype=torch.float32))
