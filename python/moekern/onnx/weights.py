"""How a graph holds FP8 weights: every mode yields their values in float32, to be multiplied by.

mode        initialisers                                              exact
fp8-qdq     the FP8 bytes and their scales; DequantizeLinear          yes
uint8-lut   the same bytes as uint8, and a table of their 256 values  yes
int8-qdq    int8, a scale per 1 x 128; DequantizeLinear               no, 1/254 of a block's largest value
fp16, bf16  dequantised and rounded                                   no, 11 and 8 bits

Scales of a 128 x 128 grid are stored as they are and repeated in the graph, since DequantizeLinear's blocks are one row
high. They also depend on the activations, though not on their values: onnxruntime would otherwise dequantise every
layer's weights before it runs the first, with all of them in memory at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moekern.scaled import BLOCK, ScaledTensor

EXACT = ("fp8-qdq", "uint8-lut")
MODES = (*EXACT, "int8-qdq", "fp16", "bf16")
FLOAT, INT32, INT64, BOOL = 1, 6, 7, 9  # ONNX's numbers for types
Value = Any  # of a graph under construction


class Weight(NamedTuple):
    name: str  # in the file
    matrix: ScaledTensor  # [N, K]


def constant(op: Any, x: torch.Tensor) -> Value:
    from onnx_ir.tensor_adapters import TorchTensor

    return op.Constant(value=TorchTensor(x.detach().contiguous()))


class Stored:
    """The weights of one graph."""

    def __init__(self, op: Any, mode: str) -> None:
        self.op, self.mode = op, mode
        self.matrices: dict[str, ScaledTensor] = {}
        self._named: dict[str, Value] = {}
        self._zeros: dict[Value, Value] = {}

    def values(self, weight: Weight, after: Value) -> Value:
        """Float32 values of a weight [N, K]. `after`: activations that have to be there first."""
        name, matrix = weight
        self.matrices[name] = matrix
        if self.mode in EXACT:
            return self._as_it_is(name, matrix, after)
        exact = matrix.to_float64().float()
        if self.mode == "int8-qdq":
            return self._int8(name, exact, after)
        dtype = torch.float16 if self.mode == "fp16" else torch.bfloat16
        if (worst := exact.abs().max().item()) > torch.finfo(dtype).max:
            raise ValueError(
                f"{name}: a weight of magnitude {worst:.3g} is beyond {self.mode}; bf16 has float32's range"
            )
        return self.op.Cast(self._initialiser(name, exact.to(dtype)), to=FLOAT)

    def _initialiser(self, name: str, x: torch.Tensor) -> Value:
        """One for a name, however often a model uses it."""
        if name not in self._named:
            self._named[name] = constant(self.op, x)
            self._named[name].name = name
        return self._named[name]

    def _as_it_is(self, name: str, matrix: ScaledTensor, after: Value) -> Value:
        op, (rows, k), (block_rows, columns) = self.op, matrix.shape, matrix.block
        scale = self._initialiser(f"{name}_scale_inv", matrix.scale.float())  # ue8m0 would need opset 24
        scale = op.Gather(self._late(scale, after), constant(op, torch.arange(rows) // block_rows), axis=0)
        if self.mode == "fp8-qdq":
            return op.DequantizeLinear(self._initialiser(name, matrix.data), scale, axis=1, block_size=min(columns, k))
        table = torch.arange(256, dtype=torch.uint8).view(matrix.data.dtype).float()
        bytes_ = self._initialiser(name, matrix.data.view(torch.uint8))
        decoded = op.Gather(constant(op, table), op.Cast(bytes_, to=INT32))
        return op.Mul(decoded, op.Gather(scale, constant(op, torch.arange(k) // columns), axis=1))

    def _int8(self, name: str, exact: torch.Tensor, after: Value) -> Value:
        k = exact.shape[1]
        padded = torch.nn.functional.pad(exact, (0, -k % BLOCK)).unflatten(-1, (-1, BLOCK))
        scale = padded.abs().amax(-1) / 127
        steps = padded / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
        data = self._initialiser(name, steps.round().to(torch.int8).flatten(-2)[:, :k])
        late = self._late(self._initialiser(f"{name}_scale_inv", scale), after)
        return self.op.DequantizeLinear(data, late, axis=1, block_size=min(BLOCK, k))

    def _late(self, x: Value, after: Value) -> Value:
        """x + 0, not known before `after` [T, K] is, whatever is in it and however few rows it has."""
        if after not in self._zeros:
            op = self.op
            ends = [constant(op, torch.tensor([i, i])) for i in (0, 1)]
            first = op.ReduceSum(op.Slice(after, *ends, constant(op, torch.tensor([0, 1]))), keepdims=0)
            is_number = op.Cast(op.Equal(first, first), to=FLOAT)
            self._zeros[after] = op.Mul(is_number, constant(op, torch.zeros(())))
        return self.op.Add(x, self._zeros[after])
