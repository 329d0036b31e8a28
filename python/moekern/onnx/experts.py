"""fused_experts' operands as a graph needs them: one expert's matrices and biases at a time, and its gating."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from moekern.experts import ExpertWeights
from moekern.onnx.weights import Value, Weight
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
                Projection(Weight(of_gate, gate), b_gate),
                Projection(Weight(of_up, up), b_up),
                Projection(Weight(last, down), b_down),
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


class Gating(NamedTuple):
    """What is between an expert's products; h is then quantised, or rounded to the activations' type."""

    activation: str
    alpha: float
    beta: float
    limit: float | None
    quantise: bool
    dtype: int  # of the activations, ONNX's number

    def apply(self, op: Any, gate: Value, up: Value, number: Callable[[float], Value]) -> Value:
        """g, u -> (u + beta) g sigmoid(alpha g), or gelu(g) u; both clamped first if there is a limit."""
        if self.limit is not None:
            gate = op.Min(gate, number(self.limit))
            up = op.Clip(up, number(-self.limit), number(self.limit))
        if self.activation in ("swiglu", "silu"):
            return op.Mul(op.Add(up, number(self.beta)), op.Mul(gate, op.Sigmoid(op.Mul(gate, number(self.alpha)))))
        return op.Mul(op.Gelu(gate, approximate="tanh" if self.activation == "gelu_tanh" else "none"), up)
