"""One expert in a graph: its operands, and what it computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from moekern.experts import ExpertWeights
from moekern.onnx.casts import dequantized, per_token
from moekern.onnx.graph import DTYPES, FLOAT, Graph, Value
from moekern.onnx.weights import Stored, Weight, one, stack
from moekern.scaled import ScaledTensor


class Projection(NamedTuple):
    weight: Weight
    bias: torch.Tensor | None


class Expert(NamedTuple):
    gate: Projection
    up: Projection
    down: Projection


def experts_of(experts: ExpertWeights, names: Sequence[str]) -> list[Expert]:
    """names: of experts.tensors, those of the program."""
    sources = _sources(experts, names)
    found = []
    for e, ((gate, b_gate), (up, b_up), (down, b_down)) in enumerate(experts.projections()):
        if experts.up_first:  # in the same matrix
            size = experts.intermediate_size
            gate, up = _rows(gate, 0, size), _rows(up, experts.up_first, size)
        first, last = sources[0][e], sources[-1][e]
        of_gate, of_up = (f"{first}.gate", f"{first}.up") if len(sources) == 2 else (first, sources[1][e])
        found.append(
            Expert(
                Projection(one(of_gate, gate), b_gate),
                Projection(one(of_up, up), b_up),
                Projection(one(last, down), b_down),
            )
        )
    return found


def _sources(experts: ExpertWeights, names: Sequence[str]) -> list[list[str]]:
    """A name for every expert of each argument; one of a stack has its number behind the stack's name."""
    found, rest = [], list(names)
    for count in experts.layout[4::4]:  # of each argument's matrices, whose scales follow
        own, rest = rest[:count], rest[2 * count :]
        stacked = count < experts.num_experts or experts.tensors[names.index(own[0])].dim() == 3
        found.append([f"{own[0]}.{e}" for e in range(experts.num_experts)] if stacked else own)
    return found


def _rows(x: ScaledTensor, first: int, count: int) -> ScaledTensor:
    """Some rows of a matrix. Where they begin within a block, each gets a row of scales."""
    rows, columns = x.block
    if first % rows == 0 and (count % rows == 0 or first + count == x.shape[0]):
        return ScaledTensor(x.data[first : first + count], x.scale[first // rows :][: -(-count // rows)], x.block)
    scale = x.scale.repeat_interleave(rows, 0)[first : first + count]
    return ScaledTensor(x.data[first : first + count], scale, (1, columns))


def stacked(experts: list[Expert]) -> Expert:
    """All of them as one, whose matrices and biases are stacks."""

    def whole(parts: list[Projection]) -> Projection:
        biases = [part.bias for part in parts if part.bias is not None]
        return Projection(stack([part.weight for part in parts]), torch.stack(biases) if biases else None)

    gate, up, down = (whole(list(parts)) for parts in zip(*experts, strict=True))
    return Expert(gate, up, down)


class Gating(NamedTuple):
    """What is between an expert's products; h is then quantised, or rounded to the activations' type."""

    activation: str
    alpha: float
    beta: float
    limit: float | None
    quantise: bool
    dtype: int  # of the activations, ONNX's number


class Network:
    """y(e, x) of fused_experts."""

    def __init__(self, graph: Graph, stored: Stored, gating: Gating) -> None:
        self.graph, self.stored, self.gating = graph, stored, gating

    def __call__(self, rows: Value, e: Expert, factor: Value | None = None, index: Value | None = None) -> Value:
        """rows [T, H] in the products' type -> [T, H]; index: which one of a stack; factor: of x, [T, 1].

        Of a stack without index: every one, for rows [1, T, H] -> [E, T, H].
        """
        op, gating = self.graph.op, self.gating
        g, u = (self._projected(rows, p, index, factor) for p in (e.gate, e.up))
        h = self._gated(g, u)
        if gating.quantise:
            intermediate = e.down.weight.shape[-1]
            h = dequantized(self.graph, *per_token(self.graph, h, intermediate), intermediate)
        elif gating.dtype != FLOAT == self.stored.type:
            h = op.Cast(op.Cast(h, to=gating.dtype), to=FLOAT)
        return self._projected(h, e.down, index)

    def _projected(self, rows: Value, p: Projection, index: Value | None, factor: Value | None = None) -> Value:
        op = self.graph.op
        y = self.stored.times(rows, p.weight, index)
        y = y if factor is None else op.Mul(y, factor)
        if p.bias is None:
            return y
        bias = p.bias.to(DTYPES[self.stored.type])
        whole = self.graph.constant(bias.unsqueeze(1) if p.weight.stacked else bias)  # [E, 1, N] or [N]
        return op.Add(y, whole if index is None else op.Gather(whole, index, axis=0))

    def _gated(self, gate: Value, up: Value) -> Value:
        """g, u -> (u + beta) g sigmoid(alpha g), or gelu(g) u; both clamped first if there is a limit."""
        op, gating = self.graph.op, self.gating
        if gating.limit is not None:
            gate = op.Min(gate, self._number(gating.limit))
            up = op.Clip(up, self._number(-gating.limit), self._number(gating.limit))
        if gating.activation not in ("swiglu", "silu"):
            return op.Mul(self._gelu(gate), up)
        shifted = op.Add(up, self._number(gating.beta)) if gating.beta else up
        steep = op.Mul(gate, self._number(gating.alpha)) if gating.alpha != 1 else gate
        return op.Mul(shifted, op.Mul(gate, op.Sigmoid(steep)))

    def _gelu(self, x: Value) -> Value:
        """Of its parts: Gelu is an operator from opset 20 on, and few runtimes have it."""
        op, number = self.graph.op, self._number
        if self.gating.activation == "gelu_tanh":
            cubic = op.Add(x, op.Mul(number(0.044715), op.Mul(x, op.Mul(x, x))))
            share = op.Tanh(op.Mul(number(math.sqrt(2 / math.pi)), cubic))
        else:
            share = op.Erf(op.Mul(x, number(math.sqrt(0.5))))
        return op.Mul(op.Mul(x, number(0.5)), op.Add(share, number(1.0)))

    def _number(self, x: float) -> Value:
        return self.graph.number(x, self.stored.type)
