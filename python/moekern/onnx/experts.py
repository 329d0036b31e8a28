"""fused_experts' operands as a graph needs them: one expert's matrices and biases at a time, and its gating."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from moekern.onnx.weights import Value, Weight

Projection = tuple[Weight, "torch.Tensor | None"]


class Expert(NamedTuple):
    gate: Projection
    up: Projection
    down: Projection


class Stack:
    """The tensors and the layout in which ExpertWeights pass through torch.library (ExpertWeights.from_tensors)."""

    def __init__(self, weight_of: Callable[..., Weight], tensors: Sequence[Value], layout: Sequence[int]) -> None:
        rest, flags = iter(tensors), iter(layout)
        interleaved, b13, b2, parts = (next(flags) for _ in range(4))
        self._interleaved = bool(interleaved)
        self._sources: list[list[Weight]] = []
        for _ in range(parts):
            count, rows, columns, grids = (next(flags) for _ in range(4))
            data, scale = ([next(rest) for _ in range(count)] for _ in range(2))
            found = [weight_of(d, s, (rows, columns), grids) for d, s in zip(data, scale, strict=True)]
            stacked = found[0].data.ndim == 3
            self._sources.append([found[0].expert(e) for e in range(len(found[0].data))] if stacked else found)
        self._biases = [[weight_of(next(rest)).data for _ in range(n)] for n in (b13, b2)]
        self.count = len(self._sources[0])
        self.intermediate = self._sources[-1][0].data.shape[1]

    def __getitem__(self, e: int) -> Expert:
        b13, b2 = (self._bias(biases, e) for biases in self._biases)
        b_gate, b_up = (None, None) if b13 is None else self._halves(b13)
        if len(self._sources) == 3:
            gate, up = self._sources[0][e], self._sources[1][e]
        else:
            gate, up = self._split(self._sources[0][e])
        return Expert((gate, b_gate), (up, b_up), (self._sources[-1][e], b2))

    def _bias(self, biases: list[torch.Tensor], e: int) -> torch.Tensor | None:
        if not biases:
            return None
        return biases[0][e] if biases[0].ndim == 2 else biases[e]

    def _halves(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._interleaved:
            return x[0::2], x[1::2]
        return x[: self.intermediate], x[self.intermediate :]

    def _split(self, w13: Weight) -> tuple[Weight, Weight]:
        """Gate and up of a matrix that has both. Scales of rows that no grid could hold any more get a row each."""
        data = self._halves(w13.data)
        rows, columns = w13.block
        if w13.grids == 2:
            scales, rows_of = tuple(w13.scale.chunk(2, 0)), rows
        elif not self._interleaved and self.intermediate % rows == 0:
            scales, rows_of = self._cut(w13.scale, self.intermediate // rows), rows
        else:
            scales, rows_of = self._halves(w13.scale.repeat_interleave(rows, 0)[: len(w13.data)]), 1
        return tuple(
            Weight(f"{w13.name}.{name}", d, s, (rows_of, columns))
            for name, d, s in zip(("gate", "up"), data, scales, strict=True)
        )  # type: ignore[return-value]

    @staticmethod
    def _cut(x: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:at], x[at:]


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
